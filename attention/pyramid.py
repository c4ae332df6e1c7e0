"""Pyramid lists: important blocks in full, lesser ones by ever coarser means, the least not at all."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..kernels.blocklist import BlockList
from ..kernels.pyramid import KVPyramid
from ..kernels.rows import gather_rows
from .levels import NOT_READ, levels_list
from .rows import Layout
from .select import DynamicSelector, Selector
from .topk import pooled_scores

FACTORS = (1, 2, 4, 8)
SCORES = 1 << 24
"""Sampled scores held at a time."""

Part = Annotated[float, Field(ge=0, le=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
Four = tuple[Part, Part, Part, Part]


class Pyramid(DynamicSelector):
    """Each block of visual keys at one level, 1, 2, 4 or 8 rows a mean, or nowhere (PSA, arXiv 2512.04025).

    quotas: shares of a tile's blocks, by falling importance, read at the levels 1, 2, 4 and 8; the others are left out.
    bounds: instead of quotas, cumulative shares of the tile's importance at which each level ends, such as
    (0.4, 0.5, 0.6, 0.8).
    importance: "sampled": in a quarter of the rows, drawn once per head, the largest exp(logit - the row's maximum);
    "pooled": the softmax of mean query with mean key. seed: of the drawing, by a generator of its own.
    similarity: mean cosines of the first with the last key in groups of 2, 4 and 8 that a block must exceed to be read
    at that level; else it is read at the coarsest finer one that it may. For instance (0.7, 0.65, 0.6).

    Text and reference tokens are read at level 1. In blocks of n rows a level has n / factor of them; their neighbours'
    share the kernel's block, so that reading one of 8 costs the rows of all.
    """

    name: Literal["pyramid"] = "pyramid"
    quotas: Four = (0.1, 0.05, 0.0, 0.2)
    bounds: Four | None = None
    importance: Literal["sampled", "pooled"] = "sampled"
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    similarity: tuple[Cosine, Cosine, Cosine] | None = None

    @classmethod
    def candidates(cls) -> tuple[Selector, ...]:
        quotas = ((0.05, 0.05, 0.0, 0.9), (0.1, 0.05, 0.0, 0.2), (0.1, 0.1, 0.0, 0.8), (0.2, 0.1, 0.0, 0.7))
        bounds = ((0.4, 0.5, 0.6, 0.8), (0.6, 0.7, 0.7, 0.8))
        return (*(cls(quotas=shares) for shares in quotas), *(cls(bounds=shares) for shares in bounds))

    def factors(self, block: int, rows: int | None) -> tuple[int, ...] | None:
        return tuple(factor for factor in FACTORS if block % factor == 0)

    def choose(
        self, query: Tensor, layout: Layout, pyramid: KVPyramid, *, scale: float, lse: Tensor | None
    ) -> BlockList:
        usable = [number for number, factor in enumerate(FACTORS) if layout.block % factor == 0]
        if any(FACTORS[number] not in pyramid.factors for number in usable):
            raise ValueError(
                f"factors must hold those of {FACTORS} that divide block {layout.block}, got {pyramid.factors}"
            )
        if self.importance == "sampled":
            scores = sampled_importance(query, layout, pyramid, scale, self.seed)
        else:
            scores = torch.softmax(pooled_scores(query, layout, pyramid, scale), -1)
        level = torch.zeros(scores.shape, dtype=torch.int64, device=scores.device)
        for _, _, blocks in layout.visual_parts():
            level[..., blocks] = self._levels(scores[..., blocks])
        if self.similarity is not None:
            limit = _coarsest(pyramid, self.similarity)[:, :, None]
            level = torch.where(level < len(FACTORS), torch.minimum(level, limit), level)
        level = level.masked_fill(layout.exact_tiles[:, None], 0)
        # A level that the block can't have gives way to the next finer one.
        to_index = [pyramid.factors.index(FACTORS[max(n for n in usable if n <= number)]) for number in range(4)]
        table = torch.tensor([*to_index, NOT_READ], dtype=torch.int8, device=level.device)
        return levels_list(table[level], layout, pyramid.factors)

    def _levels(self, scores: Tensor) -> Tensor:
        """Index into FACTORS for each block [..., K], 4 = left out."""
        ordered, index = scores.sort(dim=-1, descending=True, stable=True)
        count = scores.shape[-1]
        if self.bounds is None:
            ends = torch.tensor(self.quotas, dtype=torch.float64).cumsum(0).clamp(max=1) * count
            ends = ends.round().long().to(scores.device)
            rank = torch.arange(count, device=scores.device)
            number = (rank[:, None] >= ends).sum(-1).expand(scores.shape).clone()
        else:
            every = ordered.sum(-1, keepdim=True)
            before = ordered.cumsum(-1) - ordered
            ends = torch.tensor(self.bounds, dtype=scores.dtype, device=scores.device).cummax(0).values
            number = (before[..., None] >= ends * every[..., None]).sum(-1)
        number[..., 0] = 0
        return torch.empty_like(number).scatter(-1, index, number)


def sampled_importance(query: Tensor, layout: Layout, pyramid: KVPyramid, scale: float, seed: int) -> Tensor:
    """The importance of each level-0 block for each tile, from a quarter of both their rows: [B, H, T, blocks].

    From 0 to 1. Each head draws its positions once, the same in all blocks. A block cut short by padding takes them
    modulo its length.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = query.shape[1]
    key_rows = layout.key_rows.view(-1, layout.block)
    # Drawn rows side by side for all blocks, so that the maximum over a block's goes along whole rows of scores.
    rows = _sampled(key_rows, heads, generator).transpose(1, 2)
    keys = gather_rows(pyramid.key, key_rows.flatten()[rows.flatten(1)]).float()
    weight = pyramid.log_weight[:, :, : pyramid.offsets[1]].expand(-1, heads, -1)
    weight = weight.gather(2, rows.flatten(1).expand(weight.shape[0], -1, -1))
    plain = bool((weight == 0).all())
    if not plain:
        keys = torch.where(weight[..., None] > -math.inf, keys, 0)
    positions = _sampled(layout.query_rows[0], heads, generator)
    queries = gather_rows(query, layout.query_rows.flatten()[positions.flatten(1)]).float()
    queries = queries.unflatten(2, positions.shape[1:]) * scale

    step = max(1, SCORES // max(1, query.shape[0] * heads * positions.shape[2] * keys.shape[2]))
    parts = []
    for part in queries.split(step, 2):
        logits = part.flatten(2, 3) @ keys.mT
        logits = logits if plain else logits + weight[:, :, None]
        peaks = logits.unflatten(3, rows.shape[1:]).amax(3)
        most = peaks.amax(-1, keepdim=True).clamp(min=torch.finfo(peaks.dtype).min)
        parts.append((peaks - most).exp().unflatten(2, part.shape[2:4]).amax(3))
    return torch.cat(parts, 2)


def _sampled(rows: Tensor, heads: int, generator: torch.Generator) -> Tensor:
    """A quarter of each group's places: rows int [G, n] (-1 = padding at the end) to int64 [heads, G, n // 4]."""
    size = rows.shape[1]
    draws = torch.rand(heads, size, generator=generator).argsort(-1)[:, : max(1, size // 4)].to(rows.device)
    live = (rows >= 0).sum(-1).clamp(min=1)
    return draws[:, None] % live[:, None] + torch.arange(len(rows), device=rows.device)[:, None] * size


def _coarsest(pyramid: KVPyramid, thresholds: tuple[float, float, float]) -> Tensor:
    """The index into FACTORS of the coarsest level that each level-0 block's keys agree on: int64 [B, H, blocks]."""
    live = pyramid.log_weight[:, :, : pyramid.offsets[1]] > -math.inf
    keys = gather_rows(pyramid.key, pyramid.key_rows, live).float()
    unit = torch.nn.functional.normalize(keys, dim=-1).unflatten(2, (-1, pyramid.block))
    both = live.unflatten(2, (-1, pyramid.block))
    limit = torch.zeros(unit.shape[:3], dtype=torch.int64, device=unit.device)
    for number, (factor, threshold) in enumerate(zip(FACTORS[1:], thresholds, strict=True), 1):
        if pyramid.block % factor:
            continue
        cosine = (unit[:, :, :, ::factor] * unit[:, :, :, factor - 1 :: factor]).sum(-1)
        counted = both[..., ::factor] & both[..., factor - 1 :: factor]
        mean = (cosine * counted).sum(-1) / counted.sum(-1).clamp(min=1)
        limit = torch.where(mean > threshold, number, limit)
    return limit
