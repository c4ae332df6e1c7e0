"""Diffusers' pipelines under a sparse attention plan: load one, attach a plan, take it off again."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch.run import generate_many
    from .handle import Handle, attach
    from .loading import load
    from .memory import keep_freed_memory
    from .plans import find_plan

__all__ = ["Handle", "attach", "find_plan", "generate_many", "keep_freed_memory", "load"]

_HOMES = {
    "Handle": ".handle",
    "attach": ".handle",
    "find_plan": ".plans",
    "generate_many": ".batch.run",
    "keep_freed_memory": ".memory",
    "load": ".loading",
}


def __getattr__(name: str) -> Any:
    # Late, since torch and diffusers take seconds to import.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name], __name__), name)
