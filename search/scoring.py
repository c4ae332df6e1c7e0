"""Every candidate held against dense attention, inside the calls of a dense run, so that one call is held at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.correct import Measured, measure
from ..attention.dense import Dense
from ..attention.grid import TokenGrid
from ..attention.plan import Plan
from ..attention.run import PlanRun
from ..attention.schedule import Schedule
from ..kernels.attend import attend
from ..kernels.bitsets import BitList, as_list, smaller
from ..kernels.blocklist import BlockList, moved
from .capture import Sample
from .entry import Call, Entry, entries_of
from .findings import Candidate
from .sensitivity import middle_steps

ROWS = 512
"""Queries of a call that errors are measured on; of longer sequences a sample of their tiles. What a search finds for
`shapes` with twice as many is foretold 2 % less error."""


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

    Dynamic lists are those that a run by the plan would read at that step: built at the step that builds them; so are
    corrections, for which the calls of that step are held, and of the measurement before it where a trend is followed.
    Steps at which corrections are measured are exact, and are scored only where there are no others.

    schedule: of the plan that is searched for; count: at how many of its sparse steps, those of `middle_steps`.
    takes_part: whether the transformer runs at a noise level, where experts share a run. rows: see `Call`.
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
        self.sparse: list[int] = []
        self.wanted: list[int] = []
        self.builds: dict[int, int] = {}
        self.earlier: dict[int, int] = {}
        self.branches: list[str] = []
        self.grid: TokenGrid | None = None
        self.dtype: torch.dtype | None = None
        self._entries: dict[TokenGrid, list[Entry]] = {}
        # Of each branch and layer, the lists that the steps to come read.
        self._built: dict[tuple[str, int], list[BlockList | BitList | None]] = {}
        self.corrected = any(candidate.correction != "none" for candidate in candidates)
        self.trends = any(candidate.correction == "trend" for candidate in candidates)
        # The calls of each branch and layer that corrections are measured in, by step: the last two at most.
        self._held: dict[tuple[str, int], dict[int, Sample]] = {}
        super().__init__(plan)

    def begin(self, noise_levels: Sequence[float] | None = None) -> None:
        super().begin(noise_levels)
        if noise_levels:
            dense = self.wanted_schedule.is_dense
            own = [(step, level) for step, level in enumerate(noise_levels) if self.takes_part(level)]
            self.sparse = sparse = [step for step, level in own if not dense(level, step)]
            if not sparse:
                raise ValueError(
                    f"schedule leaves none of the transformer's {len(own)} steps of this run sparse: give more steps, "
                    "or lower dense_until, dense_first_steps or dense_from"
                )
            epochs = {step: self.wanted_schedule.epoch(noise_levels[step]) for step in sparse}
            # The step whose lists are read at each one: the first of its epoch.
            builds = {step: next(one for one in sparse if epochs[one] == epochs[step]) for step in sparse}
            reused = [step for step in sparse if builds[step] != step]
            self.wanted = middle_steps(noise_levels, reused if self.corrected and reused else sparse, self.count)
            self.builds = {step: builds[step] for step in self.wanted}
            # The measurement before each: trends are taken from it.
            firsts = sorted(set(builds.values()))
            self.earlier = dict(zip(firsts[1:], firsts, strict=False)) if self.trends else {}
        self._built.clear()
        self._held.clear()

    def attend_layer(self, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor | None:
        place = (self.prompt, call["step"], str(call["branch"]), call["layer"])
        now, grid = call["step"], call["grid"]
        if grid is not None:
            self.grid, self.dtype = grid, query.dtype
        if place[2] not in self.branches:
            self.branches.append(place[2])
        waiting = [step for step in self.wanted if (place[0], step, *place[2:]) not in self.journal.scores]
        measured = now in waiting
        # Whether steps to come read lists that this one builds, or what it measures.
        builds = any(self.builds[step] == now < step for step in waiting)
        holds = builds or any(self.earlier.get(self.builds[step]) == now for step in waiting)
        if grid is not None and (measured or holds):
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
            entries = self._entries[sample.grid]
            with torch.no_grad():
                if holds and self.corrected:
                    held = self._held.get(place[2:], {})
                    kept = {step: one for step, one in held.items() if step == self.earlier.get(now)}
                    self._held[place[2:]] = {**kept, now: sample.to("cpu")}
                looked = self._call(sample, call, now)
                if builds:
                    self._built[place[2:]] = [_kept(looked, entry) for entry in entries]
                if measured:
                    lists, before, earlier = None, None, None
                    build = self.builds[now]
                    if build != now:
                        lists = self._built[place[2:]]
                        if self.corrected:
                            held = self._held[place[2:]]
                            before = self._call(held[build].to(query.device), call, now)
                            if build in self.earlier:
                                earlier = self._call(held[self.earlier[build]].to(query.device), call, now)
                    found = score(looked, entries, lists, before, earlier)
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

    def _call(self, sample: Sample, given: dict[str, Any], step: int) -> Call:
        """The call as `step` looks at it: those of a layer take turns, the same whenever they are made, and steps that
        read one build's lists look at the same queries."""
        builds = sorted(set(self.builds.values()))
        build = self.builds.get(step, step)
        # A measurement that trends are taken from alone is looked at by the steps that follow them.
        own = (builds.index(build) if build in builds else 0) * 2 + self.branches.index(sample.branch)
        return Call(
            sample,
            scale=given.get("scale"),
            key_log_weight=given.get("key_log_weight"),
            rows=self.rows,
            turn=self.prompt * 2 * len(builds) + own,
        )


def _kept(call: Call, entry: Entry) -> BlockList | BitList | None:
    """An entry's list, to be read at a later step, in the smaller of its forms and in the CPU's memory: many wait.
    None of static ones."""
    if entry.blocks is not None:
        return None
    return moved(smaller(call.select(entry), call.pyramid(entry)), "cpu")


def score(
    call: Call,
    entries: Sequence[Entry],
    lists: Sequence[BlockList | BitList | None] | None = None,
    before: Call | None = None,
    earlier: Call | None = None,
) -> dict[str, Any]:
    """The parts of a `Score` that a call's tensors tell, each as lists [heads][candidates].

    lists: of the entries, built at an earlier step; None = each dynamic one is built from this call. before: the same
    queries at the step that corrections are measured at; None = at this one, which is exact. earlier: the same at the
    measurement before that, which trends are taken from. Errors are the worst of a batch's items. Those that read
    everything are what errors are held against: theirs is 0.
    """
    sample = call.sample
    heads = sample.query.shape[1]
    columns: dict[str, list[list[float]]] = {"errors": [], "recalls": [], "densities": []}
    exact: dict[int, tuple[Tensor, Tensor]] = {}
    for number, entry in enumerate(entries):
        if isinstance(entry.candidate.selector, Dense):
            for name, value in (("errors", 0.0), ("recalls", 1.0), ("densities", 1.0)):
                columns[name].append([value] * heads)
            continue
        if entry.queries not in exact:
            held = call.layout(entry).query_rows
            places = held[held >= 0].long()
            exact[entry.queries] = places, call.dense(entry)[0][:, :, places].float()
        places, dense = exact[entry.queries]
        built = lists[number] if lists else None
        blocks = as_list(moved(built, sample.query.device)) if built is not None else call.select(entry)
        columns["densities"].append(call.density(entry, blocks))
        columns["recalls"].append(call.recall(entry, blocks))
        out = attend(sample.query, call.pyramid(entry), blocks, scale=call.scale)[0][:, :, places]
        kind = entry.candidate.correction
        if kind != "none" and before is None:
            out = dense
        elif kind != "none" and before is not None:
            first = None
            if kind == "trend" and earlier is not None:
                first = _measured(earlier, entry, earlier.select(entry), places)
            out = _measured(before, entry, blocks, places, first).apply(out, sample.noise_level)
        off = (out.float() - dense).square().sum((2, 3)).sqrt()
        columns["errors"].append((off / dense.square().sum((2, 3)).sqrt().clamp(min=1e-12)).amax(0).tolist())
    if not exact:
        raise ValueError("candidates must hold one that does not read everything: there is nothing to choose")
    places, dense = next(iter(exact.values()))
    turned = {name: [list(row) for row in zip(*column, strict=True)] for name, column in columns.items()}
    return {"rows": len(places), "norms": dense.square().sum((0, 2, 3)).sqrt().tolist(), **turned}


def _measured(call: Call, entry: Entry, blocks: BlockList, places: Tensor, before: Measured | None = None) -> Measured:
    """What `attention.correct.measure` finds of an entry's list at an earlier call, for some queries."""
    out, lse = attend(call.sample.query, call.pyramid(entry), blocks, scale=call.scale)
    parts = (part[:, :, places] for part in (out, lse, *call.dense(entry)))
    return measure(entry.candidate.correction, *parts, noise_level=call.sample.noise_level, before=before)
