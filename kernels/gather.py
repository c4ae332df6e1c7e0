"""The torch backend: gathers the blocks of a few query tiles and attends to them in cache.

On CPUs with AVX2 or AVX-512 and a C++ compiler all of it is done by kernels of our own, but for bfloat16 where the chip
has AMX. Otherwise tiles that read all of level 0, and in bfloat16 with AMX every tile, go to PyTorch's fused kernel,
and elsewhere to batched products around an exponential.

Passes over the scores are what costs at small head_dim, so that in bfloat16 there is one: exp2, in place. The scale
sits in the first product; log-weights are folded into the values, and into columns that give the softmax's sum with
the second product; the maximum is subtracted only where Cauchy–Schwarz cannot rule out an overflow; and the output is
divided by the sum, not the scores. float32 and float64, whose products are dearer and whose sums are cheap, add
log-weights to the scores and sum them instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import native, native_build
from .blocklist import BlockList
from .chip import has_amx, has_bfloat16
from .chunks import Budget, ChunkPlan, plan_chunks
from .fused import flash, gathered_tiles
from .gather_grad import add_to_results, backward_group
from .pyramid import KVPyramid
from .tables import Group, Rows, groups, lay_rows, of_group, power_bound, with_sum_columns
from .walk import Walk

# Powers of two in which exp2(logits) may lie without a shift: their sums and products stay inside float32's range.
SAFE_POWER = 100.0


def attend(
    query: Tensor, pyramid: KVPyramid, blocks: BlockList, *, scale: float, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `kernels.attend.attend`; computes in the dtype that `products_in` tells."""
    compute_dtype = products_in(compute_dtype)
    tensors = (query, pyramid.key, pyramid.value, pyramid.pooled_key, pyramid.pooled_value)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Attend.apply(*tensors, pyramid, blocks, scale, compute_dtype)  # pyright: ignore[reportReturnType]
    return _forward(tensors, pyramid, blocks, scale, compute_dtype)


def products_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products for `dtype` are computed on this machine.

    float16's range is too small for unshifted exponentials; bfloat16 on a CPU without bfloat16 products is slower than
    float32, and no less exact for being computed in it.
    """
    return torch.float32 if dtype == torch.float16 or (dtype == torch.bfloat16 and not has_bfloat16()) else dtype


def in_cpp(query: Tensor, dtype: torch.dtype) -> bool:
    """Do products in `dtype` go to the C++ kernels? Not in graphs that are compiled around `attend`."""
    if torch.compiler.is_compiling():
        return False
    fits = query.shape[3] <= native.MOST_HEAD_DIM and query.dtype != torch.float64
    return fits and native_build.lacking(dtype, query.device) is None


class _Attend(torch.autograd.Function):
    """Keeps inputs, output and lse, nothing of the scores; the backward recomputes them chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        tensors, rest = arguments[:5], arguments[5:]
        out, lse = _forward(tensors, *rest)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.rest = rest
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("the torch backend has no second derivative: use backend='reference'")
        *tensors, out, lse = ctx.saved_tensors
        pyramid, blocks, scale, compute_dtype = ctx.rest
        results = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
        if in_cpp(tensors[0], compute_dtype):
            _backward_in_cpp(tuple(tensors), ctx.rest, (out, grads[0], lse), results)
            return _wanted(results, ctx.needs_input_grad)
        for group, rows, plan in _by_group(tuple(tensors), pyramid, blocks, compute_dtype, False, backward=True):
            packed = [plan.pack(of_group(tensor, group), compute_dtype) for tensor in (tensors[0], out, grads[0])]
            powers = plan.pack(of_group(lse, group)[..., None], lse.dtype) / math.log(2)
            # Weights fold only where rows of weight 0, whose logits are 0, stay finite beside sums this far from 1.
            extent = float(powers.masked_fill(powers == -math.inf, 0).abs().amax()) if powers.numel() else 0.0
            folded = compute_dtype.itemsize < 4 and extent <= SAFE_POWER
            walk = Walk(packed[0], rows, plan, pyramid, scale, folded)
            backward_group(walk, packed[1], packed[2], powers, [of_group(result, group) for result in results], group)
        return _wanted(results, ctx.needs_input_grad)


def _wanted(results: list[Tensor], needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return (*(result if need else None for result, need in zip(results, needed, strict=False)), None, None, None, None)


def _backward_in_cpp(
    tensors: tuple[Tensor, ...],
    rest: tuple[KVPyramid, BlockList, float, torch.dtype],
    forward: tuple[Tensor, Tensor, Tensor],
    results: list[Tensor],
) -> None:
    """Write the gradients of query, key, value, pooled key and pooled value, [B, H, …], which hold zeros.

    rest: pyramid, list, scale and compute dtype. forward: output, its gradient, lse.
    """
    pyramid, _, _, dtype = rest
    query = results[0]
    wide = query if query.dtype in (dtype, torch.float32) else torch.zeros_like(query, dtype=dtype)
    for group, keys, values in native.backward(tensors, *rest, forward, wide):
        unread = of_group(pyramid.log_weight, group).expand(len(group[0]), len(group[1]), -1).flatten(0, 1) == -math.inf
        add_to_results(keys, values, unread, pyramid, [of_group(result, group) for result in results[1:]], group)
    if wide is not query:
        query.copy_(wide)


def _by_group(
    tensors: tuple[Tensor, ...],
    pyramid: KVPyramid,
    blocks: BlockList,
    dtype: torch.dtype,
    fused: bool,
    *,
    backward: bool = False,
) -> Iterator[tuple[Group, Rows, ChunkPlan]]:
    """Batch entries and heads that are computed together, their rows and the order of their tiles."""
    query, *sources = tensors
    batch, heads, tokens, head_dim = query.shape
    if fused:
        budget = Budget.for_rows(blocks.tile, blocks.block, head_dim, dtype.itemsize)
    else:
        budget = Budget.for_scores(blocks.tile, blocks.block, dtype.itemsize)
    # Keys and values; a backward also holds values with their weights, both sums in float32, and what is packed.
    row_bytes, query_bytes = (4 * dtype.itemsize + 8, 5 * dtype.itemsize + 8) if backward else (2 * dtype.itemsize, 0)
    head_bytes = head_dim * (pyramid.rows * row_bytes + tokens * query_bytes)
    for group in groups(batch, heads, max(1, head_bytes)):
        plan = plan_chunks(blocks, group, (batch, heads), tokens, pyramid, budget)
        yield group, lay_rows(pyramid, tuple(sources), group, dtype), plan


def _forward(
    tensors: tuple[Tensor, ...], pyramid: KVPyramid, blocks: BlockList, scale: float, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Output and lse in token order; `tensors` are query and the pyramid's four, detached from autograd."""
    query = tensors[0]
    fused = compute_dtype == torch.bfloat16 and query.device.type == "cpu" and has_amx()
    with torch.no_grad():
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = out.new_empty(query.shape[:3], dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
        if in_cpp(query, compute_dtype):
            # float16 and bfloat16 that are computed in float32 are written in it, and rounded once.
            wide = out if query.dtype in (compute_dtype, torch.float32) else torch.empty_like(out, dtype=compute_dtype)
            native.attend(tensors, pyramid, blocks, scale, compute_dtype, wide, lse)
            return (out if wide is out else wide.to(query.dtype)), lse
        for group, rows, plan in _by_group(tensors, pyramid, blocks, compute_dtype, fused):
            packed = plan.pack(of_group(query, group), compute_dtype)
            result, sums = _forward_group(packed, rows, plan, pyramid, scale, fused)
            plan.unpack(result, of_group(out, group), 0.0)
            plan.unpack(sums[:, None], of_group(lse, group)[..., None], -math.inf)
    return out, lse


def _forward_group(
    query: Tensor, rows: Rows, plan: ChunkPlan, pyramid: KVPyramid, scale: float, fused: bool
) -> tuple[Tensor, Tensor]:
    """The packed queries' outputs [rows, D] and lse [rows], the latter in float32 or float64."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    result = torch.empty_like(query)
    lse = query.new_empty(query.shape[0], dtype=wide)
    for run in plan.dense:
        part = slice(run.begin * plan.tile, run.end * plan.tile)
        _dense_run(query[part], rows, slice(run.first, run.last), pyramid.offsets[1], scale, result[part], lse[part])
    if plan.gathered and fused:
        gathered_tiles(query, rows, plan, pyramid, scale, result, lse)
    elif plan.gathered:
        part = slice(plan.gathered[0].begin * plan.tile, None)
        _gathered_tiles(query, rows, plan, pyramid, scale, result[part], lse[part])
    return result, lse


def _dense_run(query: Tensor, rows: Rows, heads: slice, level: int, scale: float, result: Tensor, lse: Tensor) -> None:
    """Tiles that read all of level 0."""
    key, value = (table[heads, None, :level] for table in (rows.key, rows.value))
    bias = None if rows.plain else rows.log_weight[heads, None, None, :level].to(lse.dtype)
    out, sums = flash(query.view(len(key), 1, -1, query.shape[1]), key, value, bias, scale)
    result.copy_(out.reshape(result.shape))
    lse.copy_(sums.reshape(lse.shape))


def _gathered_tiles(
    query: Tensor,
    rows: Rows,
    plan: ChunkPlan,
    pyramid: KVPyramid,
    scale: float,
    result: Tensor,
    lse: Tensor,
) -> None:
    """Tiles that read listed blocks: product, exp2 in place, product, and the division at the end."""
    powers = lse
    narrow, head_dim = query.dtype.itemsize < 4, query.shape[1]
    shifted = not power_bound(query, rows, scale) <= SAFE_POWER
    folded = narrow and not shifted
    value = with_sum_columns(rows, folded) if narrow else rows.value
    before = query.shape[0] - result.shape[0]
    product = result if not narrow else query.new_empty(result.shape[0], value.shape[2])
    shift = torch.zeros_like(powers) if shifted else None
    for chunk in Walk(query, rows, plan, pyramid, scale, folded).gathered(value):
        power, (count, tall, _) = chunk.logits, chunk.logits.shape
        part = slice(chunk.part.start - before, chunk.part.stop - before)
        if shift is not None:
            # Rows that read nothing have -inf here; -inf less the least number is -inf still.
            most = power.amax(-1, keepdim=True).clamp_(min=torch.finfo(power.dtype).min)
            power -= most
            shift[part].view(count, tall, 1).copy_(most)
        power.exp2_()
        torch.bmm(power, chunk.values, out=product[part].view(count, tall, -1))
        if not narrow:
            torch.sum(power, -1, out=powers[part].view(count, tall))
    if narrow:
        wide = product.to(powers.dtype)
        torch.sum(wide[:, head_dim:], -1, out=powers)
        product = wide[:, :head_dim]
    torch.div(product, torch.where(powers == 0, 1, powers)[:, None], out=result)
    powers.log2_()
    if shift is not None:
        powers += shift
    lse.mul_(math.log(2))
