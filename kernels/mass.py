"""The exact softmax mass of every pair of query tile and key block, from the logsumexp of an earlier pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import native, native_build
from .backends import choose, load_triton
from .checks import check_query
from .pyramid import KVPyramid
from .rows import gather_rows
from .tables import Rows, groups, lay_rows, of_group

# Scores held at a time, in bytes; they stay in a second-level cache.
SCORE_BYTES = 1 << 20
KEY_ROWS = 2048


def block_mass(
    query: Tensor,
    pyramid: KVPyramid,
    lse: Tensor,
    query_rows: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax mass that each query tile puts on each level-0 block, in one pass over the scores.

    With the lse of all of level 0, as `attend` returns it, a tile's masses add up to its number of live queries. An
    older lse, from an earlier denoising step, gives the masses up to a factor per query (AdaSpa, arXiv 2502.21079).

    query: [B, H, Nq, D]. lse: [B, H, Nq], natural log, in token order; queries of lse -inf count for nothing.
    query_rows: int32 [H|1, T, tile], the tokens of each query tile, -1 = padding.
    scale: factor on the logits; None = D ** -0.5.
    backend: "auto", "torch", "reference" or "triton".

    Returns [B, H, T, level-0 blocks], float32 (float64 for float64 input). Raises ValueError for what does not fit.
    """
    _check(query, pyramid, lse, query_rows)
    factor = float(query.shape[-1]) ** -0.5 if scale is None else scale
    name = choose(query.device)[0] if backend == "auto" else backend
    if name == "triton":
        return load_triton().block_mass(query, pyramid, lse, query_rows, scale=factor)
    known = {"torch": _torch, "reference": _reference}
    if name not in known:
        raise ValueError(f"backend must be one of auto, {', '.join([*known, 'triton'])}, got {backend!r}")
    with torch.no_grad():
        return known[name](query, pyramid, lse, query_rows, factor)


def _check(query: Tensor, pyramid: KVPyramid, lse: Tensor, query_rows: Tensor) -> None:
    check_query(query, pyramid)
    if lse.shape != query.shape[:3]:
        raise ValueError(
            f"lse must have the query's [batch, heads, tokens] {tuple(query.shape[:3])}, got {tuple(lse.shape)}"
        )
    if query_rows.ndim != 3 or query_rows.shape[0] not in (1, query.shape[1]):
        raise ValueError(
            f"query_rows must be [1 or {query.shape[1]}, tiles, tile], got {tuple(query_rows.shape)}: pad tiles with -1"
        )


def _reference(query: Tensor, pyramid: KVPyramid, lse: Tensor, query_rows: Tensor, scale: float) -> Tensor:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    weight = pyramid.log_weight[:, :, : pyramid.offsets[1]]
    key = gather_rows(pyramid.key, pyramid.key_rows, weight > -math.inf).to(wide)
    flat = query_rows.flatten(1)
    tiles = gather_rows(query, flat).unflatten(2, query_rows.shape[1:]).to(wide)
    powers, live = _tile_lse(lse.to(wide), query_rows)
    logits = scale * torch.einsum("bhtqd,bhrd->bhtqr", tiles, key) + weight[:, :, None, None]
    shares = torch.where(live[..., None], (logits - powers[..., None]).exp(), 0)
    return shares.sum(3).unflatten(3, (-1, pyramid.block)).sum(4)


def _tile_lse(lse: Tensor, query_rows: Tensor) -> tuple[Tensor, Tensor]:
    """The lse of each tile's queries [B, H, T, tile], 0 where there is none, and where there is one."""
    flat = query_rows.flatten(1)
    gathered = gather_rows(lse[..., None], flat)[..., 0].unflatten(2, query_rows.shape[1:])
    live = (query_rows >= 0)[None] & (gathered > -math.inf)
    return torch.where(live, gathered, 0), live


def _torch(query: Tensor, pyramid: KVPyramid, lse: Tensor, query_rows: Tensor, scale: float) -> Tensor:
    """By the C++ kernel where there is one. Otherwise score chunks that stay in cache: the lse and the log-weights ride
    along as further columns of query and key, so that what is rounded to a narrow dtype is the logarithm of a share,
    small wherever the share is large."""
    dtype = torch.float32 if query.dtype == torch.float16 else query.dtype
    batch, heads, _, head_dim = query.shape
    tiles, tile = query_rows.shape[1:]
    if head_dim <= native.MOST_HEAD_DIM and native_build.lacking(dtype, query.device) is None:
        out = query.new_empty(batch, heads, tiles, pyramid.offsets[1] // pyramid.block, dtype=torch.float32)
        native.block_mass(query, pyramid, lse.float().contiguous(), query_rows, scale, dtype, out)
        return out
    level, block = pyramid.offsets[1], pyramid.block
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    result = query.new_empty(batch, heads, tiles, level // block, dtype=wide)
    factor = scale or 1.0
    for group in groups(batch, heads, max(1, 2 * pyramid.rows * head_dim * dtype.itemsize)):
        tensors = (pyramid.key, pyramid.value, pyramid.pooled_key, pyramid.pooled_value)
        rows = lay_rows(pyramid, tensors, group, dtype)
        size = len(group[0]) * len(group[1])
        own = query_rows[group[1].start : group[1].stop] if query_rows.shape[0] > 1 else query_rows
        powers, live = _tile_lse(of_group(lse, group).to(wide), own)
        packed = gather_rows(of_group(query, group), own.flatten(1)).to(dtype) * bool(scale)
        keys, queries = _with_columns(rows, level, packed, powers, live, factor)
        target = result[group[0].start : group[0].stop, group[1].start : group[1].stop]
        shape = (size, tiles, tile)
        masses = _masses(
            queries.view(*shape, -1), keys, live.reshape(shape).to(dtype), block, factor / math.log(2), wide
        )
        target.copy_(masses.view(target.shape))
    return result


def _with_columns(
    rows: Rows, level: int, packed: Tensor, powers: Tensor, live: Tensor, factor: float
) -> tuple[Tensor, Tensor]:
    """Keys [G, level, D + 2 n] and queries [B, H, T · tile, D + 2 n], whose products are logits - lse + log-weight,
    over `factor`; a narrow dtype takes n = 3 columns to hold a number that float32 holds in one."""
    dtype = packed.dtype
    live_keys = rows.log_weight[:, :level] > -math.inf
    weight = _split(torch.where(live_keys, rows.log_weight[:, :level], 0) / factor, dtype)
    weight[..., 0].masked_fill_(~live_keys, -math.copysign(math.inf, factor))
    shares = _split(torch.where(live, -powers / factor, 0).flatten(2), dtype)
    one_key, one_query = torch.ones_like(weight), torch.ones_like(shares)
    keys = torch.cat([rows.key[:, :level], one_key[..., : shares.shape[-1]], weight], -1)
    return keys, torch.cat([packed, shares, one_query], -1)


def _split(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values [...] as a sum of numbers of `dtype`, [..., n]."""
    parts = []
    for _ in range(1 if dtype.itemsize >= values.dtype.itemsize else 3):
        parts.append(values.to(dtype))
        values = values - parts[-1].to(values.dtype)
    return torch.stack(parts, -1)


def _masses(queries: Tensor, keys: Tensor, live: Tensor, block: int, alpha: float, wide: torch.dtype) -> Tensor:
    """Masses [G, T, blocks] of queries [G, T, tile, E] on keys [G, R, E], counting queries by live [G, T, tile]."""
    size, tiles, tile, _ = queries.shape
    level = keys.shape[1]
    result = queries.new_empty(size, tiles, level // block, dtype=wide)
    step = max(1, SCORE_BYTES // max(1, tile * min(level, KEY_ROWS) * queries.element_size()))
    width = max(1, KEY_ROWS // block) * block
    for head in range(size):
        for first in range(0, tiles, step):
            here = queries[head, first : first + step].flatten(0, 1)
            count = here.shape[0] // tile
            chosen = live[head, first : first + step, None]
            for begin in range(0, level, width):
                part = keys[head, begin : begin + width]
                shares = torch.addmm(part.new_zeros(()), here, part.mT, beta=0, alpha=alpha).exp2_()
                summed = torch.bmm(chosen, shares.view(count, tile, -1))[:, 0]
                end = (begin + part.shape[0]) // block
                result[head, first : first + count, begin // block : end] = (
                    summed.to(wide).unflatten(1, (-1, block)).sum(2)
                )
    return result
