"""The key/value pyramid: the tokens, and mean-pooled levels of them, addressed as one run of rows."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor


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


def gather_rows(tokens: Tensor, rows: Tensor, live: Tensor | None = None) -> Tensor:
    """Token vectors in row order: tokens [B, H, N, D] and rows int [H|1, R] give [B, H, R, D], zeros where padding.

    live: bool [B|1, H|1, R], rows to zero as well where false; zeroed by `where`, so that NaN does not pass.
    """
    index = rows.clamp(min=0).long()
    if rows.shape[0] == 1:
        gathered = tokens.index_select(2, index[0]) if tokens.shape[2] else tokens.new_zeros(_shape(tokens, rows))
    else:
        index = index[None, :, :, None].expand(tokens.shape[0], -1, -1, tokens.shape[3])
        gathered = tokens.gather(2, index) if tokens.shape[2] else tokens.new_zeros(_shape(tokens, rows))
    keep = (rows >= 0)[None] if live is None else (rows >= 0)[None] & live
    return gathered if bool(keep.all()) else torch.where(keep[..., None], gathered, 0)


def build_pyramid(
    key: Tensor,
    value: Tensor,
    key_rows: Tensor | None = None,
    *,
    block: int = 64,
    factors: tuple[int, ...] = (1,),
    key_log_weight: Tensor | None = None,
) -> KVPyramid:
    """Lay out keys and values in row order and mean-pool them into coarser levels; differentiable in key and value.

    A pooled row is the mean over the live level-0 rows it covers, weighted by what they stand for, and weighs their
    sum (log 2, 4, 8 in PSA, arXiv 2512.04025; l · log 16 in LLSA, arXiv 2512.16615). A row over no live row is unread.

    key, value: [B, H, N, D], one floating dtype.
    key_rows: int [H|1, R0], R0 a multiple of `block`, -1 = padding; None = tokens in order, padded.
    block: rows per block, positive.
    factors: strictly increasing, the first 1; level i has ceil(R0 / factors[i]) rows, padded to whole blocks.
    key_log_weight: [B|1, H|1, N], added to the level-0 log-weights; -inf masks a key. No gradient flows to it.

    Raises ValueError for shapes, dtypes or factors that do not fit.
    """
    _check(key, value, block, factors)
    batch, heads, tokens, head_dim = key.shape
    key_rows = identity_key_rows(tokens, block).to(key.device) if key_rows is None else key_rows.to(torch.int32)
    if key_rows.ndim != 2 or key_rows.shape[0] not in (1, heads) or key_rows.shape[1] % block:
        raise ValueError(
            f"key_rows must be [1 or {heads}, a multiple of block {block}], got {tuple(key_rows.shape)}: pad it with -1"
        )
    if key_rows.numel() and (int(key_rows.min()) < -1 or int(key_rows.max()) >= tokens):
        raise ValueError(
            f"key_rows must lie in -1 … {tokens - 1}, got {int(key_rows.min())} … {int(key_rows.max())}: "
            "use -1 for padding"
        )
    log_weight = _row_log_weight(key_rows, key_log_weight, key)
    level_rows = key_rows.shape[1]
    offsets = level_offsets(level_rows, factors, block)
    pooled_key = pooled_value = key.new_zeros(batch, heads, 0, head_dim)
    if len(factors) > 1:
        live = log_weight > -math.inf
        sources = gather_rows(key, key_rows, live), gather_rows(value, key_rows, live)
        sizes = [end - begin for begin, end in itertools.pairwise(offsets)][1:]
        # From the coarsest finer level that it is a multiple of: that has the fewest rows to read.
        wide = torch.float64 if key.dtype == torch.float64 else torch.float32
        levels = {1: (sources, log_weight)}
        for factor, size in zip(factors[1:], sizes, strict=True):
            finer = max(other for other in levels if factor % other == 0)
            live = math.ceil(level_rows / factor)
            levels[factor] = _pool(*levels[finer], factor // finer, live, size, wide)
        pooled = [levels[factor] for factor in factors[1:]]
        pooled_key, pooled_value = (
            torch.cat([means[which].to(key.dtype) for means, _ in pooled], 2) for which in range(2)
        )
        log_weight = torch.cat([log_weight, *(weight for _, weight in pooled)], 2)
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


def _pool(
    sources: tuple[Tensor, Tensor], log_weight: Tensor, factor: int, count: int, size: int, wide: torch.dtype
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """One coarser level: weighted means, in `wide`, of `factor` rows each, and their summed weights.

    Of its `size` rows the first `count` are over any rows at all; the others are padding.
    """
    # Negative where the finer level has more padding than this one needs.
    missing = count * factor - log_weight.shape[2]
    pad = torch.nn.functional.pad
    grouped = pad(log_weight, (0, missing), value=-math.inf).unflatten(2, (count, factor))
    summed = torch.logsumexp(grouped, -1)
    # Rows over nothing: shares of 0 instead of -inf - -inf.
    share = torch.where(summed[..., None] > -math.inf, (grouped - summed[..., None]).exp(), 0).to(wide)
    means = []
    for source in sources:
        rows = (pad(source, (0, 0, 0, missing)) if missing else source).unflatten(2, (count, factor)).to(wide)
        # A product writes nothing but the means; over few rows each, its loop costs more than adding them one by one.
        if factor >= 8:
            mean = (share[..., None, :] @ rows)[..., 0, :]
        else:
            mean = rows[..., 0, :] * share[..., 0, None]
            for row in range(1, factor):
                mean = torch.addcmul(mean, rows[..., row, :], share[..., row, None])
        means.append(pad(mean, (0, 0, 0, size - count)))
    return (means[0], means[1]), pad(summed, (0, size - count), value=-math.inf)


def _shape(tokens: Tensor, rows: Tensor) -> tuple[int, int, int, int]:
    return tokens.shape[0], tokens.shape[1], rows.shape[1], tokens.shape[3]
