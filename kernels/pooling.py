"""A pyramid's coarser levels: weighted means of the rows that each of their rows covers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import native_pool
from .rows import gather_rows

Means = tuple[Tensor, Tensor]


def pool_levels(
    key: Tensor,
    value: Tensor,
    key_rows: Tensor,
    log_weight: Tensor,
    factors: Sequence[int],
    sizes: Sequence[int],
    memo: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values [B, H, P, D] and log-weights [B|1, H|1, P] of the levels above 0, one behind the other.

    key, value: [B, H, N, D]. key_rows: int32 [H|1, R]. log_weight: of level 0, [B|1, H|1, R], -inf = unread.
    factors: of these levels. sizes: their rows, those behind the last that covers any being padding. memo: keeps what
    follows from log_weight, factors and sizes.
    """
    count = {factor: math.ceil(key_rows.shape[1] / factor) for factor in factors}
    size = dict(zip(factors, sizes, strict=True))
    levels: dict[int, tuple[Means, Tensor]] = {}
    if native_pool.takes(key, value):
        once = native_pool.together(factors)
        if once:
            shares, weights = memo["shares"] if "shares" in memo else _shares(log_weight, once, size)
            memo["shares"] = shares, weights
            # One pass over level 0.
            keys, values = native_pool.pool(key, value, key_rows, once, shares, [size[factor] for factor in once])
            levels = dict(zip(once, zip(zip(keys, values, strict=True), weights, strict=True), strict=True))
    if len(levels) < len(factors):
        live = log_weight > -math.inf
        levels[1] = (gather_rows(key, key_rows, live), gather_rows(value, key_rows, live)), log_weight
    # From the coarsest finer level that it is a multiple of: that has the fewest rows to read.
    wide = torch.float64 if key.dtype == torch.float64 else torch.float32
    for factor in factors:
        if factor not in levels:
            finer = max(other for other in levels if other < factor and factor % other == 0)
            levels[factor] = _pool(*levels[finer], factor // finer, count[factor], size[factor], wide)
    pooled = [levels[factor] for factor in factors]
    keys, values = (torch.cat([means[which].to(key.dtype) for means, _ in pooled], 2) for which in range(2))
    return keys, values, torch.cat([weight for _, weight in pooled], 2)


def _shares(log_weight: Tensor, factors: Sequence[int], size: dict[int, int]) -> tuple[Tensor, list[Tensor]]:
    """How much of its mean each row makes at each level, [levels, B|1, H|1, R], and each level's log-weights."""
    rows = log_weight.shape[2]
    shares, weights = [], []
    for factor in factors:
        summed, share = _weigh(log_weight, factor, -(-rows // factor))
        shares.append(share.flatten(2)[..., :rows])
        weights.append(torch.nn.functional.pad(summed, (0, size[factor] - summed.shape[2]), value=-math.inf))
    return torch.stack(shares), weights


def _weigh(log_weight: Tensor, factor: int, count: int) -> tuple[Tensor, Tensor]:
    """Summed weights [B|1, H|1, count] of every `factor` rows, and the share that each of them has, [..., factor]."""
    # Negative where the finer level has more padding than this one needs.
    missing = count * factor - log_weight.shape[2]
    padded = torch.nn.functional.pad(log_weight, (0, missing), value=-math.inf)
    grouped = padded.unflatten(2, (count, factor))
    summed = torch.logsumexp(grouped, -1)
    # Rows over nothing: shares of 0 instead of -inf - -inf.
    return summed, torch.where(summed[..., None] > -math.inf, (grouped - summed[..., None]).exp(), 0)


def _pool(
    sources: tuple[Tensor, Tensor], log_weight: Tensor, factor: int, count: int, size: int, wide: torch.dtype
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """One coarser level: weighted means, in `wide`, of `factor` rows each, and their summed weights.

    Of its `size` rows the first `count` are over any rows at all; the others are padding.
    """
    summed, share = _weigh(log_weight, factor, count)
    share = share.to(wide)
    missing = count * factor - log_weight.shape[2]
    pad = torch.nn.functional.pad
    means = []
    for source in sources:
        rows = (pad(source, (0, 0, 0, missing)) if missing else source).unflatten(2, (count, factor)).to(wide)
        # A product writes nothing but the means; over few rows each, its loop costs more than adding them one by one.
        if factor >= 8:
            mean = (share[..., None, :] @ rows)[..., 0, :]
        else:
            mean = rows[..., 0, :] * share[..., 0, None]
            for row in range(1, factor):
                mean = torch.addcmul(mean, rows[..., row, :], share[..., row, None])
        means.append(pad(mean, (0, 0, 0, size - count)))
    return (means[0], means[1]), pad(summed, (0, size - count), value=-math.inf)
