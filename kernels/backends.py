"""Which backends there are, which one `auto` takes, and why."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

NAMES = ("torch", "triton", "flex", "reference")


def choose(device: torch.device) -> tuple[str, str]:
    """The backend that `auto` takes for tensors on a device, and why, in one sentence."""
    if device.type != "cuda":
        return "torch", f"on {device.type} the torch backend is the fast one"
    if not has_triton():
        return "torch", "this is a GPU, but the package triton is missing: pip install 'ziggurat[gpu]'"
    return "triton", "this is a GPU and triton is installed"


def attend_of(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The `attend` of a backend; only then is what it needs imported.

    Raises ValueError for a name that is none of `NAMES`, ImportError if its package is missing.
    """
    if name not in NAMES:
        raise ValueError(f"backend must be one of auto, {', '.join(NAMES)}, got {name!r}")
    if name == "triton":
        return load_triton().attend
    # Statements, not a table of names: torch.compile follows these into its graph.
    if name == "flex":
        from . import flex

        return flex.attend
    if name == "reference":
        from . import reference

        return reference.attend
    from . import gather

    return gather.attend


def load_triton() -> ModuleType:
    """The Triton backend. Raises ImportError, saying what to install, if the package triton is missing."""
    if not has_triton():
        raise ImportError("backend 'triton' needs the package triton, which is missing: pip install 'ziggurat[gpu]'")
    from .triton_backend import ops

    return ops


def has_triton() -> bool:
    """Whether the package triton is installed."""
    # torch.compile can't look for packages; what it then imports would say that it is missing.
    return torch.compiler.is_compiling() or importlib.util.find_spec("triton") is not None
