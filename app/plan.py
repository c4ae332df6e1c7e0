"""`ziggurat plan`: what a plan file says, whether it is valid, and where two of them differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .console import Debug, note, quiet_libraries, sentence, show_traceback

app = typer.Typer(help="Look into plan files.\n\nExample: ziggurat plan show plan.json", no_args_is_help=True)
File = Annotated[Path, typer.Argument(help="A plan's JSON file.")]
Json = Annotated[bool, typer.Option("--json", help="Last line of output: the same as JSON.")]
TROUBLE = 2


@app.callback()
def plan() -> None:
    pass


@app.command()
def show(
    file: File,
    picture: Annotated[
        Path | None, typer.Option(help="Draw layers and heads into this PNG.", show_default=False)
    ] = None,
    grid: Annotated[
        str | None, typer.Option(metavar="FxHxW", help="Latent patches.", show_default="the plan's own")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a plan does: grid, schedule, figures, and for each layer its groups and heads.

    Densities are those to expect of the lists on the plan's own grid, or on another one.

    Example: ziggurat plan show runs/search/plan.json --grid 17x16x16
    """
    from ..attention.expect import head_densities, mean_density
    from ..attention.plan import Plan
    from ..attention.tell import describe, families
    from ..search.heatmap import heatmap, save

    other = None if grid is None else parse_grid(grid)
    found = Plan.load(file)
    densities, names = head_densities(found, other), families(found)
    for line in describe(found, densities, other):
        print(line)
    if picture is not None:
        if picture.suffix.lower() != ".png" or not picture.absolute().parent.is_dir():
            raise ValueError(f"--picture must name a .png in a folder that exists, got {picture}")
        save(heatmap(found, densities), picture)
        note(f"picture     {picture}")
    if as_json:
        said = found.model_dump(mode="json", exclude_none=True, exclude={"layers"})
        dense = {number: layer.dense for number, layer in enumerate(found.layers) if layer.dense is not None}
        print(
            json.dumps(
                {"plan": str(file), **said, "layers": len(found.layers), "families": names}
                | {"densities": densities, "density": mean_density(densities), "dense": dense}
                | ({} if other is None else {"on": other})
            )
        )


def parse_grid(text: str) -> tuple[int, int, int]:
    """Frames, height and width from "17x16x16"."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and 0 < int(part) <= 1 << 16 for part in parts):
        raise typer.BadParameter(f"{text!r} is not frames x height x width, such as 17x16x16", param_hint="--grid")
    return int(parts[0]), int(parts[1]), int(parts[2])


@app.command()
def validate(
    file: File,
    model: Annotated[
        str | None, typer.Option(help="Also: does it fit? shapes, a folder, or a Hub id.", show_default=False)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that a file is a plan and, with --model, that it is one for that model; weights are not loaded.

    Example: ziggurat plan validate runs/search/plan.json --model shapes
    """
    from ..attention.plan import Plan

    found = Plan.load(file)
    print(f"{file} is a valid plan of {len(found.layers)} layers and {found.heads} heads for {found.model_class}")
    fitted = []
    if model is not None:
        quiet_libraries()
        from ..pipelines.batch.identity import weightless
        from ..pipelines.plans import fitting

        fitted = fitting(found, weightless(model))
        print(f"it fits the {' and the '.join(fitted)} of {model}")
    if as_json:
        print(json.dumps({"plan": str(file), "valid": True, "model": model, "transformers": fitted}))


@app.command()
def diff(first: File, second: File, as_json: Json = False, debug: Debug = False) -> None:
    """Where two plans differ; exits with 0 where they say the same, 1 where they differ, 2 where one is no plan.

    Example: ziggurat plan diff first.json second.json
    """
    from ..attention.plan import Plan
    from ..attention.tell import differences

    try:
        one, other = Plan.load(first), Plan.load(second)
    except (ValueError, OSError) as error:
        # 1 is taken: as with diff, a script has to tell another plan from no plan.
        show_traceback()
        note(f"error: {sentence(error)}")
        raise typer.Exit(TROUBLE) from None
    found = differences(one, other)
    for where, before, after in found:
        print(f"{where}: {before} -> {after}")
    if as_json:
        rows = [{"where": where, "first": before, "second": after} for where, before, after in found]
        print(json.dumps({"equal": not found, "differences": rows}))
    if found:
        raise typer.Exit(1)
