"""What finding lists costs beside the sparse attention that it serves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.grid import TokenGrid
from ..attention.loglinear import LogLinear
from ..attention.order import TokenOrder
from ..attention.plan import HeadGroup, HeadPlan
from ..attention.rows import Layout, lay_out
from ..attention.select import DynamicSelector
from ..kernels.attend import attend
from ..kernels.blocklist import BlockList
from ..kernels.listops import all_blocks
from ..kernels.pyramid import KVPyramid, build_pyramid
from .capture import Sample
from .contenders import CONTENDERS, Contender
from .fidelity import Problem, fit
from .maps import synthetic

GRIDS = {4096: (16, 16, 16), 4352: (17, 16, 16), 65536: (16, 64, 64)}
ORDER = TokenOrder(name="hilbert")
DENSITY = 0.125
REFRESH_EVERY = 5
HEADS = 4
"""A group of heads, as plans have them: its lists are found in one go."""
LONG = 1 << 14
"""From so many tokens on one head is enough to time, and quadratic selectors take long as it is."""


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Seconds for a group of heads, medians of several runs.

    lay_out_seconds: to order the tokens, once a grid. pyramid_seconds: at every step. select_seconds: at every refresh.
    share: order, pyramid and selection ÷ attention, over a refresh and the steps that reuse it.
    microseconds_per_token: of a step with a refresh, a head.
    """

    selector: str
    tokens: int
    heads: int
    list_density: float
    lay_out_seconds: float
    pyramid_seconds: float
    select_seconds: float
    attend_seconds: float
    share: float
    microseconds_per_token: float


def overhead(
    tokens: int,
    *,
    selectors: Sequence[str] = ("topk", "precise", "loglinear", "pyramid"),
    head_dim: int = 128,
    tile: int = 128,
    block: int = 64,
    density: float = DENSITY,
    repeats: int = 3,
) -> list[Overhead]:
    """Time order, pyramid, selection and attention of each selector on a clustered map of so many tokens, HEADS heads
    at once (one if the sequence is long).

    Last comes the log-linear selector as published, keep 8 and blocks of 16, whose work per token hardly grows with the
    tokens. A precise list's dense step is not counted: it stands for a step that would have been dense in any case.
    Raises ValueError for a number of tokens that is none of GRIDS.
    """
    if tokens not in GRIDS:
        raise ValueError(f"tokens must be one of {', '.join(map(str, GRIDS))}, got {tokens}")
    grid = TokenGrid.video(*GRIDS[tokens])
    sample = synthetic("clustered", grid, heads=HEADS if tokens < LONG else 1, head_dim=head_dim)
    layout = lay_out(grid, ORDER, tile=tile, block=block)
    found = []
    for contender in (item for item in CONTENDERS if item.name in selectors):
        selector = _fitted(contender, sample, layout, density)
        found.append(_time(contender.name, selector, sample, tile, block, repeats))
    if "loglinear" in selectors:
        found.append(_time("loglinear, keep 8, block 16", LogLinear(keep=8), sample, tile, 16, repeats))
    return found


def _fitted(contender: Contender, sample: Sample, layout: Layout, density: float) -> DynamicSelector:
    """The contender's selector of this list density; to know that of one that is fitted takes no dense attention."""
    empty = torch.empty(0)
    problem = Problem(sample, layout, empty, empty, empty)
    selector = fit(contender, problem, density) if contender.fitted else contender.make(density, layout)
    assert isinstance(selector, DynamicSelector)
    return selector


def _time(name: str, selector: DynamicSelector, sample: Sample, tile: int, block: int, repeats: int) -> Overhead:
    def order() -> Layout:
        return lay_out(sample.grid, ORDER, tile=tile, block=block)

    layout = order()
    heads = tuple(range(sample.query.shape[1]))
    group = HeadGroup(order=ORDER, tile=tile, block=block, entries=(HeadPlan(heads=heads, selector=selector),))  # type: ignore[arg-type]
    factors = group.levels(layout.blocks * block)

    def build() -> KVPyramid:
        return build_pyramid(sample.key, sample.value, layout.key_rows, block=block, factors=factors)

    pyramid = build()
    lse = attend(sample.query, pyramid, all_blocks(layout.query_rows, block))[1] if selector.needs_lse else None

    def choose() -> BlockList:
        return selector.select(sample.query, sample.key, layout, pyramid, lse=lse)

    blocks = choose()

    def run() -> Tensor:
        return attend(sample.query, pyramid, blocks)[0]

    run()
    seconds = [_median(call, repeats) for call in (order, build, choose, run)]
    spent = seconds[0] + REFRESH_EVERY * seconds[1] + seconds[2]
    return Overhead(
        selector=name,
        tokens=sample.grid.tokens,
        heads=len(heads),
        list_density=blocks.density(pyramid),
        lay_out_seconds=seconds[0],
        pyramid_seconds=seconds[1],
        select_seconds=seconds[2],
        attend_seconds=seconds[3],
        share=spent / (REFRESH_EVERY * seconds[3]),
        microseconds_per_token=1e6 * sum(seconds[1:]) / sample.grid.tokens / len(heads),
    )


def _median(call: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
