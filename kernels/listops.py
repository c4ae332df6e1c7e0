"""Building, joining and reading block lists, vectorised over tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .blocklist import ALL, BlockList, mask_words
from .checks import ragged
from .pyramid import KVPyramid


def all_blocks(query_rows: Tensor, block: int) -> BlockList:
    """Every tile reads every level-0 block. query_rows: int [H|1, T, tile]."""
    tiles = query_rows.shape[1]
    nowhere = query_rows.new_zeros(1, 1, tiles, dtype=torch.int64)
    return BlockList(
        start=nowhere,
        count=torch.full_like(nowhere, ALL, dtype=torch.int32),
        pool=query_rows.new_zeros(0, dtype=torch.int32),
        masked_count=torch.zeros_like(nowhere, dtype=torch.int32),
        mask_start=nowhere,
        row_masks=query_rows.new_zeros(0, mask_words(block), dtype=torch.int32),
        query_rows=query_rows.to(torch.int32),
        block=block,
    )


def from_pairs(
    tile_index: Tensor,
    block_index: Tensor,
    query_rows: Tensor,
    block: int,
    *,
    batch: int = 1,
    heads: int = 1,
    masked: Tensor | None = None,
    row_masks: Tensor | None = None,
    dense: Tensor | None = None,
) -> BlockList:
    """A list from (tile, block) pairs in any order; sorted pairs skip the sort.

    tile_index: int [P], (batch · heads + head) · tiles + tile. block_index: int [P].
    query_rows: int [heads or 1, T, tile].
    masked: int [M], positions among the pairs that carry row masks, and row_masks: bool [M, block], true = read.
    dense: bool [batch, heads, T], tiles that read every level-0 block; they may have no pairs.
    """
    tiles, pairs = query_rows.shape[1], tile_index.shape[0]
    total = batch * heads * tiles
    if tile_index.shape != block_index.shape or tile_index.ndim != 1:
        raise ValueError(
            f"tile_index and block_index must be flat and of one length, got {tuple(tile_index.shape)} "
            f"and {tuple(block_index.shape)}"
        )
    if pairs and (int(tile_index.min()) < 0 or int(tile_index.max()) >= total):
        raise ValueError(
            f"tile_index must lie in 0 … {total - 1} ({batch} batch, {heads} heads, {tiles} tiles), "
            f"got {int(tile_index.min())} … {int(tile_index.max())}"
        )
    if (masked is None) != (row_masks is None):
        raise ValueError("masked and row_masks must be given together, got one of them")
    tile_index, block_index = tile_index.long(), block_index.long()
    plain = torch.ones_like(tile_index)
    slot = torch.full_like(tile_index, -1)
    words = query_rows.new_zeros(0, mask_words(block), dtype=torch.int32)
    if masked is not None and row_masks is not None:
        plain[masked] = 0
        slot[masked] = torch.arange(masked.numel(), device=slot.device)
        words = pack_rows(row_masks, block)
    span = int(block_index.max()) + 1 if pairs else 1
    order_key = (tile_index * 2 + plain) * span + block_index
    if bool((order_key[1:] < order_key[:-1]).any()):
        order = order_key.argsort()
        tile_index, block_index, plain, slot = (x[order] for x in (tile_index, block_index, plain, slot))
    shape = (batch, heads, tiles)
    count = torch.bincount(tile_index, minlength=total)
    masked_count = torch.bincount(tile_index[plain == 0], minlength=total)
    count_or_all = count.to(torch.int32).view(shape)
    if dense is not None:
        if bool((dense & (count_or_all > 0)).any()):
            raise ValueError("dense tiles must have no pairs of their own, got some: drop those pairs")
        count_or_all = torch.where(dense, ALL, count_or_all)
    return BlockList(
        start=(count.cumsum(0) - count).view(shape),
        count=count_or_all.to(torch.int32),
        pool=block_index.to(torch.int32),
        masked_count=masked_count.to(torch.int32).view(shape),
        mask_start=(masked_count.cumsum(0) - masked_count).view(shape),
        row_masks=words[slot[plain == 0]] if words.numel() else words,
        query_rows=query_rows.to(torch.int32),
        block=block,
    )


def from_dense(mask: Tensor, query_rows: Tensor, block: int, row_masks: Tensor | None = None) -> BlockList:
    """A list from a dense mask. mask: bool [B|1, H|1, T, blocks], true = read.

    row_masks: bool [B|1, H|1, T, blocks, block], true = read; read blocks with an unread row become masked entries.
    """
    batch, heads, tiles, columns = mask.shape
    if tiles != query_rows.shape[1]:
        raise ValueError(f"mask must have query_rows' {query_rows.shape[1]} tiles, got {tiles}")
    flat = mask.reshape(-1, columns)
    tile_index, block_index = flat.nonzero().unbind(1)
    masked = rows = None
    if row_masks is not None:
        of_pairs = row_masks.expand(*mask.shape, block).reshape(-1, columns, block)[tile_index, block_index]
        masked = (~of_pairs.all(-1)).nonzero()[:, 0]
        rows = of_pairs[masked]
    return from_pairs(
        tile_index, block_index, query_rows, block, batch=batch, heads=heads, masked=masked, row_masks=rows
    )


def to_pairs(blocks: BlockList, pyramid: KVPyramid) -> tuple[Tensor, Tensor]:
    """(tile, block) of every entry, ALL tiles written out: two int64 [P], in `from_pairs`'s numbering of tiles."""
    tile_index, entry = ragged(blocks.start, blocks.count)
    block_index = blocks.pool[entry].long()
    dense = (blocks.count.flatten() == ALL).nonzero()[:, 0]
    if not dense.numel():
        return tile_index, block_index
    level = len(pyramid.blocks_at(0))
    every = torch.arange(level, device=dense.device).repeat(dense.numel())
    return torch.cat([tile_index, dense.repeat_interleave(level)]), torch.cat([block_index, every])


def masked_entries(blocks: BlockList) -> tuple[Tensor, Tensor, Tensor]:
    """Every entry with a row mask: its tile and block, int64 [M], and the rows it reads, bool [M, block]."""
    tile_index, entry = ragged(blocks.start, blocks.masked_count)
    _, slot = ragged(blocks.mask_start, blocks.masked_count)
    return tile_index, blocks.pool[entry].long(), unpack_rows(blocks.row_masks[slot], blocks.block)


def to_dense(blocks: BlockList, pyramid: KVPyramid) -> Tensor:
    """Which pyramid rows each tile reads, row masks applied: bool [B|1, H|1, T, R]. Unread rows count as listed."""
    shape = tuple(blocks.start.shape)
    read = torch.zeros(blocks.start.numel(), pyramid.blocks, blocks.block, dtype=torch.bool, device=blocks.pool.device)
    read[to_pairs(blocks, pyramid)] = True
    tile_index, block_index, rows = masked_entries(blocks)
    read[tile_index, block_index] = rows
    return read.view(*shape, pyramid.rows)


def concat(lists: Sequence[BlockList]) -> BlockList:
    """Join lists head-wise, in order; one of one head counts as one head. Blocks, tile and tile counts must agree."""
    first = lists[0]
    for other in lists[1:]:
        if (other.block, other.tiles, other.tile) != (first.block, first.tiles, first.tile):
            raise ValueError(
                f"lists must agree in block, tiles and tile {(first.block, first.tiles, first.tile)}, "
                f"got {(other.block, other.tiles, other.tile)}: join only heads of one group"
            )
    batch = max(item.batch for item in lists)
    for item in lists:
        if item.batch not in (1, batch):
            raise ValueError(f"lists must be for batch 1 or {batch}, got {item.batch}: expand it")
    pools = [0, *torch.tensor([item.pool.numel() for item in lists]).cumsum(0).tolist()]
    masks = [0, *torch.tensor([item.row_masks.shape[0] for item in lists]).cumsum(0).tolist()]

    def joined(name: str, shifts: Sequence[int]) -> Tensor:
        parts = [
            (getattr(item, name) + shift).expand(batch, item.heads, -1)
            for item, shift in zip(lists, shifts, strict=False)
        ]
        return torch.cat(parts, 1)

    rows = [item.query_rows for item in lists]
    shared = all(item.shape[0] == 1 and torch.equal(item, rows[0]) for item in rows)
    nothing = [0] * len(lists)
    return BlockList(
        start=joined("start", pools),
        count=joined("count", nothing),
        pool=torch.cat([item.pool for item in lists]),
        masked_count=joined("masked_count", nothing),
        mask_start=joined("mask_start", masks),
        row_masks=torch.cat([item.row_masks for item in lists]),
        query_rows=rows[0]
        if shared
        else torch.cat([x.expand(i.heads, -1, -1) for x, i in zip(rows, lists, strict=True)]),
        block=first.block,
    )


def select_heads(blocks: BlockList, heads: Sequence[int]) -> BlockList:
    """The list of some heads, in the order given; what is shared by all heads stays shared. The pool is compacted."""
    chosen = _select(blocks, 1, heads, blocks.heads)
    index = torch.tensor(heads, dtype=torch.int64, device=blocks.start.device)
    rows = blocks.query_rows
    return replace(chosen, query_rows=rows.index_select(0, index)) if rows.shape[0] > 1 else chosen


def select_batch(blocks: BlockList, entries: Sequence[int]) -> BlockList:
    """The list of some batch entries, in the order given; one shared by all stays so. The pool is compacted."""
    return _select(blocks, 0, entries, blocks.batch)


def _select(blocks: BlockList, dimension: int, chosen: Sequence[int], size: int) -> BlockList:
    index = torch.tensor(chosen, dtype=torch.int64, device=blocks.start.device)
    if index.numel() and size > 1 and not (int(index.min()) >= 0 and int(index.max()) < size):
        what = ("batch entries", "heads")[dimension]
        raise ValueError(f"{what} must lie in 0 … {size - 1}, got {list(chosen)}")

    def pick(tensor: Tensor) -> Tensor:
        return tensor.index_select(dimension, index) if tensor.shape[dimension] > 1 else tensor

    count, masked_count = pick(blocks.count), pick(blocks.masked_count)
    _, entry = ragged(pick(blocks.start), count)
    _, slot = ragged(pick(blocks.mask_start), masked_count)
    listed, carried = count.clamp(min=0).flatten().long(), masked_count.flatten().long()
    return replace(
        blocks,
        start=(listed.cumsum(0) - listed).view(count.shape),
        count=count,
        pool=blocks.pool[entry],
        masked_count=masked_count,
        mask_start=(carried.cumsum(0) - carried).view(count.shape),
        row_masks=blocks.row_masks[slot],
    )


def pack_rows(rows: Tensor, block: int) -> Tensor:
    """Row masks as bits: bool [M, block] to int32 [M, ceil(block / 32)]."""
    words = mask_words(block)
    padded = torch.nn.functional.pad(rows, (0, words * 32 - block)).view(rows.shape[0], words, 32)
    bits = (padded.long() << torch.arange(32, device=rows.device)).sum(-1)
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)


def unpack_rows(words: Tensor, block: int) -> Tensor:
    """Bits as row masks: int32 [M, ceil(block / 32)] to bool [M, block]."""
    bits = (words[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return bits.flatten(-2)[..., :block].bool()
