"""Attention while `shapes` is trained: the same outputs as a pipeline's, by what is fastest forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.transformers import transformer_wan
from torch import Tensor

from ...attention.grid import TokenGrid
from ...attention.plan import Plan
from ...attention.repeats import attend_all
from ...attention.run import PlanRun
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


class LongAttention:
    """Self-attention over long clips by our own kernel: all blocks, or by a plan in the steps that `begin` gives one.

    A model that has met its plan in training keeps to what the plan leaves it, as in VSA (arXiv 2505.13389).
    """

    def __init__(self, plan: Plan | None = None):
        self._run = PlanRun(plan) if plan is not None else None
        # A compiled graph breaks here: our kernel runs as it is.
        self.attend: Any = torch.compiler.disable(self._attend)
        self.begin(None, 1.0)

    def begin(self, grid: tuple[int, int, int] | None, noise_level: float) -> None:
        """A forward is to come. grid: of a clip that is to run by the plan; None = all blocks."""
        if grid is not None and self._run is None:
            raise ValueError("a grid was given but no plan: give LongAttention the plan to train under")
        self._grid = None if grid is None else TokenGrid.video(*grid)
        self._noise_level = noise_level
        self._layer = 0
        if self._run is not None:
            self._run.begin()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the next layer, [B, N, H, D]."""
        q, k, v = (x.transpose(1, 2) for x in (query.to(value.dtype), key.to(value.dtype), value))
        layer, self._layer = self._layer, self._layer + 1
        out = None
        if self._run is not None and self._grid is not None:
            level = self._noise_level
            out = self._run.attend_layer(q, k, v, layer=layer, noise_level=level, step=0, grid=self._grid)
        if out is None:
            out = attend_all(q, build_pyramid(k, v, block=BLOCK))
        return out.transpose(1, 2)


@contextmanager
def batched_attention(text_log_weight: Tensor, long: LongAttention) -> Iterator[None]:
    """Within it, Wan's attention is two batched products around a softmax, and over long clips `long`: stock
    attention's backward alone is half of a training step on a CPU."""

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        batch, rows, heads, dim = query.shape
        if rows >= LISTED_ROWS and key.shape[1] == rows:
            return long.attend(query, key, value)
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
