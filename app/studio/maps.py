"""Attention maps of a layer of a finished run: it is run again, dense, and looked into."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...attention.levels import level0_reads
from ...attention.plan import Plan
from ...pipelines.media import whole
from ...pipelines.request import Request, call_arguments
from ...search.capture import Sample, capture
from ...search.fidelity import pose
from .jobs import Job
from .texts import SETTINGS
from .worker import Worker

MOST_STEPS = 5
INDEX = "maps.json"
TALL = 420


def map_steps(steps: int) -> list[int]:
    """The steps that are looked at: first, last and a few between."""
    return sorted({round(i * (steps - 1) / (MOST_STEPS - 1)) for i in range(MOST_STEPS)}) if steps > 1 else [0]


def make_maps(worker: Worker, job: Job) -> None:
    """Draw every head of one layer at a few steps, with the blocks that the plan reads."""
    ask, home = job.ask, worker.store.home(job)
    worker.phase(job, "loading the model")
    pipe = worker.pipe(ask["model"])
    plan = worker.shelf.read_plan(ask["plan"], worker.shelf.model(ask["model"]))
    image = str(home / ask["image"]) if ask["image"] else None
    request = Request(prompt=ask["prompt"], image=image, **{name: ask[name] for name in SETTINGS})
    arguments = call_arguments(pipe, request)
    del arguments["prompt"]

    def check(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        worker.phase(job, "running it again, dense", step + 1, ask["steps"] or 1)
        return tensors

    if "callback_on_step_end" in worker.shelf.model(ask["model"]).parameters:
        arguments["callback_on_step_end"] = check
    steps = map_steps(ask["steps"] or 1)

    samples = capture(
        pipe,
        [ask["prompt"]],
        layers=[ask["layer"]],
        steps=steps,
        seed=ask["seed"],
        **arguments,
    )
    first = [sample for sample in samples if sample.branch == samples[0].branch]
    found: dict[str, dict[str, str]] = {}
    for number, sample in enumerate(first):
        worker.phase(job, "drawing", number + 1, len(first))
        for head, picture in _pictures(sample, plan, ask["layer"]).items():
            name = f"head{head}-step{sample.step}.png"
            _save(home / name, picture)
            found.setdefault(str(head), {})[str(sample.step)] = name
    with whole(home / INDEX) as part:
        part.write_text(json.dumps(found))
    job.result = {"maps": found, "layer": ask["layer"], "branch": first[0].branch}


def _pictures(sample: Sample, plan: Plan | None, layer: int) -> dict[int, np.ndarray]:
    """Each head's map: softmax mass of query tiles (down) on key blocks (across), what is not read greyed."""
    groups = plan.layers[layer].groups if plan is not None else ()
    if not groups:
        heads = range(sample.query.shape[1])
        return _drawn(sample, list(heads), None, None)
    found: dict[int, np.ndarray] = {}
    for group in groups:
        for entry in group.entries:
            found |= _drawn(sample, list(entry.heads), group, entry)
    return found


def _drawn(sample: Sample, heads: list[int], group: Any, entry: Any) -> dict[int, np.ndarray]:
    from ...attention.order import TokenOrder

    own = replace(sample, **{name: getattr(sample, name)[:1, heads].float() for name in ("query", "key", "value")})
    order, tile, block = (group.order, group.tile, group.block) if group else (TokenOrder(), 128, 16)
    problem = pose(own, order, tile=tile, block=block)
    count = problem.layout.blocks
    reads = None
    if entry is not None:
        blocks, _ = problem.select(entry.selector, entry.rest)
        reads = level0_reads(blocks, count).view(*blocks.start.shape, count)[0]
    pictures = {}
    for place, head in enumerate(heads):
        mass = problem.mass[0, place].numpy()
        read = None if reads is None else reads[min(place, len(reads) - 1)].numpy()
        pictures[head] = _paint(mass / np.maximum(mass.sum(1, keepdims=True), 1e-30), read)
    return pictures


def _paint(share: np.ndarray, read: np.ndarray | None) -> np.ndarray:
    """uint8 [height, width, 3]: dark to bright over four decades of mass; unread blocks grey, with an edge around."""
    import matplotlib

    level = np.clip(1 + np.log10(np.maximum(share * share.shape[1], 1e-9)) / 4 - 0.25, 0, 1)
    picture = matplotlib.colormaps["magma"](level)[..., :3]
    tall = max(TALL // share.shape[0], 1)
    wide = max(round(2 * TALL / share.shape[1]), 1)
    large = np.repeat(np.repeat(picture, tall, 0), wide, 1)
    if read is not None:
        kept = np.repeat(np.repeat(read, tall, 0), wide, 1)
        grey = large.mean(-1, keepdims=True) * 0.5 + 0.45
        large = np.where(kept[..., None], large, grey)
        edge = np.zeros_like(kept)
        edge[1:] |= kept[1:] != kept[:-1]
        edge[:, 1:] |= kept[:, 1:] != kept[:, :-1]
        large[edge] = (0.1, 0.85, 0.75)
    return (255 * large).round().astype(np.uint8)


def _save(path: Path, picture: np.ndarray) -> None:
    from PIL import Image

    with whole(path) as part:
        Image.fromarray(picture).save(part, format="PNG")
