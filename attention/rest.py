"""The rest, pooled: whatever a list leaves out is read exactly once, through means of a coarser level."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..kernels.blocklist import ALL, BlockList
from ..kernels.checks import ragged
from ..kernels.listops import from_pairs
from .rows import Layout

Rest = Literal["drop", "pooled"]


def pool_rest(blocks: BlockList, layout: Layout, *, factor: int) -> BlockList:
    """Add to a list of level-0 blocks the rows of level 1 that stand for the blocks it leaves out.

    blocks: level-0 entries without row masks. factor: level-0 rows per row of level 1, a divisor of `block`.
    Every token is then read once: at level 0 if its block was listed or holds text or reference tokens, at level 1
    otherwise; the weights of a tile's rows add up to the number of (unmasked) keys. Costs N / factor rows a tile.

    Raises ValueError for a factor that does not divide the block, and for lists that read coarser levels already.
    """
    if factor < 2 or layout.block % factor:
        raise ValueError(f"factor must be a divisor of block {layout.block} and at least 2, got {factor}")
    if bool((blocks.masked_count > 0).any()):
        raise ValueError("blocks must hold no row masks for the rest to be pooled, got some")
    batch, heads, tiles = blocks.start.shape
    read = level0_reads(blocks, layout.blocks) | layout.exact_blocks.to(blocks.pool.device)
    dense = read.all(-1)
    left = ~read & ~dense[:, None]

    # Row r of level 1 stands for level-0 block r // rows_each; its rows past the end stand for nothing.
    rows_each = layout.block // factor
    rows = left.repeat_interleave(rows_each, 1)
    missing = -rows.shape[1] % layout.block
    unread = torch.nn.functional.pad(rows, (0, missing), value=False).view(len(rows), -1, layout.block)
    whole = torch.nn.functional.pad(rows, (0, missing), value=True).view(unread.shape).all(-1)

    fine_tile, fine_block = (read & ~dense[:, None]).nonzero().unbind(1)
    coarse_tile, coarse_block = unread.any(-1).nonzero().unbind(1)
    partial = (~whole[coarse_tile, coarse_block]).nonzero()[:, 0]
    return from_pairs(
        torch.cat([fine_tile, coarse_tile]),
        torch.cat([fine_block, coarse_block + layout.blocks]),
        blocks.query_rows,
        blocks.block,
        batch=batch,
        heads=heads,
        masked=partial + len(fine_tile),
        row_masks=unread[coarse_tile[partial], coarse_block[partial]],
        dense=dense.view(batch, heads, tiles),
    )


def level0_reads(blocks: BlockList, level0_blocks: int) -> Tensor:
    """Which level-0 blocks each tile reads: bool [B * H * T, level0_blocks].

    Raises ValueError if the list reads blocks of a coarser level.
    """
    tile_index, entry = ragged(blocks.start, blocks.count)
    block_index = blocks.pool[entry].long()
    if block_index.numel() and int(block_index.max()) >= level0_blocks:
        raise ValueError(f"blocks must be of level 0 (below {level0_blocks}), got block {int(block_index.max())}")
    reads = torch.zeros(blocks.start.numel(), level0_blocks, dtype=torch.bool, device=blocks.pool.device)
    reads[tile_index, block_index] = True
    reads[blocks.count.flatten() == ALL] = True
    return reads
