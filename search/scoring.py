"""Every candidate held against dense attention, inside the calls of a dense run, so that few calls are ever held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention.correct import Measured, measure
from ..attention.dense import Dense
from ..attention.grid import TokenGrid
from ..attention.plan import Plan
from ..attention.run import PlanRun
from ..attention.schedule import Schedule
from ..kernels.bitsets import BitList, as_list, smaller
from ..kernels.blocklist import BlockList, moved
from .capture import Sample, Seen
from .entry import Call, Entry, entries_of
from .findings import Candidate
from .journal import Journal, Score
from .sensitivity import middle_steps

ROWS = 256
"""Queries of a call that errors are measured on; of longer sequences a sample of their tiles. What a search finds for
`shapes` with twice as many is foretold 2 % less error."""


class Cancelled(Exception):
    """The search was asked to stop; what is finished is kept."""


@dataclass(frozen=True, eq=False)
class Built:
    """What steps read of earlier ones, made once for all that read it.

    lists: of the entries, None for static ones. before: the call, of the same queries, that corrections are measured
    in; earlier: that of the measurement before it, which trends are taken from.
    """

    lists: Sequence[BlockList | BitList | None]
    before: Call | None = None
    earlier: Call | None = None
    _measured: dict[int, Measured] = field(default_factory=dict)

    def blocks(self, number: int, device: torch.device) -> BlockList | None:
        """An entry's list, None where it is static."""
        return None if (found := self.lists[number]) is None else as_list(moved(found, device))

    def measured(self, number: int, entry: Entry, blocks: BlockList) -> Measured:
        """What makes up for what an entry's list leaves out."""
        assert self.before is not None
        if number not in self._measured:
            first = None
            if entry.candidate.correction == "trend" and self.earlier is not None:
                first = _measure(self.earlier, entry, self.earlier.select(entry))
            self._measured[number] = _measure(self.before, entry, blocks, first)
        return self._measured[number]


class ScoringRun(PlanRun):
    """A dense plan that holds every candidate against some of the calls on the way.

    Dynamic lists are those that a run by the plan would read at that step: built at the step that builds them; so are
    corrections, for which the calls of that step are held, and of the measurement before it where a trend is followed.
    Steps that share them are scored together, at the last. Steps at which corrections are measured are exact, and are
    scored only where there are no others.

    schedule: of the plan that is searched for; count: at how many of its sparse steps, those of `middle_steps`.
    takes_part: whether the transformer runs at a noise level, where experts share a run. rows: see `Call`.
    report: called after each scored call. cancelled: asked before each. whole: to be set between runs; one that is not
    whole ends with `Seen` after the last step to score.
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
        self.due: dict[int, int] = {}
        self.whole = True
        self.branches: list[str] = []
        self.grid: TokenGrid | None = None
        self.dtype: torch.dtype | None = None
        self._entries: dict[TokenGrid, list[Entry]] = {}
        # Of each branch and layer, the lists that the steps to come read.
        self._built: dict[tuple[str, int], list[BlockList | BitList | None]] = {}
        self.corrected = any(candidate.correction != "none" for candidate in candidates)
        self.trends = any(candidate.correction == "trend" for candidate in candidates)
        # Of each branch and layer, by step, the calls that scores to come read.
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
            # When each is scored: corrections are measured once for all steps that share them.
            last = {build: step for step, build in self.builds.items()}
            self.due = {
                step: last[build] if self.corrected and build != step else step for step, build in self.builds.items()
            }
        self._built.clear()
        self._held.clear()

    def attend_layer(self, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor | None:
        place, grid = (str(call["branch"]), call["layer"]), call["grid"]
        now: int = call["step"]
        if not self.whole and self.wanted and now > self.wanted[-1]:
            raise Seen
        if grid is not None:
            self.grid, self.dtype = grid, query.dtype
        if place[0] not in self.branches:
            self.branches.append(place[0])
        waiting = [step for step in self.wanted if (self.prompt, step, *place) not in self.journal.scores]
        due = [step for step in waiting if self.due[step] == now]
        later = [step for step in waiting if self.due[step] > now]
        # Whether scores to come read lists that this call builds, or the call itself.
        builds = any(self.builds[step] == now for step in later)
        holds = self.corrected and any(now in self._read_at(step) for step in later)
        if grid is not None and (due or builds or holds):
            if self.cancelled():
                raise Cancelled
            if not bool(torch.isfinite(query.sum() + key.sum() + value.sum())):
                raise ValueError(
                    f"layer {call['layer']} was given NaN or infinity at step {now} of prompt {self.prompt}: "
                    "capture in another dtype (float32 or bfloat16), or check the model's weights"
                )
            sample = Sample(
                source="captured",
                query=query,
                key=key,
                value=value,
                grid=grid,
                layer=call["layer"],
                step=now,
                noise_level=call["noise_level"],
                branch=place[0],
            )
            if grid not in self._entries:
                self._entries[grid] = entries_of(self.candidates, grid, query.device)
            entries = self._entries[grid]
            with torch.no_grad():
                looked = self._call(sample, call, self.builds.get(now, now))
                if builds:
                    self._built[place] = [_kept(looked, entry) for entry in entries]
                if due:
                    self._score(due, looked, entries, call)
                held = {**self._held.get(place, {}), **({now: sample.to("cpu")} if holds else {})}
                wanted = {read for step in later for read in self._read_at(step)}
                self._held[place] = {step: one for step, one in held.items() if step in wanted}
        return super().attend_layer(query, key, value, **call)

    def _read_at(self, step: int) -> set[int]:
        """The steps whose calls a corrected score reads."""
        build = self.builds[step]
        return {step, build, self.earlier.get(build, build)}

    def _score(self, due: Sequence[int], looked: Call, entries: Sequence[Entry], given: dict[str, Any]) -> None:
        """Score the calls of some steps that share what they read, the last of which is the one looked at."""
        now = looked.sample
        place, device = (now.branch, now.layer), now.query.device
        held, build = self._held.get(place, {}), self.builds[due[0]]

        def call_at(step: int) -> Call | None:
            return self._call(held[step].to(device), given, build) if step in held else None

        built = None
        if build != due[0]:
            earlier = self.earlier.get(build)
            built = Built(self._built[place], call_at(build), None if earlier is None else call_at(earlier))
        for step in due:
            call = call_at(step) or looked
            self.journal.add(
                Score(
                    prompt=self.prompt,
                    step=step,
                    branch=now.branch,
                    layer=now.layer,
                    noise_level=call.sample.noise_level,
                    **score(call, entries, built),
                )
            )
            self.report()

    def _call(self, sample: Sample, given: dict[str, Any], build: int) -> Call:
        """The call as what reads a step's build looks at it: always at the same queries, and the calls of a layer that
        read different builds take turns."""
        builds = sorted(set(self.builds.values()))
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


def score(call: Call, entries: Sequence[Entry], built: Built | None = None) -> dict[str, Any]:
    """The parts of a `Score` that a call's tensors tell, each as lists [heads][candidates].

    built: at an earlier step, what the entries read of it; None = each dynamic list is built from this call, at which
    corrections are measured too: those are exact here. Errors are the worst of a batch's items. Those that read
    everything are what errors are held against: theirs is 0.
    """
    sample = call.sample
    heads = sample.query.shape[1]
    columns: dict[str, list[list[float]]] = {"errors": [], "recalls": [], "densities": []}
    exact: Tensor | None = None
    for number, entry in enumerate(entries):
        if isinstance(entry.candidate.selector, Dense):
            for name, value in (("errors", 0.0), ("recalls", 1.0), ("densities", 1.0)):
                columns[name].append([value] * heads)
            continue
        if entry.twin is not None:
            for column in columns.values():
                column.append(column[entry.twin])
            continue
        dense = call.dense(entry)[0].float()
        exact = dense if exact is None else exact
        older = built.blocks(number, sample.query.device) if built else None
        blocks = older or call.select(entry)
        columns["densities"].append(call.density(entry, blocks))
        columns["recalls"].append(call.recall(entry, blocks))
        out = call.attend(entry, blocks)[0]
        if entry.candidate.correction != "none":
            out = built.measured(number, entry, blocks).apply(out, sample.noise_level) if built else dense
        off = (out.float() - dense).square().sum((2, 3)).sqrt()
        columns["errors"].append((off / dense.square().sum((2, 3)).sqrt().clamp(min=1e-12)).amax(0).tolist())
    if exact is None:
        raise ValueError("candidates must hold one that does not read everything: there is nothing to choose")
    turned = {name: [list(row) for row in zip(*column, strict=True)] for name, column in columns.items()}
    return {"rows": exact.shape[2], "norms": exact.square().sum((0, 2, 3)).sqrt().tolist(), **turned}


def _measure(call: Call, entry: Entry, blocks: BlockList, before: Measured | None = None) -> Measured:
    """What `attention.correct.measure` finds of an entry's list at an earlier call."""
    parts = *call.attend(entry, blocks), *call.dense(entry)
    return measure(entry.candidate.correction, *parts, noise_level=call.sample.noise_level, before=before)
