"""generate(model, prompt): a video under a plan, beside stock attention if asked."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..attention.plan import Plan
from .handle import Handle, attach
from .models import MODELS
from .plans import TRANSFORMERS, Grid, find_plan, model_shape, transformers_of
from .request import Request, call_arguments, complete, warn_of_unknown_words
from .settings import model_settings
from .watch import Steering, Watch

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A video and the figures of its run.

    frames: uint8 [frames, height, width, 3]. seconds: the pipeline's whole call, text encoder to decoded frames.
    tokens: of the visual sequence; None for a class without a row. density, list_density: see `Handle.density`; 1 where
    no plan ran. attention_share: of `seconds`, spent in visual self-attention; None without a plan.
    plan: the one that ran, None for stock attention, and its path where it came from a file.
    dense_...: the same seed with stock diffusers and SDPA in the same dtype; psnr (dB, 100 if equal), ssim: against it.
    ended_at: the step after which the denoising was ended early; None for a whole run.
    summary: what became of every layer under the plan (`Handle.summary`); "" without one.
    """

    frames: np.ndarray
    request: Request
    model: str
    pipeline: str
    dtype: str
    device: str
    fps: float
    seconds: float
    tokens: int | None
    density: float
    list_density: float
    attention_share: float | None
    schedule: str
    plan: Plan | None
    plan_path: Path | None
    dense_frames: np.ndarray | None = None
    dense_seconds: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    ended_at: int | None = None
    summary: str = ""

    @property
    def plan_name(self) -> str:
        """The plan's own name, else its file's; "none" where stock attention ran."""
        if self.plan is None:
            return "none"
        return self.plan.name or (self.plan_path.stem if self.plan_path else "unnamed")


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def generate(
    model: Any,
    prompt: str,
    *,
    plan: Plan | Handle | str | Path | None = "auto",
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | None = None,
    negative: str | None = None,
    image: Any = None,
    arguments: Mapping[str, Any] | None = None,
    compare: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    progress: Progress = _silent,
    steering: Steering | None = None,
    warn: Callable[[str], None] = _warn,
) -> Generation:
    """Make a video (or an image: one frame) from a sentence.

    Args:
        model: a pipeline, or what `load` takes; dtype and device are for that.
        plan: a Plan, its path, "none", or "auto": the one shipped for this model and the nearest grid; where there is
            none, `warn` says so and stock attention runs. A handle of this pipeline runs what it holds and stays
            attached, so that one call's lists serve the next.
        frames, height, width, steps, guidance: the model folder's `ziggurat.json` if None, else the pipeline's own.
        seed: 0 ... 2**63 - 1; drawn if None.
        image, arguments: for pipelines that take an image, and for anything else their call takes, by name.
        compare: also run stock diffusers with the same seed.
        progress: called with "denoise" or "dense", steps done, steps in all.
        steering: sees the run between steps, and may end it, with or without keeping what there is; of a comparison
            whose dense run was ended early there is nothing to compare.

    Raises ValueError, before any work, for what the pipeline can't take: sizes, memory, a prompt without words or with
    over 512 tokens, unknown arguments, a plan for another model; and during it for NaN, naming layer and step.
    """
    asked = Request(
        prompt=prompt,
        frames=frames,
        height=height,
        width=width,
        steps=steps,
        guidance=guidance,
        seed=seed,
        negative=negative,
        image=image,
        arguments=dict(arguments or {}),
    )
    if isinstance(model, str | Path):
        from .loading import load

        pipe: Any = load(model, dtype=dtype, device=device)
    elif dtype is not None or device is not None:
        raise ValueError("dtype and device are for a model that is still to be loaded: leave them out for a pipeline")
    else:
        pipe = model
    settings = model_settings(pipe)
    request, grid = complete(pipe, asked, settings, compare=compare)
    if isinstance(plan, Handle):
        if not plan.drives(pipe):
            what = "of another pipeline" if plan.attached else "that was detached"
            raise ValueError(f"plan is a handle {what}: attach it to this one, or give the plan itself")
        if compare:
            raise ValueError("compare can't run stock attention beside a handle: give it the plan itself")
        chosen, path = plan.plan, None
    else:
        chosen, path = choose_plan(pipe, plan, grid, warn)
    if compare and chosen is None:
        raise ValueError("compare needs a plan to hold against dense, and none runs here: give one with plan")
    warn_of_unknown_words(settings, pipe, request.prompt, warn)

    core = next((getattr(pipe, name) for name in TRANSFORMERS if getattr(pipe, name, None) is not None), None)
    kind = torch.device(getattr(pipe, "_execution_device", "cpu")).type
    # On an accelerator timing waits for every attention call, so there only a comparison asks for it.
    timing = kind == "cpu" or compare
    if isinstance(plan, Handle):
        attached = nullcontext(plan)
    else:
        attached = nullcontext() if chosen is None else attach(pipe, chosen, grid=grid, timing=timing)
    with attached as handle:
        watch = Watch(
            pipe,
            report=lambda done, total: progress("denoise", done, total),
            layers=handle is None,
            steering=steering,
        )
        video, seconds = _run(pipe, request, watch)
    share = handle.attention_seconds / seconds if handle is not None and handle.attention_seconds else None
    figures: dict[str, Any] = {}
    if compare and not watch.ended:
        from .fidelity import psnr, ssim

        stock = Watch(
            pipe,
            report=lambda done, total: progress("dense", done, total),
            layers=False,
            stage="dense",
            steering=steering,
        )
        progress("dense", 0, request.steps or 1)
        with stock_attention(pipe):
            dense, dense_seconds = _run(pipe, request, stock)
        if not stock.ended:
            figures = {"dense_frames": dense, "dense_seconds": dense_seconds}
            figures |= {"psnr": psnr(dense, video), "ssim": ssim(dense, video)}
    return Generation(
        frames=video,
        request=request,
        model=str(model) if isinstance(model, str | Path) else str(getattr(pipe, "name_or_path", None) or ""),
        pipeline=type(pipe).__name__,
        dtype=str(getattr(core, "dtype", getattr(pipe, "dtype", ""))).removeprefix("torch."),
        device=str(getattr(pipe, "_execution_device", "cpu")),
        fps=settings.fps,
        seconds=seconds,
        tokens=watch.tokens,
        density=1.0 if handle is None or handle.density is None else handle.density,
        list_density=1.0 if handle is None else handle.list_density,
        attention_share=share,
        schedule="" if handle is None else handle.schedule(),
        plan=chosen,
        plan_path=path,
        ended_at=watch.step if watch.ended else None,
        summary="" if handle is None else handle.summary(),
        **figures,
    )


def choose_plan(
    pipe: Any, plan: Plan | str | Path | None, grid: Grid | None, warn: Callable[[str], None]
) -> tuple[Plan | None, Path | None]:
    """The plan to run and its path; (None, None) for stock attention.

    Raises ValueError for a plan that does not exist or is not valid; whether it is for this model is `attach`'s word.
    """
    if plan is None or plan == "none":
        return None, None
    if isinstance(plan, Plan):
        return plan, None
    if plan != "auto":
        return Plan.load(plan), Path(plan)
    names = [type(getattr(pipe, name)).__name__ for name in TRANSFORMERS if getattr(pipe, name, None) is not None]
    if not names or names[0] not in MODELS:
        warn(f"no plan can run on {names[0] if names else type(pipe).__name__}: stock attention runs")
        return None, None
    found = find_plan(pipe, grid)
    if found is None:
        shape = model_shape(next(iter(transformers_of(pipe).values())))
        warn(f"no plan is shipped for this {shape}: stock attention runs; make one, or give a file")
        return None, None
    path, chosen = found
    if grid is not None and grid != chosen.grid:
        made, here = ("x".join(map(str, sizes)) for sizes in (chosen.grid, grid))
        warn(f"the plan shipped for this model, {path.name}, was made for {made} latent patches; this run has {here}")
    return chosen, path


@contextmanager
def stock_attention(pipe: Any) -> Iterator[None]:
    """Diffusers' own SDPA, whichever attention backend was chosen before; that is chosen again afterwards."""
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    from .modules import attention_modules

    kept: list[tuple[Any, Any]] = []
    for name in TRANSFORMERS:
        transformer = getattr(pipe, name, None)
        for module in attention_modules(transformer).values() if transformer is not None else ():
            processor: Any = getattr(module, "processor", None)
            if getattr(processor, "_attention_backend", None) is not None:
                kept.append((processor, processor._attention_backend))
                processor._attention_backend = None
    try:
        with attention_backend(AttentionBackendName.NATIVE):
            yield
    finally:
        for processor, backend in kept:
            processor._attention_backend = backend


def _run(pipe: Any, request: Request, watch: Watch) -> tuple[np.ndarray, float]:
    """Call the pipeline: frames uint8 [frames, height, width, 3], and its seconds."""
    assert request.seed is not None
    shown = dict(getattr(pipe, "_progress_bar_config", {}))
    arguments = call_arguments(pipe, request) | watch.arguments
    if watch.arguments:
        pipe.set_progress_bar_config(**{**shown, "disable": True})
    try:
        with watch:
            started = time.perf_counter()
            # On the CPU, whatever the device: then a seed gives the same noise everywhere.
            generator = torch.Generator("cpu").manual_seed(request.seed)
            output = pipe(**arguments, generator=generator, output_type="np")
            seconds = time.perf_counter() - started - watch.aside
    finally:
        pipe.set_progress_bar_config(**shown)
    found = output.frames[0] if hasattr(output, "frames") else output.images[:1]
    video = np.asarray(found)
    if video.dtype != np.uint8:
        if not np.isfinite(video).all():
            raise ValueError("the decoded frames hold NaN or infinity: load the VAE in float32")
        video = (video.clip(0, 1) * 255).round().astype(np.uint8)
    return video, seconds
