"""The shipped plan against stock diffusers: `python benchmarks/default_plan.py [plan] [folder] [out.json] [dtypes]`.

Whole pipelines, text encoder and decoder included, in runs that take turns: the plan, our own kernel with all blocks,
stock attention (SDPA), all in one dtype; bf16 and fp32, 30 steps, at 33x128x128 and at 65x192x192, which the plan was
never made for and where stock attention takes many minutes. Then PSNR against dense over held-out captions. Every run
leaves a file in `folder` (runs/default_plan) and is not made again: interrupt it whenever you like. `dtypes`: bf16,fp32
by default, fp32 alone for chips without bf16 products. On a machine that does nothing else.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ziggurat.attention.plan import Plan
from ziggurat.pipelines import find_plan, load
from ziggurat.pipelines.fidelity import psnr, ssim
from ziggurat.pipelines.generate import Generation, generate, stock_attention
from ziggurat.pipelines.plans import all_block_plan, model_shape
from ziggurat.pipelines.record import surroundings
from ziggurat.search.prompts import default_prompts

SIZES = ((33, 128, 128), (65, 192, 192))
STEPS = 30
ROUNDS = {SIZES[0]: 3, SIZES[1]: 1}
CAPTIONS = {SIZES[0]: 20, SIZES[1]: 1}
"""Captions that PSNR is measured on, in the first dtype, beside the timed ones."""
COLUMNS = ("plan", "all_blocks", "stock")


def main(path: Path | None, folder: Path, out: Path, dtypes: list[str]) -> None:
    """Make the runs that are not there yet, and write what all of them say, after each kind of run anew."""
    folder.mkdir(parents=True, exist_ok=True)
    # Captions that neither training nor a search is given.
    _, prompts = default_prompts("shapes")
    rows: dict[tuple[Any, str], dict[str, Any]] = {}
    kinds = [(size, dtype, ROUNDS[size]) for size in SIZES for dtype in dtypes]
    kinds += [(size, dtypes[0], CAPTIONS[size]) for size in SIZES if CAPTIONS[size] > ROUNDS[size]]
    for size, dtype, captions in kinds:
        pipe: Any = load("shapes", dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        shape = model_shape(pipe.transformer)
        shipped = find_plan(pipe, (17, 16, 16))
        plan = Plan.load(path) if path else shipped[1] if shipped else sys.exit("no plan is shipped for shapes")
        plans = {
            "plan": plan,
            "all_blocks": all_block_plan(shape).model_copy(update={"cross_by": plan.cross_by}),
            "stock": None,
        }
        for number in range(captions):
            # The timed rounds take turns of all columns; the others are for the eye alone.
            for column in COLUMNS if number < ROUNDS[size] else ("plan", "stock"):
                name = folder / f"{dtype}-{size[0]}-{number}-{column}"
                run(pipe, plans[column], prompts[number], number, size, name)
        rows[size, dtype] = told(folder, dtype, size, captions)
        print(rows[size, dtype], flush=True)
        said = {"plan": plan.name, "steps": STEPS, "rows": list(rows.values()), **surroundings("cpu")}
        fresh = out.with_suffix(".tmp")
        fresh.write_text(json.dumps(said, indent=1) + "\n")
        fresh.replace(out)


def run(pipe: Any, plan: Plan | None, prompt: str, seed: int, size: tuple[int, int, int], name: Path) -> None:
    """Make a video, unless its files are there: the frames, then the figures."""
    if name.with_suffix(".json").is_file():
        return
    frames, height, width = size
    settings: dict[str, Any] = {"frames": frames, "height": height, "width": width, "steps": STEPS, "seed": seed}
    if not any(name.parent.glob(f"{name.name[:4]}-{frames}-*.json")):
        # The first run of a size also prepares what later ones find ready.
        generate(pipe, prompt, plan=plan, warn=quiet, **{**settings, "steps": 2})
    with stock_attention(pipe):
        made: Generation = generate(pipe, prompt, plan=plan, warn=quiet, **settings)
    np.save(name.with_suffix(".npy"), made.frames)
    figures = {"prompt": prompt, "seconds": made.seconds, "attention_share": made.attention_share}
    figures |= {"density": made.density, "list_density": made.list_density, "tokens": made.tokens}
    fresh = name.with_suffix(".tmp")
    fresh.write_text(json.dumps(figures) + "\n")
    fresh.replace(name.with_suffix(".json"))
    print(name.name, f"{made.seconds:.1f} s", flush=True)


def told(folder: Path, dtype: str, size: tuple[int, int, int], captions: int) -> dict[str, Any]:
    """The figures of one dtype and size; seconds are medians, each ratio the median of its rounds."""
    first = f"{dtype}-{size[0]}"

    def column(name: str, count: int) -> Iterator[dict[str, Any]]:
        return (json.loads((folder / f"{first}-{number}-{name}.json").read_text()) for number in range(count))

    seconds = {name: [one["seconds"] for one in column(name, ROUNDS[size])] for name in COLUMNS}
    near = [
        [np.load(folder / f"{first}-{number}-{name}.npy") for name in ("stock", "plan")] for number in range(captions)
    ]
    plan = next(column("plan", 1))
    return {
        **{"dtype": dtype, "frames": size[0], "height": size[1], "width": size[2], "tokens": plan["tokens"]},
        **{f"{name}_seconds": statistics.median(taken) for name, taken in seconds.items()},
        "to_stock": statistics.median(b / a for a, b in zip(seconds["plan"], seconds["stock"], strict=True)),
        "to_all_blocks": statistics.median(b / a for a, b in zip(seconds["plan"], seconds["all_blocks"], strict=True)),
        "rounds": ROUNDS[size],
        "density": plan["density"],
        "captions": captions,
        "psnr": statistics.median(psnr(dense, sparse) for dense, sparse in near),
        "psnr_least": min(psnr(dense, sparse) for dense, sparse in near),
        "ssim": statistics.median(ssim(dense, sparse) for dense, sparse in near),
    }


def quiet(_message: str) -> None:
    """The plan is meant for another size where it runs at one."""


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    path = given.get(1, "auto")
    main(
        None if path == "auto" else Path(path),
        Path(given.get(2, "runs/default_plan")),
        Path(given.get(3, "benchmarks/default_plan.json")),
        given.get(4, "bf16,fp32").split(","),
    )
