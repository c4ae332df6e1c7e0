"""What the kernels share: which tokens a tile of queries or a step of key rows holds, and loading them."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def query_tokens(QUERY_ROWS, slot, LIST_TILE: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, part):
    """Tokens of one part of a query tile, -1 = padding. slot: the tile's number over the heads of the row map."""
    place = part * TILE + tl.arange(0, TILE)
    rows = QUERY_ROWS + slot.to(tl.int64) * LIST_TILE + place
    if PARTS * TILE == LIST_TILE:
        return tl.load(rows)
    return tl.load(rows, mask=place < LIST_TILE, other=-1)


@triton.jit
def load_tokens(base, tokens, stride, dims, D: tl.constexpr, COMPUTE: tl.constexpr):
    """Vectors [rows, D padded] of tokens, zeros where padding. Offsets are 64-bit: N · stride may pass 2³¹."""
    pointers = base + tokens.to(tl.int64)[:, None] * stride + dims[None, :]
    mask = (tokens >= 0)[:, None]
    if dims.shape[0] != D:
        mask = mask & (dims < D)[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def store_tokens(base, values, tokens, stride, dims, D: tl.constexpr):
    pointers = base + tokens.to(tl.int64)[:, None] * stride + dims[None, :]
    mask = (tokens >= 0)[:, None]
    if dims.shape[0] != D:
        mask = mask & (dims < D)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def listed_rows(
    begin,
    total,
    entries,
    masks,
    masked,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Pyramid rows begin … begin + ROWS of a run of blocks, one number a row, and which of them are read.

    A step holds several blocks, or a part of one, so that its products are as wide as the MMAs whatever the block.
    """
    place = begin + tl.arange(0, ROWS)
    entry, within = place // BLOCK, place % BLOCK
    if MASKED:
        inside = place < total
        block = tl.load(entries + entry, mask=inside, other=0)
        word = tl.load(masks + entry * WORDS + within // 32, mask=inside & (entry < masked), other=-1)
        read = inside & (((word >> (within % 32)) & 1) != 0)
    else:
        block = tl.load(entries + entry)
        read = tl.full([ROWS], 1, tl.int1)
    return block * BLOCK + within, read


@triton.jit
def weigh_rows(row, read, KEY_ROWS, LOG_WEIGHT, level_rows, POOLED: tl.constexpr, MASKED: tl.constexpr):
    """The rows' log2-weights, -inf where not read; their tokens; and which are to be loaded at all.

    Rows of weight -inf are never loaded, so that NaN there stays there.
    """
    weight = tl.load(LOG_WEIGHT + row) * LOG2_E
    if MASKED:
        weight = tl.where(read, weight, float("-inf"))
    token = tl.load(KEY_ROWS + row, mask=row < level_rows, other=0) if POOLED else tl.load(KEY_ROWS + row)
    return weight, token, (weight > float("-inf")) & (token >= 0)


@triton.jit
def load_rows(
    row, token, live, tokens, stride, pooled, pooled_stride, level_rows, dims,
    D: tl.constexpr, POOLED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Vectors [rows, D padded] of level 0 through the row map, or of the coarser levels; zeros where not live."""
    pointers = tokens + token.to(tl.int64) * stride
    if POOLED:
        coarse = pooled + (row - level_rows).to(tl.int64) * pooled_stride
        pointers = tl.where(row < level_rows, pointers, coarse)
    mask = live[:, None]
    if dims.shape[0] != D:
        mask = mask & (dims < D)[None, :]
    return tl.load(pointers[:, None] + dims[None, :], mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def entries_of(POOL, EVERY, START, COUNT, place, level_blocks):
    """A tile's run of block indices and its length; tiles of count ALL read the run EVERY = 0, 1, …, level_blocks."""
    count = tl.load(COUNT + place)
    start = tl.load(START + place)
    if count < 0:
        entries = EVERY
    else:
        entries = POOL + start
    return entries, tl.where(count < 0, level_blocks, count)
