"""`ziggurat search`: a plan for a model, on this machine, and what it costs and gains."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .console import Debug, note, progress_bars, quiet_libraries

OWN = "the model's own"
STAGES = {
    "capture": "dense runs, every candidate scored",
    "sensitivity": "sensitivity of each layer",
    "cost": "cost on this machine",
    "choice": "choosing",
    "proof": "proof on held-out prompts",
    "pictures": "pictures and report",
}

Model = Annotated[str, typer.Option(help="shapes, a folder or a Hub id.")]
Out = Annotated[Path, typer.Option(help="The folder for plan, figures, pictures and report.")]
Budget = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Share of our own dense attention's time: least error.", show_default="0.5"),
]
MaxError = Annotated[float | None, typer.Option(min=0, help="Bound on the weighted sum of errors: least time.")]
TargetPsnr = Annotated[float | None, typer.Option(help="dB against dense on held-out prompts: the cheapest plan.")]
TargetSsim = Annotated[float | None, typer.Option(max=1, help="The same in SSIM.")]
Prompts = Annotated[Path | None, typer.Option(help="A file of 1 to 16 prompts.", show_default="shipped ones")]
HeldOut = Annotated[Path | None, typer.Option(help="A file of prompts to prove on.", show_default="shipped ones")]
Candidates = Annotated[Path | None, typer.Option(help="A TOML file of what to try.", show_default="the defaults")]
Write = Annotated[Path | None, typer.Option(help="Write the default candidates to this file, to be edited; no search.")]
Corrected = Annotated[
    Literal["none", "rho", "residual", "trend"] | None,
    typer.Option(
        help="Of the default candidates: what makes up for keys left out, measured at each refresh, which runs dense.",
        show_default="trend or residual, if it fits memory",
    ),
]
Noise = Annotated[int, typer.Option(min=1, help="Denoising steps that are measured.")]
Rows = Annotated[int, typer.Option(min=0, help="Queries of a call that are measured, about; 0 = all of them.")]
DenseUntil = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Steps of more noise than this run dense; 1 = none.", show_default="what suits"),
]
RefreshAt = Annotated[
    list[float] | None,
    typer.Option(
        min=0, max=1, help="A noise level where lists are built anew; repeat it for more.", show_default="what suits"
    ),
]
Across = Annotated[int, typer.Option(min=0, help="Plans spread over the front to prove beside the chosen one.")]
Quantile = Annotated[float, typer.Option(help="Of the errors over prompts, steps and branches; 1 = the worst.")]
Proofs = Annotated[int, typer.Option(min=0, help="Held-out prompts to prove the plan on.")]
Steps = Annotated[int | None, typer.Option(min=1, show_default=OWN)]
Size = Annotated[int | None, typer.Option(min=1, show_default=OWN)]
Guidance = Annotated[float | None, typer.Option(show_default=OWN)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from what an interrupted search left in the folder.")]
Pareto = Annotated[bool, typer.Option("--pareto", help="Print every plan of the front, and write them all.")]


def search(
    model: Model = "shapes",
    out: Out = Path("runs/search"),
    budget: Budget = None,
    max_error: MaxError = None,
    target_psnr: TargetPsnr = None,
    target_ssim: TargetSsim = None,
    pareto: Pareto = False,
    prompts: Prompts = None,
    held_out: HeldOut = None,
    candidates: Candidates = None,
    write_candidates: Write = None,
    correction: Corrected = None,
    expert: Annotated[str | None, typer.Option(help="Of two transformers, the one.", show_default="the first")] = None,
    noise_steps: Noise = 3,
    rows: Rows = 1024,
    dense_until: DenseUntil = None,
    refresh_at: RefreshAt = None,
    quantile: Quantile = 1.0,
    proofs: Proofs = 2,
    across: Across = 0,
    steps: Steps = None,
    frames: Size = None,
    height: Size = None,
    width: Size = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="auto (fastest on this chip), fp32, bf16 or fp16.")] = "auto",
    resume: Resume = False,
    as_json: Annotated[bool, typer.Option("--json", help="Last line of output: the figures as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Find a plan for a model, prove it on prompts that it never saw, and draw it.

    Example: ziggurat search --model shapes --budget 0.3 --out runs/search
    """
    if write_candidates is not None:
        from ..pipelines.loading import default_device
        from ..search.candidates import default_candidates, to_toml

        if write_candidates.exists():
            raise ValueError(f"{write_candidates} is there already: give a new name")
        write_candidates.write_text(to_toml(default_candidates(default_device(), correction or "trend")))
        note(f"candidates  {write_candidates}")
        return
    quiet_libraries()
    from ..pipelines.loading import load
    from ..search import run as searching
    from ..search.prompts import read_prompts

    falling = tuple(sorted(set(refresh_at), reverse=True)) if refresh_at else None
    asked = {"dense_until": dense_until, "refresh_at": falling}
    begun = time.monotonic()
    pipe: Any = load(model, dtype=dtype)
    with kept_in(out), progress_bars(STAGES) as report:
        result = searching.search(
            pipe,
            out,
            budget=budget,
            max_error=max_error,
            target_psnr=target_psnr,
            target_ssim=target_ssim,
            prompts=read_prompts(prompts) if prompts else None,
            held_out=read_prompts(held_out) if held_out else None,
            candidates=candidates,
            correction=correction,
            expert=expert,
            noise_steps=noise_steps,
            rows=rows or None,
            schedule={name: at for name, at in asked.items() if at is not None},
            quantile=quantile,
            proofs=proofs,
            across=across,
            steps=steps,
            frames=frames,
            height=height,
            width=width,
            guidance=guidance,
            seed=seed,
            resume=resume,
            report=report,
        )
    said = figures(result, time.monotonic() - begun)
    if pareto:
        for number, point in enumerate(result.front):
            result.findings.plan(number).save(out / f"plan-{number}.json")
            mark = "  <- plan.json" if number == result.findings.chosen else ""
            print(f"{number:3}  {point.seconds:8.3f} s  error {point.error:7.4f}  density {point.density:6.1%}{mark}")
    for name, value in said.items():
        print(f"{name:20} {value:.4g}" if isinstance(value, float) else f"{name:20} {value}")
    if as_json:
        print(json.dumps(said))
    if not result.met:
        raise ValueError(f"no plan of this search keeps the bound: {out / 'plan.json'} is the nearest that was found")


@contextmanager
def kept_in(out: Path) -> Iterator[None]:
    """Of a search that is ended, say what is kept."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        note(f"what was measured so far is kept in {out}: the same command with --resume goes on from there")
        raise


def figures(result: Any, seconds: float) -> dict[str, Any]:
    """What a search comes to, by name; what was not proved is None."""
    found, proof = result.findings, result.proof
    point = found.front[found.chosen]
    dense = found.dense_seconds * found.calls * found.shape.layers
    return {
        "plan": str(result.folder / "plan.json"),
        "report": str(result.folder / "report.html"),
        "candidates": len(found.candidates),
        "heads": found.shape.layers * found.shape.heads,
        "density": proof.density if proof else point.density,
        "predicted_speedup": dense / point.seconds,
        "measured_speedup": proof.own_dense_attention_seconds / proof.attention_seconds if proof else None,
        "whole_speedup": proof.own_dense_seconds / proof.seconds if proof else None,
        "stock_speedup": proof.stock_seconds / proof.seconds if proof else None,
        "psnr": proof.psnr if proof else None,
        "ssim": proof.ssim if proof else None,
        "seconds": seconds,
    }
