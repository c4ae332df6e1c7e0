"""Which plan to run: one given, one in a file, or the one shipped for a model."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from ..attention.dense import Dense
from ..attention.plan import Grid, HeadGroup, HeadPlan, Plan
from .models import row_of
from .modules import attention_modules, heads_of

TRANSFORMERS = ("transformer", "transformer_2")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a plan has to agree with: the transformer's class, layers, heads, head dimension and configuration."""

    model_class: str
    layers: int
    heads: int
    head_dim: int
    config_hash: str

    def __str__(self) -> str:
        return f"{self.model_class} of {self.layers} layers, {self.heads} heads, head_dim {self.head_dim}"


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's transformers by name; one that torch.compile wrapped is unwrapped.

    Raises ValueError for a pipeline without one.
    """
    found = {}
    for name in TRANSFORMERS:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            found[name] = getattr(module, "_orig_mod", module)
    if not found:
        raise ValueError(f"pipe must hold a transformer, but {type(pipe).__name__} has none: no plan can run on it")
    return found


def model_shape(transformer: nn.Module) -> ModelShape:
    """What a plan for this transformer has to agree with.

    Raises ValueError for a class without a row in the table.
    """
    row = row_of(transformer)
    modules = attention_modules(transformer)
    layers = row.layers(modules)
    if not layers:
        raise ValueError(f"transformer is a {row.model} without any self-attention layer that a plan could run")
    heads, head_dim = heads_of(modules[layers[0]])
    config: Any = transformer.config
    # Where it was loaded from, and by which version, makes no other model of it.
    facts = {name: value for name, value in config.items() if not name.startswith("_")}
    return ModelShape(
        model_class=row.model,
        layers=len(layers),
        heads=heads,
        head_dim=head_dim,
        config_hash=hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16],
    )


def shipped_plans() -> list[Path]:
    """The plan files that come with the package."""
    return sorted((Path(str(files("ziggurat.assets"))) / "plans").glob("*.json"))


def find_plan(pipe: Any, grid: Grid | None = None) -> tuple[Path, Plan] | None:
    """The plan shipped for a pipeline's transformer, or None.

    Of several, the one made for the grid (frames, height, width in latent patches) nearest to `grid`.
    """
    return _find(model_shape(next(iter(transformers_of(pipe).values()))), grid)


def _find(shape: ModelShape, grid: Grid | None) -> tuple[Path, Plan] | None:
    found = []
    for path in shipped_plans():
        plan = Plan.load(path)
        try:
            plan.check(**asdict(shape))
        except ValueError:
            continue
        found.append((path, plan))
    if not found or grid is None:
        return found[0] if found else None

    def distance(entry: tuple[Path, Plan]) -> float:
        return sum(abs(math.log(made / wanted)) for made, wanted in zip(entry[1].grid, grid, strict=True))

    return min(found, key=distance)


def resolve_plan(plan: Plan | str | Path, shape: ModelShape, grid: Grid | None = None) -> tuple[str, Plan]:
    """The plan that `plan` stands for, and in words where it came from; that it fits is the word of `fitting`.

    Raises ValueError where there is no such plan.
    """
    if isinstance(plan, Plan):
        return plan.name or "given", plan
    if plan != "auto":
        return str(plan), Plan.load(plan)
    shipped = _find(shape, grid)
    if shipped is None:
        names = ", ".join(path.name for path in shipped_plans()) or "none"
        raise ValueError(f"plan 'auto' found no shipped plan for {shape} (shipped: {names}); give a plan file")
    return str(shipped[0]), shipped[1]


def fitting(plan: Plan, pipe: Any) -> list[str]:
    """Names of the pipeline's transformers that the plan is for: each of them, unless it names one.

    Raises ValueError, naming the field, where it is for another model.
    """
    transformers = transformers_of(pipe)
    if plan.expert is not None and plan.expert not in transformers:
        raise ValueError(
            f"plan is for another model: its expert is {plan.expert!r}, the model has {' and '.join(transformers)}; "
            "use a plan made for this model"
        )
    names = [name for name in transformers if plan.expert in (None, name)]
    for name in names:
        plan.check(**asdict(model_shape(transformers[name])))
    return names


def all_block_plan(shape: ModelShape) -> Plan:
    """The plan that reads everything through our own kernel: the error and time of a plan that leaves nothing out."""
    group = HeadGroup(entries=(HeadPlan(heads=tuple(range(shape.heads)), selector=Dense()),))
    return Plan.uniform([group], name="all blocks", grid=(1, 1, 1), **asdict(shape))
