"""A candidate on one grid, and one attention call that candidates are held against."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention.grid import TokenGrid
from ..attention.levels import level0_reads
from ..attention.lists import PER_TILE, TENSORS, ListCache
from ..attention.rest import pool_rest
from ..attention.rows import Layout
from ..attention.select import DynamicSelector, RatedSelector
from ..kernels.attend import attend
from ..kernels.blocklist import BlockList
from ..kernels.listops import all_blocks
from ..kernels.mass import block_mass
from ..kernels.pyramid import KVPyramid, build_pyramid
from .capture import Sample
from .findings import Candidate


@dataclass(frozen=True, eq=False)
class Entry:
    """queries, rows: numbers of the entry's query tiles and of its whole row map, equal for entries that share them.
    blocks: of a static selector, its rest included. twin: number of an earlier entry that is the same on this grid,
    such as a window of more frames than there are.
    """

    candidate: Candidate
    layout: Layout
    factors: tuple[int, ...]
    blocks: BlockList | None
    queries: int
    rows: int
    twin: int | None = None

    def same(self, other: Entry) -> bool:
        """Whether another static entry reads the same blocks for the same queries, and is corrected alike."""
        if self.blocks is None or other.blocks is None:
            return False
        mine, its = ((e.queries, e.rows, e.factors, e.candidate.correction) for e in (self, other))
        return mine == its and all(torch.equal(getattr(self.blocks, n), getattr(other.blocks, n)) for n in TENSORS)


def entries_of(candidates: Sequence[Candidate], grid: TokenGrid, device: torch.device | str = "cpu") -> list[Entry]:
    """The candidates on a grid and device."""
    cache = ListCache()
    tiles: list[Tensor] = []
    maps: list[tuple[int, Tensor]] = []
    found: list[Entry] = []
    for number, candidate in enumerate(candidates):
        prepared = cache.prepare(number, candidate.group, grid, torch.device(device))
        layout, blocks = prepared.layouts[0], prepared.lists[0]
        queries = next((i for i, other in enumerate(tiles) if torch.equal(other, layout.query_rows)), len(tiles))
        if queries == len(tiles):
            tiles.append(layout.query_rows)
        same = (
            i for i, (block, other) in enumerate(maps) if block == layout.block and torch.equal(other, layout.key_rows)
        )
        rows = next(same, len(maps))
        if rows == len(maps):
            maps.append((layout.block, layout.key_rows))
        entry = Entry(candidate, layout, prepared.factors, blocks, queries, rows)
        twin = next((number for number, other in enumerate(found) if entry.same(other)), None)
        found.append(replace(entry, twin=twin))
    return found


class Call:
    """One attention call, as candidates see it: what several of them need is made once, when it is first needed.

    rows: about how many visual queries are looked at; None = all of them, and text and reference queries too. Of each
    order's tiles every so many-th is, and which of them goes by `turn`, so that calls that take turns see them all.
    """

    def __init__(
        self,
        sample: Sample,
        *,
        scale: float | None = None,
        key_log_weight: Tensor | None = None,
        rows: int | None = None,
        turn: int = 0,
    ):
        self.sample, self.scale, self.key_log_weight = sample, scale, key_log_weight
        visual = sum(segment.tokens for segment in sample.grid.visual)
        self.every, self.turn = 1 if rows is None else max(1, -(-visual // rows)), turn
        self._tiles: dict[int, Tensor] = {}
        self._looked: dict[int, tuple[Tensor, Tensor]] = {}
        self._dense: dict[int, tuple[Tensor, Tensor]] = {}
        self._masses: dict[tuple[int, int], Tensor] = {}
        self._pyramids: dict[tuple[int, tuple[int, ...]], KVPyramid] = {}
        self._ratings: dict[Hashable, Tensor] = {}

    def tiles(self, entry: Entry) -> Tensor:
        """int64 [n]: the query tiles that are looked at."""
        if entry.queries not in self._tiles:
            every = torch.arange(entry.layout.tiles, device=entry.layout.query_rows.device)
            visual = every if self.every == 1 else every[~entry.layout.exact_tiles]
            self._tiles[entry.queries] = visual[self.turn % self.every :: self.every]
        return self._tiles[entry.queries]

    def looked(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """The queries that are looked at [B, H, n, D], and int32 [1, tiles, tile], which of these each tile holds."""
        if self.every == 1:
            return self.sample.query, entry.layout.query_rows
        if entry.queries not in self._looked:
            rows = entry.layout.query_rows[:, self.tiles(entry)]
            held = rows >= 0
            places = torch.where(held, held.flatten().cumsum(0).view_as(rows) - 1, -1)
            self._looked[entry.queries] = self.sample.query[:, :, rows[held].long()], places.to(rows.dtype)
        return self._looked[entry.queries]

    def layout(self, entry: Entry) -> Layout:
        """The entry's, of the tiles and queries that are looked at."""
        if self.every == 1:
            return entry.layout
        return replace(entry.layout.of_tiles(self.tiles(entry)), query_rows=self.looked(entry)[1])

    def pyramid(self, entry: Entry) -> KVPyramid:
        """The call's keys and values, laid out once for every list, and pooled."""
        key = entry.rows, entry.factors
        if key not in self._pyramids:
            self._pyramids[key] = build_pyramid(
                self.sample.key,
                self.sample.value,
                entry.layout.key_rows,
                block=entry.layout.block,
                factors=entry.factors,
                key_log_weight=self.key_log_weight,
            ).keep_layouts()
        return self._pyramids[key]

    def attend(self, entry: Entry, blocks: BlockList) -> tuple[Tensor, Tensor]:
        """Attention over a list: output [B, H, n, D] and lse [B, H, n] of the queries looked at."""
        return attend(self.looked(entry)[0], self.pyramid(entry), blocks, scale=self.scale)

    def dense(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """Attention over all keys, as `attend` gives it."""
        if entry.queries not in self._dense:
            self._dense[entry.queries] = self.attend(entry, all_blocks(self.looked(entry)[1], entry.layout.block))
        return self._dense[entry.queries]

    def select(self, entry: Entry, *, fresh: bool = False) -> BlockList:
        """The entry's list for the queries looked at. fresh: rate blocks anew."""
        if entry.blocks is not None:
            return entry.blocks if self.every == 1 else self._of_static(entry, entry.blocks)
        selector, layout, pyramid = entry.candidate.selector, self.layout(entry), self.pyramid(entry)
        assert isinstance(selector, DynamicSelector)
        query, lse = self.looked(entry)[0], self.dense(entry)[1] if selector.needs_lse else None
        if isinstance(selector, RatedSelector):
            key = entry.rows, entry.queries, entry.factors, selector.basis
            if fresh or key not in self._ratings:
                scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
                self._ratings[key] = selector.rate(query, layout, pyramid, scale=scale, lse=lse)
            blocks = selector.pick(self._ratings[key], layout)
        else:
            blocks = selector.select(query, self.sample.key, layout, pyramid, scale=self.scale, lse=lse)
        return pool_rest(blocks, layout, factors=entry.factors) if entry.candidate.entry.pooled else blocks

    def _of_static(self, entry: Entry, blocks: BlockList) -> BlockList:
        """The tiles looked at of a static list, the same for every call of the same turn."""
        key = "tiles", self.every, self.turn % self.every
        if key not in blocks.memo:
            blocks.memo[key] = tiles_of(blocks, self.tiles(entry), self.looked(entry)[1])
        return blocks.memo[key]

    def mass(self, entry: Entry) -> Tensor:
        """The dense softmax mass of each tile looked at on each of the entry's key blocks: [B, H, tiles, K]."""
        key = entry.rows, entry.queries
        if key not in self._masses:
            query, rows = self.looked(entry)
            lse = self.dense(entry)[1]
            self._masses[key] = block_mass(query, self.pyramid(entry), lse, rows, scale=self.scale)
        return self._masses[key]

    def recall(self, entry: Entry, blocks: BlockList) -> list[float]:
        """Each head's share of the dense softmax mass that the list reads at level 0."""
        mass = self.mass(entry)
        return ((mass * self.reads(entry, blocks)).sum((0, 2, 3)) / mass.sum((0, 2, 3)).clamp(min=1e-30)).tolist()

    def reads(self, entry: Entry, blocks: BlockList) -> Tensor:
        """bool [B|1, H|1, tiles, K]: which level-0 blocks the list reads."""
        return level0_reads(blocks, entry.layout.blocks).view(*blocks.start.shape, entry.layout.blocks)

    def density(self, entry: Entry, blocks: BlockList) -> list[float]:
        """Each head's rows touched ÷ level-0 rows, over all queries; tiles not looked at count as those that are."""
        pyramid, heads = self.pyramid(entry), self.sample.query.shape[1]
        if entry.blocks is not None:
            return _density(entry.blocks, pyramid).expand(heads).tolist()
        found = _density(blocks, pyramid).expand(heads)
        if self.every > 1:
            rows = (entry.layout.query_rows[0] >= 0).sum(-1)
            exact = float(rows[entry.layout.exact_tiles].sum() / rows.sum())
            found = found * (1 - exact) + exact
        return found.tolist()


def _density(blocks: BlockList, pyramid: KVPyramid) -> Tensor:
    queries = (blocks.query_rows >= 0).sum(-1, dtype=torch.float64)[None]
    touched = (blocks.rows_touched(pyramid).double() * queries).sum(2) / (queries.sum(-1) * pyramid.offsets[1])
    return touched.mean(0)


def tiles_of(blocks: BlockList, tiles: Tensor, query_rows: Tensor) -> BlockList:
    """The list of some of the query tiles, whose queries are at other places."""
    parts = {name: getattr(blocks, name)[..., tiles] for name in PER_TILE}
    return replace(blocks, query_rows=query_rows, **parts)
