"""The whole fidelity bench: capture, synthetic maps, every contender, the picture, and what it all says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attention.grid import TokenGrid
from .capture import Sample, capture
from .charts import draw
from .fidelity import DENSITIES, ORDERS, Report, Row, fidelity, verdicts
from .maps import MAPS, synthetic
from .overhead import Overhead, overhead

PROMPTS = ("a large red circle moving left on a gray background", "a small blue square moving up on a black background")
MAP_GRID = (9, 16, 16)


@dataclass(frozen=True, kw_only=True)
class Result:
    """rows: of the bench. to_topk: see `verdicts`. overhead: of each number of tokens asked for."""

    rows: list[Row]
    to_topk: dict[str, dict[str, float]]
    overhead: list[Overhead]


def run(
    model: str | None,
    out: Path,
    *,
    prompts: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    orders: Sequence[str] = ORDERS,
    densities: Sequence[float] = DENSITIES,
    steps: int = 10,
    frames: int | None = None,
    size: int | None = None,
    tile: int = 128,
    block: int = 16,
    overheads: Sequence[int] = (),
    map_grid: tuple[int, int, int] = MAP_GRID,
    report: Report = lambda stage, done, total: None,
) -> Result:
    """Run the bench and draw its picture to `out`.

    model: what `load` takes, or None for synthetic maps alone. layers: by default the first, the middle and the last.
    frames, size: of the captured videos, by default the model's own. overheads: numbers of tokens to time selection at.
    Raises ValueError for what the model does not have, and where the picture can't be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    samples: list[Sample] = []
    if model is not None:
        samples = captured(model, prompts or PROMPTS, layers, steps=steps, frames=frames, size=size, report=report)
    samples += [synthetic(name, TokenGrid.video(*map_grid)) for name in MAPS]
    rows = fidelity(samples, orders=orders, densities=densities, tile=tile, block=block, report=report)
    draw(rows, out)
    return Result(rows=rows, to_topk=verdicts(rows), overhead=[one for tokens in overheads for one in overhead(tokens)])


def captured(
    model: str,
    prompts: Sequence[str],
    layers: Sequence[int] | None,
    *,
    steps: int,
    frames: int | None,
    size: int | None,
    report: Report = lambda stage, done, total: None,
) -> list[Sample]:
    """Calls of a model's layers at an early, a middle and a late step of a run for each prompt."""
    import torch

    from ..pipelines.loading import load
    from ..pipelines.plans import model_shape, transformers_of
    from ..pipelines.settings import model_settings

    pipe: Any = load(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    settings = model_settings(pipe)
    given = {
        "num_frames": frames or settings.frames,
        "height": size or settings.height,
        "width": size or settings.width,
        "num_inference_steps": steps,
        "guidance_scale": settings.guidance,
    }
    count = model_shape(next(iter(transformers_of(pipe).values()))).layers
    found: list[Sample] = []
    for number, prompt in enumerate(prompts):
        report("capture", number, len(prompts))
        found += capture(
            pipe,
            [prompt],
            layers=sorted(set(layers or (0, count // 2, count - 1))),
            steps=sorted({steps // 8, steps // 2, steps - 1}),
            **{name: value for name, value in given.items() if value is not None},
        )
    report("capture", len(prompts), len(prompts))
    return found


def summary(result: Result, *, most: float = 0.15) -> list[str]:
    """For each source the selectors by their error relative to plain top-k at low density, least first."""
    lines = [f"median relative error ÷ that of top-k, list densities up to {most:.0%}, equal order and density"]
    for source, ratios in result.to_topk.items():
        lines.append(source)
        lines += [f"  {ratio:5.2f}  {name}" for name, ratio in sorted(ratios.items(), key=lambda pair: pair[1])]
    for one in result.overhead:
        cost = f"order, pyramid and selection {one.share:.0%} of attention, {one.microseconds_per_token:.2f} µs a token"
        lines.append(
            f"{one.tokens} tokens, {one.heads} heads, {one.selector}, list density {one.list_density:.1%}: {cost}"
        )
    return lines
