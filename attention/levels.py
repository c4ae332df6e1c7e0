"""Lists that read each level-0 block at one level of the pyramid, or not at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.blocklist import ALL, BlockList
from ..kernels.checks import ragged
from ..kernels.listops import from_pairs, unpack_rows
from ..kernels.pyramid import level_offsets
from .rows import Layout

NOT_READ = -1


def levels_list(level: Tensor, layout: Layout, factors: Sequence[int], query_rows: Tensor | None = None) -> BlockList:
    """The list of a map that says at which level each tile reads each level-0 block.

    level: int8 [B|1, H|1, T, K], index into `factors`, NOT_READ (-1) = nowhere. query_rows: the layout's if None.
    A block of n rows has n / factor rows of a coarser level, beside those of its neighbours in one block of that level,
    which becomes one entry with a row mask where not all of them are read. A tile that reads everything at level 0
    becomes `ALL`. Raises ValueError for a level in use whose factor does not divide the block.
    """
    batch, heads, tiles, count = level.shape
    flat = level.reshape(-1, count)
    dense = (flat == 0).all(-1)
    left = ~dense[:, None]
    tile, index = ((flat == 0) & left).nonzero().unbind(1)
    tile_index, block_index, masked, masks, total = [tile], [index], [], [], tile.numel()
    offsets = level_offsets(count * layout.block, tuple(factors), layout.block)
    for number, factor in enumerate(factors):
        chosen = (flat == number) & left
        if number == 0 or not bool(chosen.any()):
            continue
        if layout.block % factor:
            raise ValueError(f"factor must be a divisor of block {layout.block} to be read by the block, got {factor}")
        missing = -count % factor
        grouped = torch.nn.functional.pad(chosen, (0, missing)).unflatten(1, (-1, factor))
        tile, index = grouped.any(-1).nonzero().unbind(1)
        # Rows past the last block stand for nothing: where they alone are left out, no mask is needed.
        whole = torch.nn.functional.pad(chosen, (0, missing), value=True).view(grouped.shape).all(-1)
        partial = (~whole[tile, index]).nonzero()[:, 0]
        tile_index.append(tile)
        block_index.append(index + offsets[number] // layout.block)
        masked.append(partial + total)
        masks.append(grouped[tile[partial], index[partial]].repeat_interleave(layout.block // factor, 1))
        total += tile.numel()
    return from_pairs(
        torch.cat(tile_index),
        torch.cat(block_index),
        layout.query_rows if query_rows is None else query_rows,
        layout.block,
        batch=batch,
        heads=heads,
        masked=torch.cat(masked) if masked else None,
        row_masks=torch.cat(masks) if masks else None,
        dense=dense.view(batch, heads, tiles),
    )


def read_levels(blocks: BlockList, layout: Layout, factors: Sequence[int]) -> Tensor:
    """The map of a list, the inverse of `levels_list`: int8 [B|1, H|1, T, K].

    Raises ValueError for a list that has no such map: one that reads a block at two levels, in part, or at a level
    whose factor does not divide the block.
    """
    count, block = layout.blocks, layout.block
    level = torch.full((blocks.start.numel(), count), NOT_READ, dtype=torch.int8, device=blocks.pool.device)
    level[blocks.count.flatten() == ALL] = 0
    tile, entry = ragged(blocks.start, blocks.count)
    index = blocks.pool[entry].long()
    rows = _rows_read(blocks, entry)
    offsets = level_offsets(count * block, tuple(factors), block)
    if index.numel() and int(index.max()) >= offsets[-1] // block:
        raise ValueError(
            f"blocks must be of the levels {tuple(factors)}, below {offsets[-1] // block}, got {int(index.max())}"
        )
    for number, factor in enumerate(factors):
        first, last = offsets[number] // block, offsets[number + 1] // block
        here = ((index >= first) & (index < last)).nonzero()[:, 0]
        if not here.numel():
            continue
        if block % factor:
            raise ValueError(f"blocks must be of levels whose factor divides block {block}, got one of factor {factor}")
        parts = rows[here].unflatten(1, (factor, -1)) if number else rows[here][:, None]
        chosen = parts.any(-1)
        if bool((chosen & ~parts.all(-1)).any()):
            raise ValueError("blocks must be read whole for the rest to be known, got row masks that cut through one")
        member, part = chosen.nonzero().unbind(1)
        target = (index[here] - first)[member] * factor + part
        held = target < count
        owner, target = tile[here][member][held], target[held]
        if bool((level[owner, target] != NOT_READ).any()):
            raise ValueError("blocks must be read at one level for the rest to be known, got one read at two")
        level[owner, target] = number
    return level.view(*blocks.start.shape, count)


def _rows_read(blocks: BlockList, entry: Tensor) -> Tensor:
    """bool [entries, block]: the rows that each entry reads; `entry` as `ragged` gives it."""
    rows = torch.ones(entry.numel(), blocks.block, dtype=torch.bool, device=entry.device)
    _, slot = ragged(blocks.mask_start, blocks.masked_count)
    count = blocks.count.flatten().long().clamp(min=0)
    # Masked entries stand at the front of each tile's run.
    _, position = ragged(count.cumsum(0) - count, blocks.masked_count)
    rows[position] = unpack_rows(blocks.row_masks[slot], blocks.block)
    return rows


def level0_reads(blocks: BlockList, count: int) -> Tensor:
    """Which of the `count` level-0 blocks each tile has an entry for: bool [B * H * T, count]."""
    tile, entry = ragged(blocks.start, blocks.count)
    index = blocks.pool[entry].long()
    fine = index < count
    reads = torch.zeros(blocks.start.numel(), count, dtype=torch.bool, device=index.device)
    reads[tile[fine], index[fine]] = True
    reads[blocks.count.flatten() == ALL] = True
    return reads
