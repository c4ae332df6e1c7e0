"""A searched plan against the best of one candidate alone: `python benchmarks/search_singles.py FOLDER [out.json]`.

FOLDER is a search's, of `shapes`. Of each family the candidate is taken that, used in every layer and head alone, has
the least error of those predicted to take no more than a tenth more time than the chosen plan; all of them and the plan
then run on the held-out prompts in turns. Told are measured attention seconds, the search's weighted sum of relative
errors, PSNR, and whether any that measured no slower has less error. On a machine that does nothing else.
"""

import json
import sys
from pathlib import Path
from typing import Any

from ziggurat.pipelines import load
from ziggurat.pipelines.record import surroundings
from ziggurat.search import figures
from ziggurat.search.choose import Choice
from ziggurat.search.findings import Findings, Point
from ziggurat.search.prove import Prover
from ziggurat.search.settle import point_of

SLACK = 1.1


def main(folder: Path, out: Path) -> None:
    """Run the plan and its rivals, and write how they compare."""
    found = Findings.load(folder)
    assert found.chosen is not None, "the search did not come to its end"
    point = found.front[found.chosen]
    pipe: Any = load("shapes", dtype=found.dtype)
    best: dict[str, tuple[float, int]] = {}
    for number, (family, seconds, error) in enumerate(figures.singles(found)):
        if seconds <= SLACK * point.seconds and error < best.get(family, (float("inf"), 0))[0]:
            best[family] = error, number
    points = {"the plan": point, **{str(found.candidates[n]): alone(found, n) for _, n in best.values()}}
    rivals = found.model_copy(update={"front": list(points.values()), "proofs": []})
    settings = {"steps": found.steps, "guidance": found.guidance}
    prover = Prover(pipe=pipe, prompts=found.held_out, settings=settings, seed=found.seed + 1000, expert=found.expert)
    rows = []
    for number, (name, one) in enumerate(points.items()):
        proof, _ = prover.prove(rivals.plan(number), number)
        rows.append(
            {
                **{"name": name, "error": one.error, "predicted_seconds": one.seconds},
                **{"attention_seconds": proof.attention_seconds, "psnr": proof.psnr, "density": proof.density},
            }
        )
        print(rows[-1], flush=True)
    mine, *others = rows
    slower = [one for one in others if one["attention_seconds"] > mine["attention_seconds"]]
    beaten = all(one["error"] > mine["error"] for one in others if one not in slower)
    said = {"search": str(folder), "rows": rows, "no_single_as_fast_has_less_error": beaten, **surroundings("cpu")}
    fresh = out.with_suffix(".tmp")
    fresh.write_text(json.dumps(said, indent=1) + "\n")
    fresh.replace(out)


def alone(found: Findings, number: int) -> Point:
    """One candidate in every layer and head."""
    _, seconds, error = figures.singles(found)[number]
    picks: list[list[int] | None] = [[number] * found.shape.heads for _ in range(found.shape.layers)]
    return point_of(found, Choice(picks=picks, error=error, seconds=seconds), constant=0)


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(Path(given.get(1, "runs/search")), Path(given.get(2, "benchmarks/search_singles.json")))
