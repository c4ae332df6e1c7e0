"""A pyramid's coarser levels by the C++ kernel: each key and value is read once for all of them, where it stands."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import native_build

MOST_FACTOR = 256
TENSORS = ("key", "value")
POINTERS = (*TENSORS, "key_rows", "shares", "factors", "begins", "pooled_key", "pooled_value")


class Pool(ctypes.Structure):
    """`struct Pool` of native_pool.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "head_dim", "rows", "levels", "chunk", "pooled_rows")),
        ("threads", ctypes.c_int64),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in (*TENSORS, "share")),
        ("key_rows_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in POINTERS),
    )


def takes(key: Tensor, value: Tensor) -> bool:
    """Can the kernel pool these keys and values? It has no gradient."""
    # What the kernel is built with decides, not which dtype's products are faster.
    known = key.dtype == torch.float32 or (key.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())
    graded = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    return known and not graded and native_build.lacking(torch.float32, key.device) is None


def together(factors: Sequence[int]) -> list[int]:
    """Of a pyramid's coarser factors those that one pass makes: up to 256, and divisors of the largest such."""
    small = [factor for factor in factors if factor <= MOST_FACTOR]
    return [factor for factor in small if small[-1] % factor == 0]


def pool(
    key: Tensor, value: Tensor, key_rows: Tensor, factors: Sequence[int], shares: Tensor, sizes: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """The means of every `factor` rows, for each factor: two lists of [B, H, size, D] in the dtype of key.

    key, value: [B, H, N, D]. key_rows: int32 [H|1, R]. factors: as `together` gives them. shares: float32
    [levels, B|1, H|1, R], how much of its mean each row makes at each level; rows of share 0 are not looked at.
    sizes: rows of each level, zeros behind the last mean.
    """
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, heads, _, head_dim = key.shape
    rows = key_rows.shape[1]
    held = {"key": key, "value": value, "key_rows": key_rows.contiguous(), "shares": shares.contiguous()}
    held |= {f"pooled_{name}": key.new_empty(batch, heads, sum(sizes), head_dim) for name in TENSORS}
    begins = [sum(sizes[:level]) for level in range(len(sizes))]
    held |= {"factors": torch.tensor(factors), "begins": torch.tensor(begins)}
    call = Pool(
        **{"batch": batch, "heads": heads, "head_dim": head_dim, "rows": rows, "levels": len(factors)},
        **{"chunk": factors[-1], "pooled_rows": sum(sizes), "threads": torch.get_num_threads()},
        **{f"{name}_stride": tuple(held[name].stride()[:3]) for name in TENSORS},
        share_stride=tuple(0 if shares.shape[i] == 1 else held["shares"].stride(i) for i in range(3)),
        key_rows_stride=0 if len(key_rows) == 1 else rows,
        **{name: held[name].data_ptr() for name in POINTERS},
    )
    library = native_build.library()
    run = library.pool_bfloat16 if key.dtype == torch.bfloat16 else library.pool_float32
    run(ctypes.byref(call))
    parts = [list(held[f"pooled_{name}"].split(list(sizes), 2)) for name in TENSORS]
    for levels in parts:
        for factor, level in zip(factors, levels, strict=True):
            level[:, :, -(-rows // factor) :] = 0
    return parts[0], parts[1]
