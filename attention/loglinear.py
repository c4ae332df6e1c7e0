"""Log-linear lists: coarse to fine through the pyramid, a few children of a few parents at every level."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..kernels.blocklist import BlockList
from ..kernels.listops import from_pairs
from ..kernels.pyramid import KVPyramid
from .budget import top
from .means import block_means, tile_means
from .rows import Layout
from .select import DynamicSelector, Selector

GATHERED = 1 << 24
"""Elements of candidate keys held at a time."""


class LogLinear(DynamicSelector):
    """The `keep` best rows of each level among the children of those of the level above (LLSA, arXiv 2512.16615).

    B is the block; a row of level l is the mean of B^l rows. The top level is scored in full by the product of the
    tile's mean query with mean keys, then each level among the `keep` · B children of what was chosen above; the
    children of level 1's rows are blocks of tokens. A tile reads those `keep` blocks, the coarser rows that it met,
    and the top level: keep · B · levels + N / B^levels rows, each weighing the tokens that it stands for.

    levels: coarse levels; by default ⌊log_B N⌋ - 1, at least 1.
    coverage: "partition" reads a coarse row only where its children are not read, so that every token counts once;
    "overlap" reads all of them, as published for models trained that way.

    Rows that hold any text are always opened, so that text is read token by token.
    """

    covers = True
    name: Literal["loglinear"] = "loglinear"
    keep: Annotated[int, Field(ge=1)] = 8
    levels: Annotated[int, Field(ge=1, le=8)] | None = None
    coverage: Literal["partition", "overlap"] = "partition"

    @classmethod
    def candidates(cls) -> tuple[Selector, ...]:
        return tuple(cls(keep=keep, levels=levels) for levels in (None, 1) for keep in (4, 8, 16, 32))

    def factors(self, block: int, rows: int | None) -> tuple[int, ...] | None:
        if self.levels is None and rows is None:
            return None
        return tuple(block**level for level in range(self._levels(block, rows or 1) + 1))

    def _levels(self, block: int, rows: int) -> int:
        if block < 2:
            raise ValueError(f"block must be at least 2 to be pooled for the log-linear selector, got {block}")
        if self.levels is not None:
            return self.levels
        levels = 1
        while block ** (levels + 2) <= rows:
            levels += 1
        return levels

    def choose(
        self, query: Tensor, layout: Layout, pyramid: KVPyramid, *, scale: float, lse: Tensor | None
    ) -> BlockList:
        block, levels = layout.block, self._levels(layout.block, pyramid.offsets[1])
        missing = [block**level for level in range(levels + 1) if block**level not in pyramid.factors]
        if missing:
            raise ValueError(
                f"factors must hold the powers of block {block} up to {block**levels}, got {pyramid.factors}: the "
                "log-linear selector pools by the kernel's block, or every row met costs a whole block of others"
            )
        batch, heads, tiles = query.shape[0], query.shape[1], layout.tiles
        means = tile_means(query, layout).flatten(0, 1)
        mixed = _mixed(layout, levels)
        pairs = _Pairs(batch * heads, tiles, block)

        # The top level: every row a candidate, in whole blocks.
        keys, weight = _level(pyramid, levels, means.shape[0])
        size = keys.shape[1]
        missing_rows = -size % block
        scores = torch.nn.functional.pad(scale * means @ keys.mT + weight[:, None], (0, missing_rows), value=-math.inf)
        rows = torch.arange(size + missing_rows, device=scores.device).expand(scores.shape)
        parents = None
        for level in range(levels, 0, -1):
            if parents is not None:
                rows = (parents[..., None] * block + torch.arange(block, device=parents.device)).flatten(2)
                rows = torch.where(parents.repeat_interleave(block, 2) < 0, -1, rows)
                scores = _scores(means, pyramid, level, rows, scale)
            inside = (rows >= 0) & (rows < mixed[level].numel())
            opened = mixed[level][torch.where(inside, rows, 0)] & inside
            closed = scores.masked_fill(opened, -math.inf)
            taken = (top(closed, self.keep) & (closed > -math.inf)) | opened
            first = pyramid.offsets[pyramid.factors.index(block**level)] // block
            read = ~opened if self.coverage == "overlap" else ~taken
            pairs.add(rows[..., ::block] // block, first, read.unflatten(2, (-1, block)))
            parents = _listed(rows, taken)
        assert parents is not None
        pairs.add(parents, 0, None)
        every = (parents >= 0).sum(-1) == layout.blocks
        dense = (every | layout.exact_tiles).view(batch, heads, tiles)
        return pairs.to_list(layout, dense)


class _Pairs:
    """Entries of a list in the making: blocks with the rows read of each, -1 = no block."""

    def __init__(self, owners: int, tiles: int, block: int):
        self.owners, self.tiles, self.block = owners, tiles, block
        self._tile: list[Tensor] = []
        self._index: list[Tensor] = []
        self._rows: list[Tensor] = []

    def add(self, index: Tensor, first: int, rows: Tensor | None) -> None:
        """index: [owners, T, n], of a level that begins at block `first`; rows: bool [owners, T, n, block], None = all.

        Entries that read no row are left out.
        """
        listed = index >= 0 if rows is None else (index >= 0) & rows.any(-1)
        owner, tile, _ = listed.nonzero().unbind(1)
        self._tile.append(owner * self.tiles + tile)
        self._index.append(index[listed] + first)
        whole = index.new_ones(1, self.block, dtype=torch.bool)
        self._rows.append(whole.expand(owner.numel(), -1) if rows is None else rows[listed])

    def to_list(self, layout: Layout, dense: Tensor) -> BlockList:
        tile, index, rows = (torch.cat(parts) for parts in (self._tile, self._index, self._rows))
        kept = ~dense.flatten()[tile]
        tile, index, rows = tile[kept], index[kept], rows[kept]
        masked = (~rows.all(-1)).nonzero()[:, 0]
        batch, heads, _ = dense.shape
        return from_pairs(
            tile,
            index,
            layout.query_rows,
            layout.block,
            batch=batch,
            heads=heads,
            masked=masked,
            row_masks=rows[masked],
            dense=dense,
        )


def _mixed(layout: Layout, levels: int) -> list[Tensor]:
    """For each level bool [rows]: rows that stand for any text or reference token. Level 0 counts by blocks."""
    held = [layout.exact_blocks, layout.exact_blocks]
    for _ in range(levels - 1):
        padded = torch.nn.functional.pad(held[-1], (0, -held[-1].numel() % layout.block))
        held.append(padded.view(-1, layout.block).any(-1))
    return held


def _level(pyramid: KVPyramid, level: int, owners: int) -> tuple[Tensor, Tensor]:
    """Keys [B * H, rows, D] of one level, and their log-weights [B * H, rows]."""
    keys, weight = block_means(pyramid, pyramid.block**level)
    return keys.flatten(0, 1), weight.expand(*keys.shape[:3]).reshape(owners, -1)


def _scores(means: Tensor, pyramid: KVPyramid, level: int, rows: Tensor, scale: float) -> Tensor:
    """Scores of tiles [owners, T, D] with candidate rows [owners, T, C] of a level; -inf where there is no row."""
    keys, weight = _level(pyramid, level, means.shape[0])
    size = keys.shape[1]
    absent = (rows < 0) | (rows >= size)
    index = rows.clamp(0, size - 1) + torch.arange(len(keys), device=rows.device)[:, None, None] * size
    flat_rows, flat_means = index.flatten(0, 1), means.flatten(0, 1)
    step = max(1, GATHERED // (rows.shape[2] * keys.shape[2]))
    table = keys.flatten(0, 1)
    scores = torch.cat(
        [
            torch.einsum("td,tcd->tc", part, table[chosen])
            for part, chosen in zip(flat_means.split(step), flat_rows.split(step), strict=True)
        ]
    ).view(rows.shape)
    return (scale * scores + weight.flatten()[index]).masked_fill(absent, -math.inf)


def _listed(rows: Tensor, taken: Tensor) -> Tensor:
    """The taken of rows [owners, T, C] as [owners, T, most], padded with -1 at the end."""
    most = max(1, int(taken.sum(-1).max())) if taken.numel() else 1
    order = taken.to(torch.int8).sort(dim=-1, descending=True, stable=True)
    index = order.indices[..., :most]
    return torch.where(order.values[..., :most] > 0, rows.gather(-1, index), -1)
