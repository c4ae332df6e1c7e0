"""Training the embedded model from nothing, or on from a checkpoint, into a folder that diffusers loads."""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ...attention.plan import Plan
from ..loading import default_device, fastest_dtype
from .build import build_scheduler, build_text_encoder, build_tokenizer, build_transformer, build_vae
from .card import card
from .train_flow import FlowStage, Grid, Student, train_flow
from .train_vae import Report, VaeStage, train_vae

# Clips are cheap on small grids, which teach colours, sizes and ways. What shapes look like is taught at full scale,
# where the same words mean twice as many tokens, and mostly by crops: all but a tenth of a full frame is background.
TINY = Grid(frames=9, size=32, batch=32, fresh=4, keep=4096, two_share=0.0, shift=5.0, top_share=0.3)
MIDDLE = Grid(frames=17, size=64, batch=8, fresh=1, shift=5.0)
PART = Grid(frames=1, size=128, crop=80, batch=16, fresh=4, keep=8192, two_share=0.0, shift=5.0, top_share=0.02)
SHORT = Grid(frames=9, size=128, crop=80, batch=4, fresh=0.7, two_share=0.0, span=33, shift=6.0, top_share=0.05)
MEDIUM = Grid(frames=17, size=128, crop=96, batch=2, fresh=0.5, two_share=0.0, span=33, shift=6.0, top_share=0.1)
STILL = Grid(frames=1, size=128, batch=8, fresh=2, keep=4096, two_share=0.05, shift=6.0, top_share=0.02)
LONG = Grid(frames=33, size=128, crop=96, batch=1, fresh=0.4, keep=1024, two_share=0.0, shift=7.0)
FULL = Grid(frames=33, size=128, batch=1, fresh=0.5, keep=512, two_share=0.05, shift=7.0)
# Where a plan's own schedule is dense there is nothing to learn of it.
LEVEL_FULL, LEVEL_LONG, LEVEL_MEDIUM = (replace(grid, top_share=0.0, shift=5.0) for grid in (FULL, LONG, MEDIUM))

VAE = VaeStage()
# Over long clips a decoder that has seen short ones leaves trails and lets colours drift.
DECODER = VaeStage(
    steps=350,
    stills=0,
    batch=2,
    size=48,
    frames=(17, 17, 33, 9),
    patchwork=0.0,
    learning_rate=1e-3,
    decoder_only=True,
)
STAGES = (
    FlowStage(name="tiny", steps=1000, grids=((1.0, TINY),)),
    FlowStage(name="middle", steps=750, grids=((0.85, MIDDLE), (0.15, TINY))),
    FlowStage(name="wide", steps=6000, grids=((0.4, PART), (0.4, SHORT), (0.2, STILL))),
    FlowStage(
        name="full",
        steps=8000,
        grids=((0.14, FULL), (0.14, LONG), (0.2, MEDIUM), (0.2, SHORT), (0.16, STILL), (0.16, PART)),
        cooldown=3000,
    ),
    # A clip of full length that is not quite decided shows a second object for a few frames.
    FlowStage(
        name="long",
        steps=4000,
        grids=((0.36, FULL), (0.25, LONG), (0.15, MEDIUM), (0.1, SHORT), (0.07, STILL), (0.07, PART)),
        learning_rate=1.2e-3,
        cooldown=3500,
    ),
    FlowStage(
        name="planned",
        steps=2200,
        grids=((0.45, LEVEL_FULL), (0.2, LEVEL_LONG), (0.15, LEVEL_MEDIUM), (0.05, SHORT), (0.1, STILL), (0.05, PART)),
        learning_rate=1e-3,
        cooldown=2100,
        plan_share=0.8,
    ),
)


def train(
    out: Path,
    *,
    run: Path,
    start: Path | None = None,
    plan: Plan | None = None,
    stages: Sequence[str] = (),
    steps: int | None = None,
    mixed_precision: str = "auto",
    compiled: bool = True,
    seed: int = 0,
) -> None:
    """Train `shapes` and write it to `out`, going on from what `run` holds of an earlier, interrupted training.

    Args:
        out: the diffusers folder to write; it appears whole or not at all.
        run: where states are kept while training; the same folder resumes.
        start: a checkpoint to go on from instead of fresh weights; its VAE is kept as it is.
        plan: the plan that the stage `planned` trains under; `start` is the checkpoint it was found for, which that
            stage also follows as its teacher.
        stages: names of the flow stages to run; by default all, without a plan all but `planned`.
        steps: steps of each chosen flow stage in place of its own number.
        mixed_precision: accelerate's setting, `"bf16"` or `"no"`; `"auto"` is bf16 where the device has products of it.
        compiled: compile the transformer's blocks, a minute for each size of clip, for steps a third shorter.
        seed: the source of everything random.

    Raises:
        ValueError: a stage is not one of those there are, or needs a plan that is missing or fits another model.
    """
    names = [stage.name for stage in STAGES]
    if unknown := [name for name in stages if name not in names]:
        raise ValueError(f"stages must be among {', '.join(names)}, got {', '.join(unknown)}")
    chosen = tuple(stage for stage in STAGES if (stage.name in stages if stages else plan or not stage.plan_share))
    planned = any(stage.plan_share for stage in chosen)
    if planned and (plan is None or start is None):
        raise ValueError(
            "stage planned needs a checkpoint to start from and the plan to train under, got "
            f"{'no start' if start is None else 'no plan'}: search for a plan of the checkpoint, and give both"
        )
    if steps is not None:
        chosen = tuple(replace(stage, steps=steps, cooldown=min(stage.cooldown, steps)) for stage in chosen)
    run.mkdir(parents=True, exist_ok=True)
    if mixed_precision == "auto":
        mixed_precision = "bf16" if fastest_dtype(default_device())[0] == torch.bfloat16 else "no"
    accelerator = Accelerator(mixed_precision=mixed_precision)
    torch.manual_seed(seed)
    tokenizer: Any = build_tokenizer()
    with _progress() as report:
        if start is None:
            student = Student(build_text_encoder(tokenizer), build_transformer(), plan)
            vae = _trained_vae(run, accelerator, report, seed)
        else:
            pipe = WanPipeline.from_pretrained(str(start))
            vae, student = pipe.vae, Student(pipe.text_encoder, pipe.transformer, plan)
        teacher = None
        if planned:
            pipe = WanPipeline.from_pretrained(str(start))
            teacher = Student(pipe.text_encoder, pipe.transformer)
        train_flow(student, vae, tokenizer, chosen, run, accelerator, report, seed, compiled, teacher)
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=student.text_encoder,
        transformer=student.transformer,
        vae=vae,
        scheduler=build_scheduler(),
    )
    if accelerator.is_main_process:
        save(pipe, out, [recipe(stage) for stage in chosen], start)


def recipe(stage: FlowStage) -> str:
    """A stage in a line of the model card."""
    told = f"{stage.name}: {stage.steps} steps"
    if stage.plan_share:
        told += f", {stage.plan_share:.0%} of those on long clips under a sparse plan, following what it was before"
    return told


def _trained_vae(run: Path, accelerator: Accelerator, report: Report, seed: int) -> AutoencoderKLWan:
    """The VAE that `run` holds, or one trained there: both halves together, then the decoder on long clips."""
    for name, stage, before in (("vae", VAE, None), ("decoder", DECODER, run / "vae")):
        if not (run / name).exists():
            vae = build_vae() if before is None else AutoencoderKLWan.from_pretrained(str(before))
            part = run / f"{name}.part"
            train_vae(vae, stage, run / f"{name}-state", accelerator, report, seed).save_pretrained(part)
            part.rename(run / name)
    return AutoencoderKLWan.from_pretrained(str(run / "decoder"))


def save(pipe: WanPipeline, out: Path, recipe: Sequence[str], start: Path | None) -> None:
    """Write the pipeline, its defaults and its model card to `out`, replacing what is there at once."""
    part, old = out.with_name(out.name + ".part"), out.with_name(out.name + ".old")
    for model in (pipe.transformer, pipe.vae):
        model.register_to_config(_name_or_path="")  # where this machine had it
    pipe.to("cpu", torch.float32).save_pretrained(part, safe_serialization=True)
    (part / "ziggurat.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    (part / "README.md").write_text(card(recipe, start))
    if out.exists():
        out.rename(old)
    part.rename(out)
    if old.exists():
        shutil.rmtree(old)


DEFAULTS = {"frames": 33, "height": 128, "width": 128, "steps": 20, "guidance": 2.0, "fps": 16, "captions": "shapes"}


@contextmanager
def _progress() -> Iterator[Report]:
    """A bar per stage with its figures and time left; where there is no terminal, a line every 20 seconds."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[figures]}"),
    )
    with Progress(*columns, TimeRemainingColumn()) as bar:
        smooth: dict[str, float] = {}
        tasks: dict[str, TaskID] = {}
        spoken = begun = time.monotonic()
        first = 0

        def report(stage: str, step: int, total: int, figures: dict[str, float]) -> None:
            nonlocal spoken, first, begun
            for name, value in figures.items():
                if value == value:
                    smooth[name] = value + 0.95 * (smooth.get(name, value) - value)
            text = " ".join(f"{name} {value:.4f}" for name, value in smooth.items())
            if stage not in tasks:
                tasks[stage], first, begun = bar.add_task(stage, total=total, figures=""), step, time.monotonic()
            bar.update(tasks[stage], completed=step, figures=text)
            if not bar.console.is_terminal and time.monotonic() - spoken > 20:
                spoken = time.monotonic()
                pace = (spoken - begun) / max(step - first, 1)
                bar.console.print(
                    f"{stage} {step}/{total} {text} {pace:.2f} s a step, {pace * (total - step):.0f} s left"
                )

        yield report
