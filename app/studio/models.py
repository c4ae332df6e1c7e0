"""The models and plans that the page offers: what the operator allowed at the start, and nothing by any other name."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...attention.plan import Plan
from ...pipelines.batch.identity import weightless
from ...pipelines.generate import choose_plan
from ...pipelines.loading import embedded_models
from ...pipelines.media import whole
from ...pipelines.plans import TRANSFORMERS, fitting, shipped_plans
from ...pipelines.request import Request, complete
from ...pipelines.settings import ModelSettings, model_settings
from ...pipelines.sizes import SizeRule, memory_free, memory_needed, size_rule
from .jobs import Store

MOST_PLAN_BYTES = 64 << 20
SIZES = ("height", "width", "frames", "steps")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model without its weights: what it takes, and what it takes where nothing is said."""

    name: str
    pipe: Any
    settings: ModelSettings
    rule: SizeRule
    parameters: frozenset[str]
    needs_image: bool
    defaults: Request

    @property
    def video(self) -> bool:
        return "num_frames" in self.parameters

    @property
    def takes_image(self) -> bool:
        return "image" in self.parameters

    @property
    def experts(self) -> list[str]:
        """Its transformers, where there is more than one."""
        names = [name for name in TRANSFORMERS if getattr(self.pipe, name, None) is not None]
        return names if len(names) > 1 else []

    @property
    def known(self) -> str:
        """The name that holds from anywhere: a folder's whole path."""
        folder = Path(self.name)
        return self.name if self.name in embedded_models() or not folder.is_dir() else str(folder.resolve())

    def complete(self, asked: Request, *, compare: bool, device: str) -> Request:
        """The request with every default filled in.

        Raises ValueError for what this model, or this machine's memory, can't take.
        """
        if asked.image is None and self.needs_image:
            raise ValueError(f"{self.name} starts from an image: give one")
        return complete(self.pipe, asked, self.settings, compare=compare, device=device)[0]

    def memory(self, request: Request, *, compare: bool, device: str) -> tuple[int, int] | None:
        """Bytes that a run needs beside the weights, and that are free; None where the sizes are not known."""
        if not request.height or not request.width:
            return None
        sizes = (request.frames or 1, request.height, request.width)
        return memory_needed(self.pipe, self.rule, *sizes, compare=compare), memory_free(device)


def open_model(name: str) -> Model:
    """Read what a model is.

    Raises ValueError for one that does not exist or holds no defaults for its sizes.
    """
    pipe = weightless(name)
    settings = model_settings(pipe)
    parameters = inspect.signature(pipe.__call__).parameters
    defaults, _ = complete(pipe, Request(prompt="defaults", seed=0), settings, compare=False)
    image = parameters.get("image")
    return Model(
        name=name,
        pipe=pipe,
        settings=settings,
        rule=size_rule(pipe),
        parameters=frozenset(parameters),
        needs_image=image is not None and image.default is inspect.Parameter.empty,
        defaults=defaults,
    )


class Shelf:
    """The models that were allowed, by name, and the plans that may be chosen."""

    def __init__(self, names: Sequence[str], store: Store):
        self.models = {name: open_model(name) for name in names}
        self.store = store

    def model(self, name: str) -> Model:
        if name not in self.models:
            raise ValueError(
                f"model {name!r} was not allowed when the app was started (allowed: {', '.join(self.models)}):"
                " start it with --model"
            )
        return self.models[name]

    def _paths(self) -> dict[str, Path]:
        mine = sorted(self.store.plans.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        return {
            **{f"shipped: {path.stem}": path for path in shipped_plans()},
            **{f"mine: {path.stem}": path for path in mine},
        }

    def plan_names(self) -> list[str]:
        """What `plan` takes: auto, none, every plan that is shipped, and those of the output folder."""
        return ["auto", "none", *self._paths()]

    def plan_of(self, name: str) -> str:
        """What `generate` takes for one of `plan_names`; never a path that a page sent."""
        paths = self._paths()
        if name in ("auto", "none"):
            return name
        if name not in paths:
            raise ValueError(f"there is no plan {name!r} here: choose one of {', '.join(self.plan_names())}")
        return str(paths[name])

    def read_plan(self, name: str, model: Model) -> Plan | None:
        """The plan that a name stands for with this model; None where stock attention would run."""
        request = model.defaults
        grid = None
        if request.height and request.width:
            grid = model.rule.grid(request.frames or 1, request.height, request.width)
        return choose_plan(model.pipe, self.plan_of(name), grid, lambda _: None)[0]

    def check_plan(self, name: str, model: Model) -> None:
        """Raise ValueError where a plan is not for this model."""
        chosen = self.plan_of(name)
        if chosen not in ("auto", "none"):
            fitting(Plan.load(chosen), model.pipe)

    def fits(self, name: str, model: Model) -> bool:
        """Is a plan there, and for this model?"""
        try:
            self.check_plan(name, model)
        except ValueError:
            return False
        return True

    def take_plan(self, upload: str | Path) -> str:
        """Keep an uploaded plan; returns its name.

        It is read as data and validated, and only what was understood is written. Raises ValueError otherwise.
        """
        source = Path(upload)
        if source.stat().st_size > MOST_PLAN_BYTES:
            raise ValueError(f"{source.name} is larger than {MOST_PLAN_BYTES >> 20} MiB: that is no plan")
        return self.keep_plan(Plan.from_json(source.read_bytes(), source=source.name))

    def keep_plan(self, plan: Plan) -> str:
        """Write a plan into the output folder; returns its name."""
        text = plan.to_json()
        safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in plan.name)[:60] or "plan"
        path = self.store.plans / f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
        with whole(path) as part:
            part.write_text(text, encoding="utf-8")
        return f"mine: {path.stem}"
