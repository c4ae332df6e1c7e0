"""The pictures of a search that take another look at the model: attention maps with the chosen lists over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attention.plan import Plan
from ..attention.run import PlanRun
from ..pipelines.clock import RunClock
from ..pipelines.models import row_of
from ..pipelines.routing import TransformerRun
from .capture import Sample, Seen, until_seen
from .entry import Call, entries_of
from .findings import Candidate, Findings
from .report import write_report
from .sensitivity import Forward

Maps = dict[str, tuple[Tensor, Tensor]]
"""Title: softmax mass [query tiles, key blocks] of a head, and bool of that shape, which of them its list reads."""


class MapsRun(PlanRun):
    """A dense plan that looks at some heads on the way, and ends with `Seen`.

    wanted: for each layer, heads and the candidate that each is looked at with.
    """

    def __init__(self, plan: Plan, wanted: Mapping[int, Mapping[int, Candidate]]):
        self.wanted = wanted
        self.maps: Maps = {}
        super().__init__(plan)

    def attend_layer(self, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor | None:
        layer, grid = call["layer"], call["grid"]
        if grid is not None:
            for head, candidate in self.wanted.get(layer, {}).items():
                one = slice(head, head + 1)
                part = query[:1, one], key[:1, one], value[:1, one]
                sample = Sample(source="captured", query=part[0], key=part[1], value=part[2], grid=grid)
                with torch.no_grad():
                    self.maps[f"layer {layer}, head {head}: {candidate}"] = map_of(sample, candidate)
        if layer == max(self.wanted):
            raise Seen
        return super().attend_layer(query, key, value, **call)


def map_of(sample: Sample, candidate: Candidate) -> tuple[Tensor, Tensor]:
    """One head's softmax mass [query tiles, key blocks] in the candidate's order, and which of it its list reads."""
    (entry,) = entries_of([candidate], sample.grid)
    call = Call(sample)
    mass, reads = call.mass(entry), call.reads(entry, call.select(entry))
    return mass[0, 0].float(), reads.expand_as(mass)[0, 0]


def look(
    pipe: Any,
    transformer: nn.Module,
    found: Findings,
    forward: Forward,
    wanted: Mapping[int, Mapping[int, Candidate]],
) -> Maps:
    """The maps of some heads in a forward that was kept."""
    run = MapsRun(Plan.dense(grid=(1, 1, 1), **asdict(found.shape)), wanted)
    clock = RunClock(pipe)
    hooks = TransformerRun(transformer, row_of(transformer), run.plan, run, clock, timing=False)
    try:
        with torch.no_grad():
            until_seen(pipe, partial(transformer, *forward.args, **forward.kwargs))
    finally:
        hooks.remove()
        clock.release()
    return run.maps


def draw_all(
    folder: Path,
    found: Findings,
    plan: Plan,
    pipe: Any,
    transformer: nn.Module,
    forwards: Sequence[Forward],
    videos: dict[str, tuple[np.ndarray, np.ndarray]],
) -> Path:
    """The report of a search, with the maps of one head of each family that was chosen, and of the first layer's, in
    the middle one of the forwards that were kept."""
    assert found.chosen is not None
    picks = found.front[found.chosen].picks
    wanted: dict[int, dict[int, Candidate]] = {}
    seen: set[str] = set()
    for layer, heads in enumerate(picks):
        for head, number in enumerate(heads or ()):
            candidate = found.candidates[number]
            if candidate.family not in seen or layer == head == 0:
                seen.add(candidate.family)
                wanted.setdefault(layer, {})[head] = candidate
    maps = look(pipe, transformer, found, forwards[len(forwards) // 2], wanted) if wanted else {}
    return write_report(folder, found, plan, maps, videos)
