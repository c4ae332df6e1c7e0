"""What a batch costs above `pipe(...)`: seconds an item in a batch, writing included, over those of the bare call.

python -P benchmarks/batch_overhead.py [--items 6] [--model shapes] [--device cpu] [--out FILE]
"""

import argparse
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ziggurat.pipelines import generate_many, load
from ziggurat.pipelines.record import surroundings
from ziggurat.pipelines.request import Request, call_arguments, complete
from ziggurat.pipelines.settings import model_settings

PROMPT = "a large red circle moving left"


def bare(model: str, device: str, dtype: str, items: int) -> list[float]:
    """The seconds of each `pipe(...)` of stock diffusers, of the second on."""
    pipe: Any = load(model, device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    spent = []
    for seed in range(items + 1):
        request, _ = complete(pipe, Request(prompt=PROMPT, seed=seed), model_settings(pipe), compare=False)
        started = time.perf_counter()
        pipe(**call_arguments(pipe, request), generator=torch.Generator("cpu").manual_seed(seed), output_type="np")
        spent.append(time.perf_counter() - started)
    return spent[1:]


def batch(model: str, device: str, dtype: str, items: int) -> list[float]:
    """The seconds from each item of a batch to the next: call, encoding, record and manifest."""
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        result = generate_many(
            model,
            [PROMPT],
            folder,
            plan="none",
            seeds=items + 1,
            device=device,
            dtype=dtype,
            progress=lambda done, _total, _outcome: ends.append(time.perf_counter()) if done else None,
        )
    assert result is not None
    assert result.ok
    return [later - earlier for earlier, later in pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=6)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    alone = bare(asked.model, asked.device, asked.dtype, asked.items)
    together = batch(asked.model, asked.device, asked.dtype, asked.items)
    overhead = median(together) / median(alone) - 1
    told = {"model": Path(asked.model).name, "items": asked.items, "overhead": overhead}
    seconds = {"pipe": alone, "batch": together}
    asked.out.write_text(json.dumps({**told, "seconds": seconds, **surroundings(asked.device)}, indent=1) + "\n")
    print(f"pipe(...) {median(alone):.3f} s, in a batch {median(together):.3f} s an item: {overhead:+.1%}")


if __name__ == "__main__":
    main()
