"""The backward's second half: gradients of key and value rows, one program a block of them, over the transposed list.

Each row is written by one program, and each token sums its rows in order: the same input gives the same bits.
"""

import triton
import triton.language as tl

from .grad_query import load_sums
from .rows import load_rows, load_tokens, store_tokens, weigh_rows


@triton.jit
def _step(
    key, value, weight, grad_key, grad_value, begin, end, entries, slots, within_block,
    Q, GRAD, LSE, DELTA, QUERY_ROWS, ROW_MASKS, number, first_tile, queries, scale_log2, q_n, g_n, dims,
    TILE: tl.constexpr, LIST_TILE: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr,
    UPRIGHT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """TILE queries of the tiles that read these rows: several tiles a step, or a part of one."""
    if LIST_TILE % TILE == 0:
        entry = begin // LIST_TILE
        place = begin % LIST_TILE + tl.arange(0, TILE)
        tile = tl.load(entries + entry)
        tokens = tl.load(QUERY_ROWS + (first_tile + tile) * LIST_TILE + place)
        if MASKED:
            slot = tl.load(slots + entry)
            word = tl.load(
                ROW_MASKS + slot.to(tl.int64) * WORDS + within_block // 32,
                mask=(slot >= 0) & (within_block >= 0),
                other=-1,
            )
            weight = tl.where(((word >> (within_block % 32)) & 1) != 0, weight, float("-inf"))
    else:
        place = begin + tl.arange(0, TILE)
        inside = place < end
        tile = tl.load(entries + place // LIST_TILE, mask=inside, other=0)
        tokens = tl.load(QUERY_ROWS + (first_tile + tile) * LIST_TILE + place % LIST_TILE, mask=inside, other=-1)
    query = load_tokens(Q, tokens, q_n, dims, D, COMPUTE)
    grad = load_tokens(GRAD, tokens, g_n, dims, D, COMPUTE)
    powers, delta = load_sums(LSE, DELTA, number, queries, tokens)

    # Either way round, the side that MMAs want wide is the wide one.
    if UPRIGHT:
        logits = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale_log2 + weight[:, None]
    else:
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2 + weight[None, :]
    if MASKED and LIST_TILE % TILE != 0:
        slot = tl.load(slots + place // LIST_TILE, mask=inside, other=-1).to(tl.int64)
        if UPRIGHT:
            words = ROW_MASKS + slot[None, :] * WORDS + (within_block // 32)[:, None]
            bits = (
                tl.load(words, mask=(slot >= 0)[None, :] & (within_block >= 0)[:, None], other=-1)
                >> (within_block % 32)[:, None]
            )
        else:
            words = ROW_MASKS + slot[:, None] * WORDS + (within_block // 32)[None, :]
            bits = (
                tl.load(words, mask=(slot >= 0)[:, None] & (within_block >= 0)[None, :], other=-1)
                >> (within_block % 32)[None, :]
            )
        logits = tl.where((bits & 1) != 0, logits, float("-inf"))
    if UPRIGHT:
        shares = tl.exp2(logits - powers[None, :])
        grad_value = tl.dot(shares.to(COMPUTE), grad, grad_value, input_precision=PRECISION)
        change = tl.dot(value, tl.trans(grad), input_precision=PRECISION) - delta[None, :]
        grad_key = tl.dot((shares * change).to(COMPUTE), query, grad_key, input_precision=PRECISION)
    else:
        shares = tl.exp2(logits - powers[:, None])
        grad_value = tl.dot(tl.trans(grad), shares.to(COMPUTE), grad_value, input_precision=PRECISION)
        change = tl.dot(grad, tl.trans(value), input_precision=PRECISION) - delta[:, None]
        grad_key = tl.dot(tl.trans(query), (shares * change).to(COMPUTE), grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit
def grad_rows_block(
    Q, K, V, PK, PV, KEY_ROWS, LOG_WEIGHT, QUERY_ROWS,
    ORDER, START, COUNT, POOL, SLOTS, ALL_START, ALL_COUNT, ALL_POOL, ROW_MASKS, GRAD, LSE, DELTA,
    ROW_GRAD_K, ROW_GRAD_V, GRAD_PK, GRAD_PV,
    scale_log2, scale, heads, blocks, tiles, queries, level_rows, pooled_rows,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, pk_b, pk_h, pk_n, pv_b, pv_h, pv_n, g_b, g_h, g_n,
    list_b, list_h, all_b, all_h, query_rows_h, key_rows_h, weight_b, weight_h,
    TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    LIST_TILE: tl.constexpr, PARTS: tl.constexpr, WORDS: tl.constexpr, LISTED: tl.constexpr, MASKED: tl.constexpr,
    EVERY: tl.constexpr, POOLED: tl.constexpr, UPRIGHT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    item = tl.load(ORDER + program // PARTS)
    block, head, batch = item % blocks, (item // blocks % heads).to(tl.int64), (item // blocks // heads).to(tl.int64)
    number = batch * heads + head
    dims = tl.arange(0, WIDE)
    place = program % PARTS * ROWS + tl.arange(0, ROWS)
    held = place < BLOCK
    row = block * BLOCK + tl.where(held, place, 0)
    weight, token, live = weigh_rows(  # pyright: ignore[reportGeneralTypeIssues]
        row,
        held,
        KEY_ROWS + head * key_rows_h,
        LOG_WEIGHT + batch * weight_b + head * weight_h,
        level_rows,
        POOLED,
        True,
    )
    key = load_rows(
        row, token, live, K + batch * k_b + head * k_h, k_n, PK + batch * pk_b + head * pk_h, pk_n,
        level_rows, dims, D, POOLED, COMPUTE,
    )  # fmt: skip
    value = load_rows(
        row, token, live, V + batch * v_b + head * v_h, v_n, PV + batch * pv_b + head * pv_h, pv_n,
        level_rows, dims, D, POOLED, COMPUTE,
    )  # fmt: skip
    Q += batch * q_b + head * q_h
    GRAD += batch * g_b + head * g_h
    first_tile = head * query_rows_h
    within = tl.where(held, place, -1)

    if UPRIGHT:
        grad_key = tl.zeros([ROWS, WIDE], tl.float32)
        grad_value = tl.zeros([ROWS, WIDE], tl.float32)
    else:
        grad_key = tl.zeros([WIDE, ROWS], tl.float32)
        grad_value = tl.zeros([WIDE, ROWS], tl.float32)
    if LISTED:
        listed = batch * list_b + head * list_h + block
        start = tl.load(START + listed)
        end = tl.load(COUNT + listed) * LIST_TILE
        for begin in tl.range(0, end, TILE):
            grad_key, grad_value = _step(
                key, value, weight, grad_key, grad_value, begin, end, POOL + start, SLOTS + start, within,
                Q, GRAD, LSE, DELTA, QUERY_ROWS, ROW_MASKS, number, first_tile, queries, scale_log2, q_n, g_n, dims,
                TILE, LIST_TILE, D, WORDS, MASKED, UPRIGHT, COMPUTE, PRECISION,
            )  # fmt: skip
    if EVERY:
        whole = batch * all_b + head * all_h
        start = tl.load(ALL_START + whole)
        end = tl.where(block * BLOCK < level_rows, tl.load(ALL_COUNT + whole), 0) * LIST_TILE
        for begin in tl.range(0, end, TILE):
            grad_key, grad_value = _step(
                key, value, weight, grad_key, grad_value, begin, end, ALL_POOL + start, SLOTS, within,
                Q, GRAD, LSE, DELTA, QUERY_ROWS, ROW_MASKS, number, first_tile, queries, scale_log2, q_n, g_n, dims,
                TILE, LIST_TILE, D, WORDS, False, UPRIGHT, COMPUTE, PRECISION,
            )  # fmt: skip

    if not UPRIGHT:
        grad_key = tl.trans(grad_key)
        grad_value = tl.trans(grad_value)
    grad_key = tl.where(live[:, None], grad_key * scale, 0.0)
    grad_value = tl.where(live[:, None], grad_value, 0.0)
    target = tl.where(held, row, -1)
    key_base = ROW_GRAD_K + number * level_rows * D
    value_base = ROW_GRAD_V + number * level_rows * D
    # One is known to the compiler, the other is not.
    if POOLED:  # noqa: SIM102
        if block * BLOCK >= level_rows:
            key_base = GRAD_PK + number * pooled_rows * D
            value_base = GRAD_PV + number * pooled_rows * D
            target = tl.where(held, row - level_rows, -1)
    store_tokens(key_base, grad_key, target, D, dims, D)
    store_tokens(value_base, grad_value, target, D, dims, D)


@triton.jit
def sum_rows(
    ROW_GRAD, SORTED, FIRST, GRAD, heads, tokens, level_rows, map_h, first_h,
    TILE: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """GRAD[b, h, n] = the sum of ROW_GRAD over the rows that hold token n, in the rows' order.

    SORTED: rows by the token they hold. FIRST[n]: where token n's rows begin in it, FIRST[n + 1] where they end.
    """
    number = tl.program_id(1).to(tl.int64)
    head = number % heads
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = token < tokens
    dims = tl.arange(0, WIDE)
    begin = tl.load(FIRST + head * first_h + token, mask=inside, other=0)
    end = tl.load(FIRST + head * first_h + token + 1, mask=inside, other=0)
    total = tl.zeros([TILE, WIDE], tl.float32)
    for rank in range(0, tl.max(end - begin, 0)):
        row = tl.load(SORTED + head * map_h + begin + rank, mask=begin + rank < end, other=-1).to(tl.int32)
        total += load_tokens(ROW_GRAD + number * level_rows * D, row, D, dims, D, tl.float32)
    store_tokens(GRAD + number * tokens * D, total, tl.where(inside, token, -1), D, dims, D)
