"""The attention modules of a transformer of diffusers."""

from __future__ import annotations

from typing import Any

from torch import nn


def attention_modules(transformer: nn.Module) -> dict[str, nn.Module]:
    """Every attention module of a transformer of diffusers by its path, in module order."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention, MochiAttention

    kinds: Any = (Attention, MochiAttention, AttentionModuleMixin)
    return {path: module for path, module in transformer.named_modules() if isinstance(module, kinds)}


def heads_of(module: nn.Module) -> tuple[int, int]:
    """The heads of an attention module of diffusers, and the dimensions of each."""
    known: Any = module
    heads = int(getattr(known, "heads", None) or known.num_heads)
    width = getattr(known, "head_dim", None)
    if width is None:
        projection = getattr(known, "to_q", None) or known.to_query
        width = projection.out_features // heads
    return heads, int(width)
