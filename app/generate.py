"""`ziggurat generate`: a sentence becomes a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import Debug, note, progress_bars, quiet_libraries, warn


def parse_setting(text: str) -> tuple[str, Any]:
    """`key=value`, the value JSON if it can be read as such, else text."""
    name, found, value = text.partition("=")
    if not found or not name.strip():
        raise typer.BadParameter(f"{text!r} is not key=value", param_hint="--set")
    try:
        return name.strip(), json.loads(value)
    except (ValueError, RecursionError):
        return name.strip(), value


def generate(
    prompt: Annotated[str, typer.Argument(help="What the video is to show.", show_default=False)],
    model: Annotated[str, typer.Option(help="An embedded model, a local folder, or a Hub id.")] = "shapes",
    plan: Annotated[str, typer.Option(help="auto (the one shipped for the model), none, or a plan file.")] = "auto",
    frames: Annotated[int | None, typer.Option(help="Frames; 1 makes an image.", show_default="the model's")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default="the model's")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the model's")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the model's")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same video.", show_default="drawn, and shown")] = None,
    negative: Annotated[str | None, typer.Option(help="What the video is not to show.", show_default=False)] = None,
    image: Annotated[Path | None, typer.Option(help="For models that start from one.", show_default=False)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other argument of the pipeline; may be repeated."),
    ] = None,
    out: Annotated[Path, typer.Option(help="mp4, gif or png.")] = Path("video.mp4"),
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run stock dense attention; write both side by side.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Last line of output: the figures as JSON.")] = False,
    dtype: Annotated[str, typer.Option(help="auto (fastest on this chip), fp32, bf16 or fp16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="a GPU if any")] = None,
    offload: Annotated[
        str | None, typer.Option(help="model, sequential or group: for weights larger than the GPU.")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second.", show_default="the model's")] = None,
    debug: Debug = False,
) -> None:
    """Make a video (or, with one frame, an image) from a sentence, under a sparse attention plan.

    Example: ziggurat generate 'a large red circle moving left on a gray background' --seed 1 --compare
    """
    arguments = dict(parse_setting(text) for text in settings or ())
    if fps is not None and not 0 < fps <= 1000:
        raise typer.BadParameter(f"{fps} does not lie in 0 ... 1000", param_hint="--fps")
    from ..pipelines.media import check_output

    check_output(out)
    from ..pipelines.request import Request

    # What no model could take is refused before one is loaded.
    Request(
        prompt=prompt, frames=frames, height=height, width=width, steps=steps, guidance=guidance, seed=seed, image=image
    )
    if plan not in ("auto", "none"):
        from ..attention.plan import Plan

        Plan.load(plan)
    quiet_libraries()
    from ..pipelines import generate as generating
    from ..pipelines.loading import embedded_models, fastest_dtype, load
    from ..pipelines.media import side_by_side, write_video
    from ..pipelines.record import figures, record_of
    from ..pipelines.settings import model_settings

    pipe: Any = load(model, dtype=dtype, device=device, offload=offload)  # pyright: ignore[reportArgumentType]
    chosen = str(pipe.transformer.dtype if getattr(pipe, "transformer", None) is not None else pipe.dtype)
    placed = str(pipe._execution_device)
    reason = f" ({fastest_dtype(placed)[1]})" if dtype == "auto" else ""
    stated = f"{chosen.removeprefix('torch.')} on {placed}{reason}"
    note(f"{model}: {type(pipe).__name__}, {stated}")
    with progress_bars({"denoise": "denoising", "dense": "dense, for comparison"}) as progress:
        made = generating.generate(
            pipe,
            prompt,
            plan=plan,
            frames=frames,
            height=height,
            width=width,
            steps=steps,
            guidance=guidance,
            seed=seed,
            negative=negative,
            image=image,
            arguments=arguments,
            compare=compare,
            progress=progress,
            warn=warn,
        )
    rate = fps or model_settings(pipe).fps
    # A folder's path holds from anywhere; an embedded model's name also after Ziggurat has moved.
    known = model if model in embedded_models() or not Path(model).is_dir() else str(Path(model).resolve())
    record = {**record_of(made), "model": known, "fps": rate, "compare": compare}
    shown = made.frames
    if made.dense_frames is not None:
        shown = side_by_side(
            {f"{made.plan_name} {made.seconds:.1f} s": shown, f"dense {made.dense_seconds:.1f} s": made.dense_frames}
        )
    write_video(out, shown, rate, record=record)
    for line in summary(record, out, stated, shown.shape):
        print(line)
    if as_json:
        result = {"out": str(out), "plan": made.plan_name, "seed": made.request.seed, "dtype": made.dtype}
        print(json.dumps({**result, **figures(made)}))


def summary(record: dict[str, Any], out: Path, stated: str, shape: tuple[int, ...]) -> list[str]:
    """The run in a few lines for people, the path last."""
    found, plan = record["figures"], record["plan"]
    share = f", {found['attention_share']:.0%} of it in self-attention" if "attention_share" in found else ""
    lines = [
        f"model    {record['model']}, {stated}",
        f"plan     {plan['name']}" + (f" ({plan['path']})" if plan["path"] else ""),
        f"density  {found['density']:.1%} of {found.get('tokens') or 'unknown'} tokens' rows over the run,"
        f" {found['list_density']:.1%} where it is sparse",
        f"seed     {record['seed']}",
        f"time     {found['seconds']:.1f} s for {found['steps']} steps{share}",
    ]
    if record["schedule"]:
        lines.insert(3, f"schedule {record['schedule']}")
    if "dense_seconds" in found:
        lines.append(
            f"dense    {found['dense_seconds']:.1f} s ({found['dense_seconds'] / found['seconds']:.2f}x);"
            f" PSNR {found['psnr']:.1f} dB, SSIM {found['ssim']:.4f} against it"
        )
    frames, height, width, _ = shape
    lines.append(f"out      {out} ({frames} frames of {width}x{height}; record in {out.name}.json)")
    return lines
