"""The forward kernel: one program a query tile, online softmax over the rows of its blocks."""

import triton
import triton.language as tl

from .rows import entries_of, listed_rows, load_rows, load_tokens, query_tokens, store_tokens, weigh_rows


@triton.jit
def _step(
    query, total, sums, peak, begin, end, entries, masks, masked,
    K, V, PK, PV, KEY_ROWS, LOG_WEIGHT, scale_log2, level_rows, k_n, v_n, pk_n, pv_n, dims,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr,
    POOLED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, read = listed_rows(begin, end, entries, masks, masked, ROWS, BLOCK, WORDS, MASKED)  # pyright: ignore[reportGeneralTypeIssues]
    weight, token, live = weigh_rows(row, read, KEY_ROWS, LOG_WEIGHT, level_rows, POOLED, MASKED)  # pyright: ignore[reportGeneralTypeIssues]
    key = load_rows(row, token, live, K, k_n, PK, pk_n, level_rows, dims, D, POOLED, COMPUTE)
    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2 + weight[None, :]
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    # Where nothing has been read yet, the shift is 0, not -inf - -inf.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    shares = tl.exp2(logits - shift[:, None])
    shrink = tl.exp2(peak - shift)
    sums = sums * shrink + tl.sum(shares, 1)
    value = load_rows(row, token, live, V, v_n, PV, pv_n, level_rows, dims, D, POOLED, COMPUTE)
    total = tl.dot(shares.to(COMPUTE), value, total * shrink[:, None], input_precision=PRECISION)
    return total, sums, new_peak


@triton.jit
def attend_tile(
    Q, K, V, PK, PV, KEY_ROWS, LOG_WEIGHT, QUERY_ROWS,
    ORDER, START, COUNT, POOL, EVERY, MASKED_COUNT, MASK_START, ROW_MASKS, OUT, LSE,
    scale_log2, heads, tiles, queries, level_rows, level_blocks,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, pk_b, pk_h, pk_n, pv_b, pv_h, pv_n,
    list_b, list_h, query_rows_h, key_rows_h, weight_b, weight_h,
    TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    LIST_TILE: tl.constexpr, PARTS: tl.constexpr, WORDS: tl.constexpr, POOLED: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    item = tl.load(ORDER + program // PARTS)
    tile, head, batch = item % tiles, (item // tiles % heads).to(tl.int64), (item // tiles // heads).to(tl.int64)
    dims = tl.arange(0, WIDE)
    tokens = query_tokens(QUERY_ROWS, head * query_rows_h + tile, LIST_TILE, PARTS, TILE, program % PARTS)
    query = load_tokens(Q + batch * q_b + head * q_h, tokens, q_n, dims, D, COMPUTE)

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
    sums = tl.zeros([TILE], tl.float32)
    peak = tl.full([TILE], float("-inf"), tl.float32)
    # First what carries row masks, together with what would leave the last step short; then whole steps, free of masks.
    end = count * BLOCK
    first = end - (end - masked * BLOCK) // ROWS * ROWS
    for begin in tl.range(0, first, ROWS):
        total, sums, peak = _step(
            query, total, sums, peak, begin, first, entries, masks, masked,
            K, V, PK, PV, KEY_ROWS, LOG_WEIGHT, scale_log2, level_rows, k_n, v_n, pk_n, pv_n, dims,
            ROWS, BLOCK, D, WORDS, True, POOLED, COMPUTE, PRECISION,
        )  # fmt: skip
    for begin in tl.range(first, end, ROWS):
        total, sums, peak = _step(
            query, total, sums, peak, begin, end, entries, masks, masked,
            K, V, PK, PV, KEY_ROWS, LOG_WEIGHT, scale_log2, level_rows, k_n, v_n, pk_n, pv_n, dims,
            ROWS, BLOCK, D, WORDS, False, POOLED, COMPUTE, PRECISION,
        )  # fmt: skip

    some = sums > 0
    total = total / tl.where(some, sums, 1.0)[:, None]
    lse = tl.where(some, (peak + tl.log2(tl.where(some, sums, 1.0))) * 0.6931471805599453, float("-inf"))
    number = batch * heads + head
    store_tokens(OUT + number * queries * D, total, tokens, D, dims, D)
    tl.store(LSE + number * queries + tokens, lse, mask=tokens >= 0)
