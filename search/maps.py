"""Attention problems with maps of a known kind, from a seed: what a selector is good at shows on them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..attention.grid import TokenGrid
from ..attention.order import coordinates
from .capture import Sample

MAPS = ("local", "strided", "clustered", "uniform")
SHARPNESS = 8.0
"""Factor on the logits: neighbours in the map weigh exp(8) times what strangers do."""
NOISE = 0.5


def synthetic(name: str, grid: TokenGrid, *, heads: int = 2, head_dim: int = 32, seed: int = 0) -> Sample:
    """Queries, keys and values [1, heads, N, head_dim] over one video, whose map is of a kind.

    local: tokens near in space and time. strided: tokens equal modulo 4 in row and column, whatever the frame.
    clustered: tokens of one of 24 kinds of content, scattered over the video in blobs that move from frame to frame.
    uniform: every token alike. Values vary smoothly over the video and by content, with noise.
    """
    if name not in MAPS:
        raise ValueError(f"name must be one of {', '.join(MAPS)}, got {name!r}")
    (segment,) = grid.segments
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    frame, row, column = (axis.float() for axis in coordinates(segment.grid))
    place = torch.stack([frame, row, column], 1)
    content = _content(place, normal)
    shape = (heads, grid.tokens, head_dim)
    if name == "local":
        features = torch.stack([_fourier(place, normal, head_dim, (2.0, 2.5, 2.5)) for _ in range(heads)])
    elif name == "strided":
        phases = torch.stack([row % 4, column % 4], 1)
        kinds = (phases[:, 0] * 4 + phases[:, 1]).long()
        features = torch.stack([normal(16, head_dim)[kinds] for _ in range(heads)])
    elif name == "clustered":
        features = torch.stack([normal(24, head_dim)[content] for _ in range(heads)])
    else:
        features = torch.zeros(shape)
    features = torch.nn.functional.normalize(features, dim=-1, eps=1e-6)
    size = math.sqrt(SHARPNESS * math.sqrt(head_dim))
    query, key = (size * features + NOISE * normal(*shape) for _ in range(2))
    smooth = torch.stack([_fourier(place, normal, head_dim, (4.0, 6.0, 6.0)) for _ in range(heads)])
    value = smooth * math.sqrt(head_dim) + normal(24, head_dim)[content] + NOISE * normal(*shape)
    return Sample(source=name, query=query[None], key=key[None], value=value[None], grid=grid)


def _fourier(place: Tensor, normal, size: int, lengths: tuple[float, float, float]) -> Tensor:
    """Random features [N, size] whose products fall off with distance, by these lengths along the axes."""
    waves = normal(3, size // 2) / torch.tensor(lengths)[:, None]
    angles = place @ waves
    return torch.cat([angles.cos(), angles.sin()], 1)


def _content(place: Tensor, normal) -> Tensor:
    """int64 [N]: the nearest of 72 moving centres, which are of 24 kinds."""
    extent = place.amax(0) + 1
    start = (normal(72, 3) * 0.35 + 0.5) * extent
    drift = normal(72, 2) * 0.4
    centre = start[None, :, 1:] + drift[None] * place[:, :1, None]
    distance = (place[:, None, 1:] - centre).square().sum(-1) + 0.25 * (place[:, :1] - start[None, :, 0]).square()
    return distance.argmin(1) % 24
