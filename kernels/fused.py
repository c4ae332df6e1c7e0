"""Chunks of gathered blocks through the fused CPU kernel behind `scaled_dot_product_attention`, which returns lse.

In bfloat16 on chips with AMX it is about as fast as separate products and exponentials, writes no scores out, and its
sums are float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .chunks import ChunkPlan
from .pyramid import KVPyramid
from .tables import Rows
from .walk import Scratch

SLICE_BYTES = 256 << 20
"""Scores held at a time where the fused kernel does not run."""


def flash(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of query [n, h, t, D] on key and value [n, h, L, D]: out like query, lse [n, h, t].

    bias: added to the logits, [n, h, 1, L], -inf = not read; where nothing is read: zeros and -inf.
    """
    if query.device.type != "cpu":
        return _by_slices(query, key, value, bias, scale)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=bias, scale=scale
    )
    if bias is not None:
        # The kernel divides 0 by 0 where every key is masked.
        empty = (bias == -math.inf).all(-1, keepdim=True)
        if bool(empty.any()):
            out, lse = out.masked_fill(empty, 0), lse.masked_fill(empty[..., 0], -math.inf)
    return out, lse


def _by_slices(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The same on any device, a slice of the queries at a time."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=wide)
    key, value = key.to(wide), value.to(wide)
    step = max(1, SLICE_BYTES // max(1, key.shape[2] * query[:, :, :1, 0].numel() * wide.itemsize))
    for begin in range(0, query.shape[2], step):
        part = slice(begin, begin + step)
        logits = (query[:, :, part].to(wide) @ key.mT) * scale
        if bias is not None:
            logits += bias
        lse[:, :, part] = logits.logsumexp(-1)
        most = lse[:, :, part, None].clamp(min=torch.finfo(wide).min)
        out[:, :, part] = (logits - most).exp() @ value
    return out, lse


def gathered_tiles(
    query: Tensor, rows: Rows, plan: ChunkPlan, pyramid: KVPyramid, scale: float, result: Tensor, lse: Tensor
) -> None:
    """Write outputs [rows, D] and lse [rows] of the plan's gathered tiles. query: [rows, D], packed."""
    block, tile, head_dim = pyramid.block, plan.tile, query.shape[1]
    tables = [table.reshape(-1, block * head_dim) for table in (rows.key, rows.value)]
    weights = None if rows.plain else rows.log_weight.view(-1, block)
    scratch = Scratch(query)
    for chunk in plan.gathered:
        count, entries = chunk.end - chunk.begin, len(chunk.index)
        part = slice(chunk.begin * tile, chunk.end * tile)
        key, value = (
            torch.index_select(table, 0, chunk.index, out=scratch.take(name, entries, block * head_dim)).view(
                count, 1, -1, head_dim
            )
            for name, table in zip(("keys", "values"), tables, strict=True)
        )
        bias = None if weights is None else weights.index_select(0, chunk.index).view(count, -1)
        if chunk.hidden is not None:
            # What a row mask hides may hold NaN, which even a weight of 0 would spread.
            front = chunk.hidden.shape[1]
            key[:, 0, :front].masked_fill_(chunk.hidden, 0)
            value[:, 0, :front].masked_fill_(chunk.hidden, 0)
            bias = query.new_zeros(count, key.shape[2], dtype=lse.dtype) if bias is None else bias
            bias[:, :front].masked_fill_(chunk.hidden[..., 0], -math.inf)
        if bias is not None:
            bias = bias.to(lse.dtype)[:, None, None]
        out, sums = flash(query[part].view(count, 1, tile, head_dim), key, value, bias, scale)
        result[part] = out.reshape(-1, head_dim)
        lse[part] = sums.reshape(-1)
