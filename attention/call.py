"""One call of a head group: what it is given, and what the run says of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.attend import attend
from ..kernels.blocklist import BlockList
from ..kernels.pyramid import KVPyramid
from .grid import TokenGrid
from .lists import Places, Prepared, pyramid_heads
from .plan import HeadGroup


@dataclass(frozen=True, kw_only=True)
class GroupCall:
    """One call of a head group.

    place: the layer and group. branch: which guidance branch calls. shared: branches read the first one's list.
    noise_level: of the step, 0 ... 1.
    epoch: a list or correction of another epoch is rebuilt. final: no refresh follows in this run. lends: the group
    reads everything, and the lse of that is what lists of the layer are to be built from.
    query: [B, heads of the group, N, D]; pyramid: over the same heads' keys and values.
    """

    place: tuple[int, int]
    branch: Hashable
    shared: bool
    noise_level: float
    epoch: int
    final: bool
    lends: bool
    group: HeadGroup
    prepared: Prepared
    query: Tensor
    pyramid: KVPyramid
    scale: float | None
    backend: str
    compute_dtype: torch.dtype | None

    @property
    def stamp(self) -> tuple[TokenGrid, int]:
        """What a kept thing must agree with, beside the epoch."""
        return self.prepared.layouts[0].grid, self.query.shape[0]

    @property
    def list_branch(self) -> Hashable:
        """Whose dynamic lists the call reads."""
        return None if self.shared else self.branch

    def attend(self, blocks: BlockList, heads: Places | None = None) -> tuple[Tensor, Tensor]:
        query = self.query if heads is None else self.query[:, heads]
        pyramid = self.pyramid if heads is None else pyramid_heads(self.pyramid, heads)
        return attend(query, pyramid, blocks, scale=self.scale, backend=self.backend, compute_dtype=self.compute_dtype)
