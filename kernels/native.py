"""The torch backend's C++ kernels for CPUs with AVX2 or AVX-512: their arguments, forward and backward.

They read queries, keys and values through the row maps, keep scores in cache, and make no copies for a tile; the
sums are float32. Only the layout of keys and values is made anew in each call, for as many heads as fit, unless the
pyramid keeps it.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .blocklist import BlockList
from .listops import all_blocks
from .native_build import library
from .pyramid import KVPyramid
from .tables import Group, groups, of_group

LANES = 16
MOST_HEAD_DIM = 256
LAID = ("key_units", "value_units")
TENSORS = ("query", "key", "value", "pooled_key", "pooled_value")
POINTERS = (
    *(*TENSORS, "weight", "key_rows", "query_rows", "count", "masked_count", "pool", "row_masks", "start"),
    *("mask_start", "key_units", "value_units", "unit_weight", "longest", "scratch", "out", "lse"),
)


class Call(ctypes.Structure):
    """`struct Call` of native.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "tokens", "head_dim", "padded_dim", "tiles", "tile")),
        *((name, ctypes.c_int64) for name in ("block", "block_units", "blocks", "level_blocks", "threads", "wide_out")),
        ("laid", ctypes.c_int64),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in TENSORS),
        *((name, ctypes.c_int64 * 2) for name in ("weight_stride", "list_stride")),
        *((name, ctypes.c_int64) for name in ("query_rows_stride", "key_rows_stride")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in POINTERS),
    )


class Gradient(ctypes.Structure):
    """`struct Gradient` of native_grad.cpp."""

    _fields_ = (
        ("call", Call),
        ("parts", ctypes.c_int64),
        *((name, ctypes.c_int64 * 3) for name in ("result_stride", "grad_stride")),
        *((name, ctypes.c_void_p) for name in ("result", "grad", "key_columns", "key_sums", "value_sums")),
    )


def attend(
    tensors: tuple[Tensor, ...],
    pyramid: KVPyramid,
    blocks: BlockList,
    scale: float,
    dtype: torch.dtype,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Write outputs [B, H, N, D] and lse [B, H, N] in token order.

    tensors: query, key, value, pooled key, pooled value. dtype: that of products, one that nothing is `lacking` for.
    out: contiguous, `dtype` or float32. lse: contiguous, float32.
    """
    if not _every_token(blocks, lse.shape[2]):
        out.zero_()
        lse.fill_(-math.inf)
    if not out.numel():
        return
    run = library().attend_bfloat16 if dtype == torch.bfloat16 else library().attend_float32
    ready = [_ready(tensor, dtype) for tensor in tensors]
    scratch = _scratch(library().scratch_bytes, dtype, out.shape[3])
    units = _units(blocks, pyramid, out.shape[3])
    batch, heads, _ = lse.shape
    for group in groups(batch, heads, 2 * units * dtype.itemsize):
        kept = {} if pyramid.layouts is None else pyramid.layouts
        place = "native", dtype, group
        known = place in kept
        size = len(group[0]) * len(group[1])
        laid = kept[place] if known else {name: out.new_empty(size, units, dtype=dtype) for name in LAID}
        if not known:
            rows = units // _padded(out.shape[3])
            laid |= {"unit_weight": lse.new_empty(size, rows), "longest": lse.new_empty(size, 2)}
        call, held = _call(ready, pyramid, blocks, scale, group, {**laid, "scratch": scratch, "out": out, "lse": lse})
        call.laid = known
        run(ctypes.byref(call))
        kept[place] = laid
        # Before the next group's are made.
        del held, laid, kept


def block_mass(
    query: Tensor, pyramid: KVPyramid, lse: Tensor, query_rows: Tensor, scale: float, dtype: torch.dtype, out: Tensor
) -> None:
    """Write the masses of `mass.block_mass`, float32 [B, H, T, level-0 blocks], contiguous; lse float32, contiguous.
    dtype: that of products, one that nothing is `lacking` for."""
    if not out.numel():
        return
    run = library().mass_bfloat16 if dtype == torch.bfloat16 else library().mass_float32
    blocks = all_blocks(query_rows, pyramid.block)
    # No values are read: keys stand for them.
    keys = [_ready(tensor, dtype) for tensor in (pyramid.key, pyramid.pooled_key)]
    ready = [_ready(query, dtype), keys[0], keys[0], keys[1], keys[1]]
    scratch = _scratch(library().mass_scratch_bytes, dtype, query.shape[3])
    units = _units(blocks, pyramid, query.shape[3])
    for group in groups(query.shape[0], query.shape[1], units * dtype.itemsize):
        laid = query.new_empty(len(group[0]) * len(group[1]), units, dtype=dtype)
        more = {"key_units": laid, "value_units": laid, "scratch": scratch, "longest": lse, "out": out, "lse": lse}
        call, held = _call(ready, pyramid, blocks, scale, group, more)
        run(ctypes.byref(call))
        del held, laid, more


def backward(
    tensors: tuple[Tensor, ...],
    pyramid: KVPyramid,
    blocks: BlockList,
    scale: float,
    dtype: torch.dtype,
    forward: tuple[Tensor, Tensor, Tensor],
    grad_query: Tensor,
) -> Iterator[tuple[Group, Tensor, Tensor]]:
    """Write the query's gradient [B, H, N, D] (contiguous zeros, `dtype` or float32) and yield, for each group of
    heads, that group and the float32 gradients of its pyramid rows [G, R, D]: of keys, and of values.

    forward: output, its gradient, and lse. The same call gives the same sums, for the same number of threads.
    """
    out, grad, lse = forward
    batch, heads, _, head_dim = out.shape
    if not out.numel():
        return
    run = library().backward_bfloat16 if dtype == torch.bfloat16 else library().backward_float32
    ready, (out, grad) = [_ready(tensor, dtype) for tensor in tensors], (_ready(out, dtype), _ready(grad, dtype))
    scratch = _scratch(library().backward_scratch_bytes, dtype, head_dim)
    units, padded = _units(blocks, pyramid, head_dim), _padded(head_dim)
    for group in groups(batch, heads, units * (3 * dtype.itemsize + 8)):
        size = len(group[0]) * len(group[1])
        # As many parts a head as keep every thread busy; each has sums of its own.
        parts = torch.get_num_threads() // math.gcd(torch.get_num_threads(), size)
        names = ("key_units", "value_units", "key_columns")
        laid = {name: out.new_empty(size, units, dtype=dtype) for name in names}
        sums = [lse.new_zeros(size, parts, units) for _ in range(2)]
        call, held = _call(
            ready, pyramid, blocks, scale, group,
            {**laid, "scratch": scratch, "longest": sums[0], "out": grad_query, "lse": lse},
        )  # fmt: skip
        held |= {"result": of_group(out, group), "grad": of_group(grad, group), **laid}
        held |= {"key_sums": sums[0], "value_sums": sums[1]}
        gradient = Gradient(
            call=call,
            parts=parts,
            **{f"{name}_stride": _strides(held[name], 3) for name in ("result", "grad")},
            **{name: held[name].data_ptr() for name in ("result", "grad", "key_columns", "key_sums", "value_sums")},
        )
        run(ctypes.byref(gradient))
        # What a group needs goes before its sums are copied, and these before the next group's are made.
        del call, gradient, held, laid
        sums[0] *= scale
        keys, values = (_rows_of(sums.pop(0), pyramid, padded)[..., :head_dim] for _ in range(2))
        yield group, keys, values
        del keys, values


def _rows_of(sums: Tensor, pyramid: KVPyramid, padded: int) -> Tensor:
    """Sums [G, parts, units] as pyramid rows [G, R, padded head_dim]."""
    total = sums[:, 0] if sums.shape[1] == 1 else sums.sum(1)
    return total.view(len(sums), pyramid.blocks, -1, padded)[:, :, : pyramid.block].flatten(1, 2)


def _call(
    ready: list[Tensor],
    pyramid: KVPyramid,
    blocks: BlockList,
    scale: float,
    group: Group,
    more: dict[str, Tensor],
) -> tuple[Call, dict[str, Tensor]]:
    """The arguments for a group of heads, and the tensors whose memory they point to."""
    held = {name: of_group(tensor, group) for name, tensor in zip(TENSORS, ready, strict=True)}
    held |= more | {"out": of_group(more["out"], group), "lse": of_group(more["lse"], group)}
    held["weight"] = of_group(pyramid.log_weight, group).contiguous()
    for name in ("start", "count", "masked_count", "mask_start"):
        held[name] = of_group(getattr(blocks, name), group).contiguous()
    for name, rows in (("query_rows", blocks.query_rows), ("key_rows", pyramid.key_rows)):
        held[name] = of_group(rows[None], group)[0].contiguous()
    held |= {"pool": blocks.pool.contiguous(), "row_masks": blocks.row_masks.contiguous()}
    entries, heads, tokens, head_dim = held["query"].shape
    padded = _padded(head_dim)
    size = entries * heads
    if "unit_weight" not in held:
        held["unit_weight"] = held["lse"].new_empty(size, _units(blocks, pyramid, head_dim) // padded)
    call = Call(
        **{"batch": entries, "heads": heads, "tokens": tokens, "head_dim": head_dim, "padded_dim": padded},
        **{"tiles": blocks.tiles, "tile": blocks.tile, "block": blocks.block, "block_units": -(-blocks.block // LANES)},
        **{"blocks": pyramid.blocks, "level_blocks": len(pyramid.blocks_at(0)), "threads": torch.get_num_threads()},
        **{"wide_out": held["out"].dtype == torch.float32, "scale": scale},
        **{name: held[name].data_ptr() for name in POINTERS},
        **{f"{name}_stride": _strides(held[name], 3) for name in TENSORS},
        **{"weight_stride": _strides(held["weight"], 2), "list_stride": _strides(held["count"], 2)},
        **{f"{name}_stride": _strides(held[name], 1)[0] for name in ("query_rows", "key_rows")},
    )
    return call, held


def _padded(head_dim: int) -> int:
    return LANES * -(-head_dim // LANES)


def _units(blocks: BlockList, pyramid: KVPyramid, head_dim: int) -> int:
    """Elements of one head's keys in units of 16 rows, every block being whole units."""
    return max(1, pyramid.blocks * LANES * -(-blocks.block // LANES) * _padded(head_dim))


def _scratch(size: Any, dtype: torch.dtype, head_dim: int) -> Tensor:
    """What every thread needs for itself, from the start of a cache line on."""
    each = size(ctypes.c_int64(dtype == torch.bfloat16), ctypes.c_int64(_padded(head_dim)))
    memory = torch.empty(torch.get_num_threads() * each + 64, dtype=torch.uint8, device="cpu")
    return memory[-memory.data_ptr() % 64 :]


def _every_token(blocks: BlockList, tokens: int) -> bool:
    """Does every token stand in a tile of every head?"""
    key = ("every token", tokens)
    if key not in blocks.memo:
        blocks.memo[key] = bool(((blocks.query_rows >= 0).sum((1, 2)) == tokens).all())
    return blocks.memo[key]


def _ready(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`, with the components of a vector side by side."""
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(tensor: Tensor, count: int) -> tuple[int, ...]:
    """The first strides, 0 where a dimension is one for all."""
    return tuple(0 if tensor.shape[i] == 1 else tensor.stride(i) for i in range(count))
