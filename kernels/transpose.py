"""Block lists read the other way: which query tiles read each block, as the gradients of keys and values need it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocklist import ALL, BlockList
from .checks import ragged
from .pyramid import KVPyramid


@dataclass(frozen=True, kw_only=True)
class BlockTiles:
    """For each batch, head and block of the pyramid, a run of query tiles in one shared pool, in ascending order.

    C blocks, P entries; tiles that read all of level 0 (count `ALL`) stand apart, once a head.

    start: int64 [B|1, H|1, C], where a block's run begins in `pool` and `mask`.
    count: int32 [B|1, H|1, C], its length.
    pool: int32 [P], query tiles.
    mask: int32 [P], the entry's row in the list's `row_masks`, -1 = all rows are read.
    all_start: int64 [B|1, H|1], where a head's run of `ALL` tiles begins in `all_pool`.
    all_count: int32 [B|1, H|1], its length.
    all_pool: int32, query tiles that read every level-0 block.
    """

    start: Tensor
    count: Tensor
    pool: Tensor
    mask: Tensor
    all_start: Tensor
    all_count: Tensor
    all_pool: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in vars(self).values())


def transpose(blocks: BlockList, pyramid: KVPyramid) -> BlockTiles:
    """The transposed list, by counting, a prefix sum and a stable sort: the same list gives the same order always."""
    batch, heads, tiles = blocks.start.shape
    columns = pyramid.blocks
    run, entry = ragged(blocks.start, blocks.count)
    column = run // tiles * columns + blocks.pool[entry]
    mask = torch.full_like(run, -1, dtype=torch.int32)
    _, masked_entry = ragged(blocks.mask_start, blocks.masked_count)
    # A tile's masked entries stand first in its run.
    listed = blocks.count.flatten().long().clamp(min=0)
    _, place = ragged(listed.cumsum(0) - listed, blocks.masked_count)
    mask[place] = masked_entry.to(torch.int32)
    count = torch.bincount(column, minlength=batch * heads * columns)
    order = column.argsort(stable=True)
    every = (blocks.count == ALL).flatten(0, 1)
    all_count = every.sum(1)
    return BlockTiles(
        start=(count.cumsum(0) - count).view(batch, heads, columns),
        count=count.to(torch.int32).view(batch, heads, columns),
        pool=(run % tiles)[order].to(torch.int32),
        mask=mask[order],
        all_start=(all_count.cumsum(0) - all_count).view(batch, heads),
        all_count=all_count.to(torch.int32).view(batch, heads),
        all_pool=every.nonzero()[:, 1].to(torch.int32),
    )
