"""What candidates cost on this device: measured with the real kernel at a few sizes, fitted, residuals kept."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
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
from .candidates import ORDER
from .capture import Sample
from .entry import Call, entries_of
from .findings import Candidate, CostRow, Record

RUNS, FEW = 5, 2
MIXTURES = 7
SHARES = ("25%", "45%", "65%", "85%")


class LayoutCost(Record):
    """Seconds a token of one head in a call: fixed, more with a pyramid (`pooled`), and for each row read (`pair`)."""

    tile: int
    block: int
    fixed: float
    pooled: float
    pair: float

    def seconds(self, tokens: int, pooled: bool, density: Any) -> Any:
        return tokens * (self.fixed + self.pooled * pooled + self.pair * tokens * density)


class Cost(Record):
    """What this device takes. A call of a head group is launch + the sum over its heads.

    layouts: the fitted model. own, own_density: each candidate's seconds a head in a call as measured, and the list
    density it had there, which the model carries over to others. mixed: how many times the sum of its heads alone a
    layer of unlike heads takes, whose lists, levels and orders of keys are joined. select: seconds to build a
    candidate's list for one head, 0 where it is static. dense: of one layer by our kernel reading everything, stock: by
    SDPA. rows: what the model was fitted to.
    """

    launch: float
    layouts: list[LayoutCost]
    own: list[float]
    own_density: list[float]
    mixed: float = 1.0
    select: list[float]
    dense: float
    stock: float
    rows: list[CostRow]

    def seconds(self, number: int, candidate: Candidate, density: np.ndarray, heads: int, tokens: int) -> np.ndarray:
        """Of one head in one call for candidate `number` at list densities of any shape, the list being there."""
        if isinstance(candidate.selector, Dense):
            return np.full_like(density, self.dense / heads)
        layout = next(one for one in self.layouts if (one.tile, one.block) == (candidate.tile, candidate.block))
        pooled = has_levels(candidate)
        there = layout.seconds(tokens, pooled, self.own_density[number])
        return self.mixed * self.own[number] * layout.seconds(tokens, pooled, density) / max(there, 1e-30)


def has_levels(candidate: Candidate) -> bool:
    """Whether a candidate reads more than level 0, so that every call builds a pyramid."""
    return candidate.group.factors != (1,)


def measure(
    candidates: Sequence[Candidate],
    grid: tuple[int, int, int],
    *,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Cost:
    """Time and fit. Where something else runs too, times mean nothing: the machine has to be quiet."""
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
    total = len(jobs) + 2 * len(candidates)
    features, taken, rows = [], [], []
    for number, (tile, block, sizes, count, share, pooled) in enumerate(jobs):
        tensors = _tensors(sizes, count, head_dim, dtype, device)
        entry = HeadPlan(
            heads=tuple(range(count)),
            selector=Window(frames=share, height=share, width=share),
            rest="pooled" if pooled else "drop",
        )
        group = HeadGroup(order=ORDER, tile=tile, block=block, entries=(entry,))
        seconds, density = _layer(group, tensors, sizes)
        tokens = tensors[0].shape[2]
        place = layouts.index((tile, block))
        row = np.zeros(1 + 3 * len(layouts))
        row[0] = 1
        row[1 + 3 * place : 4 + 3 * place] = np.array([1.0, float(pooled), tokens * density]) * tokens * count
        features.append(row)
        taken.append(seconds)
        rows.append((block, tokens, count, pooled, density))
        report(number + 1, total)
    weights = _fit(np.array(features), np.array(taken))
    fitted = np.array(features) @ weights
    tensors = _tensors(grid, heads, head_dim, dtype, device)
    own = []
    for number, candidate in enumerate(candidates):
        own.append((0.0, 1.0) if isinstance(candidate.selector, Dense) else _alone(candidate, tensors, grid))
        report(len(jobs) + number + 1, total)
    dense, stock = _whole(tensors, grid, *layouts[0])
    launch = float(weights[0])
    select = _selections(candidates, grid, tensors)
    report(total, total)
    alone = [max(seconds - launch, seconds / 2) / heads for seconds, _ in own]
    return Cost(
        launch=launch,
        mixed=_mixed(candidates, alone, launch, tensors, grid),
        layouts=[
            LayoutCost(
                tile=tile, block=block, fixed=weights[1 + 3 * i], pooled=weights[2 + 3 * i], pair=weights[3 + 3 * i]
            )
            for i, (tile, block) in enumerate(layouts)
        ],
        own=alone,
        own_density=[density for _, density in own],
        select=select,
        dense=dense,
        stock=stock,
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


def own_is_faster(
    grid: tuple[int, int, int], *, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> bool:
    """Whether a layer's dense attention takes our own kernel less time than SDPA here."""
    own, stock = _whole(_tensors(grid, heads, head_dim, dtype, device), grid, runs=FEW)
    return own < stock


def _whole(
    tensors: tuple[Tensor, Tensor, Tensor],
    sizes: tuple[int, int, int],
    tile: int = 128,
    block: int = 64,
    runs: int = RUNS,
) -> tuple[float, float]:
    """Median seconds of a layer's dense attention by our own kernel, and by SDPA."""
    everything = HeadPlan(heads=tuple(range(tensors[0].shape[1])), selector=Dense())
    own, _ = _layer(HeadGroup(tile=tile, block=block, entries=(everything,)), tensors, sizes, runs)
    return own, _median(lambda: scaled_dot_product_attention(*tensors), tensors[0].device, runs)


def _fit(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Weights ≥ 0 of least squared relative error."""
    from scipy.optimize import nnls

    scaled = features / seconds[:, None]
    # Columns differ by many powers of ten.
    size = np.abs(scaled).max(0).clip(min=1e-30)
    return nnls(scaled / size, np.ones(len(seconds)))[0] / size


def _tensors(
    sizes: tuple[int, int, int], heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = sizes[0] * sizes[1] * sizes[2]
    # Heads behind tokens in memory, as models make them.
    query, key, value = (
        torch.randn(1, tokens, heads, head_dim, generator=generator).to(device, dtype).transpose(1, 2) for _ in range(3)
    )
    return query, key, value


def _layer(
    group: HeadGroup, tensors: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, int, int], runs: int = RUNS
) -> tuple[float, float]:
    """Median seconds of a layer of one group, run as a plan runs it with its list at hand, and its list density."""
    heads, head_dim = tensors[0].shape[1], tensors[0].shape[3]
    plan = Plan(model_class="timing", heads=heads, head_dim=head_dim, grid=sizes, layers=(LayerPlan(groups=(group,)),))
    run, grid = PlanRun(plan), TokenGrid.video(*sizes)

    def call(step: int = 1) -> Any:
        return run.attend_layer(*tensors, layer=0, noise_level=0.5, step=step, grid=grid)

    # Lists that start from a dense step are there after it.
    with torch.no_grad():
        call(0)
    return _median(call, tensors[0].device, runs), run.list_density()


def _alone(
    candidate: Candidate, tensors: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, int, int]
) -> tuple[float, float]:
    """A layer whose heads all use one candidate; density is of its own list."""
    entry = candidate.entry.model_copy(update={"heads": tuple(range(tensors[0].shape[1]))})
    group = candidate.group.model_copy(update={"entries": (entry,)})
    return _layer(group, tensors, sizes)


def _mixed(
    candidates: Sequence[Candidate],
    alone: Sequence[float],
    launch: float,
    tensors: tuple[Tensor, Tensor, Tensor],
    sizes: tuple[int, int, int],
) -> float:
    """Layers whose heads are drawn from the candidates of the commonest layout, over the sum of those heads; median."""
    layout = Counter(one.layout for one in candidates).most_common(1)[0][0]
    heads = tensors[0].shape[1]
    numbers = [n for n, one in enumerate(candidates) if one.layout == layout and not isinstance(one.selector, Dense)]
    if heads < 2 or len(numbers) < 2:
        return 1.0
    draw, ratios = random.Random(0), []
    for _ in range(MIXTURES):
        drawn = [draw.choice(numbers) for _ in range(heads)]
        entries: dict[int, HeadPlan] = {}
        for number in dict.fromkeys(drawn):
            own = tuple(head for head, other in enumerate(drawn) if other == number)
            entries[number] = candidates[number].entry.model_copy(update={"heads": own})
        group = HeadGroup(order=layout[0], tile=layout[1], block=layout[2], entries=tuple(entries.values()))
        seconds, _ = _layer(group, tensors, sizes)
        ratios.append(seconds / (launch + sum(alone[number] for number in drawn)))
    return max(1.0, statistics.median(ratios))


def _selections(
    candidates: Sequence[Candidate], grid: tuple[int, int, int], tensors: tuple[Tensor, Tensor, Tensor]
) -> list[float]:
    """Seconds to build each candidate's list, for one head; those that need the lse of dense attention are given it."""
    tokens, device = TokenGrid.video(*grid), tensors[0].device
    query, key, value = tensors
    call = Call(Sample(source="timing", query=query, key=key, value=value, grid=tokens))
    found = []
    for entry in entries_of(candidates, tokens, device):
        if not isinstance(entry.candidate.selector, DynamicSelector):
            found.append(0.0)
            continue
        call.pyramid(entry)
        call.dense(entry)
        found.append(_median(partial(call.select, entry, fresh=True), device, FEW) / query.shape[1])
    return found


def _median(call: Callable[[], Any], device: torch.device, runs: int = RUNS) -> float:
    def settled() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    taken = []
    with torch.no_grad():
        call()
        for _ in range(runs):
            begin = settled()
            call()
            taken.append(settled() - begin)
    return statistics.median(taken)
