"""`ziggurat bench`: what methods are worth, measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .bench_kernels import kernels
from .console import Debug, note, progress_bars, quiet_libraries

app = typer.Typer(
    help="Measure what methods and kernels are worth.\n\nExample: ziggurat bench fidelity", no_args_is_help=True
)
app.command()(kernels)

MORE = "May be repeated."
Prompts = Annotated[list[str] | None, typer.Option(help=MORE, show_default="two of the model's")]
Layers = Annotated[list[int] | None, typer.Option(help=MORE, show_default="first, middle, last")]
Orders = Annotated[list[str] | None, typer.Option(help=MORE, show_default="raster, temporal, hilbert")]
Densities = Annotated[list[float] | None, typer.Option(help=MORE, show_default="0.05 ... 0.5")]
Overheads = Annotated[list[int] | None, typer.Option(help="Also time selection at 4096, 4352 or 65536 tokens.")]


@app.callback()
def bench() -> None:
    pass


@app.command()
def fidelity(
    model: Annotated[str, typer.Option(help="shapes, a folder, or none: synthetic maps alone.")] = "shapes",
    out: Annotated[Path, typer.Option(help="The picture to write, a PNG.")] = Path("outputs/fidelity.png"),
    prompt: Prompts = None,
    layer: Layers = None,
    order: Orders = None,
    density: Densities = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of the captured runs.")] = 10,
    frames: Annotated[int | None, typer.Option(min=1, show_default="the model's")] = None,
    size: Annotated[int | None, typer.Option(min=16, help="Height and width.", show_default="the model's")] = None,
    tile: Annotated[int, typer.Option(min=1, help="Queries that share a list.")] = 128,
    block: Annotated[int, typer.Option(min=2, help="Keys in a block.")] = 16,
    overhead: Overheads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Last line of output: the rows as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """How near each selector comes to dense attention, on captured calls and on maps of a known kind.

    Example: ziggurat bench fidelity --model shapes --density 0.1 --density 0.25 --json
    """
    quiet_libraries()
    from ..pipelines.record import surroundings
    from ..search import bench as benching

    with progress_bars({"capture": "capture", "bench": "selectors"}) as report:
        result = benching.run(
            None if model == "none" else model,
            out,
            prompts=prompt,
            layers=layer,
            orders=order or benching.ORDERS,
            densities=density or benching.DENSITIES,
            steps=steps,
            frames=frames,
            size=size,
            tile=tile,
            block=block,
            overheads=overhead or (),
            report=report,
        )
    for line in benching.summary(result):
        print(line)
    note(f"picture  {out}")
    if as_json:
        said: dict[str, Any] = {"rows": [asdict(row) for row in result.rows], "to_topk": result.to_topk}
        print(json.dumps({**said, "overhead": [asdict(one) for one in result.overhead], **surroundings()}))
