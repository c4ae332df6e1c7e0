"""The two names that processors call attention by, rebound in the Python modules that define them, and restored."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

# Reentrant: garbage collection may run a finalizer, which restores names, while this thread holds it.
_lock = threading.RLock()


@dataclass
class Home:
    """The names of one Python module while at least one transformer needs them rebound."""

    users: int = 0
    dispatch: Callable[..., Tensor] | None = None
    rebound: dict[str, Any] = field(default_factory=dict)
    originals: dict[str, Any] = field(default_factory=dict)


HOMES: dict[str, Home] = {}


def rebind(
    name: str,
    gate_dispatch: Callable[[Callable[..., Tensor], str], Callable[..., Tensor]],
    gated_functional: Callable[[], types.ModuleType],
) -> None:
    """Rebind the names of the module `name`, unless they are already; `restore` undoes one such call."""
    with _lock:
        home = HOMES.setdefault(name, Home())
        home.users += 1
        if home.users > 1:
            return
        module = sys.modules[name]
        if hasattr(module, "dispatch_attention_fn"):
            original = home.dispatch = module.dispatch_attention_fn
            home.rebound["dispatch_attention_fn"] = gate_dispatch(original, name)
        if getattr(module, "F", None) is F:
            home.rebound["F"] = gated_functional()
        for attribute, value in home.rebound.items():
            home.originals[attribute] = getattr(module, attribute)
            setattr(module, attribute, value)


def restore(names: Iterable[str]) -> None:
    """Give the modules their own names back, those that nobody needs rebound any more."""
    with _lock:
        for name in names:
            home = HOMES[name]
            home.users -= 1
            if home.users:
                continue
            module = sys.modules[name]
            for attribute, value in home.rebound.items():
                # Someone who rebound the name after us keeps their own; ours passes through once no slot is set.
                if getattr(module, attribute) is value:
                    setattr(module, attribute, home.originals[attribute])
            del HOMES[name]
