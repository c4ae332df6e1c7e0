"""Every candidate held against dense attention, inside the calls of a dense run, so that one call is held at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.grid import TokenGrid
from ..attention.plan import Plan
from ..attention.run import PlanRun
from ..attention.schedule import Schedule
from ..kernels.attend import attend
from ..kernels.blocklist import BlockList
from ..kernels.listops import all_blocks
from ..kernels.pyramid import build_pyramid
from .capture import Sample
from .entry import Entry, density_of, entries_of
from .findings import Candidate

MOST_ROWS = 16384
"""Query rows of a call that errors are measured on; of longer sequences a sample of their tiles."""


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
        report: Callable[[], None],
        cancelled: Callable[[], bool],
    ):
        self.candidates, self.journal, self.wanted_schedule, self.count = candidates, journal, schedule, count
        self.report, self.cancelled = report, cancelled
        self.prompt = 0
        self.wanted: Collection[int] = ()
        self.grid: TokenGrid | None = None
        self.dtype: torch.dtype | None = None
        self._entries: dict[TokenGrid, list[Entry]] = {}
        super().__init__(plan)

    def begin(self, noise_levels: Sequence[float] | None = None) -> None:
        super().begin(noise_levels)
        if noise_levels:
            sparse = [step for step, level in enumerate(noise_levels) if not self.wanted_schedule.is_dense(level, step)]
            if not sparse:
                raise ValueError("schedule leaves no step of this run sparse: lower dense_first_steps or dense_from")
            places = torch.linspace(0, len(sparse) - 1, min(self.count, len(sparse))).round().long().unique()
            self.wanted = [sparse[place] for place in places.tolist()]

    def attend_layer(self, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor | None:
        place = (self.prompt, call["step"], str(call["branch"]), call["layer"])
        if call["grid"] is not None:
            self.grid, self.dtype = call["grid"], query.dtype
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
                self._entries[sample.grid] = entries_of(self.candidates, sample.grid)
            with torch.no_grad():
                found = score(sample, self._entries[sample.grid], call.get("scale"), call.get("key_log_weight"))
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


def score(
    sample: Sample, entries: Sequence[Entry], scale: float | None = None, key_log_weight: Tensor | None = None
) -> dict[str, Any]:
    """The parts of a `Score` that the tensors tell, each as lists [heads][candidates].

    Errors are the worst of a batch's items. Of a sequence longer than MOST_ROWS every so many-th tile is measured.
    """
    query = sample.query
    heads = query.shape[1]
    columns: dict[str, list[list[float]]] = {"errors": [], "recalls": [], "densities": []}
    dense: tuple[Tensor, Tensor] | None = None
    norms: list[float] = []
    rows = 0
    for entry in entries:
        every = max(1, -(-sample.grid.tokens // MOST_ROWS))
        chosen = torch.arange(0, entry.layout.tiles, every)
        if dense is None:
            pyramid = build_pyramid(
                sample.key,
                sample.value,
                entry.layout.key_rows,
                block=entry.layout.block,
                key_log_weight=key_log_weight,
            )
            # All of it: selectors that start from a dense step's lse have it for every query.
            dense = attend(query, pyramid, all_blocks(entry.layout.query_rows, entry.layout.block), scale=scale)
            norms = dense[0].float().square().sum((0, 2, 3)).sqrt().tolist()
        blocks, pyramid = entry.select(sample, dense[1], scale, key_log_weight)
        columns["densities"].append(density_of(blocks, pyramid, heads))
        columns["recalls"].append(entry.recall(sample, blocks, dense[1], scale, key_log_weight))
        few = blocks if every == 1 else tiles_of(blocks, chosen)
        held = few.query_rows[few.query_rows >= 0].long()
        rows = len(held)
        out, _ = attend(query, pyramid, few, scale=scale)
        off = (out[:, :, held].float() - dense[0][:, :, held].float()).square().sum((2, 3)).sqrt()
        exact = dense[0][:, :, held].float().square().sum((2, 3)).sqrt()
        columns["errors"].append((off / exact.clamp(min=1e-12)).amax(0).tolist())
    turned = {name: [list(row) for row in zip(*column, strict=True)] for name, column in columns.items()}
    for entry in entries:
        entry.forget()
    return {"rows": rows, "norms": norms, **turned}


def tiles_of(blocks: BlockList, tiles: Tensor) -> BlockList:
    """The list of some of the query tiles."""
    names = ("start", "count", "masked_count", "mask_start")
    parts = {name: getattr(blocks, name)[..., tiles] for name in names}
    return replace(blocks, query_rows=blocks.query_rows[:, tiles], **parts)
