"""Windows in space and time: every query reads the keys of a box around it."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..kernels.blocklist import BlockList
from ..kernels.pyramid import KVPyramid
from .order import Shape, TokenOrder
from .rows import Layout
from .select import Selector, Size, length, level0_list

Step = Annotated[int, Field(ge=1)]


class Window(Selector):
    """Keys in a box of frames x height x width patches around the query (STA, arXiv 2502.04507).

    A size of w patches runs from w // 2 before the query to (w - 1) // 2 after it; "100%" is the whole axis. At the
    grid's border the box is cut, or with border="shift" moved inward, so that every query reads equally many keys.
    `dilation` d along an axis counts only cells equal to the query's modulo d (Skiparse, arXiv 2605.28691).
    A tile reads a block if any of its queries reads any of the block's keys; pairs of different visual segments, and
    text and reference keys, are always read.
    """

    name: Literal["window"] = "window"
    frames: Size = "100%"
    height: Size = "100%"
    width: Size = "100%"
    dilation: tuple[Step, Step, Step] = (1, 1, 1)
    border: Literal["cut", "shift"] = "cut"

    @classmethod
    def candidates(cls) -> tuple[Selector, ...]:
        near = ((3, 3, 3), (3, 5, 5), (5, 7, 7), (7, 9, 9), ("50%", "60%", "60%"))
        whole = ((1, "100%", "100%"), (3, "100%", "100%"), ("100%", 1, 1), ("100%", 3, 3), ("100%", 5, 5))
        strided = cls(dilation=(1, 2, 2))
        return (*(cls(frames=f, height=h, width=w) for f, h, w in (*near, *whole)), strided)

    def reach(self, shape: Shape) -> list[Tensor]:
        """For each axis bool [extent, extent]: which coordinates of keys (columns) a query's coordinate (row) reads."""
        sizes = (self.frames, self.height, self.width)
        return [
            _reach(extent, size, step, self.border)
            for extent, size, step in zip(shape, sizes, self.dilation, strict=True)
        ]

    def select(self, query: Tensor | None, key: Tensor | None, layout: Layout, pyramid: KVPyramid | None) -> BlockList:
        reads = torch.ones(layout.tiles, layout.blocks, dtype=torch.bool)
        key_rows = layout.key_rows.view(-1, layout.block)
        for segment, tiles, blocks in layout.visual_parts():
            local_queries = _local(layout.query_rows[0, tiles], layout.local)
            local_keys = _local(key_rows[blocks], layout.local)
            axes = self.reach(segment.grid)
            reads[tiles, blocks] = touching(local_queries, local_keys, segment.grid, axes, self.dilation)
        return level0_list(reads[None, None], layout)


def diagonal(frames: int | str = 1) -> tuple[TokenOrder, Window]:
    """A band along the diagonal of the attention map: whole frames near the query's own, in raster order."""
    return TokenOrder(name="raster"), Window(frames=frames)


def multi_diagonal(height: int | str, width: int | str) -> tuple[TokenOrder, Window]:
    """A diagonal per pair of frames: nearby patches of all frames. In temporal order they are one narrow band."""
    return TokenOrder(name="temporal"), Window(height=height, width=width)


def _reach(extent: int, size: int | str, step: int, border: str) -> Tensor:
    cell = torch.arange(extent)
    residue, index = cell % step, cell // step
    cells = (extent - residue + step - 1) // step  # of the axis that share the residue
    if size == "100%":
        first, last = torch.zeros_like(cell), cells
    else:
        # A share of a dilated axis is a share of the cells that it counts.
        wide = torch.tensor([length(size, int(count)) for count in cells])
        first = index - wide // 2
        if border == "shift":
            first = torch.minimum(first, cells - wide).clamp(min=0)
        last = first + wide
    near = (index[None] >= first[:, None]) & (index[None] < last[:, None])
    return near & (residue[None] == residue[:, None])


def _local(rows: Tensor, local: Tensor) -> Tensor:
    """Tokens as indices within their segment, padding left at -1."""
    return torch.where(rows < 0, -1, local[rows.clamp(min=0).long()])


def touching(queries: Tensor, keys: Tensor, shape: Shape, axes: list[Tensor], dilation: tuple[int, int, int]) -> Tensor:
    """bool [T, K]: which tiles and blocks hold a (query, key) pair that reaches along every axis. Exact in any order.

    queries: [T, tile], keys: [K, block], raster indices or -1. Each token carries one bit per tile; spreading the bits
    along the axes one after another takes 0.2 s for 75,600 tokens, where testing pairs would take minutes.
    """
    tiles = len(queries)
    tile_index, column = (queries >= 0).nonzero().unbind(1)
    bits = torch.zeros(*shape, (tiles + 63) // 64, dtype=torch.int64)
    bits.view(-1, bits.shape[-1])[queries[tile_index, column], tile_index // 64] = torch.ones(
        (), dtype=torch.int64
    ) << (tile_index % 64)
    for axis in range(3):
        bits = _spread(bits, axis, axes[axis], dilation[axis])
    # One spare row of zeros at the end is what padding (-1) reads.
    flat = torch.nn.functional.pad(bits.flatten(0, 2), (0, 0, 0, 1))
    rows = flat[keys]
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        joined = rows[:, :half] | rows[:, half : 2 * half]
        rows = torch.cat([joined, rows[:, 2 * half :]], 1)
    reads = (rows[:, 0, :, None] >> torch.arange(64)) & 1
    return reads.flatten(1)[:, :tiles].T.bool()


def _spread(bits: Tensor, axis: int, reach: Tensor, step: int) -> Tensor:
    """OR along one axis over the queries that reach each key, by ranges of doubling length."""
    extent = len(reach)
    # Cells of one residue side by side: then the queries that reach a key are one run.
    together = torch.argsort(torch.arange(extent) % step, stable=True)
    relation = reach[together][:, together].long()
    begin = relation.argmax(0)
    width = relation.sum(0)
    level = [int(w).bit_length() - 1 for w in width]
    result = torch.empty_like(bits)
    table = bits.index_select(axis, together)
    for power in range(max(level) + 1):
        chosen = torch.tensor([cell for cell in range(extent) if level[cell] == power], dtype=torch.int64)
        if len(chosen):
            late = begin[chosen] + width[chosen] - (1 << power)
            value = table.index_select(axis, begin[chosen]) | table.index_select(axis, late)
            result.index_copy_(axis, together[chosen], value)
        if power < max(level):
            keep = table.shape[axis] - (1 << power)
            table = table.narrow(axis, 0, keep) | table.narrow(axis, 1 << power, keep)
    return result
