"""`ziggurat train`: the embedded model, from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Debug

app = typer.Typer(
    help="Train a model that comes with Ziggurat.\n\nExample: ziggurat train shapes", no_args_is_help=True
)


@app.callback()
def train() -> None:
    pass


@app.command()
def shapes(
    out: Annotated[Path, typer.Option(help="The diffusers folder to write.")] = Path("runs/shapes/model"),
    run: Annotated[Path, typer.Option(help="Where states are kept; the same folder resumes.")] = Path("runs/shapes"),
    start: Annotated[Path | None, typer.Option(help="A checkpoint to go on from.", show_default=False)] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A plan of the checkpoint, for the stage that trains under it.")
    ] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage; may be repeated.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of each stage.", show_default="its own")] = None,
    precision: Annotated[str, typer.Option(help="bf16, no (float32), or auto: whichever is fast here.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the transformer.")] = True,
    seed: Annotated[int, typer.Option(help="Source of everything random.")] = 0,
    debug: Debug = False,
) -> None:
    """Train the miniature of Wan on captioned clips of moving shapes; resumes where it stopped.

    Example: ziggurat train shapes --out runs/shapes/model --run runs/shapes
    """
    from ..attention.plan import Plan
    from ..pipelines.shapes.train import train

    train(
        out,
        run=run,
        start=start,
        plan=None if plan is None else Plan.load(plan),
        stages=stage or (),
        steps=steps,
        mixed_precision=precision,
        compiled=compiled,
        seed=seed,
    )
    print(f"out      {out}")
