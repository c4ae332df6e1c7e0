"""When sparse attention runs and when dynamic lists are rebuilt, in noise level rather than in steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import isfinite, log
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Action = Literal["dense", "refresh", "reuse"]
Level = Annotated[float, Field(ge=0, le=1)]


TOLERANCE = 1e-6
"""Levels this near count as equal: hosts compute them in float32, plans hold them in decimal."""
LEAST_SIGNAL = 1e-3
"""Pure noise has none, whose logarithm is no number."""


def log_signal(noise_level: float) -> float:
    """log(1 - noise level): the clock by which a video takes shape. Fast at first, when outlines appear."""
    return log(max(1 - noise_level, LEAST_SIGNAL))


class Schedule(BaseModel):
    """What each denoising step does, for any number of steps.

    The noise level is the timestep that the model sees, after any shift, divided by the number of training timesteps:
    1 is pure noise (early), 0 the finished video (late).

    dense_until: steps of a higher level run dense: 1 = none, 0.9 = until the noise has fallen to 0.9.
    dense_from: steps of a lower level run dense: 0 = none.
    refresh_at: levels, falling; the first sparse step at or below each rebuilds the dynamic lists. The first sparse
        step of a run always does; static lists never need it.
    dense_first_steps: run at least this many steps dense, whatever their level.
    dense_first_layers, dense_last_layers, dense_layers: layers that never run sparse: so many at either end, and those
        whose path matches a pattern such as "blocks.0.*".
    dense_by: who runs dense steps: None = the host's chosen attention, "own" = this package's kernel over all blocks,
        which is the faster one on some devices. Dense layers are always the host's.
    share_branches: guidance branches read the list of whichever of them comes first, instead of each its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dense_until: Level = 1.0
    dense_from: Level = 0.0
    refresh_at: tuple[Level, ...] = ()
    dense_first_steps: Annotated[int, Field(ge=0)] = 0
    dense_first_layers: Annotated[int, Field(ge=0)] = 0
    dense_last_layers: Annotated[int, Field(ge=0)] = 0
    dense_layers: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = ()
    share_branches: bool = False
    dense_by: Literal["own"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if any(later >= earlier for earlier, later in zip(self.refresh_at, self.refresh_at[1:], strict=False)):
            raise ValueError(f"refresh_at must fall from level to level, got {self.refresh_at}")
        if self.dense_from > self.dense_until:
            raise ValueError(f"dense_from must not exceed dense_until {self.dense_until}, got {self.dense_from}")
        return self

    @classmethod
    def from_steps(
        cls,
        noise_levels: Sequence[float],
        *,
        dense_first: int = 0,
        dense_last: int = 0,
        refresh: Sequence[int] = (),
        refresh_every: int | None = None,
    ) -> Schedule:
        """The schedule that does this at these steps of a run with these (falling) noise levels.

        refresh_every: refresh at every so many steps after the first sparse one, beside those of `refresh`.
        """
        steps = len(noise_levels)
        if refresh_every is not None:
            if refresh_every < 1:
                raise ValueError(f"refresh_every must be at least 1, got {refresh_every}")
            refresh = sorted({*refresh, *range(dense_first + refresh_every, steps - dense_last, refresh_every)})
        if dense_first + dense_last > steps or min(dense_first, dense_last) < 0:
            raise ValueError(f"dense_first and dense_last must fit {steps} steps, got {dense_first} and {dense_last}")
        if any(not 0 <= step < steps for step in refresh):
            raise ValueError(f"refresh must hold steps in 0 ... {steps - 1}, got {list(refresh)}")
        return cls(
            dense_until=1.0 if not dense_first else noise_levels[dense_first] if dense_first < steps else 0.0,
            dense_from=noise_levels[steps - dense_last - 1] if 0 < dense_last < steps else 0.0,
            refresh_at=tuple(noise_levels[step] for step in sorted(refresh)),
        )

    def is_dense(self, noise_level: float, step: int) -> bool:
        """Whether a step runs dense. Raises ValueError for a noise level outside 0 ... 1."""
        if not (isfinite(noise_level) and 0 <= noise_level <= 1):
            raise ValueError(f"noise_level must lie in 0 ... 1, got {noise_level}: divide by num_train_timesteps")
        early = noise_level > self.dense_until + TOLERANCE
        return early or self.is_over(noise_level) or step < self.dense_first_steps

    def is_over(self, noise_level: float) -> bool:
        """Whether this step and all that follow run dense."""
        return noise_level < self.dense_from - TOLERANCE

    def epoch(self, noise_level: float) -> int:
        """How many refresh levels the noise has reached: a list built in an earlier epoch is rebuilt."""
        return sum(noise_level <= level + TOLERANCE for level in self.refresh_at)

    def refreshes_after(self, noise_level: float) -> bool:
        """Whether a refresh is still to come below this level."""
        return any(self.dense_from - TOLERANCE <= level < noise_level - TOLERANCE for level in self.refresh_at)

    def steps(self, noise_levels: Sequence[float]) -> tuple[Action, ...]:
        """What each step of a run with these noise levels does."""
        actions: list[Action] = []
        built = -1
        for step, noise_level in enumerate(noise_levels):
            if self.is_dense(noise_level, step):
                actions.append("dense")
                continue
            epoch = self.epoch(noise_level)
            actions.append("refresh" if epoch != built else "reuse")
            built = epoch
        return tuple(actions)

    def describe(self, noise_levels: Sequence[float]) -> str:
        """The steps that result, for people: "0-5 dense, 6 refresh, 7-29 reuse"."""
        ranges = []
        for action, group in groupby(enumerate(self.steps(noise_levels)), key=lambda pair: pair[1]):
            numbers = [step for step, _ in group]
            span = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
            ranges.append(f"{span} {action}")
        return ", ".join(ranges)
