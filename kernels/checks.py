"""Is a block list well-formed? Vectorised over its tiles, and cheap enough to ask on every new list."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .blocklist import BlockList
    from .pyramid import KVPyramid


def check_list(blocks: BlockList, limit: int, queries: int) -> None:
    """Raise ValueError unless every run, index, mask and query row is in range for `limit` blocks and `queries` tokens.

    No block may stand twice in a tile, no token twice in a head's query rows.
    """
    _check_runs(blocks)
    _check_query_rows(blocks.query_rows, queries)
    tile, entry = ragged(blocks.start, blocks.count)
    if not entry.numel():
        return
    index = blocks.pool[entry]
    wrong = (index < 0) | (index >= limit)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"pool must hold block indices in 0 … {limit - 1}, got {int(index[first])} in {_place(blocks, tile[first])}"
        )
    key = tile * limit + index
    if bool((key[1:] <= key[:-1]).any()):
        key = key.sort().values
        twice = key[1:] == key[:-1]
        if bool(twice.any()):
            first = key[int(twice.nonzero()[0, 0])]
            raise ValueError(
                f"blocks must not repeat within a tile, got block {int(first % limit)} twice in "
                f"{_place(blocks, first // limit)}: drop one"
            )


def ragged(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Expand runs: for every entry of every run, in order, the run it is in and its position start + i (int64)."""
    count = count.flatten().long().clamp(min=0)
    run = torch.repeat_interleave(torch.arange(count.numel(), device=count.device), count)
    before = count.cumsum(0) - count
    return run, torch.arange(run.numel(), device=run.device) + (start.flatten() - before)[run]


def _check_runs(blocks: BlockList) -> None:
    start, count, masked, mask_start = blocks.start, blocks.count, blocks.masked_count, blocks.mask_start
    listed = count.clamp(min=0)
    for name, wrong, why in (
        ("count", count < -1, "be -1 (ALL) or a number of blocks"),
        (
            "start",
            (listed > 0) & ((start < 0) | (start + listed > blocks.pool.numel())),
            "lie in the pool with its run",
        ),
        ("masked_count", (masked < 0) | (masked > listed), "be in 0 … count"),
        (
            "mask_start",
            (masked > 0) & ((mask_start < 0) | (mask_start + masked > blocks.row_masks.shape[0])),
            "lie in row_masks with its run",
        ),
    ):
        if bool(wrong.any()):
            tile = wrong.flatten().nonzero()[0, 0]
            got = int(getattr(blocks, name).flatten()[tile])
            raise ValueError(f"{name} must {why}, got {got} in {_place(blocks, tile)}")


def _check_query_rows(query_rows: Tensor, queries: int) -> None:
    if not query_rows.numel():
        return
    low, high = int(query_rows.min()), int(query_rows.max())
    if low < -1 or high >= queries:
        raise ValueError(
            f"query_rows must lie in -1 … {queries - 1}, got {low} … {high}: build the list for this query's tokens"
        )
    heads = query_rows.shape[0]
    slot = query_rows.reshape(heads, -1).long() + 1
    seen = torch.zeros(heads, queries + 1, dtype=torch.int32, device=slot.device)
    seen.scatter_add_(1, slot, torch.ones_like(slot, dtype=torch.int32))
    twice = seen[:, 1:] > 1
    if bool(twice.any()):
        head, token = (int(i) for i in twice.nonzero()[0])
        raise ValueError(f"query_rows must hold a token at most once, got token {token} twice in head {head}: drop one")


def _place(blocks: BlockList, tile: Tensor) -> str:
    _, heads, tiles = blocks.start.shape
    flat = int(tile)
    return f"batch {flat // (heads * tiles)}, head {flat // tiles % heads}, tile {flat % tiles}"


def check_query(query: Tensor, pyramid: KVPyramid) -> None:
    """Raise ValueError unless a query's shape, dtype and device fit the pyramid's."""
    key = pyramid.key
    if query.ndim != 4:
        raise ValueError(f"query must be [batch, heads, tokens, head_dim], got {query.ndim} dimensions: reshape it")
    batch, heads, _, head_dim = query.shape
    if (batch, heads, head_dim) != (key.shape[0], key.shape[1], key.shape[3]):
        raise ValueError(
            f"query must agree with the pyramid's batch, heads and head_dim "
            f"{(key.shape[0], key.shape[1], key.shape[3])}, got {(batch, heads, head_dim)}: expand one of them"
        )
    if query.dtype != key.dtype or query.device != key.device:
        raise ValueError(
            f"query must have the pyramid's dtype and device ({key.dtype} on {key.device}), "
            f"got {query.dtype} on {query.device}: convert one of them"
        )
