"""Means of queries over tiles and of keys over blocks: what cheap selectors judge by, instead of every pair."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.pyramid import KVPyramid
from ..kernels.rows import gather_rows
from .rows import Layout


def tile_means(query: Tensor, layout: Layout, *, squared: bool = False) -> Tensor:
    """The mean query of each tile, or the mean of the squares: query [B, H, N, D] to [B, H, T, D], float32 or wider."""
    rows = layout.query_rows
    packed = gather_rows(_wide(query), rows.flatten(1))
    packed = (packed.square() if squared else packed).unflatten(2, rows.shape[1:])
    return packed.sum(3) / (rows >= 0).sum(-1).clamp(min=1)[..., None]


def block_means(pyramid: KVPyramid, factor: int) -> tuple[Tensor, Tensor]:
    """The mean keys of runs of `factor` level-0 rows, [B, H, R, D], and their log-weights [B|1, H|1, R].

    R holds the level-0 rows ÷ factor, rounded up. Taken from the pyramid where it has the level.
    """
    count = math.ceil(pyramid.offsets[1] / factor)
    if factor in pyramid.factors[1:]:
        first = pyramid.offsets[pyramid.factors.index(factor)]
        begin = first - pyramid.offsets[1]
        return _wide(pyramid.pooled_key[:, :, begin : begin + count]), pyramid.log_weight[:, :, first : first + count]
    mean, summed, _ = _moments(pyramid, factor, second=False)
    return mean, summed


def block_spread(pyramid: KVPyramid) -> Tensor:
    """The variance of each component of the keys within a block: [B, H, level-0 blocks, D]."""
    mean, _, second = _moments(pyramid, pyramid.block, second=True)
    assert second is not None
    return (second - mean.square()).clamp(min=0)


def _moments(pyramid: KVPyramid, factor: int, *, second: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    level0 = pyramid.offsets[1]
    weight = pyramid.log_weight[:, :, :level0]
    key = gather_rows(_wide(pyramid.key), pyramid.key_rows, weight > -math.inf)
    missing = -level0 % factor
    weight = torch.nn.functional.pad(weight, (0, missing), value=-math.inf).unflatten(2, (-1, factor))
    key = torch.nn.functional.pad(key, (0, 0, 0, missing)).unflatten(2, (-1, factor))
    summed = torch.logsumexp(weight, -1)
    share = torch.where(summed[..., None] > -math.inf, (weight - summed[..., None]).exp(), 0)[..., None].to(key.dtype)
    return (key * share).sum(3), summed, (key.square() * share).sum(3) if second else None


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
