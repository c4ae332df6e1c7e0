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

from ..attention.plan import Plan
from .models import row_of
from .modules import attention_modules, heads_of

Grid = tuple[int, int, int]
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
    """The plan that `plan` stands for, and in words where it came from.

    Raises ValueError where there is no such plan, or it is for another model.
    """
    if isinstance(plan, Plan):
        plan.check(**asdict(shape))
        return plan.name or "given", plan
    if plan != "auto":
        found = Plan.load(plan)
        found.check(**asdict(shape))
        return str(plan), found
    shipped = _find(shape, grid)
    if shipped is None:
        names = ", ".join(path.name for path in shipped_plans()) or "none"
        raise ValueError(f"plan 'auto' found no shipped plan for {shape} (shipped: {names}); give a plan file")
    return str(shipped[0]), shipped[1]
