"""Vertical stripes: chosen columns of the attention map, read by every query."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..kernels.blocklist import BlockList
from ..kernels.pyramid import KVPyramid
from .order import Shape, TokenOrder
from .rows import Layout
from .select import Position, Selector, level0_list

Range = tuple[Position, Position]
Step = Annotated[int, Field(ge=1)]


class Box(BaseModel):
    """A box of tokens: a (start, stop) range along each axis, of which every so many-th cell counts.

    A range that lies beyond a smaller grid's end holds the last cell, so that a plan's box is never empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    frames: Range = (0, "100%")
    height: Range = (0, "100%")
    width: Range = (0, "100%")
    every: tuple[Step, Step, Step] = (1, 1, 1)

    def holds(self, shape: Shape) -> Tensor:
        """bool [frames, height, width]: which tokens lie in the box."""
        axes = []
        for (start, stop), step, extent in zip((self.frames, self.height, self.width), self.every, shape, strict=True):
            first = min(_cell(start, extent, up=False), extent - 1)
            last = max(min(_cell(stop, extent, up=True), extent), first + 1)
            axis = torch.zeros(extent, dtype=torch.bool)
            axis[first:last:step] = True
            axes.append(axis)
        return axes[0][:, None, None] & axes[1][None, :, None] & axes[2][None, None, :]


class Stripe(Selector):
    """Keys in any of the boxes (the first frame, the centre, every fourth row, ...), for all queries alike.

    The columns are sorted to the front of the keys, so that they fill whole blocks; the last of these also holds the
    columns that come next. Vertical stripes of Sparse-vDiT, arXiv 2506.03065.
    """

    name: Literal["stripe"] = "stripe"
    boxes: tuple[Box, ...] = Field(min_length=1)

    @classmethod
    def candidates(cls) -> tuple[Selector, ...]:
        boxes = (Box(frames=(0, 1)), Box(height=("25%", "75%"), width=("25%", "75%")), Box(every=(1, 4, 4)))
        return tuple(cls(boxes=(box,)) for box in boxes)

    def columns(self, shape: Shape) -> Tensor:
        """bool [tokens], in raster order: which keys are read."""
        return torch.stack([box.holds(shape) for box in self.boxes]).any(0).flatten()

    def key_order(self, shape: Shape, order: TokenOrder) -> Tensor:
        in_order = order.indices(shape)
        return in_order[torch.argsort(~self.columns(shape)[in_order], stable=True)]

    def select(self, query: Tensor | None, key: Tensor | None, layout: Layout, pyramid: KVPyramid | None) -> BlockList:
        reads = layout.exact_blocks.clone()
        for segment, _, blocks in layout.visual_parts():
            held = int(self.columns(segment.grid).sum())
            reads[blocks.start : blocks.start - (-held // layout.block)] = True
        return level0_list(reads.view(1, 1, 1, -1).expand(-1, -1, layout.tiles, -1), layout)


def _cell(position: int | str, extent: int, *, up: bool) -> int:
    if isinstance(position, int):
        return position
    cell = float(position[:-1]) / 100 * extent
    return -int(-cell // 1) if up else int(cell)
