"""How many blocks a tile may read, and which: the best of each segment's, equally many for every tile of a head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .grid import Segment
from .rows import Layout


def share_of(density: float, count: int) -> int:
    """A share of `count` things: at least one."""
    return max(1, min(count, round(density * count)))


def top(scores: Tensor, keep: Tensor | int) -> Tensor:
    """bool like scores [..., K]: the `keep` best of each row, ties by position. keep: int, or int64 [..., 1]."""
    most = keep if isinstance(keep, int) else int(keep.max())
    best = scores.topk(min(most, scores.shape[-1]), dim=-1).indices
    rank = torch.arange(best.shape[-1], device=scores.device)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, (rank < keep).expand(best.shape))


def top_mass(masses: Tensor, share: float) -> Tensor:
    """bool like masses [..., K]: the fewest of each row that hold `share` of its sum, at least one."""
    ordered, index = masses.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = before < share * ordered.sum(-1, keepdim=True)
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter(-1, index, kept)


def by_segment(
    scores: Tensor,
    layout: Layout,
    *,
    density: float | Tensor,
    reference: float = 1.0,
    mass: float | None = None,
) -> Tensor:
    """Which blocks each tile reads, every segment within its own budget: bool [B, H, T, K] for scores of that shape.

    density: share of each visual segment's blocks, one for all or [H]. reference: the same for reference segments.
    mass: read, instead of a density, the fewest visual blocks that hold this share of the scores, which are masses.
    Text is always read whole. Budgets of their own keep one segment from crowding out another (SparseD,
    arXiv 2509.24014).
    """
    reads = torch.ones_like(scores, dtype=torch.bool)
    for segment, _, blocks in layout.parts():
        part = scores[..., blocks]
        if segment.kind == "visual" and mass is not None:
            reads[..., blocks] = top_mass(part, mass)
        elif segment.kind != "text":
            reads[..., blocks] = top(part, _keep(segment, part.shape[-1], density, reference))
    return reads


def _keep(segment: Segment, count: int, density: float | Tensor, reference: float) -> Tensor | int:
    if segment.kind == "reference":
        return share_of(reference, count)
    if isinstance(density, Tensor):
        return (density * count).round().long().clamp(1, count).view(1, -1, 1, 1)
    return share_of(density, count)


def adaptive(masses: Tensor, reads: Tensor, density: float) -> Tensor:
    """A density for each head, by what its list recalls at the common one: float64 [H], of unchanged mean.

    Of H heads the n that recall more than 0.8 of the mass, at most half of them, get half the density, and the worst n
    half as much again (AdaSpa, arXiv 2502.21079). masses, reads: [B, H, T, K].
    """
    every = masses.sum((0, 2, 3))
    recall = torch.where(every > 0, (masses * reads).sum((0, 2, 3)) / every.clamp(min=math.ulp(0.0)), 1.0)
    heads = recall.numel()
    count = min(int((recall > 0.8).sum()), heads // 2)
    best = recall.argsort(descending=True, stable=True)
    result = torch.full((heads,), density, dtype=torch.float64, device=masses.device)
    if count:
        given = min(density / 2, 1 - density)  # the worst heads can't read more than everything
        result[best[:count]] = density - given
        result[best[-count:]] = density + given
    return result
