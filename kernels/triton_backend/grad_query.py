"""The backward's first half: Σ dO ∘ O per query, and the queries' gradients, one program a query tile."""

import triton
import triton.language as tl

from .rows import LOG2_E, entries_of, listed_rows, load_rows, load_tokens, query_tokens, store_tokens, weigh_rows


@triton.jit
def dot_rows(
    OUT, GRAD, DELTA, heads, queries, o_b, o_h, o_n, g_b, g_h, g_n,
    TILE: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """DELTA[b, h, n] = Σ over dims of OUT · GRAD, in float32."""
    number = tl.program_id(1).to(tl.int64)
    batch, head = number // heads, number % heads
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tokens = tl.where(place < queries, place, -1)
    dims = tl.arange(0, WIDE)
    out = load_tokens(OUT + batch * o_b + head * o_h, tokens, o_n, dims, D, tl.float32)
    grad = load_tokens(GRAD + batch * g_b + head * g_h, tokens, g_n, dims, D, tl.float32)
    tl.store(DELTA + number * queries + place, tl.sum(out * grad, 1), mask=place < queries)


@triton.jit
def load_sums(LSE, DELTA, number, queries, tokens):
    """log2 of the queries' softmax sums, +inf where nothing is read, which makes every share 0; and their DELTA."""
    place = number * queries + tokens
    lse = tl.load(LSE + place, mask=tokens >= 0, other=float("-inf"))
    delta = tl.load(DELTA + place, mask=tokens >= 0, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E), delta


@triton.jit
def _step(
    query, grad, powers, delta, total, begin, end, entries, masks, masked,
    K, V, PK, PV, KEY_ROWS, LOG_WEIGHT, scale_log2, level_rows, k_n, v_n, pk_n, pv_n, dims,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr,
    POOLED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, read = listed_rows(begin, end, entries, masks, masked, ROWS, BLOCK, WORDS, MASKED)  # pyright: ignore[reportGeneralTypeIssues]
    weight, token, live = weigh_rows(row, read, KEY_ROWS, LOG_WEIGHT, level_rows, POOLED, MASKED)  # pyright: ignore[reportGeneralTypeIssues]
    key = load_rows(row, token, live, K, k_n, PK, pk_n, level_rows, dims, D, POOLED, COMPUTE)
    value = load_rows(row, token, live, V, v_n, PV, pv_n, level_rows, dims, D, POOLED, COMPUTE)
    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2 + weight[None, :]
    change = tl.dot(grad, tl.trans(value), input_precision=PRECISION) - delta[:, None]
    change = tl.exp2(logits - powers[:, None]) * change
    return tl.dot(change.to(COMPUTE), key, total, input_precision=PRECISION)


@triton.jit
def grad_query_tile(
    Q, K, V, PK, PV, KEY_ROWS, LOG_WEIGHT, QUERY_ROWS,
    ORDER, START, COUNT, POOL, EVERY, MASKED_COUNT, MASK_START, ROW_MASKS, GRAD, LSE, DELTA, GRAD_QUERY,
    scale_log2, scale, heads, tiles, queries, level_rows, level_blocks,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, pk_b, pk_h, pk_n, pv_b, pv_h, pv_n, g_b, g_h, g_n,
    list_b, list_h, query_rows_h, key_rows_h, weight_b, weight_h,
    TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    LIST_TILE: tl.constexpr, PARTS: tl.constexpr, WORDS: tl.constexpr, POOLED: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    item = tl.load(ORDER + program // PARTS)
    tile, head, batch = item % tiles, (item // tiles % heads).to(tl.int64), (item // tiles // heads).to(tl.int64)
    number = batch * heads + head
    dims = tl.arange(0, WIDE)
    tokens = query_tokens(QUERY_ROWS, head * query_rows_h + tile, LIST_TILE, PARTS, TILE, program % PARTS)
    query = load_tokens(Q + batch * q_b + head * q_h, tokens, q_n, dims, D, COMPUTE)
    grad = load_tokens(GRAD + batch * g_b + head * g_h, tokens, g_n, dims, D, COMPUTE)
    powers, delta = load_sums(LSE, DELTA, number, queries, tokens)

    place = batch * list_b + head * list_h + tile
    entries, count = entries_of(POOL, EVERY, START, COUNT, place, level_blocks)
    masked = tl.load(MASKED_COUNT + place)
    masks = ROW_MASKS + tl.load(MASK_START + place) * WORDS
    K += batch * k_b + head * k_h
    V += batch * v_b + head * v_h
    PK += batch * pk_b + head * pk_h
    PV += batch * pv_b + head * pv_h
    KEY_ROWS += head * key_rows_h
    LOG_WEIGHT += batch * weight_b + head * weight_h

    total = tl.zeros([TILE, WIDE], tl.float32)
    end = count * BLOCK
    first = end - (end - masked * BLOCK) // ROWS * ROWS
    for begin in tl.range(0, first, ROWS):
        total = _step(
            query, grad, powers, delta, total, begin, first, entries, masks, masked,
            K, V, PK, PV, KEY_ROWS, LOG_WEIGHT, scale_log2, level_rows, k_n, v_n, pk_n, pv_n, dims,
            ROWS, BLOCK, D, WORDS, True, POOLED, COMPUTE, PRECISION,
        )  # fmt: skip
    for begin in tl.range(first, end, ROWS):
        total = _step(
            query, grad, powers, delta, total, begin, end, entries, masks, masked,
            K, V, PK, PV, KEY_ROWS, LOG_WEIGHT, scale_log2, level_rows, k_n, v_n, pk_n, pv_n, dims,
            ROWS, BLOCK, D, WORDS, False, POOLED, COMPUTE, PRECISION,
        )  # fmt: skip
    store_tokens(GRAD_QUERY + number * queries * D, total * scale, tokens, D, dims, D)
