"""What density a plan's lists will have on a grid, before anything has run there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.pyramid import build_pyramid
from .grid import TokenGrid
from .plan import Grid, HeadGroup, HeadPlan, Plan
from .rest import pool_rest
from .rows import lay_out
from .select import DynamicSelector

HEAD_DIM = 16


def expected_density(group: HeadGroup, entry: HeadPlan, grid: Grid) -> float:
    """List density of an entry of a group on a grid (frames, height, width), its rest included.

    Exact for static selectors. Of dynamic ones the budget tells it, so that it is taken on noise; of those whose budget
    is a share of the softmax mass it is what an even map would cost, which is the most.
    """
    # Frozen models of pydantic can be hashed, which their types do not tell.
    key: Any = (group, entry, grid)
    return _expected(*key)


@functools.lru_cache(maxsize=1024)
def _expected(group: HeadGroup, entry: HeadPlan, grid: Grid) -> float:
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


def head_densities(plan: Plan, grid: Grid | None = None) -> list[list[float]]:
    """The list density to expect of each [layer][head] on a grid, the plan's own by default; 1 in layers left to the
    host. Steps that run dense are not counted."""
    found = []
    for layer in plan.layers:
        row = [1.0] * plan.heads
        for group in layer.groups:
            for entry in group.entries:
                density = expected_density(group, entry, grid or plan.grid)
                for head in entry.heads:
                    row[head] = density
        found.append(row)
    return found


def mean_density(densities: Sequence[Sequence[float]]) -> float:
    """Of all layers and heads."""
    return sum(map(sum, densities)) / sum(map(len, densities))
