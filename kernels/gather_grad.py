"""The torch backend's backward: recomputes each chunk's scores and walks them once more."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .chunks import Gathered
from .pyramid import KVPyramid
from .tables import Group, Rows, add_to_tokens, row_weight
from .walk import Walk

# log2 of sums beyond which scores are shifted before exp2, so that dO ÷ sum stays far from float32's ends.
UNSHIFTED_POWER = 40.0


def backward_group(
    walk: Walk, out: Tensor, grad_out: Tensor, powers: Tensor, results: list[Tensor], group: Group
) -> None:
    """Add one group's gradients to `results`: of query, key, value, pooled key and pooled value, [B, H, …] views.

    out, grad_out: [rows, D] packed like the queries. powers: [rows, 1], log2 of the softmax's sums, -inf where empty.

    With P = exp2(logits) unnormalised and g = dO ÷ sum: dV = Pᵀ g, dS = P ∘ (g Vᵀ - Σ g ∘ O), dQ = dS K, dK = dSᵀ Q.
    The subtraction rides in the product as columns of V, so that scores are passed over twice: exp2 and ∘.
    """
    query, rows = walk.query, walk.rows
    wide = powers.dtype
    size, count, head_dim = rows.key.shape
    block = walk.pyramid.block
    grads, shift = _scaled(out, grad_out, powers, query.dtype)
    value = _with_ones(rows, walk.folded, grads.shape[1] - head_dim)
    grad_query = query.new_zeros(query.shape)
    key_sum, value_sum = (query.new_zeros(size, count, head_dim, dtype=wide) for _ in range(2))
    for chunk in itertools.chain(walk.dense(value), walk.gathered(value)):
        power = chunk.logits
        tiles, tall, _ = power.shape
        if shift is not None:
            power -= shift[chunk.part].view(tiles, tall, 1)
        power.exp2_()
        grad = grads[chunk.part].view(tiles, tall, -1)
        grad_value = torch.bmm(power.mT, grad[..., :head_dim])
        change = torch.bmm(grad, chunk.values.mT, out=walk.scratch.take("change", *power.shape))
        change *= power
        torch.bmm(change, chunk.keys, out=grad_query[chunk.part].view(tiles, tall, head_dim))
        grad_key = torch.bmm(change.mT, chunk.query)
        if isinstance(chunk.source, Gathered):
            if chunk.source.hidden is not None:
                front = chunk.source.hidden.shape[1]
                grad_value[:, :front].masked_fill_(chunk.source.hidden, 0)
            for table, part in ((key_sum, grad_key), (value_sum, grad_value)):
                table.view(-1, block * head_dim).index_add_(
                    0, chunk.source.index, part.to(wide).view(-1, block * head_dim)
                )
        else:
            key_sum[chunk.source, : grad_key.shape[1]] += grad_key
            value_sum[chunk.source, : grad_value.shape[1]] += grad_value

    walk.plan.unpack(grad_query.to(wide) * walk.scale, results[0], 0.0)
    key_sum *= walk.scale
    weight = row_weight(rows, walk.folded)
    if weight is not None:
        value_sum *= weight
    unread = None if rows.live is None else ~rows.live[..., 0]
    add_to_results(key_sum, value_sum, unread, walk.pyramid, results[1:], group)


def add_to_results(
    key_sum: Tensor, value_sum: Tensor, unread: Tensor | None, pyramid: KVPyramid, results: list[Tensor], group: Group
) -> None:
    """Add gradients of pyramid rows [G, R, D], but for the `unread` [G, R], to those of key, value and the pooled."""
    level = pyramid.offsets[1]
    for tokens, pooled, table in ((results[0], results[2], key_sum), (results[1], results[3], value_sum)):
        by_head = table if unread is None else table.masked_fill(unread[..., None], 0)
        by_head = by_head.unflatten(0, (len(group[0]), len(group[1])))
        add_to_tokens(by_head[:, :, :level], pyramid.key_rows, group[1], tokens)
        pooled += by_head[:, :, level:]


def _scaled(out: Tensor, grad_out: Tensor, powers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """[g, -Σ g ∘ O] as columns, g = dO ÷ sum, and the logits' shift, which goes into g where it is not whole.

    In bfloat16 the sum takes two columns, its rounded value and the rest: in one, its rounding would not cancel.
    """
    powers = torch.where(powers == -torch.inf, torch.inf, powers)
    finite = torch.where(powers.isfinite(), powers, 0)
    shift = None
    if finite.numel() and float(finite.abs().amax()) > UNSHIFTED_POWER:
        shift = finite.round().to(dtype)
    scaled = (grad_out.to(powers.dtype) * ((0 if shift is None else shift) - powers).exp2()).to(dtype)
    delta = -(scaled.to(powers.dtype) * out.to(powers.dtype)).sum(-1, keepdim=True)
    first = delta.to(dtype)
    columns = [scaled, first]
    if dtype.itemsize < 4:
        columns.append((delta - first).to(dtype))
    return torch.cat(columns, 1), shift


def _with_ones(rows: Rows, folded: bool, columns: int) -> Tensor:
    """Values, weighted if folded, and their weight in further columns: [G, R, D + columns]."""
    weight = row_weight(rows, folded)
    ones = torch.ones_like(rows.value[..., :1]) if weight is None else weight.to(rows.value.dtype)
    value = rows.value if weight is None else rows.value * weight
    return torch.cat([value.to(rows.value.dtype), ones.expand(-1, -1, columns)], 2)
