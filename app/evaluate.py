"""`ziggurat evaluate`: does a video show its sentence, and what does a plan cost?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import Debug, note, progress_bars, quiet_libraries


def evaluate(
    model: Annotated[str, typer.Option(help="shapes, or a folder of a model trained like it.")] = "shapes",
    plan: Annotated[str | None, typer.Option(help="auto, or a plan file.", show_default="dense alone")] = None,
    captions: Annotated[int, typer.Option(min=1, help="How many held-out captions.")] = 400,
    first: Annotated[int, typer.Option(min=0, help="Number of the first: so several machines share them out.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 16,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the model's own")] = None,
    dense_by: Annotated[
        str, typer.Option(help="Who runs the dense videos: stock attention, or own: our kernel, all blocks, faster.")
    ] = "stock",
    floors: Annotated[int, typer.Option(min=0, help="Captions whose floors of PSNR and SSIM are measured.")] = 8,
    card: Annotated[bool, typer.Option("--card", help="Write the score into the model's README.md.")] = False,
    cache: Annotated[Path, typer.Option(help="Finished videos; the same folder resumes.")] = Path("runs/evaluate"),
    figures: Annotated[
        Path | None,
        typer.Option(
            help="What was found of each video, here or elsewhere.", show_default="figures.jsonl in the cache"
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (fastest on this chip), fp32, bf16 or fp16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Last line of output: the result as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Score the embedded model on captions it was never trained on, dense and under a plan.

    Example: ziggurat evaluate --plan auto --captions 40
    """
    quiet_libraries()
    from ..pipelines.loading import find_model, load
    from ..pipelines.record import surroundings
    from ..pipelines.shapes import evaluate as evaluating
    from ..pipelines.shapes.card import write_score

    if dense_by not in ("stock", "own"):
        raise ValueError(f"--dense-by must be stock or own, got {dense_by!r}")
    folder = find_model(model)
    if card and folder is None:
        raise ValueError(f"--card writes into the model's folder, and {model} is a Hub id: give a folder")
    pipe: Any = load(model, dtype=dtype)
    note(f"{model}: {str(pipe.transformer.dtype).removeprefix('torch.')}, {captions} captions; kept in {cache}")
    pipe.set_progress_bar_config(disable=True)
    labels = {"dense": "dense", "plan": "under the plan", "floors": "floors"}
    with progress_bars(labels) as report:
        result = evaluating.evaluate(
            pipe,
            plan,
            captions=captions,
            first=first,
            steps=steps,
            guidance=guidance,
            dense_by=dense_by,
            floors=floors,
            cache=cache,
            figures=figures,
            report=report,
        )
    for line in summary(result):
        print(line)
    if card and folder is not None:
        write_score(folder, result)
    if as_json:
        print(json.dumps({"model": model, **result, **surroundings(str(pipe._execution_device))}))


def summary(result: dict[str, Any]) -> list[str]:
    """The scores in a few lines for people."""
    lines = []
    for name in ("dense", "sparse"):
        scores = {attribute: score["share"] for attribute, score in result.get(name, {}).items()}
        if scores:
            lines.append(f"{name:8} " + ", ".join(f"{attribute} {share:.1%}" for attribute, share in scores.items()))
    if "lost" in result:
        lost = result["lost"]
        lines.append(
            f"lost     {lost['count']} of {lost['of']} that dense gets right"
            f" ({lost['share']:.1%}, at most {lost['high']:.1%}) at density {result['density']:.1%}"
        )
        lines += [f"         {one['caption']}, seed {one['seed']}" for one in result["lost_at"]]
    return lines
