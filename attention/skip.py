"""Nothing: with the rest dropped a head's output is zero, with the rest pooled it sees every key through its block's
mean."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..kernels.blocklist import BlockList
from ..kernels.pyramid import KVPyramid
from .rows import Layout
from .select import Selector, level0_list


class Skip(Selector):
    """Visual queries read no block at level 0 (head skipping of Sparse-vDiT, arXiv 2506.03065)."""

    name: Literal["skip"] = "skip"

    def select(self, query: Tensor | None, key: Tensor | None, layout: Layout, pyramid: KVPyramid | None) -> BlockList:
        return level0_list(layout.exact_tiles.view(1, 1, -1, 1).expand(-1, -1, -1, layout.blocks), layout)
