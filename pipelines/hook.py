"""How a transformer's own attention calls reach a plan: a gate on each attention module and two rebound names.

A gate is a forward pre-hook that puts its layer into a thread-local slot. In the Python module that defines the
attention's processor, `dispatch_attention_fn` and `F.scaled_dot_product_attention` are rebound to functions that look
at the slot: empty, they pass straight through; else the call goes to the layer's router, and where that declines, to
the original with all it was given, so that the backend chosen in diffusers still does the dense calls.
"""

from __future__ import annotations

import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calls import Route, Router, route_dispatch, route_sdpa
from .rebind import HOMES, rebind, restore

SLOT_ATTRIBUTE = "_ziggurat_layer"


class _Here(threading.local):
    slot: Tensor | None = None


_here = _Here()


def clear_slot() -> None:
    """Forget which layer runs in this thread: an exception may have left one behind."""
    _here.slot = None


def _open_gate(module: nn.Module, _arguments: Any) -> None:
    _here.slot = getattr(module, SLOT_ATTRIBUTE)


def _close_gate(_module: nn.Module, _arguments: Any, _output: Any) -> None:
    _here.slot = None


@torch.library.custom_op("ziggurat::gated_attention", mutates_args=())
def _gated_op(
    slot: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
    home: str,
    backend: str | None,
) -> Tensor:
    # torch.compile sees one opaque operator; step, branch and grid are read in here, when it runs. The layer comes as
    # a tensor because a Python number would be compiled in, and every layer of a repeated block would recompile.
    options: dict[str, Any] = {
        "attn_mask": mask,
        "dropout_p": dropout,
        "is_causal": causal,
        "scale": scale,
        "enable_gqa": grouped,
    }
    if home:
        from diffusers.models.attention_dispatch import AttentionBackendName

        options["backend"] = None if backend is None else AttentionBackendName(backend)
        rebound = HOMES.get(home)
        # Code compiled before a detach still comes here: its route is gone, and the name is the original again.
        original = rebound.dispatch if rebound else None
        original = original or sys.modules[home].dispatch_attention_fn
        out = route_dispatch(slot, original, query, key, value, options)
    else:
        out = route_sdpa(slot, query, key, value, options)
    return out.contiguous()


@_gated_op.register_fake
def _gated_fake(slot, query, key, value, mask, dropout, causal, scale, grouped, home, backend):
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _gated_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    slot = _here.slot
    if slot is not None and torch.compiler.is_compiling():
        return _gated_op(slot, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, "", None)
    options = {
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    if slot is None:
        return F.scaled_dot_product_attention(query, key, value, **options)
    return route_sdpa(slot, query, key, value, options)


def _gate_dispatch(original: Callable[..., Tensor], home: str) -> Callable[..., Tensor]:
    def dispatch_attention_fn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        slot = _here.slot
        compiling = torch.compiler.is_compiling()
        if slot is not None and compiling and not attention_kwargs and parallel_config is None:
            name = None if backend is None else getattr(backend, "value", backend)
            return _gated_op(slot, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, home, name)
        options = {
            "attn_mask": attn_mask,
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "scale": scale,
            "enable_gqa": enable_gqa,
            "attention_kwargs": attention_kwargs,
            "backend": backend,
            "parallel_config": parallel_config,
        }
        if slot is None:
            return original(query, key, value, **options)
        # What the operator can't take breaks the graph, which fullgraph reports, rather than run dense unsaid.
        dispatch: Any = torch.compiler.disable(route_dispatch) if compiling else route_dispatch
        return dispatch(slot, original, query, key, value, options)

    return dispatch_attention_fn


def _gated_functional() -> types.ModuleType:
    functional = types.ModuleType(F.__name__, F.__doc__)
    functional.__dict__.update(vars(F))
    functional.__dict__["scaled_dot_product_attention"] = _gated_sdpa
    return functional


class Gates:
    """The gates of one transformer's layers; `remove` takes them off and restores the rebound names.

    Should the router die without that (its transformer was deleted), the names are restored then.
    """

    def __init__(self, router: Router, layers: Iterable[nn.Module]):
        layers = list(layers)
        self.routes = [Route(router, index) for index in range(len(layers))]
        self._modules = [weakref.ref(module) for module in layers]
        self._hooks = []
        self._homes: list[str] = []
        self._release = weakref.finalize(self, restore, self._homes)
        self.follow()
        for module, route in zip(layers, self.routes, strict=True):
            setattr(module, SLOT_ATTRIBUTE, route.slot)
            self._hooks.append(module.register_forward_pre_hook(_open_gate))
            self._hooks.append(module.register_forward_hook(_close_gate))

    def follow(self) -> None:
        """Rebind the names where the processors are defined now: users swap them."""
        for reference in self._modules:
            module = reference()
            name = type(getattr(module, "processor", module)).__module__
            if name not in self._homes:
                rebind(name, _gate_dispatch, _gated_functional)
                self._homes.append(name)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for reference in self._modules:
            module = reference()
            if module is not None and SLOT_ATTRIBUTE in module.__dict__:
                delattr(module, SLOT_ATTRIBUTE)
        self.routes.clear()
        self._release()
