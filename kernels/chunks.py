"""How the torch backend walks a block list: tiles of like length in batches whose scores stay in cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocklist import ALL, BlockList
from .checks import ragged
from .listops import unpack_rows
from .pyramid import KVPyramid

# Scores of one chunk, in bytes: half of a 2 MiB second-level cache per core measured best, with its operands beside it.
SCORE_BYTES = 1 << 20
# Keys and values of one chunk, in bytes, and its query rows, where the fused kernel holds the scores: more of
# either come from memory afresh.
GATHERED_BYTES = 3 << 19
GATHERED_QUERIES = 1024
# A tile joins a chunk only if it fills this share of the chunk's width, which bounds the padding at a few percent.
LEAST_FILL = 0.92
# Index bytes that a list may keep for its next call; longer ones are planned anew each time.
KEPT_BYTES = 32 << 20


@dataclass(frozen=True)
class Budget:
    """What a chunk may hold: bytes, of which every block read takes some for each tile, and tiles."""

    bytes: int
    bytes_per_block: int
    tiles: int

    @classmethod
    def for_scores(cls, tile: int, block: int, element: int) -> Budget:
        """For scores that are written out."""
        return cls(SCORE_BYTES, tile * block * element, SCORE_BYTES)

    @classmethod
    def for_rows(cls, tile: int, block: int, head_dim: int, element: int) -> Budget:
        """For keys and values that a fused kernel reads."""
        return cls(GATHERED_BYTES, 2 * block * head_dim * element, max(2, GATHERED_QUERIES // tile))


@dataclass(frozen=True)
class Gathered:
    """Tiles begin … end of the plan's order, each reading `width` blocks, padded at the front.

    index: int32 [(end - begin) · width], blocks in the group's table of rows.
    hidden: bool [end - begin, front · block, 1], rows not read among the first `front` blocks; None if front is 0.
    """

    begin: int
    end: int
    width: int
    index: Tensor
    hidden: Tensor | None


@dataclass(frozen=True)
class Dense:
    """Tiles begin … end, which are the same number of tiles of each of the heads first … last, one after another."""

    begin: int
    end: int
    first: int
    last: int


@dataclass(frozen=True)
class ChunkPlan:
    """The tiles of a group of heads in the order in which they are computed; tiles that read nothing are left out.

    tile: query rows per tile.
    tokens: int32 [tiles · tile], head · N + token that each packed query row holds, 0 where padding.
    padding: bool [tiles · tile, 1], or None if there is none.
    place: int32 [heads · N], the packed row of each token, 0 where it has none.
    missing: bool [heads · N, 1], tokens without a packed row, or None if there are none.
    in_order: packed rows are the tokens of the heads, one after another.
    """

    dense: list[Dense]
    gathered: list[Gathered]
    tile: int
    tokens: Tensor
    padding: Tensor | None
    place: Tensor
    missing: Tensor | None
    in_order: bool

    def pack(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Token vectors [B, H, N, D] of the group in packed order, [rows, D], zeros where padding; a view if it can."""
        if not self.tokens.numel():
            return tensor.new_zeros(0, tensor.shape[-1], dtype=dtype)
        if self.in_order:
            return tensor.reshape(-1, tensor.shape[-1]).to(dtype)
        packed = tensor.reshape(-1, tensor.shape[-1]).index_select(0, self.tokens).to(dtype)
        return packed if self.padding is None else packed.masked_fill_(self.padding, 0)

    def unpack(self, packed: Tensor, target: Tensor, fill: float) -> None:
        """Write packed rows [rows, D] to target [B, H, N, D], `fill` for tokens that have none."""
        if not packed.shape[0]:
            target.fill_(fill)
            return
        if self.in_order:
            target.copy_(packed.view(target.shape))
            return
        rows = packed.index_select(0, self.place)
        target.copy_((rows if self.missing is None else rows.masked_fill_(self.missing, fill)).view(target.shape))

    @property
    def nbytes(self) -> int:
        """Memory that keeping the plan takes, in bytes."""
        hidden = sum(chunk.hidden.nbytes for chunk in self.gathered if chunk.hidden is not None)
        return hidden + sum(chunk.index.nbytes for chunk in self.gathered) + self.tokens.nbytes + self.place.nbytes


def plan_chunks(
    blocks: BlockList,
    group: tuple[range, range],
    shape: tuple[int, int],
    queries: int,
    pyramid: KVPyramid,
    budget: Budget,
) -> ChunkPlan:
    """The plan for batch entries and heads `group` of a call of `shape` (batch, heads), remembered on the list.

    queries: tokens per head of the query.
    """
    key = ("chunks", group, shape, queries, pyramid.blocks, budget)
    plan = blocks.memo.get(key)
    if plan is None:
        plan = _plan(blocks, group, shape, queries, pyramid.blocks, budget)
        if plan.nbytes <= KEPT_BYTES:
            blocks.memo[key] = plan
    return plan


def _plan(
    blocks: BlockList, group: tuple[range, range], shape: tuple[int, int], queries: int, total: int, budget: Budget
) -> ChunkPlan:
    def of_group(tensor: Tensor) -> Tensor:
        full = tensor.expand(*shape, -1)[group[0].start : group[0].stop, group[1].start : group[1].stop]
        return full.reshape(-1, blocks.tiles)

    count = of_group(blocks.count)
    dense, dense_order = _dense_runs(count)
    flat = count.flatten()
    listed = flat.argsort(descending=True, stable=True)[: int((flat > 0).sum())]
    order = torch.cat([dense_order, listed])

    # The group's heads, batch after batch, each with its own query rows or all with the same.
    own = blocks.query_rows
    rows = own[group[1].start : group[1].stop] if own.shape[0] > 1 else own.expand(len(group[1]), -1, -1)
    rows = rows.repeat(len(group[0]), 1, 1).flatten(0, 1)[order]
    head = (order // blocks.tiles)[:, None] * queries
    padding = (rows < 0).flatten()
    tokens = torch.where(rows < 0, 0, rows + head).flatten()
    place = torch.full((count.shape[0] * queries,), -1, dtype=torch.int32, device=count.device)
    held = (~padding).nonzero()[:, 0]
    place[tokens[held]] = held.to(torch.int32)
    missing = place < 0
    return ChunkPlan(
        dense=dense,
        gathered=_gathered(blocks, of_group, listed, dense_order.numel(), total, budget) if listed.numel() else [],
        tile=blocks.tile,
        tokens=tokens.to(torch.int32),
        padding=padding[:, None] if bool(padding.any()) else None,
        place=place.clamp_(min=0),
        missing=missing[:, None] if bool(missing.any()) else None,
        in_order=torch.equal(tokens, torch.arange(place.numel(), device=tokens.device)),
    )


def _gathered(
    blocks: BlockList, of_group: Callable[[Tensor], Tensor], listed: Tensor, before: int, total: int, budget: Budget
) -> list[Gathered]:
    """Chunks of the tiles `listed` (head · T + tile, by descending count), `before` being the tiles ahead of them."""
    width = of_group(blocks.count).flatten()[listed].long()
    masked = of_group(blocks.masked_count).flatten()[listed].long()
    bounds = _bounds(width.tolist(), budget)
    widest = torch.cat([width[begin : begin + 1].expand(end - begin) for begin, end in bounds])
    ends, pad = widest.cumsum(0), widest - width
    # A tile's slots: padding, then masked entries, then the rest, so that a chunk's hidden rows are at its front.
    _, entry = ragged(of_group(blocks.start).flatten()[listed], width)
    index = ((listed // blocks.tiles) * total).repeat_interleave(widest)
    index[ragged(ends - width, width)[1]] += blocks.pool[entry]
    index = index.to(torch.int32)

    mask_tile, mask_entry = ragged(of_group(blocks.mask_start).flatten()[listed], masked)
    _, mask_slot = ragged(pad, masked)
    mask_rows = unpack_rows(blocks.row_masks[mask_entry], blocks.block)
    mask_ends = masked.cumsum(0)

    chunks = []
    for begin, end in bounds:
        span = int((pad + masked)[begin:end].max())
        hidden = None
        if span:
            slot = torch.arange(span, device=pad.device)
            hidden = (slot < pad[begin:end, None])[..., None].repeat(1, 1, blocks.block)
            here = slice(int(mask_ends[begin] - masked[begin]), int(mask_ends[end - 1]))
            hidden[mask_tile[here] - begin, mask_slot[here]] = ~mask_rows[here]
            hidden = hidden.view(end - begin, span * blocks.block, 1)
        picked = index[int(ends[begin] - widest[begin]) : int(ends[end - 1])]
        chunks.append(Gathered(before + begin, before + end, int(widest[begin]), picked, hidden))
    return chunks


def _dense_runs(count: Tensor) -> tuple[list[Dense], Tensor]:
    """Runs of neighbouring heads with equally many ALL tiles, and those tiles in order."""
    every = count == ALL
    numbers = every.sum(1).tolist()
    runs, first, begin = [], 0, 0
    for head in range(1, len(numbers) + 1):
        if head == len(numbers) or numbers[head] != numbers[first]:
            end = begin + numbers[first] * (head - first)
            if numbers[first]:
                runs.append(Dense(begin, end, first, head))
            first, begin = head, end
    return runs, every.flatten().nonzero()[:, 0]


def _bounds(widths: list[int], budget: Budget) -> list[tuple[int, int]]:
    """Cut tiles of descending width into chunks within the budget, of like widths each."""
    bounds, begin = [], 0
    while begin < len(widths):
        most = min(budget.tiles, max(1, budget.bytes // (widths[begin] * budget.bytes_per_block)))
        end, least = begin + 1, LEAST_FILL * widths[begin]
        while end < len(widths) and end - begin < most and widths[end] >= least:
            end += 1
        bounds.append((begin, end))
        begin = end
    return bounds
