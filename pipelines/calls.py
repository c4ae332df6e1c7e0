"""One attention call of a gated layer: what it was given, and how it reaches its router in whatever layout it came."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .ulysses import Share, gather_heads, gather_mask, gather_tokens, share_of


# Not frozen: one is made for every call, and freezing doubles what that takes.
@dataclass(kw_only=True, slots=True)
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

    def beyond_kernels(self) -> str:
        """Why our kernels can't take this call, its mask aside; "" where they can."""
        if self.unusual:
            return f"{self.unusual} given, which only the chosen attention backend understands"
        if self.causal:
            return "causal attention"
        if self.dropout:
            return "attention with dropout"
        if self.grouped or self.key.shape[1] != self.query.shape[1]:
            return "grouped-query attention"
        return ""

    def beyond_plans(self) -> str:
        """Why no plan can take this call, whatever its grid; "" where one may."""
        if reason := self.beyond_kernels():
            return reason
        queries, keys = self.query.shape[2], self.key.shape[2]
        return "" if keys == queries else f"not self-attention ({queries} queries, {keys} keys)"


class Router(Protocol):
    def dense(self, index: int, query: Tensor, stock: Callable[[], Tensor], *, token_dim: int) -> Tensor | None:
        """`stock()`, where layer `index` runs dense now whatever its call holds: the short way; else None.

        query: of a call whose keys are as many, in the caller's layout.
        """
        ...

    def route(self, index: int, call: Call, stock: Callable[[], Tensor], *, token_dim: int) -> Tensor:
        """The output of layer `index`, in the caller's layout: its own, or that of `stock()`."""
        ...

    def deal(self, index: int, heads: int, share: Share) -> list[int]:
        """The order in which the ranks of a share take the heads of layer `index`."""
        ...


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


def route_dispatch(
    slot: Tensor,
    original: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """A call of `dispatch_attention_fn`, tensors [B, N, H, D], by the router of `slot`, or as it was."""

    stock = functools.partial(original, query, key, value, **options)
    route = _routes.get(int(slot))
    if route is None:
        return stock()
    share = share_of(options.get("parallel_config"))
    if share is None and query.shape == key.shape:
        out = route.router.dense(route.index, query, stock, token_dim=1)
        if out is not None:
            return out
    unusual = "attention_kwargs" if options.get("attention_kwargs") else None
    mask = options.get("attn_mask")
    if isinstance(mask, Tensor) and mask.shape == (query.shape[0], key.shape[1]):
        # Diffusers' own meaning of two dimensions; to SDPA they would be queries and keys.
        mask = mask[:, None, None]
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


def route_sdpa(slot: Tensor, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """A call of `F.scaled_dot_product_attention`, tensors [B, H, N, D], by the router of `slot`, or as it was."""

    stock = functools.partial(F.scaled_dot_product_attention, query, key, value, **options)
    route = _routes.get(int(slot))
    if route is None:
        return stock()
    if query.shape == key.shape:
        out = route.router.dense(route.index, query, stock, token_dim=2)
        if out is not None:
            return out
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
