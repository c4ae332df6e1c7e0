"""Walking a chunk plan: each chunk's queries, gathered rows and logits, for forward and backward alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .chunks import SCORE_BYTES, ChunkPlan, Gathered
from .pyramid import KVPyramid
from .tables import Rows

# Query rows of a dense chunk at least: shorter products spend more on laying out the keys than on multiplying.
LEAST_ROWS = 256


class Scratch:
    """Memory by name that is used again for every chunk: fresh pages would cost more than what is written to them."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Uninitialised memory of that shape, which the next call of that name overwrites."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            held = self._held[name] = self._like.new_empty(size)
        return held[:size].view(shape)


@dataclass(frozen=True)
class Chunk:
    """A batch of n tiles (or runs of tiles), t query rows and L pyramid rows each.

    part: the packed queries' rows. query: [n, t, D]. keys: [n, L, D]. values: [n, L, …].
    logits: [n, t, L] in powers of two. Keys, values and logits may be overwritten by the next chunk.
    source: `Gathered`, or for dense chunks the heads whose level 0 is read.
    """

    part: slice
    query: Tensor
    keys: Tensor
    values: Tensor
    logits: Tensor
    source: Gathered | slice


@dataclass(frozen=True)
class Walk:
    """One group's packed queries [rows, D] and its pyramid rows.

    folded: log-weights are in the values; otherwise they are added to the logits, -inf where unread.
    """

    query: Tensor
    rows: Rows
    plan: ChunkPlan
    pyramid: KVPyramid
    scale: float
    folded: bool
    scratch: Scratch = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scratch", Scratch(self.query))

    def dense(self, values: Tensor) -> Iterator[Chunk]:
        """The tiles that read all of level 0, in chunks. values: [G, R, …], read like the keys."""
        level = self.pyramid.offsets[1]
        tile, head_dim = self.plan.tile, self.query.shape[1]
        most = max(LEAST_ROWS, SCORE_BYTES // max(1, level * self.query.element_size()))
        for run in self.plan.dense:
            tall = (run.end - run.begin) // (run.last - run.first) * tile
            heads = max(1, most // tall)
            for first in range(run.first, run.last, heads):
                here = slice(first, min(run.last, first + heads))
                count = here.stop - here.start
                origin = run.begin * tile + (first - run.first) * tall
                # Several heads share a chunk only when each is whole.
                step = tall if count > 1 else most
                for row in range(0, tall, step):
                    part = slice(origin + row, origin + (count * tall if count > 1 else min(tall, row + step)))
                    query = self.query[part].view(count, -1, head_dim)
                    keys = self.rows.key[here, :level]
                    bias = None if self.folded or self.rows.plain else self.rows.log_weight[here, :level]
                    yield Chunk(part, query, keys, values[here, :level], self._logits(query, keys, bias), here)

    def gathered(self, values: Tensor) -> Iterator[Chunk]:
        """The tiles that read listed blocks, in chunks. values: [G, R, …], read like the keys."""
        block, tile = self.pyramid.block, self.plan.tile
        head_dim, width = self.query.shape[1], values.shape[2]
        key_blocks = self.rows.key.view(-1, block * head_dim)
        value_blocks = values.view(-1, block * width)
        weights = None if self.folded or self.rows.plain else self.rows.log_weight.view(-1, block)
        for chunk in self.plan.gathered:
            count, entries = chunk.end - chunk.begin, len(chunk.index)
            part = slice(chunk.begin * tile, chunk.end * tile)
            query = self.query[part].view(count, tile, head_dim)
            keys = self.scratch.take("keys", entries, block * head_dim)
            picked = self.scratch.take("values", entries, block * width)
            torch.index_select(key_blocks, 0, chunk.index, out=keys)
            torch.index_select(value_blocks, 0, chunk.index, out=picked)
            keys, picked = keys.view(count, -1, head_dim), picked.view(count, -1, width)
            bias = None if weights is None else weights.index_select(0, chunk.index).view(count, -1)
            if chunk.hidden is not None:
                # What a row mask hides may hold NaN, which 0 · NaN would spread.
                front = chunk.hidden.shape[1]
                keys[:, :front].masked_fill_(chunk.hidden, 0)
                picked[:, :front].masked_fill_(chunk.hidden, 0)
                if bias is not None:
                    bias[:, :front].masked_fill_(chunk.hidden[..., 0], -math.inf)
            logits = self._logits(query, keys, bias)
            if chunk.hidden is not None and bias is None and not self.folded:
                logits[..., : chunk.hidden.shape[1]].masked_fill_(chunk.hidden.mT, -math.inf)
            yield Chunk(part, query, keys, picked, logits, chunk)

    def _logits(self, query: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
        logits = self.scratch.take("logits", query.shape[0], query.shape[1], keys.shape[1])
        alpha = self.scale / math.log(2)
        if bias is None:
            return torch.baddbmm(logits, query, keys.mT, beta=0, alpha=alpha, out=logits)
        wide = torch.promote_types(query.dtype, bias.dtype)
        start = (bias.to(wide) / math.log(2)).to(query.dtype)[:, None].expand(logits.shape)
        return torch.baddbmm(start, query, keys.mT, alpha=alpha, out=logits)
