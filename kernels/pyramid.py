"""The key/value pyramid: the tokens, and mean-pooled levels of them, addressed as one run of rows."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .pooling import pool_levels


@dataclass(frozen=True, kw_only=True)
class KVPyramid:
    """Keys and values of every level, end to end; level 0 is read from the tokens through `key_rows`.

    B batch, H heads, N tokens, D head_dim, R pyramid rows, of which the first R0 are level 0.

    key, value: [B, H, N, D], the tokens as given (any strides).
    key_rows: int32 [H|1, R0], the token that a level-0 row holds, -1 = padding.
    pooled_key, pooled_value: [B, H, R - R0, D], rows of the coarser levels end to end; may have no rows.
    log_weight: float32 [B|1, H|1, R], log of the tokens that a row stands for; -inf = unread.
    offsets: first row of each level, and R at the end; every one a multiple of `block`.
    factors: level-0 rows that one row of each level stands for; the first is 1.
    block: rows per block.
    layouts: what kernels made of the rows, kept for further calls; None = nothing is kept.
    """

    key: Tensor
    value: Tensor
    key_rows: Tensor
    pooled_key: Tensor
    pooled_value: Tensor
    log_weight: Tensor
    offsets: tuple[int, ...]
    factors: tuple[int, ...]
    block: int
    # Not handed on by `dataclasses.replace`: other rows have other layouts.
    layouts: dict[Any, Any] | None = field(default=None, init=False, compare=False, repr=False)

    def keep_layouts(self) -> KVPyramid:
        """Have kernels keep what they lay out, for many lists over the same rows: up to another K and V in memory.

        The pyramid's tensors must stay as they are from the first call on.
        """
        object.__setattr__(self, "layouts", {})
        return self

    @property
    def rows(self) -> int:
        """All rows of all levels, padding included (R)."""
        return self.offsets[-1]

    @property
    def levels(self) -> int:
        return len(self.factors)

    @property
    def blocks(self) -> int:
        """All blocks of all levels; a block index is row offset // block, over one index space."""
        return self.rows // self.block

    def blocks_at(self, level: int) -> range:
        """The block indices of one level."""
        return range(self.offsets[level] // self.block, self.offsets[level + 1] // self.block)


def level_offsets(level_rows: int, factors: tuple[int, ...], block: int) -> tuple[int, ...]:
    """First row of each level and the end, for `level_rows` rows at level 0, each level padded to whole blocks."""
    sizes = (block * math.ceil(level_rows / factor / block) for factor in factors)
    return (0, *itertools.accumulate(sizes))


def identity_key_rows(tokens: int, block: int) -> Tensor:
    """The row map that leaves `tokens` tokens in order: int32 [1, R0], padded with -1 to whole blocks."""
    return padded_range(tokens, block).view(1, -1)


def padded_range(tokens: int, multiple: int, size: int | None = None, device: torch.device | None = None) -> Tensor:
    """0, 1, … tokens - 1 as int32, then -1 up to the next multiple, or up to `size`."""
    size = multiple * math.ceil(tokens / multiple) if size is None else size
    rows = torch.full((size,), -1, dtype=torch.int32, device=device)
    rows[:tokens] = torch.arange(tokens, dtype=torch.int32, device=device)
    return rows


def build_pyramid(
    key: Tensor,
    value: Tensor,
    key_rows: Tensor | None = None,
    *,
    block: int = 64,
    factors: tuple[int, ...] = (1,),
    key_log_weight: Tensor | None = None,
    memo: dict[str, Any] | None = None,
) -> KVPyramid:
    """Lay out keys and values in row order and mean-pool them into coarser levels; differentiable in key and value.

    A pooled row is the mean over the live level-0 rows it covers, weighted by what they stand for, and weighs their
    sum (log 2, 4, 8 in PSA, arXiv 2512.04025; l · log 16 in LLSA, arXiv 2512.16615). A row over no live row is unread.

    key, value: [B, H, N, D], one floating dtype.
    key_rows: int [H|1, R0], R0 a multiple of `block`, -1 = padding; None = tokens in order, padded.
    block: rows per block, positive.
    factors: strictly increasing, the first 1; level i has ceil(R0 / factors[i]) rows, padded to whole blocks.
    key_log_weight: [B|1, H|1, N], added to the level-0 log-weights; -inf masks a key. No gradient flows to it.
    memo: given with the same key_rows, block and factors again, what follows from these alone is not made twice.

    Raises ValueError for shapes, dtypes or factors that do not fit.
    """
    _check(key, value, block, factors)
    batch, heads, tokens, head_dim = key.shape
    key_rows = identity_key_rows(tokens, block).to(key.device) if key_rows is None else key_rows.to(torch.int32)
    if key_rows.ndim != 2 or key_rows.shape[0] not in (1, heads) or key_rows.shape[1] % block:
        raise ValueError(
            f"key_rows must be [1 or {heads}, a multiple of block {block}], got {tuple(key_rows.shape)}: pad it with -1"
        )
    memo = {} if memo is None or key_log_weight is not None else memo
    known = "weight" in memo
    if not known and key_rows.numel() and (int(key_rows.min()) < -1 or int(key_rows.max()) >= tokens):
        raise ValueError(
            f"key_rows must lie in -1 … {tokens - 1}, got {int(key_rows.min())} … {int(key_rows.max())}: "
            "use -1 for padding"
        )
    log_weight = memo["weight"] = memo["weight"] if known else _row_log_weight(key_rows, key_log_weight, key)
    level_rows = key_rows.shape[1]
    offsets = level_offsets(level_rows, factors, block)
    pooled_key = pooled_value = key.new_zeros(batch, heads, 0, head_dim)
    if len(factors) > 1:
        sizes = [end - begin for begin, end in itertools.pairwise(offsets)][1:]
        pooled_key, pooled_value, weight = pool_levels(key, value, key_rows, log_weight, factors[1:], sizes, memo)
        log_weight = torch.cat([log_weight, weight], 2)
    return KVPyramid(
        key=key,
        value=value,
        key_rows=key_rows,
        pooled_key=pooled_key,
        pooled_value=pooled_value,
        log_weight=log_weight,
        offsets=offsets,
        factors=tuple(factors),
        block=block,
    )


def _check(key: Tensor, value: Tensor, block: int, factors: tuple[int, ...]) -> None:
    if key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            f"key and value must both be [batch, heads, tokens, head_dim], got {tuple(key.shape)} "
            f"and {tuple(value.shape)}: give them the same four dimensions"
        )
    if key.dtype != value.dtype or not key.is_floating_point() or key.device != value.device:
        raise ValueError(
            f"key and value must share one floating dtype and device, got {key.dtype} on {key.device} "
            f"and {value.dtype} on {value.device}: convert one of them"
        )
    if block < 1:
        raise ValueError(f"block must be positive, got {block}: use 16, 32, 64 or 128")
    if not factors or factors[0] != 1 or any(b <= a for a, b in itertools.pairwise(factors)):
        raise ValueError(f"factors must start with 1 and increase, got {tuple(factors)}: for example (1, 16)")


def _row_log_weight(key_rows: Tensor, key_log_weight: Tensor | None, key: Tensor) -> Tensor:
    batch, heads, tokens, _ = key.shape
    weight = torch.zeros(key_rows.shape, device=key.device).masked_fill(key_rows < 0, -math.inf)[None]
    if key_log_weight is None:
        return weight
    shape = tuple(key_log_weight.shape)
    if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2] != tokens:
        raise ValueError(
            f"key_log_weight must be [1 or {batch}, 1 or {heads}, {tokens}], got {shape}: give one value per key"
        )
    given = key_log_weight.detach().to(torch.float32)
    if bool(torch.isnan(given).any()) or bool((given == math.inf).any()):
        raise ValueError("key_log_weight must be finite or -inf, got NaN or +inf: mask a key with -inf")
    given = given.expand(-1, max(shape[1], key_rows.shape[0]), -1)
    if tokens == 0:
        return weight
    index = key_rows.clamp(min=0).long().expand(given.shape[1], -1)[None].expand(given.shape[0], -1, -1)
    return weight + given.gather(2, index)
