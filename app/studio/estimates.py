"""How long a job will take: what this machine measured, scaled by steps and pixels."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from .jobs import Job

STEEPNESS = 1.2
"""A step's time grows faster than the pixels, by its attention; between linear and quadratic."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """A run's measured seconds: of one step, and of all that is not a step (text, decoding)."""

    step: float
    rest: float
    pixels: int


def pixels_of(ask: dict[str, Any]) -> int:
    return math.prod(ask.get(name) or 1 for name in ("frames", "height", "width"))


class Estimates:
    """Paces by model and plan, from the jobs of this folder and a short trial when a model was loaded.

    A comparison's dense run counts for "none". Where a plan was never run, dense attention's pace is taken.
    """

    def __init__(self, jobs: Iterable[Job] = ()):
        self._paces: dict[tuple[str, str], list[Pace]] = {}
        self._lock = threading.Lock()
        for job in jobs:
            self.learn(job)

    def learn(self, job: Job) -> None:
        """Take up what a finished job measured."""
        for found in job.result.get("paces", ()) if job.kind == "video" else ():
            self.add(job.ask["model"], found["plan"], step=found["step"], rest=found["rest"], pixels=found["pixels"])

    def add(self, model: str, plan: str, *, step: float, rest: float, pixels: int) -> None:
        with self._lock:
            self._paces.setdefault((model, plan), []).append(Pace(step=step, rest=max(rest, 0.0), pixels=pixels))

    def measured(self, model: str) -> bool:
        return any(known == model for known, _ in self._paces)

    def _seconds(self, ask: dict[str, Any], plan: str) -> float | None:
        with self._lock:
            found = list(self._paces.get((ask["model"], plan)) or self._paces.get((ask["model"], "none")) or ())
        if not found:
            return None
        pixels = pixels_of(ask)
        # Those of the sizes nearest to this one.
        away = min(abs(math.log(pace.pixels / pixels)) for pace in found)
        near = [pace for pace in found if abs(math.log(pace.pixels / pixels)) <= away + 0.1][-5:]
        scale = pixels / median(pace.pixels for pace in near)
        step, rest = median(pace.step for pace in near), median(pace.rest for pace in near)
        return step * scale**STEEPNESS * (ask.get("steps") or 1) + rest * scale

    def seconds(self, ask: dict[str, Any]) -> float | None:
        """For a video's settings, a comparison's dense run included; None where nothing was measured."""
        under = self._seconds(ask, ask["plan"])
        if under is None or not ask.get("compare"):
            return under
        return under + (self._seconds(ask, "none") or under)
