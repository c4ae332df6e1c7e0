"""Host side of the kernels: from tensors to launches. Everything here runs on plain tensors, outside of autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..blocklist import ALL, BlockList, mask_words
from ..gpu_targets import Launch, padded, upright
from ..transpose import BlockTiles
from .forward import attend_tile
from .grad_keys import grad_rows_block, sum_rows
from .grad_query import dot_rows, grad_query_tile
from .launch import broadcast, constants, device_target, rows_first, run, scale_log2, strides
from .masses import mass_tile


@dataclass(frozen=True)
class Inputs:
    """A call's query and pyramid as the kernels take them; see `KVPyramid`."""

    query: Tensor
    key: Tensor
    value: Tensor
    pooled_key: Tensor
    pooled_value: Tensor
    key_rows: Tensor
    log_weight: Tensor
    scale: float
    compute: torch.dtype

    def __post_init__(self) -> None:
        for name in ("query", "key", "value", "pooled_key", "pooled_value"):
            object.__setattr__(self, name, rows_first(getattr(self, name)))
        for name in ("key_rows", "log_weight"):
            object.__setattr__(self, name, getattr(self, name).contiguous())

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.pooled_key, self.pooled_value

    @property
    def level_rows(self) -> int:
        return self.key_rows.shape[1]

    @property
    def is_pooled(self) -> bool:
        return self.pooled_key.shape[2] > 0

    def broadcasts(self, query_rows: Tensor) -> tuple[int, ...]:
        """Strides over heads of the row maps, of `query_rows` in tiles, and over batch and heads of the log-weights."""
        tiles = 0 if query_rows.shape[0] == 1 else query_rows.shape[1]
        return tiles, *broadcast(self.key_rows, 0), *broadcast(self.log_weight, 0, 1)


def length_order(counts: Tensor, batch: int, heads: int) -> Tensor:
    """Programs by falling length, so that heads of unequal lists do not wait for one another: int32 [B · H · T].

    counts: [B|1, H|1, T], of steps. Items are (batch · heads + head) · T + tile; equals keep their order.
    """
    return counts.expand(batch, heads, -1).flatten().argsort(descending=True, stable=True).to(torch.int32)


def tile_order(blocks: BlockList, batch: int, heads: int, level_blocks: int) -> Tensor:
    """The order in which a list's tiles are computed."""
    return length_order(torch.where(blocks.count == ALL, level_blocks, blocks.count), batch, heads)


def forward(inputs: Inputs, blocks: BlockList, order: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, H, Nq, D] and lse [B, H, Nq]."""
    query = inputs.query
    batch, heads, queries, head_dim = query.shape
    # Tokens that stand in no tile are written by no program.
    out = query.new_zeros(batch, heads, queries, head_dim)
    lse = query.new_full((batch, heads, queries), -math.inf, dtype=torch.float32)
    every = torch.arange(inputs.level_rows // blocks.block, dtype=torch.int32, device=query.device)

    def arguments(launch: Launch) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
        parts = -(-blocks.tile // launch.tile)
        given = (
            *(*inputs.sources, inputs.key_rows, inputs.log_weight, blocks.query_rows, order),
            *(*_list(blocks, every), out, lse, scale_log2(inputs.scale)),
            *(heads, blocks.tiles, queries, inputs.level_rows, len(every), *strides(*inputs.sources)),
            *(*broadcast(blocks.start, 0, 1), *inputs.broadcasts(blocks.query_rows)),
        )
        return order.numel() * parts, given, _tile_constants(inputs, blocks, launch, parts)

    run("forward", attend_tile, query, blocks.tile, blocks.block, arguments)
    return out, lse


def grad_query(inputs: Inputs, blocks: BlockList, order: Tensor, grad: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The query's gradient [B, H, Nq, D]."""
    query = inputs.query
    batch, heads, queries, head_dim = query.shape
    result = query.new_zeros(batch, heads, queries, head_dim)
    every = torch.arange(inputs.level_rows // blocks.block, dtype=torch.int32, device=query.device)

    def arguments(launch: Launch) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
        parts = -(-blocks.tile // launch.tile)
        given = (
            *(*inputs.sources, inputs.key_rows, inputs.log_weight, blocks.query_rows, order),
            *(*_list(blocks, every), grad, lse, delta, result, scale_log2(inputs.scale), inputs.scale),
            *(heads, blocks.tiles, queries, inputs.level_rows, len(every), *strides(*inputs.sources, grad)),
            *(*broadcast(blocks.start, 0, 1), *inputs.broadcasts(blocks.query_rows)),
        )
        return order.numel() * parts, given, _tile_constants(inputs, blocks, launch, parts)

    run("grad_query", grad_query_tile, query, blocks.tile, blocks.block, arguments)
    return result


def grad_rows(
    inputs: Inputs, blocks: BlockList, tiles: BlockTiles, grad: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of key and value tokens [B, H, N, D], and of the pooled rows [B, H, R - R0, D]."""
    query, block = inputs.query, blocks.block
    batch, heads, queries, head_dim = query.shape
    columns = inputs.log_weight.shape[2] // block
    level = torch.arange(columns, device=query.device) < inputs.level_rows // block
    order = length_order(tiles.count + torch.where(level, tiles.all_count[..., None], 0), batch, heads)
    rows = [query.new_empty(batch, heads, inputs.level_rows, head_dim) for _ in range(2)]
    pooled = [torch.empty_like(inputs.pooled_key, memory_format=torch.contiguous_format) for _ in range(2)]

    def arguments(launch: Launch) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
        parts = -(-block // launch.rows)
        given = (
            *(*inputs.sources, inputs.key_rows, inputs.log_weight, blocks.query_rows, order),
            *(tiles.start, tiles.count, tiles.pool, tiles.mask, tiles.all_start, tiles.all_count, tiles.all_pool),
            *(blocks.row_masks, grad, lse, delta, *rows, *pooled, scale_log2(inputs.scale), inputs.scale),
            *(heads, columns, blocks.tiles, queries, inputs.level_rows, pooled[0].shape[2]),
            *(*strides(*inputs.sources, grad), *broadcast(tiles.start, 0, 1), *broadcast(tiles.all_start, 0, 1)),
            *inputs.broadcasts(blocks.query_rows),
        )
        return (
            order.numel() * parts,
            given,
            {
                **constants(query, block, inputs.compute),
                **{"TILE": launch.tile, "ROWS": launch.rows, "LIST_TILE": blocks.tile, "PARTS": parts},
                **{"WORDS": mask_words(block), "POOLED": inputs.is_pooled},
                "UPRIGHT": upright(device_target(query), launch.rows),
                **{"LISTED": tiles.pool.numel() > 0, "EVERY": tiles.all_pool.numel() > 0},
                "MASKED": blocks.row_masks.shape[0] > 0,
            },
        )

    run("grad_rows", grad_rows_block, query, blocks.tile, block, arguments)
    key, value = (_to_tokens(table, inputs.key_rows, inputs.key.shape[2]) for table in rows)
    return key, value, pooled[0], pooled[1]


def dots(out: Tensor, grad: Tensor) -> Tensor:
    """Σ out ∘ grad over head_dim: float32 [B, H, N]."""
    batch, heads, tokens, head_dim = out.shape
    result = out.new_empty(batch, heads, tokens, dtype=torch.float32)
    if result.numel():
        launch: Any = dot_rows[(-(-tokens // 64), batch * heads)]
        launch(out, grad, result, heads, tokens, *strides(out, grad), TILE=64, D=head_dim, WIDE=padded(head_dim))
    return result


def masses(inputs: Inputs, lse: Tensor, query_rows: Tensor, block: int) -> Tensor:
    """Softmax mass of each query tile on each level-0 block: float32 [B, H, T, blocks]."""
    query = inputs.query
    batch, heads, queries, _ = query.shape
    # A step holds whole blocks, so that larger ones are cut, and their masses added.
    part = block // next(n for n in range(-(-block // 128), block + 1) if block % n == 0)
    tiles, tile = query_rows.shape[1:]
    columns = inputs.level_rows // part
    result = query.new_empty(batch, heads, tiles, columns, dtype=torch.float32)

    def arguments(launch: Launch) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
        given = (
            *(query, inputs.key, inputs.key_rows, inputs.log_weight, query_rows, lse, result),
            *(scale_log2(inputs.scale), heads, tiles, queries, inputs.level_rows, columns),
            *(*strides(query, inputs.key), *inputs.broadcasts(query_rows)),
        )
        return (
            batch * heads * tiles,
            given,
            {
                **constants(query, part, inputs.compute),
                **{"TILE": launch.tile, "ROWS": launch.rows, "LIST_TILE": tile, "PARTS": -(-tile // launch.tile)},
                "PADDED": 1 << (part - 1).bit_length(),
            },
        )

    if columns:
        run("mass", mass_tile, query, tile, part, arguments)
    return result.unflatten(3, (-1, block // part)).sum(4) if part != block else result


def _list(blocks: BlockList, every: Tensor) -> tuple[Tensor, ...]:
    return (
        *(blocks.start, blocks.count, blocks.pool, every),
        *(blocks.masked_count, blocks.mask_start, blocks.row_masks),
    )


def _tile_constants(inputs: Inputs, blocks: BlockList, launch: Launch, parts: int) -> dict[str, Any]:
    return {
        **constants(inputs.query, blocks.block, inputs.compute),
        **{"TILE": launch.tile, "ROWS": launch.rows, "LIST_TILE": blocks.tile, "PARTS": parts},
        **{"WORDS": mask_words(blocks.block), "POOLED": inputs.is_pooled},
    }


def _to_tokens(rows: Tensor, key_rows: Tensor, tokens: int) -> Tensor:
    """Sum the gradients of rows [B, H, R0, D] into their tokens' [B, H, N, D], without atomics: in the rows' order."""
    batch, heads, level_rows, head_dim = rows.shape
    result = rows.new_empty(batch, heads, tokens, head_dim)
    held, order = key_rows.sort(dim=1, stable=True)
    every = torch.arange(tokens + 1, dtype=torch.int32, device=rows.device).expand(len(held), -1).contiguous()
    first = torch.searchsorted(held, every, out_int32=True)
    order = order.to(torch.int32)
    if result.numel():
        launch: Any = sum_rows[(-(-tokens // 64), batch * heads)]
        launch(
            rows, order, first, result, heads, tokens, level_rows, *broadcast(order, 0), *broadcast(first, 0),
            TILE=64, D=head_dim, WIDE=padded(head_dim),
        )  # fmt: skip
    return result
