"""Block lists: which blocks of pyramid rows each tile of queries reads, as data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .checks import check_list
from .pyramid import KVPyramid, padded_range

_Form = TypeVar("_Form")

ALL = -1
"""The count of a tile that reads every level-0 block."""


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """For each batch, head and query tile, a run of block indices in one shared pool.

    B batch, H heads, T query tiles, P pool entries, M row masks. A block index is row offset // block of the pyramid.

    start: int64 [B|1, H|1, T], where a tile's run begins in `pool`.
    count: int32 [B|1, H|1, T], its length; ALL (-1) = every level-0 block, and nothing of the pool.
    pool: int32 [P], block indices; no block twice in a tile.
    masked_count: int32 [B|1, H|1, T], how many entries at the run's front carry row masks.
    mask_start: int64 [B|1, H|1, T], where the tile's row masks begin in `row_masks`, one for each masked entry.
    row_masks: int32 [M, ceil(block / 32)], bit r % 32 of word r // 32 set = row r of the block is read.
    query_rows: int32 [H|1, T, tile], the tokens that a query tile holds, -1 = padding, each token at most once.
    block: rows per block.
    """

    start: Tensor
    count: Tensor
    pool: Tensor
    masked_count: Tensor
    mask_start: Tensor
    row_masks: Tensor
    query_rows: Tensor
    block: int
    # What backends and `validate` derive from the list, which is built once and read at every step.
    memo: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        shape = tuple(self.start.shape)
        wanted = {
            "start": torch.int64,
            "count": torch.int32,
            "pool": torch.int32,
            "masked_count": torch.int32,
            "mask_start": torch.int64,
            "row_masks": torch.int32,
            "query_rows": torch.int32,
        }
        for name, dtype in wanted.items():
            if (got := getattr(self, name).dtype) != dtype:
                raise ValueError(f"{name} must be {dtype}, got {got}: convert it")
        for name in ("start", "count", "masked_count", "mask_start"):
            got = tuple(getattr(self, name).shape)
            if len(got) != 3 or got != shape:
                raise ValueError(f"{name} must be [batch or 1, heads or 1, tiles] like start {shape}, got {got}")
        if self.query_rows.ndim != 3 or self.query_rows.shape[1] != shape[2]:
            raise ValueError(
                f"query_rows must be [heads or 1, {shape[2]} tiles, tile], got {tuple(self.query_rows.shape)}"
            )
        heads = {1, shape[1], self.query_rows.shape[0]}
        if len(heads) > 2:
            raise ValueError(
                f"query_rows must have 1 head or the list's {shape[1]}, got {self.query_rows.shape[0]}: expand one"
            )
        if self.pool.ndim != 1:
            raise ValueError(f"pool must have one dimension, got {self.pool.ndim}: flatten it")
        if self.row_masks.ndim != 2 or self.row_masks.shape[1] != mask_words(self.block):
            raise ValueError(
                f"row_masks must be [masks, {mask_words(self.block)}] for blocks of {self.block} rows, "
                f"got {tuple(self.row_masks.shape)}"
            )

    @property
    def batch(self) -> int:
        """B, or 1 where the list holds for every batch entry."""
        return self.start.shape[0]

    @property
    def heads(self) -> int:
        """H, or 1 where list and query rows hold for every head."""
        return max(self.start.shape[1], self.query_rows.shape[0])

    @property
    def tiles(self) -> int:
        return self.start.shape[2]

    @property
    def tile(self) -> int:
        """Query rows per tile."""
        return self.query_rows.shape[2]

    @property
    def nbytes(self) -> int:
        """Memory of the list's own tensors in bytes."""
        tensors = (self.start, self.count, self.pool, self.masked_count, self.mask_start, self.row_masks)
        return sum(tensor.nbytes for tensor in (*tensors, self.query_rows))

    def to(self, device: torch.device) -> BlockList:
        """The list on a device; itself, with what backends remember on it, where it is there already."""
        return self if self.start.device == device else moved(self, device)

    def rows_touched(self, pyramid: KVPyramid) -> Tensor:
        """Rows in the blocks each tile reads, masked and padding rows included: int64 [B|1, H|1, T]."""
        dense = len(pyramid.blocks_at(0))
        return torch.where(self.count == ALL, dense, self.count).long() * self.block

    def density(self, pyramid: KVPyramid) -> float:
        """Rows touched ÷ level-0 rows, averaged over the queries (not the padding) of the tiles."""
        queries = (self.query_rows >= 0).sum(-1, dtype=torch.float64)[None]
        touched = self.rows_touched(pyramid).double()
        shape = torch.broadcast_shapes(queries.shape, touched.shape)
        every = float(queries.expand(shape).sum()) * pyramid.offsets[1]
        return float((touched * queries).sum()) / every if every else 0.0

    def validate(self, pyramid: KVPyramid, queries: int) -> None:
        """Raise ValueError unless the list fits the pyramid and `queries` tokens; the verdict is remembered.

        Checked: every run lies in the pool, every index in the pyramid, no block twice in a tile (the message names
        batch, head, tile and block), masked_count ≤ count, query_rows in range and no token twice in a head.
        """
        key = ("valid", pyramid.blocks, queries)
        if key not in self.memo:
            check_list(self, pyramid.blocks, queries)
            self.memo[key] = True


def moved(form: _Form, device: torch.device | str) -> _Form:
    """A dataclass with its tensors on a device."""
    tensors = {name: value for name, value in vars(form).items() if isinstance(value, Tensor)}
    return replace(form, **{name: tensor.to(device) for name, tensor in tensors.items()})  # pyright: ignore[reportArgumentType]


def mask_words(block: int) -> int:
    """int32 words that hold one bit per row of a block."""
    return (block + 31) // 32


def identity_rows(tokens: int, tile: int) -> Tensor:
    """Query tiles over tokens in order: int32 [1, T, tile], the last one padded with -1."""
    return padded_range(tokens, tile).view(1, -1, tile)
