"""attach(pipe, plan): a pipeline of diffusers runs its self-attention by a plan, until the handle is detached."""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import Any

from ..attention.expect import head_densities, mean_density
from ..attention.plan import Grid, Plan
from ..attention.reuse import MAX_CACHE_BYTES
from ..attention.run import PlanRun
from ..attention.tell import sizes
from .clock import RunClock
from .models import row_of
from .plans import fitting, model_shape, resolve_plan, transformers_of
from .routing import StepRecord, TransformerRun, attached
from .ulysses import own_plan


class Handle:
    """A plan at work on a pipeline; also a context manager that detaches on leaving."""

    def __init__(
        self,
        pipe: Any,
        plan: Plan,
        source: str,
        *,
        grid: Grid | None,
        backend: str,
        timing: bool,
        max_cache_bytes: int,
    ):
        self.plan, self.source, self.timing = plan, source, timing
        self._grid = grid
        every = transformers_of(pipe)
        transformers = {name: every[name] for name in fitting(plan, pipe)}
        self._stock = [name for name in every if name not in transformers]
        plan_runs = {
            name: PlanRun(own_plan(plan, transformer), backend=backend, max_cache_bytes=max_cache_bytes)
            for name, transformer in transformers.items()
        }

        def free() -> None:
            for plan_run in plan_runs.values():
                plan_run.end()

        self._clock = RunClock(pipe, free)
        self._runs = {
            name: TransformerRun(transformer, row_of(transformer), plan, plan_runs[name], self._clock, timing=timing)
            for name, transformer in transformers.items()
        }
        self._attached = True

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Leave the pipeline as it was found; the figures of the latest run stay readable. Twice does nothing."""
        if not self._attached:
            return
        self._attached = False
        self._clock.release()
        for run in self._runs.values():
            run.remove()
            run.plan_run.end()

    @property
    def attached(self) -> bool:
        return self._attached

    def drives(self, pipe: Any) -> bool:
        """Does the plan run on this very pipeline now?"""
        return self._attached and self._clock.is_of(pipe)

    @property
    def steps(self) -> list[StepRecord]:
        """The denoising steps of the latest run, in the order they ran."""
        return sorted((step for run in self._latest() for step in run.steps), key=lambda record: record.step)

    @property
    def density(self) -> float | None:
        """Rows touched ÷ all rows over every visual self-attention call of the latest run; None before the first."""
        touched = sum(run.rows_touched for run in self._latest())
        rows = sum(run.rows for run in self._latest())
        return touched / rows if rows else None

    @property
    def list_density(self) -> float:
        """The same over the calls that ran sparse, of two transformers weighed by their calls; 1 before the first."""
        runs = self._latest()
        calls = [sum(step.sparse_calls for step in run.steps) for run in runs]
        if not sum(calls):
            return 1.0
        return sum(run.plan_run.list_density() * count for run, count in zip(runs, calls, strict=True)) / sum(calls)

    @property
    def attention_seconds(self) -> float | None:
        """Seconds in visual self-attention calls of the latest run, sparse and dense; None without `timing`."""
        return sum(step.attention_seconds for step in self.steps) if self.timing else None

    @property
    def transformer_seconds(self) -> float | None:
        """Seconds in the transformers' forwards of the latest run; None without `timing`."""
        return sum(step.seconds for step in self.steps) if self.timing else None

    def _latest(self) -> list[TransformerRun]:
        return [run for run in self._runs.values() if run.in_run(self._clock.run)]

    def summary(self) -> str:
        """One line per layer: sparse, dense or why not; and the density and memory of the latest run."""
        density = "no run yet" if self.density is None else f"density {self.density:.1%} over {len(self.steps)} steps"
        lines = [f"plan {self.source}: {density}"]
        lines += [f"{name}: stock attention, the plan is for {self.plan.expert} alone" for name in self._stock]
        lines += self._extrapolation()
        for name, run in self._runs.items():
            prefix = f"{name} " if len(self._runs) > 1 else ""
            if memory := run.describe_memory():
                lines.append(f"{prefix}{memory}")
            if run.cross is not None:
                lines.append(f"{prefix}cross-attention: {run.cross.describe()}")
            lines += [f"{prefix}layer {index} {run.describe(index)}" for index in range(len(run.paths))]
        return "\n".join(lines)

    def _extrapolation(self) -> list[str]:
        """Where the plan runs at another size than it was made for: that it does, and what it reads there."""
        made = self.plan.grid
        grids = [grid for run in self._latest() for grid in run.visual_grids] or [self._grid or made]
        other = next((grid for grid in grids if grid != made), None)
        if other is None:
            return []
        if self.density is None:
            reads = f"list density {mean_density(head_densities(self.plan, other)):.1%} is to be expected"
        else:
            reads = f"list density {self.list_density:.1%}"
        if known := self.plan.predicted.get("list_density"):
            reads += f", {known:.1%} where it was made"
        return [
            f"extrapolates: made for {sizes(made)} latent patches, runs at {sizes(other)}, "
            f"{math.prod(other) / math.prod(made):.2g} times the tokens; shares hold, sizes in patches stay; {reads}"
        ]

    def schedule(self) -> str:
        """What each step of the latest run does by the plan's schedule, such as "30 steps: 0-5 dense, 6-29 reuse"."""
        return next((run.plan_run.describe_steps() for run in self._latest()), "")


def attach(
    pipe: Any,
    plan: Plan | str | Path,
    *,
    grid: Grid | None = None,
    backend: str = "auto",
    timing: bool = False,
    max_cache_bytes: int = MAX_CACHE_BYTES,
) -> Handle:
    """Run the self-attention of a diffusers pipeline by a plan, until `detach`.

    `plan` is a Plan, the path of one, or "auto": the plan shipped for the model, of several the one made for the grid
    nearest to `grid` (frames, height, width in latent patches). `backend` is the sparse kernel's (`kernels.attend`);
    dense layers keep the attention backend chosen in diffusers, and so do dense steps and cross-attention unless the
    plan says "own" (`dense_by` in its schedule, `cross_by`). `timing` measures the seconds spent in attention; on a GPU
    that synchronises around each call. `max_cache_bytes` is the most memory that the lists and corrections of a
    guidance branch may take between steps; beyond it they are rebuilt instead of kept. Both transformers of a
    two-expert pipeline run the plan, unless it names the one that it is for: then the other may be given a plan of its
    own. Attach before torch.compile, or reset Dynamo afterwards. A plan runs at any size; `summary` tells where that is
    not the one that it was made for.
    Raises ValueError where the plan is not for this model, or the pipeline is attached already; then nothing changed.
    """
    transformers = transformers_of(pipe)
    source, chosen = resolve_plan(plan, model_shape(next(iter(transformers.values()))), grid)
    for name in fitting(chosen, pipe):
        if attached(transformers[name]):
            raise ValueError(f"pipe already has a plan on its {name}: detach that handle first")
    return Handle(pipe, chosen, source, grid=grid, backend=backend, timing=timing, max_cache_bytes=max_cache_bytes)
