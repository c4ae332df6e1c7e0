"""Where static block lists are kept, once per entry and grid; and how the lists of a group's entries become one."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.blocklist import BlockList
from ..kernels.listops import concat
from ..kernels.pyramid import KVPyramid
from .grid import TokenGrid
from .plan import HeadGroup, HeadPlan
from .rest import pool_rest
from .rows import Layout, lay_out

MAX_GRIDS = 4
"""Grids whose static lists are kept; where models join text and video, prompts of other lengths make other grids."""

Places = slice | list[int]
"""An index of some of a group's heads: a range where they are a run, else their numbers."""

PER_TILE = ("start", "count", "masked_count", "mask_start")
TENSORS = (*PER_TILE, "pool", "row_masks", "query_rows")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A head group on one grid and device: each entry's layout and, if static, its list; all joined if all are static.

    key_rows: int32 [1 or heads of the group, R0]. factors: of the group's pyramid. heads: each entry's, as an index of
    the group's. memo: `build_pyramid`'s.
    """

    layouts: tuple[Layout, ...]
    lists: tuple[BlockList | None, ...]
    factors: tuple[int, ...]
    key_rows: Tensor
    heads: tuple[Places, ...]
    blocks: BlockList | None
    memo: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Kept:
    entries: dict[Hashable, tuple[Layout, BlockList | None]] = field(default_factory=dict)
    groups: dict[int, Prepared] = field(default_factory=dict)


@dataclass
class ListCache:
    """Builds each static list once and hands it out until other grids need its place.

    built: lists built so far, the dynamic ones of `Reuse` among them.
    """

    built: int = 0
    _static: OrderedDict[tuple[TokenGrid, str], _Kept] = field(default_factory=OrderedDict)

    def prepare(self, number: int, group: HeadGroup, grid: TokenGrid, device: torch.device) -> Prepared:
        """The group's layouts and static lists. `number` stands for the group, so that no call hashes a plan."""
        place = (grid, str(device))
        kept = self._static.setdefault(place, _Kept())
        self._static.move_to_end(place)
        while len(self._static) > MAX_GRIDS:
            self._static.popitem(last=False)
        if number not in kept.groups:
            blocks_in = (math.ceil(segment.tokens / group.block) for segment in grid.segments)
            factors = group.levels(sum(blocks_in) * group.block)
            layouts, lists = zip(
                *(self._entry(kept, group, entry, factors, grid, device) for entry in group.entries), strict=True
            )
            rows = [layout.key_rows for layout in layouts]
            if all(torch.equal(item, rows[0]) for item in rows[1:]):
                key_rows = rows[0]
            else:
                key_rows = torch.stack([rows[entry][0] for entry, _ in by_place(group)])
            static = [blocks for blocks in lists if blocks is not None]
            blocks = joined(static, group) if len(static) == len(lists) else None
            heads = tuple(_index(places) for places in group.places())
            kept.groups[number] = Prepared(layouts, lists, factors, key_rows, heads, blocks)
        return kept.groups[number]

    @property
    def nbytes(self) -> int:
        """Memory of all static lists kept, in bytes, a tensor that several lists share counted once."""
        lists: list[BlockList] = []
        for kept in self._static.values():
            lists += [blocks for _, blocks in kept.entries.values() if blocks is not None]
            lists += [prepared.blocks for prepared in kept.groups.values() if prepared.blocks is not None]
        tensors = {id(tensor): tensor.nbytes for blocks in lists for tensor in _tensors(blocks).values()}
        return sum(tensors.values())

    def _entry(
        self,
        kept: _Kept,
        group: HeadGroup,
        entry: HeadPlan,
        factors: tuple[int, ...],
        grid: TokenGrid,
        device: torch.device,
    ) -> tuple[Layout, BlockList | None]:
        key = (group.order, group.tile, group.block, factors if entry.pooled else (), entry.selector)
        if key not in kept.entries:
            kept.entries[key] = self._build(group, entry, factors, grid, device)
        return kept.entries[key]

    def _build(
        self, group: HeadGroup, entry: HeadPlan, factors: tuple[int, ...], grid: TokenGrid, device: torch.device
    ) -> tuple[Layout, BlockList | None]:
        selector = entry.selector
        key_orders = [
            selector.key_order(segment.grid, group.order) if segment.kind == "visual" else None
            for segment in grid.segments
        ]
        layout = lay_out(grid, group.order, tile=group.tile, block=group.block, key_orders=key_orders)
        blocks = None
        if selector.static:
            blocks = with_rest(selector.select(None, None, layout, None), layout, factors, entry)
            self.built += 1
            if device.type != "cpu":
                blocks = blocks.to(device)
        return layout.to(device), blocks


def joined(lists: Sequence[BlockList], group: HeadGroup) -> BlockList:
    """One list for all heads of a group, from one list per entry; heads of one static entry share its pool."""
    if len(lists) == 1 and group.entries[0].heads == group.heads:
        return lists[0]
    whole = concat(lists)
    first = list(itertools.accumulate((blocks.heads for blocks in lists), initial=0))
    owners = [first[entry] + head % lists[entry].heads for entry, head in by_place(group)]
    index = torch.tensor(owners, device=whole.start.device)
    rows = whole.query_rows
    return replace(
        whole,
        **{name: getattr(whole, name).index_select(1, index) for name in PER_TILE},
        query_rows=rows if rows.shape[0] == 1 else rows.index_select(0, index),
    )


def by_place(group: HeadGroup) -> list[tuple[int, int]]:
    """Of each head of the group, in order: its entry, and which of that entry's heads it is."""
    owners = {
        place: (number, head) for number, places in enumerate(group.places()) for head, place in enumerate(places)
    }
    return [owners[place] for place in range(len(owners))]


def _index(places: list[int]) -> Places:
    run = slice(places[0], places[0] + len(places))
    return run if places == list(range(run.start, run.stop)) else places


def with_rest(blocks: BlockList, layout: Layout, factors: tuple[int, ...], entry: HeadPlan) -> BlockList:
    """The list, and what it leaves out where the entry wants that read."""
    return pool_rest(blocks, layout, factors=factors) if entry.pooled else blocks


def _tensors(blocks: BlockList) -> dict[str, Tensor]:
    return {name: getattr(blocks, name) for name in TENSORS}


def pyramid_heads(pyramid: KVPyramid, heads: Places) -> KVPyramid:
    """The pyramid of some of its heads, as views where they are a run."""
    return replace(
        pyramid,
        key=pyramid.key[:, heads],
        value=pyramid.value[:, heads],
        key_rows=pyramid.key_rows if pyramid.key_rows.shape[0] == 1 else pyramid.key_rows[heads],
        pooled_key=pyramid.pooled_key[:, heads],
        pooled_value=pyramid.pooled_value[:, heads],
        log_weight=pyramid.log_weight if pyramid.log_weight.shape[1] == 1 else pyramid.log_weight[:, heads],
    )
