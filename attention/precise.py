"""Precise lists: blocks by the softmax mass that they really hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..kernels.blocklist import BlockList
from ..kernels.mass import block_mass
from ..kernels.pyramid import KVPyramid
from .budget import adaptive, by_segment
from .means import block_means
from .rows import Layout
from .select import RatedSelector, Selector, Share, level0_list


class Precise(RatedSelector):
    """The blocks of most softmax mass, summed exactly over the tile's queries (AdaSpa, arXiv 2502.21079).

    A run's first list comes from a dense step, whose lse later refreshes take again. With no refresh this is
    select-once (SparseD, arXiv 2509.24014).

    density: share of each visual segment's blocks that every tile reads. reference: the same for reference tokens;
    text is read whole.
    mass: instead of a density, the fewest visual blocks that hold this share of the tile's visual mass.
    by: "mass", or "error": the mass less what the block's means would have in its place, 0 for equal keys. With the
    rest pooled that difference is what a block left out costs.
    heads: "equal" budgets, or "adaptive": well recalled heads give half of theirs to as many badly recalled ones.
    """

    needs_lse: ClassVar[bool] = True

    name: Literal["precise"] = "precise"
    density: Share = 0.15
    reference: Share = 1.0
    mass: Annotated[float, Field(gt=0, le=1)] | None = None
    by: Literal["mass", "error"] = "mass"
    heads: Literal["equal", "adaptive"] = "equal"

    @classmethod
    def candidates(cls) -> tuple[Selector, ...]:
        return tuple(cls(density=share, by=by) for share in (0.05, 0.1, 0.2, 0.3) for by in ("mass", "error"))

    @property
    def basis(self) -> tuple[str, str]:
        return self.name, self.by

    def rate(self, query: Tensor, layout: Layout, pyramid: KVPyramid, *, scale: float, lse: Tensor | None) -> Tensor:
        if lse is None:
            raise ValueError("lse must be given to the precise selector, got None: run `attend` over all blocks first")
        scores = block_mass(query, pyramid, lse, layout.query_rows, scale=scale)
        if self.by == "error":
            scores = (scores - pooled_mass(query, layout, pyramid, lse, scale)).clamp(min=0)
        return scores

    def pick(self, ratings: Tensor, layout: Layout) -> BlockList:
        density: float | Tensor = self.density
        if self.heads == "adaptive" and self.mass is None:
            density = adaptive(ratings, by_segment(ratings, layout, density=self.density), self.density)
        reads = by_segment(ratings, layout, density=density, reference=self.reference, mass=self.mass)
        return level0_list(reads, layout)


def pooled_mass(query: Tensor, layout: Layout, pyramid: KVPyramid, lse: Tensor, scale: float) -> Tensor:
    """The mass that each level-0 block has when it is read through its means: [B, H, T, blocks].

    At most the block's own (Jensen). The means are those of the coarsest level whose rows lie within a block.
    """
    factor = max((f for f in pyramid.factors if f > 1 and layout.block % f == 0), default=layout.block)
    keys, weight = block_means(pyramid, factor)
    keys = keys.to(query.dtype)
    rows = torch.arange(keys.shape[2], dtype=torch.int32, device=keys.device)[None]
    level = replace(
        pyramid,
        key=keys,
        value=keys,
        key_rows=rows,
        pooled_key=keys[:, :, :0],
        pooled_value=keys[:, :, :0],
        log_weight=weight,
        offsets=(0, keys.shape[2]),
        factors=(1,),
        block=layout.block // factor,
    )
    return block_mass(query, level, lse, layout.query_rows, scale=scale)
