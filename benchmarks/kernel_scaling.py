"""How the torch backend's time per row read depends on the number of tokens, on raggedness and on uneven tiles.

`python benchmarks/kernel_scaling.py [out.json]`, on a machine that does nothing else. Every figure is the median of
rounds in which all settings take turns, and is given beside that of the table's first setting of 8,192 tokens.
"""

import json
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ziggurat.kernels import bench
from ziggurat.kernels.attend import attend
from ziggurat.pipelines.record import surroundings

BASE = bench.Setting(dtype="bfloat16", tokens=8192, head_dim=64, backend="torch")
ROUNDS = 5
LENGTHS = (4096, 8192, 16384, 32768, 65536)


def table(settings: list[bench.Setting]) -> list[dict[str, Any]]:
    """A row for each setting: nanoseconds per pair of query and key row read."""
    problems = [bench.build(setting) for setting in settings]
    seconds: list[list[float]] = [[] for _ in settings]
    with torch.no_grad():
        for _ in range(ROUNDS):
            for problem, taken in zip(problems, seconds, strict=True):
                # Untimed: the setting before leaves caches and the allocator's memory to its own size.
                attend(problem.query, problem.pyramid, problem.blocks, backend="torch")
                begin = time.perf_counter()
                attend(problem.query, problem.pyramid, problem.blocks, backend="torch")
                taken.append(time.perf_counter() - begin)
    rows = []
    for setting, problem, taken in zip(settings, problems, seconds, strict=True):
        density = problem.blocks.density(problem.pyramid)
        median = statistics.median(taken)
        read = density * problem.pyramid.rows * setting.tokens * setting.heads
        rows.append(
            {
                **{"tokens": setting.tokens, "head_dim": setting.head_dim, "dtype": setting.dtype},
                **{"uneven": setting.uneven, "density": round(density, 5), "seconds": median},
                "picoseconds_per_pair": 1e12 * median / read,
            }
        )
    base = next(row["picoseconds_per_pair"] for row in rows if row["tokens"] == BASE.tokens)
    for row in rows:
        row["to_base"] = row["picoseconds_per_pair"] / base
        print(row, flush=True)
    return rows


def main(out: Path) -> None:
    """Time the tables and write them."""
    shapes = [BASE, replace(BASE, tokens=8191), replace(BASE, tokens=8200), replace(BASE, uneven=True)]
    result = {"shapes": table(shapes)}
    for name, density in (("lengths", 0.125), ("lengths_sparse", 0.03)):
        result[name] = table([replace(BASE, tokens=tokens, density=density) for tokens in LENGTHS])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    fresh = out.with_suffix(".tmp")
    fresh.write_text(json.dumps({**result, "peak_process_bytes": peak, **surroundings("cpu")}, indent=1) + "\n")
    fresh.replace(out)


if __name__ == "__main__":
    main(Path(next(iter(sys.argv[1:]), "benchmarks/kernel_scaling.json")))
