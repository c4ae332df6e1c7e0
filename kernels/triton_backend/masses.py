"""Exact softmax masses: one program a query tile streams over level 0 and stores one sum a block."""

import triton
import triton.language as tl

from .rows import LOG2_E, load_rows, load_tokens, query_tokens, weigh_rows


@triton.jit
def mass_tile(
    Q, K, KEY_ROWS, LOG_WEIGHT, QUERY_ROWS, LSE, MASS,
    scale_log2, heads, tiles, queries, level_rows, level_blocks,
    q_b, q_h, q_n, k_b, k_h, k_n, query_rows_h, key_rows_h, weight_b, weight_h,
    TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr,
    WIDE: tl.constexpr, LIST_TILE: tl.constexpr, PARTS: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PADDED: the block rounded up to a power of two; a step holds ROWS ÷ PADDED blocks, at least one.

    A tile of more than TILE queries takes PARTS passes over the keys, each of which adds to the sums of the last.
    """
    item = tl.program_id(0)
    tile, head, batch = item % tiles, (item // tiles % heads).to(tl.int64), (item // tiles // heads).to(tl.int64)
    number = batch * heads + head
    dims = tl.arange(0, WIDE)
    Q += batch * q_b + head * q_h
    K += batch * k_b + head * k_h
    KEY_ROWS += head * key_rows_h
    LOG_WEIGHT += batch * weight_b + head * weight_h
    MASS += item.to(tl.int64) * level_blocks
    GROUP: tl.constexpr = ROWS // PADDED
    place = tl.arange(0, ROWS)
    for part in range(0, PARTS):
        tokens = query_tokens(QUERY_ROWS, head * query_rows_h + tile, LIST_TILE, PARTS, TILE, part)
        query = load_tokens(Q, tokens, q_n, dims, D, COMPUTE)
        lse = tl.load(LSE + number * queries + tokens, mask=tokens >= 0, other=float("-inf"))
        powers = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
        for begin in tl.range(0, level_blocks, GROUP):
            row = (begin + place // PADDED) * BLOCK + place % PADDED
            read = row < level_rows
            if PADDED != BLOCK:
                read = read & (place % PADDED < BLOCK)
            row = tl.where(read, row, 0)
            weight, token, live = weigh_rows(row, read, KEY_ROWS, LOG_WEIGHT, level_rows, False, True)
            key = load_rows(row, token, live, K, k_n, K, k_n, level_rows, dims, D, False, COMPUTE)
            logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2 + weight[None, :]
            summed = tl.sum(tl.exp2(logits - powers[:, None]), 0)
            masses = tl.sum(tl.reshape(summed, [GROUP, PADDED]), 1)
            target = begin + tl.arange(0, GROUP)
            if PARTS > 1:
                masses += tl.load(MASS + target, mask=(target < level_blocks) & (part > 0), other=0.0)
            tl.store(MASS + target, masses, mask=target < level_blocks)
        if PARTS > 1:
            # The next part adds to what other threads of this program stored.
            tl.debug_barrier()
