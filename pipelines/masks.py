"""Attention masks as log-weights of keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.grid import TokenGrid
from .calls import Call


def key_log_weight(mask: Tensor, tokens: int, *, query: int | None = None) -> Tensor | None:
    """A mask over keys alone, (..., 1, N) (bool, or added to logits), as [B|1, H|1, N] float32; else None.

    query: take a mask (..., N, N) at this query, whose row stands for all rows that matter.
    """
    if mask.ndim > 4 or not mask.ndim or mask.shape[-1] != tokens:
        return None
    mask = mask[(None,) * (4 - mask.ndim)]
    if mask.shape[2] == 1:
        mask = mask[:, :, 0]
    elif query is not None and mask.shape[2] == tokens:
        mask = mask[:, :, query]
    else:
        return None
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
    return mask.float()


def with_exact_text(out: Tensor, call: Call, grid: TokenGrid) -> Tensor:
    """A plan's output [B, H, N, D] with its text queries done anew by SDPA: they have rows of the mask of their own.

    They are few, and padding among them may read what no visual query does.
    """
    rows = [part.positions() for part in grid.segments if part.kind != "visual"]
    exact = torch.cat([*rows, torch.empty(0, dtype=torch.int64)]).to(out.device)
    mask = call.mask[:, :, exact] if call.mask is not None else None
    text = F.scaled_dot_product_attention(
        call.query[:, :, exact], call.key, call.value, attn_mask=mask, scale=call.scale
    )
    return out.index_copy(2, exact, text.to(out.dtype))
