"""Pyramid rows of a group of heads laid out for the torch backend: contiguous, in compute dtype, unread rows zero."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .pyramid import KVPyramid, padded_range

Group = tuple[range, range]
"""Batch entries and heads that are computed together."""

# Rows laid out at a time: beyond it heads follow one another, so that long sequences need no second copy of K and V.
TABLE_BYTES = 28 << 20
# Products of bfloat16 come out rounded to 8 bits; the softmax's sum is had from this many columns of the value product,
# each holding every 16th row's weight, so that their roundings average out (and 16 more columns cost no time).
SUM_COLUMNS = 16


@dataclass(frozen=True)
class Rows:
    """G = group's batch entries · heads, R pyramid rows, D head_dim.

    key, value: [G, R, D]. log_weight: float32 [G, R]. live: bool [G, R, 1], or None if all are.
    plain: true if every log-weight is zero.
    """

    key: Tensor
    value: Tensor
    log_weight: Tensor
    live: Tensor | None
    plain: bool


def groups(batch: int, heads: int, head_bytes: int) -> Iterator[Group]:
    """Cut batch × heads into groups whose tables fit: whole batch entries, or heads of one of them."""
    if head_bytes * heads <= TABLE_BYTES:
        step = max(1, TABLE_BYTES // max(1, head_bytes * heads))
        for begin in range(0, batch, step):
            yield range(begin, min(batch, begin + step)), range(heads)
        return
    # As few groups as fit, and those of like size: a small last one would leave threads idle.
    step = -(-heads // -(-heads // max(1, TABLE_BYTES // head_bytes)))
    for entry in range(batch):
        for begin in range(0, heads, step):
            yield range(entry, entry + 1), range(begin, min(heads, begin + step))


def of_group(tensor: Tensor, group: Group) -> Tensor:
    """The group's part of a [B|1, H|1, …] tensor, broadcast dimensions kept."""
    batches, heads = group
    if tensor.shape[0] > 1:
        tensor = tensor[batches.start : batches.stop]
    return tensor[:, heads.start : heads.stop] if tensor.shape[1] > 1 else tensor


def lay_rows(pyramid: KVPyramid, tensors: tuple[Tensor, ...], group: Group, dtype: torch.dtype) -> Rows:
    """The group's rows. tensors: key, value, pooled_key, pooled_value, [B, H, …] each."""
    key, value, pooled_key, pooled_value = tensors
    size = len(group[0]) * len(group[1])
    log_weight = (
        of_group(pyramid.log_weight, group).expand(len(group[0]), len(group[1]), -1).reshape(size, -1).contiguous()
    )
    live = (log_weight > -math.inf)[..., None]
    everything = bool(live.all())
    tables = []
    for tokens, pooled in ((key, pooled_key), (value, pooled_value)):
        own = of_group(tokens, group)
        if everything and own.is_contiguous() and own.dtype == dtype and is_whole(pyramid):
            tables.append(own.view(size, pyramid.rows, -1))
            continue
        table = tokens.new_empty(size, pyramid.rows, tokens.shape[3], dtype=dtype)
        level = pyramid.offsets[1]
        view = table.view(len(group[0]), len(group[1]), pyramid.rows, -1)
        _lay(view[:, :, :level], own, pyramid.key_rows, group[1])
        view[:, :, level:] = of_group(pooled, group)
        tables.append(table if everything else table.masked_fill_(~live, 0))
    plain = everything and not bool(log_weight.any())
    return Rows(tables[0], tables[1], log_weight, None if everything else live, plain)


def _lay(target: Tensor, tokens: Tensor, rows: Tensor, heads: range) -> None:
    """Write tokens [B, H, N, D] into target [B, H, R, D] by a row map [H|1, R]; the caller zeroes padding."""
    count = tokens.shape[2]
    if is_identity(rows, count):
        target[:, :, :count] = tokens
        target[:, :, count:] = 0
    elif count and rows.shape[0] == 1:
        target.copy_(tokens.index_select(2, rows[0].clamp(min=0)))
    elif count:
        index = rows[heads.start : heads.stop].clamp(min=0).long()
        target.copy_(tokens.gather(2, index[None, :, :, None].expand(*target.shape)))


def is_whole(pyramid: KVPyramid) -> bool:
    """Are the pyramid's rows its tokens in order, and nothing else?"""
    return pyramid.rows == pyramid.key.shape[2] and is_identity(pyramid.key_rows, pyramid.rows)


def is_identity(rows: Tensor, count: int) -> bool:
    """Does a row map leave `count` tokens in order, padding at the end?"""
    size = rows.shape[-1]
    return rows.shape[0] == 1 and size >= count and torch.equal(rows[0], padded_range(count, 1, size, rows.device))


def add_to_tokens(grad: Tensor, rows: Tensor, heads: range, tokens: Tensor) -> None:
    """Add row gradients [B, H, R, D] to token gradients [B, H, N, D] (in place) by a row map [H|1, R]."""
    count = tokens.shape[2]
    if is_identity(rows, count):
        tokens += grad[:, :, :count]
        return
    if rows.shape[0] > 1:
        rows = rows[heads.start : heads.stop]
    # Padding rows carry no gradient, and may point anywhere.
    index = rows.clamp(min=0).long()[None, :, :, None].expand(*grad.shape)
    if count:
        tokens.scatter_add_(2, index, grad.to(tokens.dtype))


def with_sum_columns(rows: Rows, folded: bool) -> Tensor:
    """Values with the weights in further columns, [G, R, D + SUM_COLUMNS], so that one product gives output and sum.

    folded: rows weigh exp(log_weight) in both, which spares adding it to the scores; otherwise 1, or 0 where unread.
    """
    size, count, head_dim = rows.value.shape
    table = rows.value.new_zeros(size, count, head_dim + SUM_COLUMNS)
    weight = row_weight(rows, folded)
    table[..., :head_dim] = rows.value if weight is None or not folded else rows.value * weight
    row = torch.arange(count, device=table.device)
    column = head_dim + row % SUM_COLUMNS
    table[:, row, column] = rows.value.new_ones(()) if weight is None else weight[..., 0].to(table.dtype)
    return table


def row_weight(rows: Rows, folded: bool) -> Tensor | None:
    """[G, R, 1] float32 weights to multiply with, or None if all are 1."""
    if rows.plain:
        return None
    if folded:
        return rows.log_weight.exp()[..., None]
    return None if rows.live is None else rows.live.float()


def power_bound(query: Tensor, rows: Rows, scale: float) -> float:
    """An upper bound on |log2| of a weighted exponential, by Cauchy–Schwarz; inf or NaN if there is none."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    longest = [
        float(tensor.square().sum(-1).amax().to(wide)) if tensor.numel() else 0.0 for tensor in (query, rows.key)
    ]
    # 5 % for the squares' rounding in bfloat16.
    logits = 1.05 * abs(scale) * math.sqrt(longest[0] * longest[1])
    weights = 0.0
    if not rows.plain:
        finite = rows.log_weight if rows.live is None else rows.log_weight.masked_fill(~rows.live[..., 0], 0)
        weights = float(finite.abs().amax()) if finite.numel() else 0.0
    return (logits + weights) / math.log(2)
