"""Attention maps of a layer of a finished run: it is run again, dense, and looked into."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...attention.dense import Dense
from ...attention.levels import level0_reads
from ...attention.plan import HeadGroup, HeadPlan, Plan
from ...pipelines.media import whole
from ...pipelines.request import Request, call_arguments
from ...search.capture import Sample, capture
from ...search.fidelity import pose
from ...search.heatmap import attention_map, save
from .jobs import Job
from .texts import SETTINGS
from .worker import Worker

MOST_STEPS = 5
INDEX = "maps.json"


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
        ran = plan if plan is None or plan.expert in (None, _expert(pipe, sample)) else None
        for head, (mass, reads) in _maps(sample, ran, ask["layer"]).items():
            worker.phase(job, "drawing", number + 1, len(first))
            name = f"head{head}-step{sample.step}.png"
            save(attention_map(mass, reads, f"layer {ask['layer']}, head {head}, step {sample.step}"), home / name)
            found.setdefault(str(head), {})[str(sample.step)] = name
    with whole(home / INDEX) as part:
        part.write_text(json.dumps(found))
    job.result = {"maps": found, "layer": ask["layer"], "branch": first[0].branch}


def _expert(pipe: Any, sample: Sample) -> str:
    """Which of a two-expert pipeline's transformers made a sample: the first makes the noisier steps."""
    boundary = pipe.config.get("boundary_ratio")
    return "transformer" if boundary is None or sample.noise_level >= boundary else "transformer_2"


def _maps(sample: Sample, plan: Plan | None, layer: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Each head's softmax mass [query tiles, key blocks] in its plan's order, and which of it is read exactly."""
    groups = plan.layers[layer].groups if plan is not None else ()
    if not groups:
        # Left to the host's attention, which reads everything.
        whole_layer = HeadPlan(heads=tuple(range(sample.query.shape[1])), selector=Dense())
        groups = (HeadGroup(entries=(whole_layer,)),)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for group in groups:
        for entry in group.entries:
            parts = {name: getattr(sample, name)[:1, list(entry.heads)].float() for name in ("query", "key", "value")}
            problem = pose(replace(sample, **parts), group.order, tile=group.tile, block=group.block)
            blocks, _ = problem.select(entry.selector, entry.rest)
            count = problem.layout.blocks
            reads = level0_reads(blocks, count).view(*blocks.start.shape, count).expand_as(problem.mass)
            found |= {head: (problem.mass[0, place], reads[0, place]) for place, head in enumerate(entry.heads)}
    return found
