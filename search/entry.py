"""A candidate on one grid: its layout, its list if it is static, and how it makes one if it is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attention.grid import TokenGrid
from ..attention.levels import level0_reads
from ..attention.lists import ListCache
from ..attention.rest import pool_rest
from ..attention.rows import Layout
from ..attention.select import DynamicSelector
from ..kernels.blocklist import BlockList
from ..kernels.mass import block_mass
from ..kernels.pyramid import KVPyramid, build_pyramid
from .capture import Sample
from .findings import Candidate


@dataclass(eq=False)
class _Held:
    """What candidates of one row map share while one call is scored."""

    pyramids: dict[tuple[int, ...], KVPyramid] = field(default_factory=dict)
    mass: Tensor | None = None


@dataclass(eq=False)
class Entry:
    """blocks: of a static selector, its rest included."""

    candidate: Candidate
    layout: Layout
    factors: tuple[int, ...]
    blocks: BlockList | None
    held: _Held

    def pyramid(self, sample: Sample, key_log_weight: Tensor | None) -> KVPyramid:
        """The call's keys and values, laid out and pooled."""
        found = self.held.pyramids
        if self.factors not in found:
            found[self.factors] = build_pyramid(
                sample.key,
                sample.value,
                self.layout.key_rows,
                block=self.layout.block,
                factors=self.factors,
                key_log_weight=key_log_weight,
            )
        return found[self.factors]

    def select(
        self, sample: Sample, lse: Tensor, scale: float | None, key_log_weight: Tensor | None
    ) -> tuple[BlockList, KVPyramid]:
        """The list for a call, and the pyramid that it is over. lse: of dense attention, [B, H, N]."""
        pyramid = self.pyramid(sample, key_log_weight)
        if self.blocks is not None:
            return self.blocks, pyramid
        selector = self.candidate.selector
        assert isinstance(selector, DynamicSelector)
        blocks = selector.select(
            sample.query,
            sample.key,
            self.layout,
            pyramid,
            scale=scale,
            lse=lse if selector.needs_lse else None,
        )
        if self.candidate.entry.pooled:
            blocks = pool_rest(blocks, self.layout, factors=self.factors)
        return blocks, pyramid

    def recall(
        self, sample: Sample, blocks: BlockList, lse: Tensor, scale: float | None, key_log_weight: Tensor | None
    ) -> list[float]:
        """Each head's share of the dense softmax mass that the list reads at level 0."""
        if self.held.mass is None:
            pyramid = self.pyramid(sample, key_log_weight)
            self.held.mass = block_mass(sample.query, pyramid, lse, self.layout.query_rows, scale=scale)
        mass = self.held.mass
        reads = level0_reads(blocks, self.layout.blocks).view(*blocks.start.shape, self.layout.blocks)
        return ((mass * reads).sum((0, 2, 3)) / mass.sum((0, 2, 3)).clamp(min=1e-30)).tolist()

    def forget(self) -> None:
        """Free what belongs to one call."""
        self.held.pyramids.clear()
        self.held.mass = None


def entries_of(candidates: Sequence[Candidate], grid: TokenGrid) -> list[Entry]:
    """The candidates on a grid; those of equal row maps share pyramids and masses."""
    cache = ListCache()
    shared: list[tuple[Layout, _Held]] = []
    found = []
    for number, candidate in enumerate(candidates):
        prepared = cache.prepare(number, candidate.group, grid, torch.device("cpu"))
        layout, blocks = prepared.layouts[0], prepared.lists[0]
        held = next((held for other, held in shared if same_rows(layout, other)), None)
        if held is None:
            held = _Held()
            shared.append((layout, held))
        found.append(Entry(candidate, layout, prepared.factors, blocks, held))
    return found


def same_rows(one: Layout, other: Layout) -> bool:
    """Whether two layouts put the same tokens into the same tiles and blocks."""
    return (
        (one.tile, one.block) == (other.tile, other.block)
        and torch.equal(one.query_rows, other.query_rows)
        and torch.equal(one.key_rows, other.key_rows)
    )


def density_of(blocks: BlockList, pyramid: KVPyramid, heads: int) -> list[float]:
    """Each head's rows touched ÷ level-0 rows, over the queries of all tiles."""
    queries = (blocks.query_rows >= 0).sum(-1, dtype=torch.float64)[None]
    touched = (blocks.rows_touched(pyramid).double() * queries).sum(2) / (queries.sum(-1) * pyramid.offsets[1])
    return touched.mean(0).expand(heads).tolist()
