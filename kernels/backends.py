"""Which backends there are, which one `auto` takes, and why."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

NAMES = ("torch", "triton", "flex", "reference")
MODULES = {"torch": ".gather", "triton": ".triton_backend.ops", "flex": ".flex", "reference": ".reference"}


def choose(device: torch.device) -> tuple[str, str]:
    """The backend that `auto` takes for tensors on a device, and why, in one sentence."""
    if device.type != "cuda":
        return "torch", f"on {device.type} the torch backend is the fast one"
    if importlib.util.find_spec("triton") is None:
        return "torch", "this is a GPU, but the package triton is missing: pip install 'ziggurat[gpu]'"
    return "triton", "this is a GPU and triton is installed"


def attend_of(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The `attend` of a backend; only then is what it needs imported.

    Raises ValueError for a name that is none of `NAMES`, ImportError if its package is missing.
    """
    if name not in NAMES:
        raise ValueError(f"backend must be one of auto, {', '.join(NAMES)}, got {name!r}")
    module = load_triton() if name == "triton" else importlib.import_module(MODULES[name], __package__)
    return module.attend


def load_triton() -> ModuleType:
    """The Triton backend. Raises ImportError, saying what to install, if the package triton is missing."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError("backend 'triton' needs the package triton, which is missing: pip install 'ziggurat[gpu]'")
    return importlib.import_module(MODULES["triton"], __package__)
