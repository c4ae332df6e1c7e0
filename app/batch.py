"""`ziggurat batch`: a file of prompts becomes a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import Debug, note, progress_bars, quiet_libraries, warn
from .generate import parse_setting

if TYPE_CHECKING:
    from ..pipelines.batch.run import Batch

SHOWN = 20


def batch(
    rows: Annotated[Path, typer.Argument(help="Rows: .jsonl, .csv, or text with a prompt a line.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder; run again to go on.", show_default=False)],
    model: Annotated[str, typer.Option(help="An embedded model, a local folder, or a Hub id.")] = "shapes",
    plan: Annotated[str, typer.Option(help="auto (the one shipped for the model), none, or a plan file.")] = "auto",
    frames: Annotated[int | None, typer.Option(help="Frames; 1 makes an image.", show_default="the model's")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the model's")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the model's")] = None,
    seed: Annotated[int | None, typer.Option(help="Of rows without one.", show_default="0")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Videos a row, of its seed and those that follow.")] = 1,
    negative: Annotated[str | None, typer.Option(help="What is not to be shown.", show_default=False)] = None,
    image: Annotated[Path | None, typer.Option(help="For models that start from one.", show_default=False)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other argument of the pipeline; may be repeated."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--format", help="mp4, gif or png.", show_default="mp4; png for one frame")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop before any work at a bad row.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Make only what failed before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made, and make nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for another batch on the folder.")] = False,
    dtype: Annotated[str, typer.Option(help="auto (fastest on this chip), fp32, bf16 or fp16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="a GPU if any")] = None,
    devices: Annotated[
        str | None, typer.Option(help="A process on each: 0,1 are the first two GPUs.", show_default=False)
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="A Ray cluster; auto is this machine's.", show_default=False),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Ray's actors.", show_default="one a GPU, or a machine")] = None,
    offload: Annotated[
        str | None, typer.Option(help="model, sequential or group: for weights larger than the GPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Last line of output: the result as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Make a video or image of every row of a file; what is there already is not made again.

    Example: ziggurat batch prompts.txt --out outputs/batch --seeds 2
    """
    given = {
        "frames": frames,
        "height": height,
        "width": width,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "negative": negative,
        "image": image,
        "arguments": dict(parse_setting(text) for text in settings or ()),
    }
    if not rows.is_file():
        raise ValueError(f"rows {rows} does not exist or is no file: give a .jsonl, .csv or .txt file of prompts")
    quiet_libraries()
    from ..pipelines import generate_many

    with _progress() as progress:
        result = generate_many(
            model,
            rows,
            out,
            plan=plan,
            seeds=seeds,
            strict=strict,
            retry_failed=retry_failed,
            dry_run=dry_run,
            wait=wait,
            format=kind,
            dtype=dtype,
            device=device,
            devices=devices.split(",") if devices else (),
            ray=ray,
            workers=workers,
            offload=offload,  # pyright: ignore[reportArgumentType]
            progress=progress,
            warn=warn,
            **{name: value for name, value in given.items() if value is not None},
        )
    if result is None:
        return
    for row in result.bad:
        note(f"bad row: {row}")
    for entry in result.failed:
        note(f"failed: {entry['name']} (line {', '.join(map(str, entry['lines']))}): {entry['error']}")
    for line in planned(result) if dry_run else summary(result):
        print(line)
    if as_json:
        print(json.dumps(_figures(result)))
    if not result.ok:
        raise typer.Exit(1)


@contextmanager
def _progress() -> Iterator[Any]:
    with progress_bars({"items": "items"}, rate="items") as report:
        yield lambda done, total, _outcome: report("items", done, total) if total else None


def planned(result: Batch) -> list[str]:
    """What a dry run has to say."""
    found = result.estimate
    lines = [f"{item.name}  {_row(item)}" for item in result.left[:SHOWN]]
    if len(result.left) > SHOWN:
        lines.append(f"... and {len(result.left) - SHOWN} more")
    if found.seconds is None or found.bytes is None:
        cost = "time and size unknown: nothing was made here yet to tell from"
    else:
        from ..pipelines.sizes import in_bytes

        cost = f"about {duration(found.seconds)} and {in_bytes(found.bytes)}, going by {found.measured} made here"
    return [*lines, f"to make  {len(result.left)} of {result.items}, {result.done} done; {cost}"]


def summary(result: Batch) -> list[str]:
    """The batch in a few lines for people, the path last."""
    bad = f", {len(result.bad)} bad rows" if result.bad else ""
    left = f", {len(result.left)} not asked for" if result.left else ""
    repeated = f"; {result.repeated} rows ask for what another does" if result.repeated else ""
    return [
        f"made     {len(result.made)} of {result.items}, {result.done} done before,"
        f" {len(result.failed)} failed{bad}{left}{repeated}",
        f"time     {duration(result.seconds)}",
        f"out      {result.folder} (index.html, manifest.jsonl)",
    ]


def duration(seconds: float) -> str:
    """75 as "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60) if seconds >= 3600 else int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60} min" if seconds >= 3600 else f"{minutes} min {int(seconds % 60)} s"


def _row(item: Any) -> str:
    asked = item.request
    sizes = "x".join(str(size) for size in (asked.frames, asked.height, asked.width) if size)
    return f"line {item.lines[0]}, seed {asked.seed}, {sizes}, {asked.steps} steps: {asked.prompt[:80]}"


def _figures(result: Batch) -> dict[str, Any]:
    return {
        "out": str(result.folder),
        "items": result.items,
        "done": result.done,
        "made": result.made,
        "failed": {entry["name"]: entry["error"] for entry in result.failed},
        "bad": {str(row.number): row.error for row in result.bad},
        "left": [item.name for item in result.left],
        "estimate": asdict(result.estimate),
        "seconds": round(result.seconds, 3),
    }
