"""What became of the attention calls of one transformer in its latest run: the figures behind a handle."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..attention.run import PlanRun


@dataclass(kw_only=True)
class StepRecord:
    """One denoising step of the latest run, as one transformer saw it."""

    step: int
    timestep: float
    noise_level: float
    branches: list[str] = field(default_factory=list)
    sparse_calls: int = 0
    dense_calls: int = 0
    lists_built: int = 0
    attention_seconds: float = 0.0
    seconds: float = 0.0


class RunFigures:
    """Counts of a run, layer by layer and step by step; whoever routes the calls keeps them.

    paths: of the layers' modules. rows: those that dense attention would have touched, batch x heads x queries x keys.
    """

    def __init__(self, plan_run: PlanRun, paths: list[str]):
        self.plan_run, self.paths = plan_run, paths
        self.steps: list[StepRecord] = []
        # Calls of each layer that no plan could take, by the reason.
        self.stock_calls = [Counter[str]() for _ in paths]
        self.planned_rows = self.stock_rows = 0

    def clear(self) -> None:
        """Begin with nothing."""
        self.steps.clear()
        self.planned_rows = self.stock_rows = 0
        for reasons in self.stock_calls:
            reasons.clear()

    @property
    def rows(self) -> float:
        """Rows that dense attention would have touched in the visual self-attention calls of the run."""
        return self.planned_rows + self.stock_rows

    @property
    def rows_touched(self) -> float:
        return self.plan_run.density() * self.planned_rows + self.stock_rows

    def describe_memory(self) -> str:
        """What the latest run kept from step to step, at its most; "" if nothing."""
        reuse = self.plan_run.reuse
        parts = [f"{name} {size / 2**20:.1f} MiB" for name, size in reuse.peak.items()]
        if reuse.unkept:
            parts.append(f"{reuse.unkept} times over {reuse.max_bytes / 2**20:.0f} MiB a branch and rebuilt, not kept")
        return f"kept between steps: {', '.join(parts)}" if parts else ""

    def describe(self, index: int) -> str:
        """What became of a layer in the latest run: sparse, dense, or why not."""
        status = self.plan_run.status()[index]
        parts = []
        if status.state == "sparse":
            parts.append(f"sparse, {status.calls - status.dense_calls} calls at list density {status.list_density:.1%}")
        if status.dense_calls:
            parts.append(f"dense, {status.reason}")
        parts += [f"dense, {reason} ({count} calls)" for reason, count in self.stock_calls[index].items()]
        if not parts:
            absent = (
                "not called (skipped by a cache, or its processor is out of reach)" if self.steps else "not called yet"
            )
            parts.append(absent + (f"; dense, {status.reason}" if status.reason else ""))
        return f"({self.paths[index]}): {'; '.join(parts)}"
