"""What candidates cost on this device: measured with the real kernel at a few sizes, fitted, residuals kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..attention.dense import Dense
from ..attention.grid import TokenGrid
from ..attention.plan import HeadGroup, HeadPlan, LayerPlan, Plan
from ..attention.run import PlanRun
from ..attention.select import DynamicSelector
from ..attention.window import Window
from ..kernels.attend import attend
from ..kernels.listops import all_blocks
from .capture import Sample
from .entry import entries_of
from .findings import Candidate, CostRow

RUNS = 5
SHARES = ("25%", "45%", "65%", "85%")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The fitted model: a call of a head group takes launch + heads · tokens · (fixed + pooled + pair · tokens ·
    density) seconds, `fixed`, `pooled` (of a pooled rest) and `pair` by (tile, block). select: seconds of building a
    candidate's list for one head, 0 where it is static. dense: of one layer by our kernel reading everything, stock:
    by SDPA.
    """

    launch: float
    by_layout: dict[tuple[int, int], tuple[float, float, float]]
    select: list[float]
    dense: float
    stock: float
    rows: list[CostRow]

    def seconds(self, candidate: Candidate, density: float, tokens: int, heads: int) -> float:
        """Of one head in one call, the list being there."""
        if isinstance(candidate.selector, Dense):
            return self.dense / heads
        fixed, pooled, pair = self.by_layout[candidate.tile, candidate.block]
        return tokens * (fixed + pooled * candidate.entry.pooled + pair * tokens * density)


def measure(
    candidates: Sequence[Candidate],
    grid: tuple[int, int, int],
    *,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Cost:
    """Time and fit. On an accelerator, or where something else runs, times mean what they say only if it is quiet."""
    layouts = list(dict.fromkeys((candidate.tile, candidate.block) for candidate in candidates))
    few = max(1, grid[0] // 2)
    grids = list(dict.fromkeys((grid, (few, *grid[1:]))))
    jobs = [
        (tile, block, sizes, count, share, pooled)
        for tile, block in layouts
        for sizes in grids
        for count in sorted({1, heads})
        for share in SHARES
        for pooled in (False, True)
    ]
    features, taken, rows = [], [], []
    for number, (tile, block, sizes, count, share, pooled) in enumerate(jobs):
        tensors = _tensors(sizes, count, head_dim, dtype)
        entry = HeadPlan(
            heads=tuple(range(count)),
            selector=Window(frames=share, height=share, width=share),
            rest="pooled" if pooled else "drop",
        )
        group = HeadGroup(order="hilbert", tile=tile, block=block, entries=(entry,))  # type: ignore[arg-type]
        seconds, density = _layer(group, tensors, sizes)
        tokens = tensors[0].shape[2]
        place = layouts.index((tile, block))
        row = np.zeros(1 + 3 * len(layouts))
        row[0] = 1
        row[1 + 3 * place : 4 + 3 * place] = np.array([1.0, float(pooled), tokens * density]) * tokens * count
        features.append(row)
        taken.append(seconds)
        rows.append((block, tokens, count, pooled, density))
        report(number + 1, len(jobs))
    weights = _fit(np.array(features), np.array(taken))
    fitted = np.array(features) @ weights
    tensors = _tensors(grid, heads, head_dim, dtype)
    everything = HeadGroup(
        tile=layouts[0][0], block=layouts[0][1], entries=(HeadPlan(heads=tuple(range(heads)), selector=Dense()),)
    )
    return Cost(
        launch=float(weights[0]),
        by_layout={
            layout: (float(weights[1 + 3 * i]), float(weights[2 + 3 * i]), float(weights[3 + 3 * i]))
            for i, layout in enumerate(layouts)
        },
        select=_selections(candidates, grid, heads, head_dim, dtype),
        dense=_layer(everything, tensors, grid)[0],
        stock=_median(lambda: scaled_dot_product_attention(tensors[0], tensors[1], tensors[2])),
        rows=[
            CostRow(
                block=block,
                tokens=tokens,
                head_dim=head_dim,
                heads=count,
                pooled=pooled,
                list_density=density,
                seconds=seconds,
                fitted=float(said),
            )
            for (block, tokens, count, pooled, density), seconds, said in zip(rows, taken, fitted, strict=True)
        ],
    )


def _fit(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Weights ≥ 0 of least squared relative error."""
    from scipy.optimize import nnls

    scaled = features / seconds[:, None]
    # Columns differ by many powers of ten.
    size = np.abs(scaled).max(0).clip(min=1e-30)
    return nnls(scaled / size, np.ones(len(seconds)))[0] / size


def _tensors(sizes: tuple[int, int, int], heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    tokens = sizes[0] * sizes[1] * sizes[2]
    # Heads behind tokens in memory, as models make them.
    return tuple(
        torch.randn(1, tokens, heads, head_dim, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)
    )


def _layer(group: HeadGroup, tensors: tuple[Tensor, ...], sizes: tuple[int, int, int]) -> tuple[float, float]:
    """Median seconds of a layer of one group, run as a plan runs it, and its list density."""
    heads, head_dim = tensors[0].shape[1], tensors[0].shape[3]
    plan = Plan(model_class="timing", heads=heads, head_dim=head_dim, grid=sizes, layers=(LayerPlan(groups=(group,)),))
    run, grid = PlanRun(plan), TokenGrid.video(*sizes)

    def call() -> Any:
        return run.attend_layer(*tensors, layer=0, noise_level=0.5, step=0, grid=grid)

    return _median(call), run.list_density()


def _selections(
    candidates: Sequence[Candidate], grid: tuple[int, int, int], heads: int, head_dim: int, dtype: torch.dtype
) -> list[float]:
    """Seconds to build each candidate's list, for one head; those of dynamic ones that need it are given the lse."""
    query, key, value = _tensors(grid, heads, head_dim, dtype)
    tokens = TokenGrid.video(*grid)
    sample = Sample(source="timing", query=query, key=key, value=value, grid=tokens)
    lse: Tensor | None = None
    found = []
    for entry in entries_of(candidates, tokens):
        if not isinstance(entry.candidate.selector, DynamicSelector):
            found.append(0.0)
            continue
        pyramid = entry.pyramid(sample, None)
        if lse is None:
            lse = attend(query, pyramid, all_blocks(entry.layout.query_rows, entry.layout.block))[1]
        select = partial(entry.select, sample, lse, None, None)
        found.append(_median(select, 2) / heads)
    return found


def _median(call: Callable[[], Any], runs: int = RUNS) -> float:
    taken = []
    with torch.no_grad():
        call()
        for _ in range(runs):
            begin = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begin)
    return statistics.median(taken)
