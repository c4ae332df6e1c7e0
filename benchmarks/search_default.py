"""The default search, timed, and plans across its front: `python benchmarks/search_default.py [folder] [out.json]`.

What `ziggurat search --across 5` does with `shapes`: the chosen plan and five spread over the front run on held-out
prompts, beside what was predicted of them. A search that is in `folder` (runs/search_default) already is only told of.
On a machine that does nothing else.
"""

import json
import sys
import time
from pathlib import Path

from ziggurat.pipelines import load
from ziggurat.pipelines.record import surroundings
from ziggurat.search import figures
from ziggurat.search import run as searching
from ziggurat.search.findings import Findings

ACROSS = 5


def main(folder: Path, out: Path) -> None:
    """Search, unless it is done, and write how near the predictions came."""
    spent = folder / "seconds.json"
    if not (folder / "search.json").is_file():
        begun, stages = time.monotonic(), dict[str, float]()

        def report(stage: str, done: int, total: int) -> None:
            # Of proofs the first is the chosen plan's: the rest a default search does without.
            if done == total:
                stages.setdefault(stage, time.monotonic() - begun)

        searching.search(load("shapes", dtype="auto"), folder, across=ACROSS, report=report)
        spent.write_text(json.dumps({"seconds": time.monotonic() - begun, "stages_end": stages}))
    found = Findings.load(folder)
    rows = [
        {
            **{"chosen": proof.point == found.chosen, "density": proof.density, "psnr": proof.psnr, "ssim": proof.ssim},
            **{"predicted_seconds": point.seconds, "attention_seconds": proof.attention_seconds},
            "off_by": proof.attention_seconds / point.seconds - 1,
            **{"seconds": proof.seconds, "own_dense_seconds": proof.own_dense_seconds},
            "stock_seconds": proof.stock_seconds,
        }
        for point, proof in figures.proved(found)
    ]
    said = {
        **(json.loads(spent.read_text()) if spent.is_file() else {}),
        **{"steps": found.steps, "tokens": found.tokens, "dtype": found.dtype, "candidates": len(found.candidates)},
        **{"prompts": len(found.prompts), "steady": found.steady, "corrected": found.corrected},
        **{"worst_off_by": max(abs(float(row["off_by"])) for row in rows), "plans": rows},
    }
    fresh = out.with_suffix(".tmp")
    fresh.write_text(json.dumps({**said, **surroundings("cpu")}, indent=1) + "\n")
    fresh.replace(out)


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(Path(given.get(1, "runs/search_default")), Path(given.get(2, "benchmarks/search_default.json")))
