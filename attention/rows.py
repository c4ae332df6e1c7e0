"""Row maps: which tokens each query tile and each level-0 key row holds, for one grid, order, tile and block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.blocklist import moved
from .grid import Segment, TokenGrid
from .order import TokenOrder


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """A grid laid out in tiles of queries and blocks of keys; none of them straddles two segments.

    N tokens, T query tiles, K level-0 blocks.

    query_rows: int32 [1, T, tile], key_rows: int32 [1, K * block]: token of each row, -1 = padding.
    tile_segment: int64 [T], block_segment: int64 [K], the index of the segment a tile or block belongs to.
    local: int64 [N], each token's index within its segment (raster order for visual ones).
    """

    grid: TokenGrid
    order: TokenOrder
    tile: int
    block: int
    query_rows: Tensor
    key_rows: Tensor
    tile_segment: Tensor
    block_segment: Tensor
    local: Tensor

    @property
    def tiles(self) -> int:
        return self.tile_segment.numel()

    @property
    def blocks(self) -> int:
        """Level-0 blocks."""
        return self.block_segment.numel()

    def _exact(self, segment_of: Tensor) -> Tensor:
        visual = torch.tensor([s.kind == "visual" for s in self.grid.segments], device=segment_of.device)
        return ~visual[segment_of]

    @property
    def exact_tiles(self) -> Tensor:
        """bool [T]: tiles of text or reference queries, which read everything."""
        return self._exact(self.tile_segment)

    @property
    def exact_blocks(self) -> Tensor:
        """bool [K]: blocks of text or reference keys, which are never pooled."""
        return self._exact(self.block_segment)

    def to(self, device: torch.device | str) -> Layout:
        """The same layout with its tensors on another device."""
        return moved(self, device)

    def of_tiles(self, tiles: Tensor) -> Layout:
        """The layout of some of the query tiles, int64 [n] in rising order, over all keys."""
        return replace(self, query_rows=self.query_rows[:, tiles], tile_segment=self.tile_segment[tiles])

    def parts(self) -> list[tuple[Segment, slice, slice]]:
        """Each segment with its range of tiles and its range of blocks."""
        found = []
        for index, segment in enumerate(self.grid.segments):
            ranges = []
            for owner in (self.tile_segment, self.block_segment):
                held = (owner == index).nonzero()[:, 0].tolist()
                # A layout of some of the tiles may hold none of a segment's.
                ranges.append(slice(held[0], held[-1] + 1) if held else slice(0, 0))
            found.append((segment, ranges[0], ranges[1]))
        return found

    def visual_parts(self) -> list[tuple[Segment, slice, slice]]:
        """The parts of visual segments."""
        return [part for part in self.parts() if part[0].kind == "visual"]


def lay_out(
    grid: TokenGrid,
    order: TokenOrder,
    *,
    tile: int,
    block: int,
    key_orders: Sequence[Tensor | None] | None = None,
) -> Layout:
    """Put each segment's tokens into query tiles and key blocks, visual ones in the given order.

    key_orders: for each segment another order of its keys, int64 [tokens of the segment] local indices, None = as the
    queries. Raises ValueError if tile or block is not positive or an explicit order does not fit the grid.
    """
    if tile < 1 or block < 1:
        raise ValueError(f"tile and block must be positive, got {tile} and {block}")
    local = torch.empty(grid.tokens, dtype=torch.int64)
    queries, keys = [], []
    for index, segment in enumerate(grid.segments):
        positions = segment.positions()
        local[positions] = torch.arange(segment.tokens)
        in_order = order.indices(segment.grid) if segment.kind == "visual" else torch.arange(segment.tokens)
        key_order = key_orders[index] if key_orders else None
        queries.append(_padded(positions[in_order], tile))
        keys.append(_padded(positions[in_order if key_order is None else key_order], block))
    return Layout(
        grid=grid,
        order=order,
        tile=tile,
        block=block,
        query_rows=torch.cat(queries)[None],
        key_rows=torch.cat(keys).view(1, -1),
        tile_segment=_owners(queries),
        block_segment=_owners(keys),
        local=local,
    )


def _padded(tokens: Tensor, width: int) -> Tensor:
    """int64 [n] in rows of `width`: int32 [ceil(n / width), width], -1 where there is no token."""
    missing = -len(tokens) % width
    return torch.nn.functional.pad(tokens, (0, missing), value=-1).view(-1, width).to(torch.int32)


def _owners(parts: Sequence[Tensor]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part) for part in parts]))
