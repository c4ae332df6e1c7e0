"""The exact choice: one candidate for every head, within a bound on error or on time (a multiple-choice knapsack)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..attention.plan import MAX_GROUPS

GAP = 1e-3
SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """errors: [layers, heads, candidates], already weighted, to be summed. seconds: [layers, heads, candidates], per
    run. groups: the number of the layout that each candidate wants, [candidates]. launch: seconds per run of one head
    group of a layer. stock: seconds per run of a whole layer that runs stock attention, whose error is 0."""

    errors: np.ndarray
    seconds: np.ndarray
    groups: Sequence[int]
    launch: float
    stock: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """picks: for each layer a candidate's number for each head, or None for stock attention."""

    picks: list[list[int] | None]
    error: float
    seconds: float


def choose(
    problem: Problem, *, max_error: float | None = None, max_seconds: float | None = None, patience: float = SECONDS
) -> Choice | None:
    """The choice of least seconds within `max_error`, or of least error within `max_seconds`; None if there is none.

    Solved by HiGHS to within a thousandth of the best, or as near as it comes in `patience` seconds. A layer has at
    most three head groups, each of which costs a launch, or runs stock as a whole. Candidates that are no better than
    another of the same layout in anything are left out first: that changes no optimum.

    Raises ValueError unless exactly one bound is given.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if (max_error is None) == (max_seconds is None):
        raise ValueError("choose takes one bound, max_error or max_seconds: give one of them")
    layers, heads, _ = problem.errors.shape
    layouts = np.asarray(problem.groups)
    kinds = sorted(set(problem.groups))
    items = [(la, h, c) for la in range(layers) for h in range(heads) for c in _useful(problem, la, h, layouts)]
    index = {(la, h): [] for la in range(layers) for h in range(heads)}
    for number, (la, h, _) in enumerate(items):
        index[la, h].append(number)
    # After the items come each layer's groups, then each layer's switch to stock attention.
    first_group, first_stock = len(items), len(items) + layers * len(kinds)
    size = first_stock + layers
    error, seconds = np.zeros(size), np.zeros(size)
    for number, item in enumerate(items):
        error[number], seconds[number] = problem.errors[item], problem.seconds[item]
    seconds[first_group:first_stock] = problem.launch
    seconds[first_stock:] = problem.stock

    rows: list[tuple[dict[int, float], float, float]] = []
    for la in range(layers):
        stock = first_stock + la
        groups = {kind: first_group + la * len(kinds) + place for place, kind in enumerate(kinds)}
        for h in range(heads):
            rows.append(({**dict.fromkeys(index[la, h], 1.0), stock: 1.0}, 1.0, 1.0))
            for kind, group in groups.items():
                members = [number for number in index[la, h] if layouts[items[number][2]] == kind]
                if members:
                    rows.append(({**dict.fromkeys(members, 1.0), group: -1.0}, -np.inf, 0.0))
        rows.append((dict.fromkeys(groups.values(), 1.0), -np.inf, float(MAX_GROUPS)))
    bounded, goal = (error, seconds) if max_error is not None else (seconds, error)
    # Both sums are scaled to about 1, or the solver's tolerances would swallow small ones.
    limit = max_error if max_error is not None else max_seconds
    assert limit is not None
    scale = max(float(np.abs(bounded).max()), 1e-30)
    rows.append(({int(n): bounded[n] / scale for n in np.flatnonzero(bounded)}, -np.inf, limit / scale * (1 + 1e-9)))
    entries = [(r, n, value) for r, (row, _, _) in enumerate(rows) for n, value in row.items()]
    r, n, value = zip(*entries, strict=True)
    matrix: Any = csr_array((value, (r, n)), shape=(len(rows), size))
    unit = max(float(np.abs(goal).max()), 1e-30)
    low: Any = np.array([row[1] for row in rows])
    high: Any = np.array([row[2] for row in rows])
    result = milp(
        goal / unit,
        constraints=LinearConstraint(matrix, low, high),
        integrality=np.ones(size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP, "time_limit": patience},
    )
    if result.x is None:
        return None
    taken = result.x > 0.5
    picks: list[list[int] | None] = []
    for la in range(layers):
        if taken[first_stock + la]:
            picks.append(None)
        else:
            picks.append([next(items[n][2] for n in index[la, h] if taken[n]) for h in range(heads)])
    return total(problem, picks)


def total(problem: Problem, picks: list[list[int] | None]) -> Choice:
    """A choice and what it adds up to."""
    error = seconds = 0.0
    for la, layer in enumerate(picks):
        if layer is None:
            seconds += problem.stock
            continue
        error += sum(float(problem.errors[la, h, c]) for h, c in enumerate(layer))
        seconds += sum(float(problem.seconds[la, h, c]) for h, c in enumerate(layer))
        seconds += problem.launch * len({problem.groups[c] for c in layer})
    return Choice(picks=picks, error=error, seconds=seconds)


def _useful(problem: Problem, layer: int, head: int, layouts: np.ndarray) -> list[int]:
    """A head's candidates that no other of the same layout beats or equals in both error and time."""
    error, seconds = problem.errors[layer, head], problem.seconds[layer, head]
    found: list[int] = []
    for kind in np.unique(layouts):
        least = np.inf
        members = np.flatnonzero(layouts == kind)
        for number in members[np.lexsort((error[members], seconds[members]))]:
            if error[number] < least:
                least = error[number]
                found.append(int(number))
    return found
