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
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rebind import HOMES, rebind, restore
from .ulysses import Share, gather_heads, gather_mask, gather_tokens, share_of

SLOT_ATTRIBUTE = "_ziggurat_layer"


@dataclass(frozen=True, kw_only=True)
class Call:
    """One attention call: query, key, value as [B, H, N, D] views, and what else it was given."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    scale: float | None = None
    causal: bool = False
    dropout: float = 0.0
    grouped: bool = False
    unusual: str | None = None
    """An argument that only the original understands."""
    share: Share | None = None
    """Under context parallelism: this call is gathered, and holds the heads that the rank was dealt."""


class Router(Protocol):
    def route(self, index: int, call: Call, stock: Callable[[], Tensor], *, token_dim: int) -> Tensor:
        """The output of layer `index`, in the caller's layout: its own, or that of `stock()`."""
        ...

    def deal(self, index: int, heads: int, share: Share) -> list[int]:
        """The order in which the ranks of a share take the heads of layer `index`."""
        ...


class _Here(threading.local):
    slot: Tensor | None = None


_here = _Here()
_routes: weakref.WeakValueDictionary[int, Route] = weakref.WeakValueDictionary()
_lock = threading.Lock()
_next_slot = 0


class Route:
    """The entry that a slot number stands for; it lives as long as the router that holds it."""

    def __init__(self, router: Router, index: int):
        global _next_slot
        self.router, self.index = router, index
        with _lock:
            # Never reused: a copied module may still carry the number of a transformer that is gone.
            self.slot = torch.tensor(_next_slot)
            _routes[_next_slot] = self
            _next_slot += 1


def clear_slot() -> None:
    """Forget which layer runs in this thread: an exception may have left one behind."""
    _here.slot = None


def _open_gate(module: nn.Module, _arguments: Any) -> None:
    _here.slot = getattr(module, SLOT_ATTRIBUTE)


def _close_gate(_module: nn.Module, _arguments: Any, _output: Any) -> None:
    _here.slot = None


def _dispatch(
    slot: Tensor,
    original: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, Any],
) -> Tensor:
    def stock() -> Tensor:
        return original(query, key, value, **options)

    route = _routes.get(int(slot))
    if route is None:
        return stock()
    unusual = "attention_kwargs" if options.get("attention_kwargs") else None
    mask = options.get("attn_mask")
    if isinstance(mask, Tensor) and mask.shape == (query.shape[0], key.shape[1]):
        # Diffusers' own meaning of two dimensions; to SDPA they would be queries and keys.
        mask = mask[:, None, None]
    share = share_of(options.get("parallel_config"))
    if share is not None and unusual is None:
        return _dispatch_shared(route, share, original, (query, key, value), {**options, "attn_mask": mask})
    call = Call(
        query=query.transpose(1, 2),
        key=key.transpose(1, 2),
        value=value.transpose(1, 2),
        mask=mask,
        scale=options.get("scale"),
        causal=options.get("is_causal", False),
        dropout=options.get("dropout_p", 0.0),
        grouped=options.get("enable_gqa", False),
        unusual=unusual,
    )
    return route.router.route(route.index, call, stock, token_dim=1)


def _dispatch_shared(
    route: Route,
    share: Share,
    original: Callable[..., Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
    options: dict[str, Any],
) -> Tensor:
    order = route.router.deal(route.index, tensors[0].shape[2], share)
    query, key, value = (gather_tokens(tensor, order, share) for tensor in tensors)
    mask = gather_mask(options.get("attn_mask"), tensors[1].shape[1], share)

    def stock() -> Tensor:
        rows = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return original(*rows, **{**options, "attn_mask": mask, "parallel_config": None}).transpose(1, 2)

    call = Call(
        query=query,
        key=key,
        value=value,
        mask=mask,
        scale=options.get("scale"),
        causal=options.get("is_causal", False),
        dropout=options.get("dropout_p", 0.0),
        grouped=options.get("enable_gqa", False),
        share=share,
    )
    return gather_heads(route.router.route(route.index, call, stock, token_dim=2), order, share)


def _sdpa(slot: Tensor, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    def stock() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **options)

    route = _routes.get(int(slot))
    if route is None:
        return stock()
    call = Call(
        query=query,
        key=key,
        value=value,
        mask=options.get("attn_mask"),
        scale=options.get("scale"),
        causal=options.get("is_causal", False),
        dropout=options.get("dropout_p", 0.0),
        grouped=options.get("enable_gqa", False),
    )
    return route.router.route(route.index, call, stock, token_dim=2)


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
        out = _dispatch(slot, original, query, key, value, options)
    else:
        out = _sdpa(slot, query, key, value, options)
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
    return _sdpa(slot, query, key, value, options)


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
        dispatch: Any = torch.compiler.disable(_dispatch) if compiling else _dispatch
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
