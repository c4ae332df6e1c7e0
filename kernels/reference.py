"""The dense reference that every other backend is held to: readable, slow, in float32 or float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .blocklist import BlockList
from .listops import to_dense
from .pyramid import KVPyramid
from .rows import gather_rows


def attend(
    query: Tensor, pyramid: KVPyramid, blocks: BlockList, *, scale: float, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `kernels.attend.attend`; logits and sums in float32, or float64 if `compute_dtype` is."""
    wide = torch.float64 if compute_dtype == torch.float64 else torch.float32
    live = pyramid.log_weight > -math.inf
    level, pooled = live.split([pyramid.offsets[1], pyramid.rows - pyramid.offsets[1]], 2)
    key, value = (
        torch.cat([gather_rows(tokens, pyramid.key_rows, level), torch.where(pooled[..., None], rows, 0)], 2).to(wide)
        for tokens, rows in ((pyramid.key, pyramid.pooled_key), (pyramid.value, pyramid.pooled_value))
    )
    tiles = gather_rows(query, blocks.query_rows.flatten(1)).unflatten(2, blocks.query_rows.shape[1:]).to(wide)

    read = (to_dense(blocks, pyramid) & live[:, :, None])[:, :, :, None]  # [B|1, H|1, T, 1, R]
    logits = scale * torch.einsum("bhtqd,bhrd->bhtqr", tiles, key) + pyramid.log_weight[:, :, None, None]
    logits = torch.where(read, logits, -math.inf)
    lse = torch.logsumexp(logits, -1)
    # A tile that reads nothing has weights 0, not exp(-inf - -inf).
    weights = torch.where(read, (logits - torch.where(lse > -math.inf, lse, 0)[..., None]).exp(), 0)
    out = torch.einsum("bhtqr,bhrd->bhtqd", weights, value)
    out_dtype, lse_dtype = query.dtype, torch.float64 if query.dtype == torch.float64 else torch.float32
    tokens = query.shape[2]
    return (
        scatter_tiles(out, blocks.query_rows, tokens, 0.0).to(out_dtype),
        scatter_tiles(lse.detach()[..., None], blocks.query_rows, tokens, -math.inf)[..., 0].to(lse_dtype),
    )


def scatter_tiles(tiles: Tensor, query_rows: Tensor, tokens: int, fill: float) -> Tensor:
    """Tile rows back in token order: [B, H, T, tile, D] to [B, H, tokens, D], `fill` for tokens in no tile."""
    batch, heads, _, _, width = tiles.shape
    # Padding goes to one row past the end, which is cut off.
    index = torch.where(query_rows < 0, tokens, query_rows).long().flatten(1)[None, :, :, None]
    result = tiles.new_full((batch, heads, tokens + 1, width), fill)
    return result.scatter(2, index.expand(batch, heads, -1, width), tiles.flatten(2, 3))[:, :, :tokens]
