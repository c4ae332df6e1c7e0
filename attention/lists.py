"""Where block lists are kept: static ones per grid, dynamic ones per layer and guidance branch until refreshed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

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

PER_TILE = ("start", "count", "masked_count", "mask_start")
TENSORS = (*PER_TILE, "pool", "row_masks", "query_rows")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A head group on one grid and device: each entry's layout and, if static, its list; all joined if all are static.

    key_rows: int32 [1 or heads of the group, R0].
    """

    layouts: tuple[Layout, ...]
    lists: tuple[BlockList | None, ...]
    key_rows: Tensor
    blocks: BlockList | None


@dataclass
class _Kept:
    entries: dict[Hashable, tuple[Layout, BlockList | None]] = field(default_factory=dict)
    groups: dict[int, Prepared] = field(default_factory=dict)


@dataclass
class ListCache:
    """Builds each list once and hands it out until the grid changes or, for dynamic ones, the schedule refreshes it."""

    built: int = 0
    _static: OrderedDict[tuple[TokenGrid, str], _Kept] = field(default_factory=OrderedDict)
    _dynamic: dict[Hashable, tuple[int, TokenGrid, BlockList]] = field(default_factory=dict)

    def begin(self) -> None:
        """Forget the dynamic lists: they belong to one run."""
        self._dynamic.clear()

    def prepare(self, number: int, group: HeadGroup, grid: TokenGrid, device: torch.device) -> Prepared:
        """The group's layouts and static lists. `number` stands for the group, so that no call hashes a plan."""
        place = (grid, str(device))
        kept = self._static.setdefault(place, _Kept())
        self._static.move_to_end(place)
        while len(self._static) > MAX_GRIDS:
            self._static.popitem(last=False)
        if number not in kept.groups:
            layouts, lists = zip(
                *(self._entry(kept, group, entry, grid, device) for entry in group.entries), strict=True
            )
            rows = [layout.key_rows for layout in layouts]
            if all(torch.equal(item, rows[0]) for item in rows[1:]):
                key_rows = rows[0]
            else:
                sizes = [len(entry.heads) for entry in group.entries]
                key_rows = torch.cat([item.expand(size, -1) for item, size in zip(rows, sizes, strict=True)])
            static = [blocks for blocks in lists if blocks is not None]
            blocks = joined(static, group) if len(static) == len(lists) else None
            kept.groups[number] = Prepared(layouts, lists, key_rows, blocks)
        return kept.groups[number]

    def refreshed(
        self,
        place: Hashable,
        epoch: int,
        group: HeadGroup,
        prepared: Prepared,
        query: Tensor,
        pyramid: KVPyramid,
    ) -> BlockList:
        """The list of a group with dynamic entries: the one kept for `place`, or a new one in a new epoch.

        query: [B, heads of the group, N, D]; pyramid: over the same heads' keys and values.
        """
        grid = prepared.layouts[0].grid
        kept = self._dynamic.get(place)
        if kept and kept[:2] == (epoch, grid) and kept[2].batch in (1, query.shape[0]):
            return kept[2]
        lists = []
        stops = accumulate(len(entry.heads) for entry in group.entries)
        for entry, layout, static, stop in zip(group.entries, prepared.layouts, prepared.lists, stops, strict=True):
            heads = slice(stop - len(entry.heads), stop)
            blocks = static
            if blocks is None:
                own = _pyramid_heads(pyramid, heads)
                with torch.no_grad():
                    blocks = entry.selector.select(query[:, heads], own.key, layout, own)
                    blocks = _with_rest(blocks, layout, group, entry)
                self.built += 1
            lists.append(blocks)
        blocks = joined(lists, group)
        self._dynamic[place] = (epoch, grid, blocks)
        return blocks

    @property
    def nbytes(self) -> int:
        """Memory of all lists kept, in bytes, a tensor that several lists share counted once."""
        lists = [blocks for _, _, blocks in self._dynamic.values()]
        for kept in self._static.values():
            lists += [blocks for _, blocks in kept.entries.values() if blocks is not None]
            lists += [prepared.blocks for prepared in kept.groups.values() if prepared.blocks is not None]
        tensors = {id(tensor): tensor.nbytes for blocks in lists for tensor in _tensors(blocks).values()}
        return sum(tensors.values())

    def _entry(
        self, kept: _Kept, group: HeadGroup, entry: HeadPlan, grid: TokenGrid, device: torch.device
    ) -> tuple[Layout, BlockList | None]:
        factor = group.factors[1] if entry.pooled else 1
        key = (group.order, group.tile, group.block, factor, entry.selector)
        if key not in kept.entries:
            kept.entries[key] = self._build(group, entry, grid, device)
        return kept.entries[key]

    def _build(
        self, group: HeadGroup, entry: HeadPlan, grid: TokenGrid, device: torch.device
    ) -> tuple[Layout, BlockList | None]:
        selector = entry.selector
        key_orders = [
            selector.key_order(segment.grid, group.order) if segment.kind == "visual" else None
            for segment in grid.segments
        ]
        layout = lay_out(grid, group.order, tile=group.tile, block=group.block, key_orders=key_orders)
        blocks = None
        if selector.static:
            blocks = _with_rest(selector.select(None, None, layout, None), layout, group, entry)
            self.built += 1
            if device.type != "cpu":
                blocks = replace(blocks, **{name: tensor.to(device) for name, tensor in _tensors(blocks).items()})
        return layout.to(device), blocks


def joined(lists: Sequence[BlockList], group: HeadGroup) -> BlockList:
    """One list for all heads of a group, from one list per entry; heads of one static entry share its pool."""
    sizes = [len(entry.heads) for entry in group.entries]
    if len(lists) == 1:
        return lists[0]
    whole = concat(lists)
    owners, first = [], 0
    for blocks, size in zip(lists, sizes, strict=True):
        owners += [first + head % blocks.heads for head in range(size)]
        first += blocks.heads
    index = torch.tensor(owners, device=whole.start.device)
    rows = whole.query_rows
    return replace(
        whole,
        **{name: getattr(whole, name).index_select(1, index) for name in PER_TILE},
        query_rows=rows if rows.shape[0] == 1 else rows.index_select(0, index),
    )


def _with_rest(blocks: BlockList, layout: Layout, group: HeadGroup, entry: HeadPlan) -> BlockList:
    return pool_rest(blocks, layout, factor=group.factors[1]) if entry.pooled else blocks


def _tensors(blocks: BlockList) -> dict[str, Tensor]:
    return {name: getattr(blocks, name) for name in TENSORS}


def _pyramid_heads(pyramid: KVPyramid, heads: slice) -> KVPyramid:
    """The pyramid of some of its heads, as views."""
    return replace(
        pyramid,
        key=pyramid.key[:, heads],
        value=pyramid.value[:, heads],
        key_rows=pyramid.key_rows if pyramid.key_rows.shape[0] == 1 else pyramid.key_rows[heads],
        pooled_key=pyramid.pooled_key[:, heads],
        pooled_value=pyramid.pooled_value[:, heads],
        log_weight=pyramid.log_weight if pyramid.log_weight.shape[1] == 1 else pyramid.log_weight[:, heads],
    )
