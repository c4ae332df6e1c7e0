"""What runs on a device: it keeps one model loaded, makes videos, and says where it stands."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...pipelines.generate import Generation, generate
from ...pipelines.loading import load
from ...pipelines.media import whole, write_video
from ...pipelines.preview import preview_frames
from ...pipelines.record import figures, record_of
from ...pipelines.watch import Moment, Steering
from .estimates import Estimates, pixels_of
from .jobs import Job, Store
from .models import Shelf
from .queue import Queue, Stopped

PREVIEW, THUMB = "preview.webp", "thumb.webp"
PREVIEWS = 4
MOST_SHOWN = 24

Kind = Callable[["Worker", Job], None]


class Worker:
    """One device. `kinds` says how each kind of job is done."""

    def __init__(
        self,
        device: str,
        *,
        shelf: Shelf,
        store: Store,
        estimates: Estimates,
        kinds: Mapping[str, Kind],
        dtype: str = "auto",
        offload: str | None = None,
    ):
        self.device, self.shelf, self.store, self.estimates = device, shelf, store, estimates
        self.kinds = dict(kinds)
        self.dtype, self.offload = dtype, offload
        self.queue: Queue
        self._loaded: tuple[str, Any] | None = None

    def __call__(self, job: Job) -> None:
        self.kinds[job.kind](self, job)

    def phase(self, job: Job, phase: str, done: int = 0, total: int = 0) -> None:
        """Say where a job stands; ends it where the user wants that."""
        self.check(job)
        job.progress.phase, job.progress.done, job.progress.total = phase, done, total
        self.queue.touch()

    def check(self, job: Job) -> None:
        if job.wanted == "stop":
            raise Stopped

    def pipe(self, name: str) -> Any:
        """The pipeline of a model; the one before is let go first, since both may not fit."""
        self.shelf.model(name)
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None
            gc.collect()
            offload: Any = self.offload
            pipe: Any = load(name, dtype=self.dtype, device=self.device, offload=offload)
            pipe.set_progress_bar_config(disable=True)
            self._loaded = (name, pipe)
        return self._loaded[1]

    def warm_up(self) -> None:
        """Load the first model, and time two steps of a video half as long as usual, for the first estimate."""
        model = next(iter(self.shelf.models.values()))
        pipe = self.pipe(model.name)
        if model.needs_image or self.estimates.measured(model.name):
            return
        usual, rule = model.defaults, model.rule
        half = (usual.frames or 1) // 2 // rule.frame_step * rule.frame_step + rule.frame_rest
        frames = max(half, rule.frame_rest or rule.frame_step) if model.video else None
        clock = _Clock()
        made = generate(pipe, "a", plan="none", frames=frames, steps=2, seed=0, steering=clock, warn=lambda _: None)
        count, height, width, _ = made.frames.shape
        step = clock.marks[1] - clock.marks[0]
        self.estimates.add(model.name, "none", step=step, rest=made.seconds - 2 * step, pixels=count * height * width)


class _Clock(Steering):
    """When each step ended."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def between(self, moment: Moment) -> bool:
        self.marks.append(time.monotonic())
        return True


class _Pacer(Steering):
    """Follows a video's steps: times them, shows previews, and ends the run where the user wants that."""

    def __init__(self, worker: Worker, job: Job, pipe: Any):
        self.worker, self.job, self.pipe = worker, job, pipe
        self.stages = 2 if job.ask["compare"] else 1
        self.steps: dict[str, list[float]] = {}
        self._mark = time.monotonic()

    def report(self, stage: str, done: int, total: int) -> None:
        if (stage, done) == ("dense", 0):
            self._mark = time.monotonic()
            self.worker.phase(self.job, "dense attention, to compare", 0, total)

    def layer(self) -> None:
        self.worker.check(self.job)

    def between(self, moment: Moment) -> bool:
        now = time.monotonic()
        if moment.done > 1:
            # The first also read the sentence.
            self.steps.setdefault(moment.stage, []).append(now - self._mark)
        stand = self.job.progress
        stand.can_keep = hasattr(self.pipe, "_interrupt") and moment.done > 1
        phase = "denoising" if moment.stage == "denoise" else "dense attention, to compare"
        paces = self.steps.get(moment.stage) or self.steps.get("denoise")
        if paces:
            stand.step_seconds = sum(paces[-4:]) / len(paces[-4:])
            ahead = moment.total - moment.done + (moment.total if moment.stage == "denoise" and self.stages == 2 else 0)
            stand.left = stand.step_seconds * ahead
        self.worker.phase(self.job, phase, moment.done, moment.total)
        if self.job.wanted == "keep" and moment.done > 1:
            return False
        every = max(moment.total // PREVIEWS, 1)
        due = moment.done == 2 or moment.done % every == 0
        if moment.stage == "denoise" and due and 1 < moment.done < moment.total:
            self._preview(moment)
        if moment.done == moment.total:
            self.worker.phase(self.job, "decoding", moment.done, moment.total)
        self._mark = time.monotonic()
        return True

    def _preview(self, moment: Moment) -> None:
        frames = preview_frames(self.pipe, moment.latents if moment.estimate is None else moment.estimate)
        if frames is not None:
            write_webp(self.worker.store.home(self.job) / PREVIEW, frames, 8)
            self.job.progress.preview = moment.done
            self.worker.queue.touch()


def make_video(worker: Worker, job: Job) -> None:
    """Make a video and everything that is shown of it."""
    ask, home = job.ask, worker.store.home(job)
    worker.phase(job, "loading the model")
    pipe = worker.pipe(ask["model"])
    worker.phase(job, "reading the sentence", 0, ask["steps"] or 0)
    pacer = _Pacer(worker, job, pipe)
    image = str(home / ask["image"]) if ask["image"] else None
    settings = {name: ask[name] for name in ("frames", "height", "width", "steps", "guidance", "seed", "negative")}
    made = generate(
        pipe,
        ask["prompt"],
        plan=worker.shelf.plan_of(ask["plan"]),
        image=image,
        compare=ask["compare"],
        progress=pacer.report,
        steering=pacer,
        warn=job.warnings.append,
        **settings,
    )
    worker.phase(job, "writing", made.request.steps or 0, made.request.steps or 0)
    known = worker.shelf.model(ask["model"]).known
    record = {**record_of(made), "model": known, "compare": made.dense_frames is not None}
    kind = "png" if len(made.frames) == 1 else "mp4"
    write_video(home / f"video.{kind}", made.frames, made.fps, record=record)
    if made.dense_frames is not None:
        write_video(home / f"dense.{kind}", made.dense_frames, made.fps)
    write_webp(home / THUMB, made.frames[len(made.frames) // 2][None], 1)
    job.result = {
        "video": f"video.{kind}",
        "dense": f"dense.{kind}" if made.dense_frames is not None else None,
        "plan": made.plan_name,
        "plan_path": str(made.plan_path) if made.plan_path else None,
        "predicted": dict(made.plan.predicted) if made.plan is not None else {},
        "fps": made.fps,
        "dtype": made.dtype,
        "device": made.device,
        "schedule": made.schedule,
        "ended_at": made.ended_at,
        "summary": made.summary,
        "figures": figures(made),
        "paces": _paces(pacer, job, made),
    }
    (home / PREVIEW).unlink(missing_ok=True)
    worker.estimates.learn(job)


def _paces(pacer: _Pacer, job: Job, made: Generation) -> list[dict[str, Any]]:
    found = []
    runs = (("denoise", job.ask["plan"], made.seconds), ("dense", "none", made.dense_seconds))
    for stage, plan, seconds in runs:
        steps = pacer.steps.get(stage)
        if steps and seconds is not None and not made.ended_at:
            each = sum(steps) / len(steps)
            rest = seconds - each * (made.request.steps or 1)
            found.append({"plan": plan, "step": each, "rest": max(rest, 0.0), "pixels": pixels_of(job.ask)})
    return found


def write_webp(path: Path, frames: np.ndarray, fps: float) -> None:
    """A small moving picture, whole or not at all."""
    from PIL import Image

    shown = frames[:: -(-len(frames) // MOST_SHOWN)]
    images = [Image.fromarray(frame) for frame in shown]
    for image in images:
        image.thumbnail((320, 320))
    more: dict[str, Any] = {"save_all": True, "append_images": images[1:], "duration": round(1000 / fps), "loop": 0}
    with whole(path) as part:
        images[0].save(part, format="WEBP", quality=80, **(more if len(images) > 1 else {}))
