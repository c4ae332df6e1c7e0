"""Each selector alone on the embedded model: `python benchmarks/single_selectors.py plans`, and then others.

`plans` writes assets/plans/selectors/, fitted on captured calls of the checkpoint in assets. `table` runs 32 held-out
captions with each of them (finished videos are kept, so that it resumes) and writes benchmarks/selectors.json. `times`
adds seconds to it, on a machine that does nothing else, plans, stock and our own kernel taking turns. `page` makes
docs/selectors.md of it and of benchmarks/fidelity.json, the last line of
`ziggurat bench fidelity --prompt PROMPT --order hilbert --density 0.05 --density 0.1 --density 0.15 --density 0.3
--overhead 4096 --overhead 4352 --overhead 65536 --json`.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from ziggurat.attention.plan import Plan
from ziggurat.pipelines import load
from ziggurat.pipelines.generate import generate
from ziggurat.pipelines.plans import find_plan, model_shape
from ziggurat.pipelines.record import surroundings
from ziggurat.pipelines.shapes.card import recipe_of
from ziggurat.pipelines.shapes.evaluate import all_block_plan, evaluate
from ziggurat.search.bench import PROMPTS, captured
from ziggurat.search.single import ALONE, single_plan

ROOT = Path(__file__).parents[1]
PLANS = ROOT / "assets" / "plans" / "selectors"
FIGURES = ROOT / "benchmarks" / "selectors.json"
DENSITIES = (0.15, 0.3)
CAPTIONS = 32
STEPS = 10
TIMED = 3
VIDEOS = """# Each selector alone

Plans of `assets/plans/selectors/`: one selector in every layer and head, about 15 % and 30 % list density with what the
pooled rest reads, on {captions} held-out captions at {steps} steps. Lost: of the captions that dense attention gets
right, those that the plan gets wrong; dense videos are made by our own kernel with all blocks, some 53 dB from stock's.
PSNR and SSIM are medians against them, with the same seeds. Seconds are medians of {timed} videos in rounds, beside
{stock:.1f} s of stock diffusers and {own:.1f} s of our own kernel reading all blocks, in those rounds too. Plans run
cross-attention by our kernel, and so does the latter. The checkpoint is the one whose training ended with
"{trained}" (see [its card](../assets/shapes/README.md)).

| plan | list density | right | lost | PSNR, dB | SSIM | seconds | of stock | of all blocks |
|---|---|---|---|---|---|---|---|---|
"""
ERRORS = """
## Relative error

Median relative error of attention's output on captured calls, as a multiple of plain top-k's, at list densities up to
15 %, equal density, one prompt, hilbert order ([benchmarks/fidelity.json](../benchmarks/fidelity.json), which has maps
of known kinds too; `ziggurat bench fidelity --prompt PROMPT --order hilbert`, densities 5 to 30 %).

![Error against density and against time](pictures/fidelity.png)

| selector | error ÷ that of top-k |
|---|---|
"""
COSTS = """
## What finding the lists costs

Order, pyramid and selection as a share of the sparse attention that they serve: list density 12.5 %, head_dim 128,
blocks of 64, float32, a refresh every fifth step, all heads of a group at once. `pyramid` scores a quarter of the
queries on a quarter of the keys, as published, which is more than a fifth of attention where tokens are few. `precise`
sums every score, which is half of dense attention's products: at a refresh every fifth step that alone comes to 80 % of
attention over an eighth of the blocks. It is meant to refresh once or twice a run.

| tokens | heads | selector | list density | share | µs a token and head |
|---|---|---|---|---|---|
"""


def plans() -> None:
    """Fit and write the plans; the schedule is that of the plan shipped for the model."""
    pipe: Any = load("shapes")
    shape = model_shape(pipe.transformer)
    shipped = find_plan(pipe)
    assert shipped is not None
    schedule = shipped[1].schedule
    samples = captured("shapes", PROMPTS[:1], None, steps=STEPS, frames=None, size=None)
    PLANS.mkdir(parents=True, exist_ok=True)
    for name in ALONE:
        for density in DENSITIES:
            plan = single_plan(name, density, samples, shape, schedule=schedule)
            plan = plan.model_copy(update={"cross_by": shipped[1].cross_by})
            path = plan.save(PLANS / f"{name}-{density:.0%}.json".replace("%", ""))
            print(path.relative_to(ROOT), plan.predicted)


def table() -> None:
    """Evaluate every plan."""
    pipe: Any = load("shapes")
    pipe.set_progress_bar_config(disable=True)
    results = {}
    for path in sorted(PLANS.glob("*.json")):
        results[path.stem] = evaluate(
            pipe,
            Plan.load(path),
            captions=CAPTIONS,
            steps=STEPS,
            dense_by="own",
            floors=0,
            cache=ROOT / "runs" / "selectors",
            report=told,
        )
        print(path.stem, results[path.stem]["lost"], results[path.stem]["fidelity"]["psnr"], flush=True)
    said = {"steps": STEPS, "trained": recipe_of(ROOT / "assets" / "shapes"), "plans": results}
    FIGURES.write_text(json.dumps({**said, **surroundings()}, indent=1) + "\n")


def times() -> None:
    """Time every plan, stock and all blocks in rounds; medians go to where `table` has written."""
    pipe: Any = load("shapes")
    pipe.set_progress_bar_config(disable=True)
    said = json.loads(FIGURES.read_text())
    columns: dict[str, Plan | None] = {name: Plan.load(PLANS / f"{name}.json") for name in said["plans"]}
    everything = all_block_plan(model_shape(pipe.transformer)).model_copy(update={"cross_by": "own"})
    columns |= {"stock": None, "all_blocks": everything}
    generate(pipe, PROMPTS[0], plan=columns["all_blocks"], steps=2)
    made = {name: [] for name in columns}
    for seed in range(TIMED):
        for name, plan in columns.items():
            made[name].append(generate(pipe, PROMPTS[0], plan=plan, seed=seed, steps=STEPS))
            print(seed, name, made[name][-1].seconds, flush=True)
    seconds = {name: statistics.median(one.seconds for one in runs) for name, runs in made.items()}
    said |= {"stock_seconds": seconds.pop("stock"), "all_blocks_seconds": seconds.pop("all_blocks")}
    for name, taken in seconds.items():
        said["plans"][name] |= {"seconds": taken, "list_density": made[name][0].list_density}
    FIGURES.write_text(json.dumps(said, indent=1) + "\n")


def page() -> None:
    """Write docs/selectors.md from the two files of figures."""
    said, bench = (json.loads(path.read_text()) for path in (FIGURES, FIGURES.with_name("fidelity.json")))
    stock, own = said["stock_seconds"], said["all_blocks_seconds"]
    text = VIDEOS.format(
        captions=CAPTIONS,
        steps=said["steps"],
        timed=TIMED,
        stock=stock,
        own=own,
        trained=said["trained"][-1],
    )
    for name, result in said["plans"].items():
        right, lost, near = result["sparse"]["all"], result["lost"], result["fidelity"]
        text += (
            f"| {name} | {result['list_density']:.1%} | {right['count']} of {right['of']} "
            f"| {lost['count']} of {lost['of']} | {near['psnr']['median']:.1f} | {near['ssim']['median']:.3f} "
            f"| {result['seconds']:.1f} | {result['seconds'] / stock:.2f} | {result['seconds'] / own:.2f} |\n"
        )
    text += ERRORS
    for name, ratio in sorted(bench["to_topk"]["captured"].items(), key=lambda pair: pair[1]):
        text += f"| {name} | {ratio:.2f} |\n"
    text += COSTS
    for one in bench["overhead"]:
        text += (
            f"| {one['tokens']:,} | {one['heads']} | {one['selector']} | {one['list_density']:.1%} "
            f"| {one['share']:.0%} | {one['microseconds_per_token']:.2f} |\n"
        )
    (ROOT / "docs" / "selectors.md").write_text(text)


def told(stage: str, done: int, total: int) -> None:
    print(f"\r{stage} {done} of {total} ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    {"plans": plans, "table": table, "times": times, "page": page}[sys.argv[1] if len(sys.argv) > 1 else "plans"]()
