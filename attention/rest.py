"""The rest, pooled: whatever a list leaves out is read exactly once, through means of a coarser level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ..kernels.blocklist import BlockList
from .levels import NOT_READ, levels_list, read_levels
from .rows import Layout

Rest = Literal["drop", "pooled"]


def rest_factor(factors: Sequence[int], block: int) -> int:
    """The factor at which a rest is pooled: the coarsest that divides the block; 1 if there is none."""
    return max(factor for factor in factors if block % factor == 0)


def pool_rest(blocks: BlockList, layout: Layout, *, factors: Sequence[int]) -> BlockList:
    """Add to a list the coarse rows that stand for the blocks it leaves out.

    blocks: reads level-0 blocks whole, each at one level or nowhere. factors: the pyramid's; the rest is read at the
    coarsest that divides the block. Every token is then read once: where the list had it, at level 0 if it is text, and
    else at that level; the weights of a tile's rows add up to the number of (unmasked) keys. Costs N / factor rows a
    tile.

    Raises ValueError where no factor above 1 divides the block, and for lists that overlap or cut through blocks.
    """
    factor = rest_factor(factors, layout.block)
    if factor < 2:
        raise ValueError(
            f"factors must hold a divisor of block {layout.block} above 1 for the rest to be pooled, "
            f"got {tuple(factors)}"
        )
    level = read_levels(blocks, layout, factors)
    coarse = torch.full_like(level[:1, :1, :1], tuple(factors).index(factor))
    rest = coarse.masked_fill(layout.exact_blocks.to(level.device), 0)
    return levels_list(torch.where(level == NOT_READ, rest, level), layout, factors, blocks.query_rows)
