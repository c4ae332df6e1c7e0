"""How far a search depends on its prompts: `python benchmarks/search_stability.py [folder] [out.json]`.

Searches `shapes` with three disjoint sets of prompts, each in a folder of its own under `folder` (runs/stability); a
search that is there already is not made again, one that was interrupted goes on. All three choices are made at one
price list, the first search's, so that they differ by prompts alone. Told are the share of heads that keep their family
and their very candidate, and the use of it: what the choice of one set costs on another set's measurements, beside what
that set would have chosen for itself. Near 1, four prompts are enough.
"""

import json
import sys
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np

from ziggurat.pipelines import load
from ziggurat.pipelines.record import surroundings
from ziggurat.search import run as searching
from ziggurat.search.choose import Problem, choose, total
from ziggurat.search.findings import Findings
from ziggurat.search.measured import MEASURED, Measured
from ziggurat.search.prompts import default_prompts
from ziggurat.search.settle import families_of, knapsack

SETS = 3
PROMPTS = 4
BUDGETS = (0.3, 0.4, 0.5, 0.7)


def main(folder: Path, out: Path) -> None:
    """Search what is not there yet, and compare."""
    told, unseen = default_prompts("shapes")
    every = list(dict.fromkeys([*told, *unseen]))
    assert len(every) >= SETS * PROMPTS, "the shipped prompts are too few for disjoint sets"
    pipe: Any = None
    found: list[Findings] = []
    for number in range(SETS):
        own = folder / f"set-{number}"
        if not (own / "search.json").is_file():
            pipe = pipe or load("shapes", dtype="auto")
            prompts = every[number * PROMPTS : (number + 1) * PROMPTS]
            searching.search(pipe, own, prompts=prompts, proofs=0, resume=(own / "scores.jsonl").is_file(), report=tell)
        found.append(Findings.load(own))
    cost = Measured.model_validate_json((folder / "set-0" / MEASURED).read_bytes()).cost
    problems = [knapsack(one, cost)[0] for one in found]
    constant = knapsack(found[0], cost)[1]
    dense = cost.dense * found[0].calls * found[0].shape.layers
    rows = [stability(found[0], problems, share, share * dense - constant) for share in BUDGETS]
    said = {"prompts": [one.prompts for one in found], "budgets": [row for row in rows if row]}
    fresh = out.with_suffix(".tmp")
    fresh.write_text(json.dumps({**said, **surroundings("cpu")}, indent=1) + "\n")
    fresh.replace(out)


def stability(found: Findings, problems: list[Problem], share: float, seconds: float) -> dict[str, float] | None:
    """The figures at one budget, means over pairs of sets; None where some set has no choice that keeps it."""
    choices = [choose(problem, max_seconds=seconds) for problem in problems]
    picks = [choice.picks for choice in choices if choice is not None]
    if len(picks) < len(problems):
        return None
    families = [families_of(found, one) for one in picks]
    chosen = [[number for layer in one for number in layer or [-1] * found.shape.heads] for one in picks]
    other = [
        total(problems[on], picks[of]).error / max(total(problems[on], picks[on]).error, 1e-12)
        for of, on in permutations(range(len(picks)), 2)
    ]
    row = {
        **{"budget": share, "keep_family": alike(families), "keep_candidate": alike(chosen)},
        **{"error_on_other_prompts": float(np.mean(other)), "worst": float(np.max(other))},
    }
    print(row, flush=True)
    return row


def alike(choices: list[list[Any]]) -> float:
    """Mean share of heads that two choices say the same of."""
    pairs = [zip(one, other, strict=True) for one, other in combinations(choices, 2)]
    return float(np.mean([np.mean([a == b for a, b in pair]) for pair in pairs]))


def tell(stage: str, done: int, count: int) -> None:
    print(f"\r{stage} {done} of {count} ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(Path(given.get(1, "runs/stability")), Path(given.get(2, "benchmarks/search_stability.json")))
