"""The app without its pages: what can be asked of it, in plain Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...pipelines.media import whole
from ...pipelines.request import Request
from .estimates import Estimates
from .jobs import Job, Store
from .maps import make_maps
from .models import Model, Shelf
from .queue import Queue
from .searching import GOALS, make_search
from .texts import SETTINGS, estimate_line, file_url
from .worker import Worker, make_video

INPUT = "input.png"
PRESETS = ("Quick look", "The model's own", "Fine")


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a page sends; None is the model's own. image: the path of an upload. seed None: drawn."""

    prompt: str
    model: str
    plan: str = "auto"
    negative: str | None = None
    image: str | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    compare: bool = False


class Studio:
    """The models, the folder, the queue and its workers, one for each device."""

    def __init__(
        self,
        folder: Path,
        models: Sequence[str],
        devices: Sequence[str],
        *,
        dtype: str = "auto",
        offload: str | None = None,
        most: int = 16,
    ):
        self.store = Store(folder)
        self.shelf = Shelf(models, self.store)
        self.devices = list(devices)
        self.estimates = Estimates()
        workers = [
            Worker(
                device,
                shelf=self.shelf,
                store=self.store,
                estimates=self.estimates,
                kinds={"video": make_video, "maps": make_maps, "search": make_search},
                dtype=dtype,
                offload=offload,
            )
            for device in devices
        ]
        self.queue = Queue(self.store, workers, most=most)
        for worker in workers:
            worker.queue = self.queue
        for job in self.queue.all():
            self.estimates.learn(job)

    def ask(self, form: Form) -> dict[str, Any]:
        """A form as a job's settings, complete and checked.

        Raises ValueError for what the model, this machine's memory or the list of plans can't take.
        """
        model = self.shelf.model(form.model)
        request = model.complete(_request(form, model), compare=form.compare, device=self.devices[0])
        self.shelf.check_plan(form.plan, model)
        if form.compare and self.shelf.read_plan(form.plan, model) is None:
            raise ValueError("compare needs a plan to hold against dense, and none runs here: choose another plan")
        path = self.shelf.plan_of(form.plan)
        return {
            "model": form.model,
            "plan": form.plan,
            "plan_path": path,
            "prompt": request.prompt,
            "compare": form.compare,
            "image": INPUT if form.image else None,
            **{name: getattr(request, name) for name in SETTINGS},
        }

    def submit(self, form: Form) -> Job:
        """Put a video in the queue; what could not run is refused here.

        Raises ValueError, `Full` where too many wait.
        """
        ask = self.ask(form)

        def keep_image(job: Job) -> None:
            if form.image:
                _copy_image(form.image, self.store.home(job) / INPUT)

        return self.queue.add("video", ask, keep_image)

    def estimate(self, form: Form) -> str:
        """What a form would take, or why it can't run, in a sentence."""
        try:
            model = self.shelf.model(form.model)
            prompt = form.prompt if form.prompt.strip() else "a"
            image = form.image or _Given()
            asked = _request(replace(form, prompt=prompt), model, image=image if model.needs_image else form.image)
            request = model.complete(asked, compare=form.compare, device=self.devices[0])
        except ValueError as error:
            return f"Can't run: {error}"
        ask = {"model": form.model, "plan": form.plan, "compare": form.compare, **request.settings()}
        memory = model.memory(request, compare=form.compare, device=self.devices[0])
        return estimate_line(self.estimates.seconds(ask), memory)

    def submit_maps(self, run: Job, layer: int, image: str | None) -> Job:
        """Have a layer's attention maps of a finished video drawn."""
        ask = {**run.ask, "run": run.id, "layer": layer}

        def keep_image(job: Job) -> None:
            if image:
                _copy_image(image, self.store.home(job) / INPUT)

        return self.queue.add("maps", ask, keep_image)

    def submit_search(self, asked: Mapping[str, Any]) -> Job:
        """Put a search in the queue: model, expert, goal and its value (a budget in percent), families, prompts,
        noise_steps, proofs, steps, frames and seed.

        Raises ValueError for what no search could run with, `Full` where too many jobs wait.
        """
        model = self.shelf.model(asked["model"])
        if asked["goal"] not in GOALS:
            raise ValueError(f"goal must be one of {', '.join(GOALS)}, got {asked['goal']!r}")
        if not asked["families"]:
            raise ValueError("families is empty: choose at least one to try")
        value = float(asked["value"]) / (100 if asked["goal"] == "budget" else 1)
        numbers = ("prompts", "noise_steps", "proofs", "steps", "frames", "seed")
        ask = {**asked, "value": value, **{name: None if asked[name] is None else int(asked[name]) for name in numbers}}
        ask["frames"] = ask["frames"] if model.video else None
        ask["expert"] = ask["expert"] if model.experts else None
        request = Request(prompt="search", steps=ask["steps"], frames=ask["frames"], seed=ask["seed"])
        model.complete(request, compare=True, device=self.devices[0])
        return self.queue.add("search", ask)

    def again(self, job: Job) -> Job:
        """The same video once more."""
        return self.submit(self.form_of(job))

    def form_of(self, job: Job) -> Form:
        """A video's settings as a form, its seed included."""
        ask = job.ask
        image = str(self.store.home(job) / ask["image"]) if ask["image"] else None
        given = {name: ask[name] for name in ("prompt", "model", "plan", "compare", *SETTINGS)}
        return Form(**given, image=image)

    def preset(self, name: str, model: Model) -> dict[str, int | None]:
        """Frames and steps by a word: fewer, the model's own, or more steps."""
        usual = model.defaults
        steps, frames = usual.steps, usual.frames
        if name == "Quick look":
            steps = max((steps or 2) // 2, 2)
            if frames is not None:
                step, rest = model.rule.frame_step, model.rule.frame_rest
                frames = max((frames // 2) // step * step + rest, rest or step)
        elif name == "Fine":
            steps = (steps or 1) * 2
        return {"frames": frames, "steps": steps, "height": usual.height, "width": usual.width}

    def screens(self, job: Job | None) -> list[tuple[str, str]]:
        """What a player is to show of a job: addresses and labels."""
        if job is None or job.kind != "video" or not job.made:
            return []
        found = job.result["figures"]
        plan = "dense" if job.result["plan"] == "none" else f"plan {job.result['plan']}"
        shown = [(file_url(self.store, job, job.result["video"]), f"{plan} · {found['seconds']:.1f} s")]
        if job.result["dense"]:
            address = file_url(self.store, job, job.result["dense"])
            shown.append((address, f"dense · {found['dense_seconds']:.1f} s"))
        return shown


class _Given:
    """Stands for an image that is still to be chosen."""


def _request(form: Form, model: Model, image: Any = None) -> Request:
    given = {name: getattr(form, name) for name in SETTINGS}
    if not model.video:
        given["frames"] = None
    return Request(prompt=form.prompt, image=image or form.image, **given)


def _copy_image(source: str, target: Path) -> None:
    """Keep an upload as plain pixels: nothing else that the file may hold is taken over."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(source) as opened:
            pixels = opened.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image can't be read: {error}") from error
    with whole(target) as part:
        pixels.save(part, format="PNG")
