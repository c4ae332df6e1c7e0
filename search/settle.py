"""From scores, sensitivities and costs to the front: the knapsack that the solver is given, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..attention.tell import STOCK
from .choose import Choice, Problem, choose, total
from .cost import Cost
from .findings import Findings, Point
from .journal import Score

FOLDS = 4
POINTS = 14
"""Budgets of the front, from the least time that there is to that of no error."""
PATIENCE = 10.0
"""Seconds for each of them: of heads that are all alike, the best is found at once and proved to be it in minutes."""


def gathered(
    scores: Sequence[Score], layers: int, sensitivities: Sequence[float], quantile: float
) -> dict[str, list[list[list[float]]] | list[list[float]]]:
    """Errors at the quantile, mean recalls and densities, [layer][head][candidate]; weights [layer][head]."""
    found: dict[str, list] = {"errors": [], "recalls": [], "densities": [], "weights": []}
    for layer in range(layers):
        own = [score for score in scores if score.layer == layer]
        if not own:
            raise ValueError(f"layer {layer} was never called: its attention is out of reach, so no plan can be found")
        # Of few measurements a quantile between two is the higher one: worst means worst.
        errors = np.quantile(np.array([score.errors for score in own]), quantile, axis=0, method="higher")
        found["errors"].append(errors.tolist())
        found["recalls"].append(np.array([score.recalls for score in own]).mean(0).tolist())
        found["densities"].append(np.array([score.densities for score in own]).mean(0).tolist())
        norms = np.array([score.norms for score in own])
        shares = (norms / np.linalg.norm(norms, axis=1, keepdims=True).clip(min=1e-30)).mean(0)
        found["weights"].append((sensitivities[layer] * shares).tolist())
    return found


def knapsack(found: Findings, cost: Cost) -> tuple[Problem, float]:
    """The solver's problem, in seconds of a run, and the seconds that no choice changes: the schedule's dense steps."""
    layers, heads = found.shape.layers, found.shape.heads
    sparse = found.calls - found.dense_calls
    densities, weights = np.array(found.densities), np.array(found.weights)
    seconds = np.empty_like(densities)
    for number, candidate in enumerate(found.candidates):
        call = cost.seconds(number, candidate, densities[:, :, number], heads, found.tokens)
        own = sparse * call + cost.select[number] * found.refreshes * found.branches
        if candidate.correction != "none":
            # Measured at every refresh, beside dense attention.
            own = own + found.refreshes * found.branches * cost.dense / heads
        elif candidate.selector.needs_lse and not (found.dense_calls and found.schedule.dense_by == "own"):
            # No dense step of our own kernel lends its lse: the first sparse step of each branch runs dense for it.
            own = own + found.branches * np.maximum(cost.dense / heads - call, 0)
        seconds[:, :, number] = own
    layouts = [candidate.layout for candidate in found.candidates]
    numbers = {layout: number for number, layout in enumerate(dict.fromkeys(layouts))}
    problem = Problem(
        errors=np.array(found.errors) * weights[:, :, None],
        seconds=seconds,
        groups=[numbers[layout] for layout in layouts],
        launch=cost.launch * sparse,
        stock=cost.stock * sparse,
    )
    dense = cost.dense if found.schedule.dense_by == "own" else cost.stock
    return problem, found.dense_calls * dense * layers


def front(found: Findings, problem: Problem, constant: float, report: Callable[[str, int, int], None]) -> list[Point]:
    """The best choices over a range of budgets, of rising time and falling error, none beaten by another."""
    fastest = choose(problem, max_error=float(problem.errors.max(2).sum()) + 1.0)
    exact = choose(problem, max_error=0.0)
    # Every layout has a candidate that reads everything.
    assert fastest is not None
    assert exact is not None
    ends = max(fastest.seconds, 1e-9), max(exact.seconds, 2e-9)
    choices = [fastest, exact]
    for number, seconds in enumerate(np.geomspace(*ends, POINTS)[1:-1].tolist()):
        choice = choose(problem, max_seconds=seconds, patience=PATIENCE)
        choices += [choice] if choice is not None else []
        report("choice", number + 1, POINTS - 2)
    return pareto([point_of(found, choice, constant) for choice in choices])


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both time and error, fastest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda one: (one.seconds, one.error)):
        if not kept or point.error < kept[-1].error:
            kept.append(point)
    return kept


def point_of(found: Findings, choice: Choice, constant: float) -> Point:
    """A choice as a point of the front."""
    heads = found.shape.layers * found.shape.heads
    sparse = (found.calls - found.dense_calls) / found.calls
    # Of sparse steps, those where corrections are measured run dense.
    exact = min(1.0, found.refreshes * found.branches / max(found.calls - found.dense_calls, 1))
    read = 0.0
    for layer, picks in enumerate(choice.picks):
        for head, number in enumerate(picks or ()):
            dense = exact if found.candidates[number].correction != "none" else 0.0
            read += dense + (1 - dense) * found.densities[layer][head][number]
        read += found.shape.heads if picks is None else 0
    density = sparse * read / heads + 1 - sparse
    return Point(seconds=choice.seconds + constant, error=choice.error, density=density, picks=choice.picks)


def bounded(
    found: Findings, problem: Problem, constant: float, *, max_seconds: float | None, max_error: float | None
) -> tuple[int, Findings, bool]:
    """The front with the best choice within the bound on it, that choice's number, and whether the bound holds; the
    nearest choice where nothing keeps it."""
    if max_error is not None:
        choice = choose(problem, max_error=max_error)
    else:
        assert max_seconds is not None
        choice = choose(problem, max_seconds=max_seconds - constant)
    if choice is None:
        return (0 if max_error is None else len(found.front) - 1), found, False
    point = point_of(found, total(problem, choice.picks), constant)
    others = [one for one in found.front if one.picks != point.picks]
    points = sorted([*others, point], key=lambda one: (one.seconds, one.error))
    return points.index(point), found.model_copy(update={"front": points}), True


def families_of(found: Findings, picks: Sequence[list[int] | None]) -> list[str]:
    """The family of every head of a choice, layer by layer."""
    heads = found.shape.heads
    return [
        found.candidates[number].family if number is not None else STOCK
        for layer in picks
        for number in (layer or [None] * heads)
    ]


def steadiness(
    found: Findings, cost: Cost, scores: Sequence[Score], picks: Sequence[list[int] | None], max_seconds: float
) -> float | None:
    """The share of heads that keep their family whichever quarter of the prompts is left out; None of one prompt.

    max_seconds: of the choice, without what no choice changes.
    """
    prompts = sorted({score.prompt for score in scores})
    folds = [prompts[place :: min(FOLDS, len(prompts))] for place in range(min(FOLDS, len(prompts)))]
    if len(folds) < 2:
        return None
    kept = np.ones(len(picks) * found.shape.heads, dtype=bool)
    mine = families_of(found, picks)
    for fold in folds:
        others = [score for score in scores if score.prompt not in fold]
        own = found.model_copy(update=gathered(others, len(picks), found.sensitivities, found.quantile))
        choice = choose(knapsack(own, cost)[0], max_seconds=max_seconds)
        if choice is not None:
            kept &= [a == b for a, b in zip(mine, families_of(found, choice.picks), strict=True)]
    return float(kept.mean())
