"""A short table of cases in which every two settings meet: what a backend is held to where each case costs a second."""

from __future__ import annotations

import itertools
from typing import Any

from .cases import Case

AXES: dict[str, tuple[Any, ...]] = {
    "lists": (
        *("all", "none", "single", "random", "shared", "per_batch"),
        *("some_all", "masked", "unread", "joined", "one_level", "overlapping"),
    ),
    "block": (16, 32, 64, 128),
    "tile": (16, 48, 64, 128),
    "head_dim": (16, 48, 64, 80),
    "factors": ((1,), (1, 4), (1, 2, 4, 8), (1, 16)),
    "layout": ("plain", "shuffled", "gaps", "strided"),
    "tokens": (1, 63, 130, 300),
    "keys": (None, 15, 203),
    "dtype": ("float32", "float16", "bfloat16"),
    "sizes": ((1, 1), (1, 2), (2, 2)),
    "masked_keys": (0.0, 0.4, 1.0),
    "spread": (1.0, 40.0),
}


def pairwise_cases() -> list[tuple[Case, str]]:
    """Cases and the names of their dtypes such that any value of one axis meets any value of any other.

    Greedy: each case takes, axis by axis, the value that meets most of what has not met yet.
    """
    names = list(AXES)
    left = {
        pair
        for (i, a), (j, b) in itertools.combinations(enumerate(names), 2)
        for pair in itertools.product(*([(axis, value) for value in AXES[name]] for axis, name in ((i, a), (j, b))))
        if _possible(a, pair[0][1], b, pair[1][1])
    }
    rows = []
    while left:
        (i, first), (j, second) = min(left, key=repr)
        chosen = {i: first, j: second}
        for axis, name in enumerate(names):
            if axis in chosen:
                continue
            fitting = [v for v in AXES[name] if all(_possible(names[k], w, name, v) for k, w in chosen.items())]
            chosen[axis] = max(fitting, key=lambda v: sum(_pair((axis, v), other) in left for other in chosen.items()))
        left -= {_pair(a, b) for a, b in itertools.combinations(chosen.items(), 2)}
        rows.append({name: chosen[axis] for axis, name in enumerate(names)})
    cases = []
    for row in rows:
        (batch, heads), dtype = row.pop("sizes"), row.pop("dtype")
        cases.append((Case(**row, batch=batch, heads=heads), dtype))
    return cases


def _pair(a: tuple[int, Any], b: tuple[int, Any]) -> tuple[tuple[int, Any], tuple[int, Any]]:
    return (a, b) if a[0] < b[0] else (b, a)


def _possible(a: str, value: Any, b: str, other: Any) -> bool:
    """A list over the coarser levels needs coarser levels."""
    return {(a, value), (b, other)} != {("lists", "overlapping"), ("factors", (1,))}
