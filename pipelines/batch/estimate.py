"""How long a batch will take and how large it will be, from what its folder has seen; else it is said to be unknown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from .items import Item


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """seconds, bytes: of all the items; None where nothing like them has been made here. measured: items behind it."""

    seconds: float | None
    bytes: int | None
    measured: int


def estimate(items: Sequence[Item], entries: Iterable[Mapping[str, Any]], workers: int) -> Estimate:
    """What items will take, of items that this folder has made: the median of equal work, else scaled.

    Time scales with steps and pixels, though attention's does more steeply; size with pixels.
    """
    done = [entry for entry in entries if entry.get("status") == "done" and entry.get("seconds")]
    if not done:
        return Estimate(seconds=None, bytes=None, measured=0)
    equal: dict[tuple[Any, ...], list[float]] = {}
    for entry in done:
        work = tuple(entry.get(name) for name in ("plan", "frames", "height", "width", "steps"))
        equal.setdefault(work, []).append(entry["seconds"])
    medians = {work: median(found) for work, found in equal.items()}
    pace = median(entry["seconds"] / (_pixels(entry) * (entry.get("steps") or 1)) for entry in done)
    density = median((entry.get("bytes") or 0) / _pixels(entry) for entry in done)
    seconds = size = 0.0
    for item in items:
        asked = vars(item.request)
        pixels = _pixels(asked)
        seconds += float(medians.get(item.work) or pace * pixels * (asked["steps"] or 1))
        size += density * pixels
    return Estimate(seconds=seconds / workers, bytes=round(size), measured=len(done))


def _pixels(values: Mapping[str, Any]) -> float:
    return math.prod(values.get(name) or 1 for name in ("frames", "height", "width"))
