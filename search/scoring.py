"""Every candidate held against dense attention, inside the calls of a dense run, so that one call is held at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.dense import Dense
from ..attention.grid import TokenGrid
from ..attention.plan import Plan
from ..attention.run import PlanRun
from ..attention.schedule import Schedule
from ..kernels.attend import attend
from .capture import Sample
from .entry import Call, Entry, entries_of
from .findings import Candidate

ROWS = 1024
"""Queries of a call that errors are measured on; of longer sequences a sample of their tiles."""


class Cancelled(Exception):
    """The search was asked to stop; what is finished is kept."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One layer's call, every candidate: lists [heads][candidates] of relative error, recall and list density.

    norms: of each head's dense output.
    """

    prompt: int
    step: int
    branch: str
    layer: int
    noise_level: float
    rows: int
    norms: list[float]
    errors: list[list[float]]
    recalls: list[list[float]]
    densities: list[list[float]]

    @property
    def place(self) -> tuple[int, int, str, int]:
        return self.prompt, self.step, self.branch, self.layer


class Journal:
    """Finished scores, a line each, appended as they come; a torn last line of an interrupted search is dropped."""

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path = path
        text = json.dumps(header, sort_keys=True)
        self.scores: dict[tuple[int, int, str, int], Score] = {}
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            if not lines or lines[0].strip() != text:
                raise ValueError(
                    f"{path} is of another search (its model, prompts, candidates or steps differ): "
                    "give a new folder, or search without resume"
                )
            whole = [line for line in lines if line.endswith("\n")]
            for line in whole[1:]:
                score = Score(**json.loads(line))
                self.scores[score.place] = score
            if len(whole) < len(lines):
                part = path.with_name(f".{path.name}.part")
                part.write_text("".join(whole))
                part.replace(path)
        else:
            path.write_text(text + "\n")

    def add(self, score: Score) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(score.__dict__) + "\n")
        self.scores[score.place] = score


class ScoringRun(PlanRun):
    """A dense plan that holds every candidate against some of the calls on the way.

    schedule: of the plan that is searched for; count: how many of its sparse steps are measured, spread over them.
    takes_part: whether the transformer runs at a noise level, where experts share a run. rows: see `score`.
    report: called after each scored call. cancelled: asked before each.
    """

    def __init__(
        self,
        plan: Plan,
        candidates: Sequence[Candidate],
        journal: Journal,
        *,
        schedule: Schedule,
        count: int,
        rows: int | None,
        takes_part: Callable[[float], bool],
        report: Callable[[], None],
        cancelled: Callable[[], bool],
    ):
        self.candidates, self.journal, self.wanted_schedule, self.count = candidates, journal, schedule, count
        self.rows, self.takes_part, self.report, self.cancelled = rows, takes_part, report, cancelled
        self.prompt = 0
        self.wanted: list[int] = []
        self.branches: list[str] = []
        self.grid: TokenGrid | None = None
        self.dtype: torch.dtype | None = None
        self._entries: dict[TokenGrid, list[Entry]] = {}
        super().__init__(plan)

    def begin(self, noise_levels: Sequence[float] | None = None) -> None:
        super().begin(noise_levels)
        if noise_levels:
            dense = self.wanted_schedule.is_dense
            own = [(step, level) for step, level in enumerate(noise_levels) if self.takes_part(level)]
            sparse = [step for step, level in own if not dense(level, step)]
            if not sparse:
                raise ValueError(
                    f"schedule leaves none of the transformer's {len(own)} steps of this run sparse: give more steps, "
                    "or lower dense_until, dense_first_steps or dense_from"
                )
            places = torch.linspace(0, len(sparse) - 1, min(self.count, len(sparse))).round().long().unique()
            self.wanted = [sparse[place] for place in places.tolist()]

    def attend_layer(self, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor | None:
        place = (self.prompt, call["step"], str(call["branch"]), call["layer"])
        if call["grid"] is not None:
            self.grid, self.dtype = call["grid"], query.dtype
        if place[2] not in self.branches:
            self.branches.append(place[2])
        if call["step"] in self.wanted and call["grid"] is not None and place not in self.journal.scores:
            if self.cancelled():
                raise Cancelled
            if not bool(torch.isfinite(query.sum() + key.sum() + value.sum())):
                raise ValueError(
                    f"layer {call['layer']} was given NaN or infinity at step {call['step']} of prompt {self.prompt}: "
                    "capture in another dtype (float32 or bfloat16), or check the model's weights"
                )
            sample = Sample(
                source="captured",
                query=query,
                key=key,
                value=value,
                grid=call["grid"],
                layer=call["layer"],
                step=call["step"],
                noise_level=call["noise_level"],
                branch=place[2],
            )
            if sample.grid not in self._entries:
                self._entries[sample.grid] = entries_of(self.candidates, sample.grid, query.device)
            with torch.no_grad():
                found = score(
                    sample,
                    self._entries[sample.grid],
                    call.get("scale"),
                    call.get("key_log_weight"),
                    rows=self.rows,
                    turn=self._turn(sample),
                )
            self.journal.add(
                Score(
                    prompt=self.prompt,
                    step=sample.step,
                    branch=sample.branch,
                    layer=sample.layer,
                    noise_level=sample.noise_level,
                    **found,
                )
            )
            self.report()
        return super().attend_layer(query, key, value, **call)

    def _turn(self, sample: Sample) -> int:
        """A number of the call among those of its layer, the same whenever it is made."""
        own = self.wanted.index(sample.step) * 2 + self.branches.index(sample.branch)
        return self.prompt * 2 * len(self.wanted) + own


def score(
    sample: Sample,
    entries: Sequence[Entry],
    scale: float | None = None,
    key_log_weight: Tensor | None = None,
    *,
    rows: int | None = None,
    turn: int = 0,
) -> dict[str, Any]:
    """The parts of a `Score` that the tensors tell, each as lists [heads][candidates].

    rows: of about how many queries; None = all of them. Then every so many-th tile of each order is measured, and which
    of them goes by `turn`, so that calls of a layer that take turns see them all. Errors are the worst of a batch's
    items. Those that read everything are what errors are held against: theirs is 0.
    """
    visual = sum(segment.tokens for segment in sample.grid.visual)
    every = 1 if rows is None else max(1, -(-visual // rows))
    call = Call(sample, scale=scale, key_log_weight=key_log_weight, every=every, turn=turn)
    heads = sample.query.shape[1]
    columns: dict[str, list[list[float]]] = {"errors": [], "recalls": [], "densities": []}
    exact: dict[int, tuple[Tensor, Tensor]] = {}
    for entry in entries:
        if isinstance(entry.candidate.selector, Dense):
            for name, value in (("errors", 0.0), ("recalls", 1.0), ("densities", 1.0)):
                columns[name].append([value] * heads)
            continue
        if entry.queries not in exact:
            held = call.layout(entry).query_rows
            places = held[held >= 0].long()
            exact[entry.queries] = places, call.dense(entry)[0][:, :, places].float()
        places, dense = exact[entry.queries]
        blocks = call.select(entry)
        columns["densities"].append(call.density(entry, blocks))
        columns["recalls"].append(call.recall(entry, blocks))
        out, _ = attend(sample.query, call.pyramid(entry), blocks, scale=scale)
        off = (out[:, :, places].float() - dense).square().sum((2, 3)).sqrt()
        columns["errors"].append((off / dense.square().sum((2, 3)).sqrt().clamp(min=1e-12)).amax(0).tolist())
    if not exact:
        raise ValueError("candidates must hold one that does not read everything: there is nothing to choose")
    places, dense = next(iter(exact.values()))
    turned = {name: [list(row) for row in zip(*column, strict=True)] for name, column in columns.items()}
    return {"rows": len(places), "norms": dense.square().sum((0, 2, 3)).sqrt().tolist(), **turned}
