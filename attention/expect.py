"""What density a plan's lists will have on a grid, before anything has run there."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..kernels.pyramid import build_pyramid
from .grid import TokenGrid
from .plan import HeadGroup, HeadPlan, Plan
from .rest import pool_rest
from .rows import lay_out
from .select import DynamicSelector

HEAD_DIM = 16


def expected_density(group: HeadGroup, entry: HeadPlan, grid: tuple[int, int, int]) -> float:
    """List density of an entry of a group on a grid (frames, height, width), its rest included.

    Exact for static selectors. Of dynamic ones the budget tells it, so that it is taken on noise; of those whose budget
    is a share of the softmax mass it is what an even map would cost, which is the most.
    """
    # Frozen models of pydantic can be hashed, which their types do not tell.
    key: Any = (group, entry, grid)
    return _expected(*key)


@functools.lru_cache(maxsize=1024)
def _expected(group: HeadGroup, entry: HeadPlan, grid: tuple[int, int, int]) -> float:
    layout = lay_out(TokenGrid.video(*grid), group.order, tile=group.tile, block=group.block)
    own = group.model_copy(update={"entries": (entry,), "factors": ()})
    factors = HeadGroup.model_validate(own.model_dump()).levels(layout.blocks * layout.block)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, layout.grid.tokens, HEAD_DIM, generator=generator) for _ in range(2))
    pyramid = build_pyramid(key, key, layout.key_rows, block=group.block, factors=factors)
    if isinstance(entry.selector, DynamicSelector):
        lse = torch.full((1, 1, layout.grid.tokens), float(layout.grid.tokens)).log()
        blocks = entry.selector.select(query, key, layout, pyramid, lse=lse if entry.selector.needs_lse else None)
    else:
        blocks = entry.selector.select(None, None, layout, None)
    if entry.pooled:
        blocks = pool_rest(blocks, layout, factors=factors)
    return blocks.density(pyramid)


def plan_density(plan: Plan, grid: tuple[int, int, int]) -> float:
    """Mean list density of a plan's heads on a grid, dense layers counted whole; steps that run dense are not."""
    total = 0.0
    for layer in plan.layers:
        if layer.dense is not None:
            total += plan.heads
        for group in layer.groups:
            total += sum(expected_density(group, entry, grid) * len(entry.heads) for entry in group.entries)
    return total / (len(plan.layers) * plan.heads)
