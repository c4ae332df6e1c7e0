"""Attention while `shapes` is trained: the same outputs as a pipeline's, by what is fastest forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.transformers import transformer_wan
from torch import Tensor

from ...attention.repeats import attend_all
from ...kernels.pyramid import build_pyramid

TEXT_ROWS = 512  # what WanPipeline pads every prompt to
LISTED_ROWS = 1024
"""From here on our kernel's forward and backward are faster than products of whole score matrices."""
BLOCK = 64


def padding_log_weight(mask: Tensor) -> Tensor:
    """Logits [B, 1, rows] by which few padding rows weigh like the 512 − length equal ones of the pipeline."""
    length = mask.sum(1, keepdim=True)
    weight = ((TEXT_ROWS - length) / (mask.shape[1] - length).clamp(min=1)).log()
    return torch.where(mask.bool(), 0.0, weight)[:, None]


def _attend_all(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of every token to every token, [B, N, H, D], by our own kernel."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attend_all(q, build_pyramid(k, v, block=BLOCK)).transpose(1, 2)


# A compiled graph breaks here: our kernel runs as it is.
_uncompiled: Any = torch.compiler.disable(_attend_all)


@contextmanager
def batched_attention(text_log_weight: Tensor) -> Iterator[None]:
    """Within it, Wan's attention is two batched products around a softmax, and over long clips our own kernel with
    all blocks: stock attention's backward alone is half of a training step on a CPU."""

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        batch, rows, heads, dim = query.shape
        if rows >= LISTED_ROWS and key.shape[1] == rows:
            return _uncompiled(query.to(value.dtype), key.to(value.dtype), value)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        if key.shape[1] == text_log_weight.shape[2]:
            bias = text_log_weight.to(q.dtype).repeat_interleave(heads, 0)
            scores = torch.baddbmm(bias, q * dim**-0.5, k.transpose(1, 2))
        else:
            scores = torch.bmm(q * dim**-0.5, k.transpose(1, 2))
        out = torch.bmm(scores.softmax(-1), v)
        return out.view(batch, heads, rows, dim).transpose(1, 2)

    host: Any = transformer_wan
    stock = host.dispatch_attention_fn
    host.dispatch_attention_fn = attention
    try:
        yield
    finally:
        host.dispatch_attention_fn = stock
