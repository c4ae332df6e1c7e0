"""Plans that use one selector alone, in every layer and head, at a given list density: the selectors' own measure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict

from ..attention.order import TokenOrder
from ..attention.plan import HeadGroup, HeadPlan, Plan
from ..attention.schedule import Schedule
from ..pipelines.plans import ModelShape
from .capture import Sample
from .contenders import CONTENDERS, Contender
from .fidelity import fit, pose

ALONE = {
    "topk": "topk by error, pooled rest",
    "precise": "precise by error, pooled rest",
    "loglinear": "loglinear",
    "pyramid": "pyramid, pooled rest",
    "window": "window, pooled rest",
}
"""Which contender stands for a selector where nothing was trained for it."""


def single_plan(
    name: str,
    density: float,
    samples: Sequence[Sample],
    shape: ModelShape,
    *,
    schedule: Schedule,
    order: str = "hilbert",
    tile: int = 128,
    block: int = 16,
) -> Plan:
    """The plan for a model's `shape` whose lists, the pooled rest included, come nearest to a density.

    samples: calls of the model at the grid that the plan is for; the first one fits the selector, all of them say what
    density it has. Raises ValueError for a selector that is not in ALONE, or that has no lists of about that density.
    """
    if name not in ALONE:
        raise ValueError(f"name must be one of {', '.join(ALONE)}, got {name!r}")
    contender: Contender = next(item for item in CONTENDERS if item.name == ALONE[name])
    orders = TokenOrder.model_validate(order)
    problems = [pose(sample, orders, tile=tile, block=block) for sample in samples]
    selector = fit(contender, problems[0], density)
    if selector is None:
        raise ValueError(f"density must be one that {name} can have with blocks of {block}, got {density}")
    measured = []
    for problem in problems:
        blocks, pyramid = problem.select(selector, contender.rest)
        measured.append(blocks.density(pyramid))
    entry = HeadPlan(heads=tuple(range(shape.heads)), selector=selector, rest=contender.rest)  # type: ignore[arg-type]
    group = HeadGroup(order=orders, tile=tile, block=block, entries=(entry,))
    segment = samples[0].grid.visual[0]
    return Plan.uniform(
        [group],
        name=f"{name} at {density:.0%}",
        note=f"The {name} selector alone in every layer and head.",
        grid=segment.grid,
        schedule=schedule,
        predicted={"list_density": round(statistics.median(measured), 4)},
        **asdict(shape),
    )
