"""Everything: each query reads each key, by this package's own kernel."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from ..kernels.blocklist import BlockList
from ..kernels.listops import all_blocks
from ..kernels.pyramid import KVPyramid
from .rows import Layout
from .select import Selector


class Dense(Selector):
    """Full attention of a head whose layer is sparse elsewhere."""

    name: Literal["dense"] = "dense"
    covers: ClassVar[bool] = True

    def select(self, query: Tensor | None, key: Tensor | None, layout: Layout, pyramid: KVPyramid | None) -> BlockList:
        return all_blocks(layout.query_rows, layout.block)
