"""The fidelity bench: how near each selector comes to dense attention, at which density and in which time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..attention.levels import level0_reads
from ..attention.loglinear import LogLinear
from ..attention.order import TokenOrder
from ..attention.plan import HeadGroup, HeadPlan
from ..attention.precise import Precise
from ..attention.pyramid import Pyramid
from ..attention.rest import pool_rest
from ..attention.rows import Layout, lay_out
from ..attention.select import DynamicSelector, Selector
from ..attention.topk import TopK
from ..attention.window import Window
from ..kernels.attend import attend
from ..kernels.blocklist import BlockList
from ..kernels.listops import all_blocks
from ..kernels.mass import block_mass
from ..kernels.pyramid import KVPyramid, build_pyramid
from .capture import Sample
from .contenders import CONTENDERS, Contender

DENSITIES = (0.05, 0.1, 0.15, 0.25, 0.5)
ORDERS = ("raster", "temporal", "hilbert")
SAME = 1e-3
"""Relative error that counts as none: float32 products in another order."""

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Medians over the samples of a source.

    recall: share of the dense softmax mass that falls on what is read at level 0. relative_error: ‖O - O*‖ / ‖O*‖.
    select_seconds: to build a list, of a precise one from a given lse. attend_seconds: to run it.
    """

    source: str
    selector: str
    order: str
    list_density: float
    recall: float
    relative_error: float
    select_seconds: float
    attend_seconds: float


@dataclass(eq=False)
class Problem:
    """A sample in one order: its layout, and what dense attention makes of it."""

    sample: Sample
    layout: Layout
    exact: Tensor
    lse: Tensor
    mass: Tensor
    pyramids: dict[tuple[int, ...], KVPyramid] = field(default_factory=dict)

    def pyramid(self, factors: tuple[int, ...]) -> KVPyramid:
        if factors not in self.pyramids:
            self.pyramids[factors] = build_pyramid(
                self.sample.key, self.sample.value, self.layout.key_rows, block=self.layout.block, factors=factors
            )
        return self.pyramids[factors]

    def select(self, selector: Selector, rest: str) -> tuple[BlockList, KVPyramid]:
        entry = HeadPlan(heads=(0,), selector=selector, rest=rest)  # type: ignore[arg-type]
        group = HeadGroup(order=self.layout.order, tile=self.layout.tile, block=self.layout.block, entries=(entry,))
        pyramid = self.pyramid(group.levels(self.layout.blocks * self.layout.block))
        if isinstance(selector, DynamicSelector):
            lse = self.lse if selector.needs_lse else None
            blocks = selector.select(self.sample.query, self.sample.key, self.layout, pyramid, lse=lse)
        else:
            blocks = selector.select(None, None, self.layout, None)
        return pool_rest(blocks, self.layout, factors=pyramid.factors) if entry.pooled else blocks, pyramid


def pose(
    sample: Sample, order: TokenOrder, *, tile: int, block: int, dense: tuple[Tensor, Tensor] | None = None
) -> Problem:
    """Lay a sample out, and run it dense, unless its dense output and lse are known."""
    layout = lay_out(sample.grid, order, tile=tile, block=block)
    pyramid = build_pyramid(sample.key, sample.value, layout.key_rows, block=block)
    exact, lse = dense or attend(sample.query, pyramid, all_blocks(layout.query_rows, block))
    mass = block_mass(sample.query, pyramid, lse, layout.query_rows)
    return Problem(sample, layout, exact, lse, mass, {(1,): pyramid})


def fidelity(
    samples: Iterable[Sample],
    *,
    orders: Sequence[str] = ORDERS,
    densities: Sequence[float] = DENSITIES,
    contenders: Sequence[Contender] = CONTENDERS,
    tile: int = 128,
    block: int = 16,
    report: Report = lambda stage, done, total: None,
) -> list[Row]:
    """Every contender on every source, in several orders, at these list densities (as near as it can).

    Raises ValueError for densities outside 0 ... 1, and RuntimeError where a thing that must hold does not: that at
    equal blocks per row exact masses recall most, and that what reads everything equals dense.
    """
    if any(not 0 < density <= 1 for density in densities):
        raise ValueError(f"densities must lie above 0 and at most at 1, got {list(densities)}")
    by_source: dict[str, list[Sample]] = {}
    for sample in samples:
        by_source.setdefault(sample.source, []).append(sample)
    rows: list[Row] = []
    total, done = len(by_source) * len(orders) * len(contenders), 0
    for source, members in by_source.items():
        for name in orders:
            order = TokenOrder.model_validate(name)
            problems = [pose(sample, order, tile=tile, block=block) for sample in members]
            _check_covering(problems[0], source)
            best: dict[tuple[int, int], float] = {}
            for contender in contenders:
                for density in densities:
                    selector = fit(contender, problems[0], density)
                    if selector is None:
                        continue
                    measured = [_measure(problem, selector, contender.rest) for problem in problems]
                    if contender.level0:
                        _note_recall(best, contender, measured, source)
                    rows.append(_median(source, contender.name, name, measured))
                done += 1
                report("bench", done, total)
    return rows


def fit(contender: Contender, problem: Problem, density: float) -> Selector | None:
    """The contender's selector whose lists, rest included, come nearest to a density; None where none comes near."""
    layout = problem.layout
    if not contender.fitted:
        coarse = -(-layout.blocks // layout.block) / layout.blocks if contender.rest == "pooled" else 0.0
        share = density - coarse
        return contender.make(share, layout) if share * layout.blocks >= 1 else None
    low, high = 0.0, 1.0
    best: tuple[float, Selector | None] = (density, None)
    for _ in range(9):
        share = (low + high) / 2
        selector = contender.make(share, layout)
        if selector is None:
            low = share
            continue
        blocks, pyramid = problem.select(selector, contender.rest)
        got = blocks.density(pyramid)
        if abs(got - density) < best[0]:
            best = (abs(got - density), selector)
        low, high = (share, high) if got < density else (low, share)
    return best[1] if best[0] <= 0.2 * density else None


@dataclass(frozen=True)
class _Measured:
    """counts: level-0 blocks that each tile of visual queries reads."""

    density: float
    recall: float
    error: float
    select_seconds: float
    attend_seconds: float
    counts: Tensor


def _measure(problem: Problem, selector: Selector, rest: str) -> _Measured:
    sample, layout = problem.sample, problem.layout
    problem.select(selector, rest)  # builds the pyramid, and warms up
    started = time.perf_counter()
    blocks, pyramid = problem.select(selector, rest)
    selected = time.perf_counter()
    out, _ = attend(sample.query, pyramid, blocks)
    attended = time.perf_counter()
    reads = level0_reads(blocks, layout.blocks).view(*blocks.start.shape, layout.blocks)
    return _Measured(
        blocks.density(pyramid),
        float((problem.mass * reads).sum() / problem.mass.sum()),
        relative_error(out, problem.exact),
        selected - started,
        attended - selected,
        reads[:, :, ~layout.exact_tiles].sum(-1),
    )


def relative_error(out: Tensor, exact: Tensor) -> float:
    """‖out - exact‖ / ‖exact‖, over everything."""
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def _median(source: str, selector: str, order: str, measured: Sequence[_Measured]) -> Row:
    def of(name: str) -> float:
        return statistics.median(getattr(one, name) for one in measured)

    return Row(
        source=source,
        selector=selector,
        order=order,
        list_density=of("density"),
        recall=of("recall"),
        relative_error=of("error"),
        select_seconds=of("select_seconds"),
        attend_seconds=of("attend_seconds"),
    )


def _note_recall(best: dict, contender: Contender, measured: Sequence[_Measured], source: str) -> None:
    """Remember what exact masses recall at each number of blocks, and hold the others to it."""
    for index, one in enumerate(measured):
        # Selectors that give tiles unequal numbers of blocks have no equal to be compared with.
        counts = one.counts.unique()
        key = (index, int(counts[0]))
        if counts.numel() > 1:
            continue
        precise = contender.name == "precise"
        known = best.get((*key, precise))
        best[(*key, precise)] = max(one.recall, known or 0.0)
        most, other = best.get((*key, True)), best.get((*key, False))
        if most is not None and other is not None and other > most + 1e-4:
            raise RuntimeError(
                f"on {source} exact masses recall {most:.4f} at {key[1]} blocks a row, less than another selector's "
                f"{other:.4f}: one of them is wrong"
            )


def _check_covering(problem: Problem, source: str) -> None:
    """What reads everything must equal dense."""
    everything: tuple[Selector, ...] = (
        TopK(density=1.0),
        Precise(density=1.0),
        LogLinear(keep=problem.layout.blocks),
        Pyramid(quotas=(1.0, 0.0, 0.0, 0.0)),
        Window(),
    )
    for selector in everything:
        for rest in ("drop", "pooled"):
            blocks, pyramid = problem.select(selector, rest)
            error = relative_error(attend(problem.sample.query, pyramid, blocks)[0], problem.exact)
            if not error <= SAME:
                raise RuntimeError(
                    f"on {source} {type(selector).__name__} reads everything, yet is {error:.2g} off dense"
                )


def verdicts(rows: Sequence[Row], *, most: float = 0.15, than: str = "topk") -> dict[str, dict[str, float]]:
    """For each source and selector its median relative error ÷ that of plain top-k, at densities up to `most`.

    Compared are rows of one order whose list densities differ by no more than a tenth of it.
    """
    found: dict[str, dict[str, list[float]]] = {}
    plain = [row for row in rows if row.selector == than]
    for row in rows:
        if row.list_density > 1.1 * most:
            continue
        for base in plain:
            near = abs(row.list_density - base.list_density) <= 0.1 * base.list_density
            if (row.source, row.order) == (base.source, base.order) and near and base.relative_error > 0:
                ratios = found.setdefault(row.source, {}).setdefault(row.selector, [])
                ratios.append(row.relative_error / base.relative_error)
    return {
        source: {name: statistics.median(ratios) for name, ratios in ratios_of.items()}
        for source, ratios_of in found.items()
    }
