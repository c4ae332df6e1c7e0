"""Top-k of pooled scores: the plain baseline of dynamic selection."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..kernels.blocklist import BlockList
from ..kernels.pyramid import KVPyramid
from .budget import by_segment
from .means import block_means, block_spread, tile_means
from .rows import Layout
from .select import RatedSelector, Selector, Share, level0_list


class TopK(RatedSelector):
    """The blocks whose mean key scores highest with the tile's mean query, equally many for every tile.

    density: share of each visual segment's blocks. reference: the same for reference tokens; text is read whole.
    by: "score", or "error": what the block's softmax mass exceeds that of its mean by, to second order in the keys'
    spread. With the rest pooled that excess, and not the mass, is what a block left out costs.
    """

    name: Literal["topk"] = "topk"
    density: Share = 0.15
    reference: Share = 1.0
    by: Literal["score", "error"] = "score"

    @classmethod
    def candidates(cls) -> tuple[Selector, ...]:
        return tuple(cls(density=share, by=by) for share in (0.05, 0.1, 0.2, 0.3) for by in ("score", "error"))

    @property
    def basis(self) -> tuple[str, str]:
        return self.name, self.by

    def rate(self, query: Tensor, layout: Layout, pyramid: KVPyramid, *, scale: float, lse: Tensor | None) -> Tensor:
        scores = pooled_scores(query, layout, pyramid, scale)
        if self.by == "error":
            variance = scale**2 * tile_means(query, layout, squared=True) @ block_spread(pyramid).mT
            # log(mass · (exp(variance / 2) - 1)), which has a finite form for any variance but 0.
            half = variance / 2
            scores = scores + half + torch.log1p(-torch.exp(-half))
        return scores

    def pick(self, ratings: Tensor, layout: Layout) -> BlockList:
        return level0_list(by_segment(ratings, layout, density=self.density, reference=self.reference), layout)


def pooled_scores(query: Tensor, layout: Layout, pyramid: KVPyramid, scale: float) -> Tensor:
    """Logits of each tile's mean query with each level-0 block's mean key, log-weight added: [B, H, T, blocks]."""
    keys, weight = block_means(pyramid, layout.block)
    return scale * tile_means(query, layout) @ keys.mT + weight[:, :, None]
