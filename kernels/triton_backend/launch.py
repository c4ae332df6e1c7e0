"""Launching the kernels: which device and cut, which arguments, and what to do when a cut does not fit."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from ..gpu_targets import KERNELS, Launch, config, fit, options, padded, smaller

log = logging.getLogger(__name__)

INTERPRETED = bool(knobs.runtime.interpret)
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def check_device(device: torch.device, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
    """Raise ValueError, saying what to do, unless Triton can run on the device in these dtypes."""
    for name, given in (("query", dtype), ("compute_dtype", compute_dtype)):
        if given not in DTYPES:
            raise ValueError(
                f"{name} must be float16, bfloat16 or float32 for backend='triton', got {given}: use backend='torch'"
            )
    if INTERPRETED:
        return
    if device.type != "cuda":
        raise ValueError(
            f"backend='triton' needs tensors on a GPU, got {device.type}: use backend='torch', "
            "or run in Triton's interpreter with TRITON_INTERPRET=1"
        )
    target_of(device.index or 0)


@functools.cache
def target_of(index: int) -> str:
    """The device's name in the table of configurations. Raises ValueError for one that Triton can't compile for."""
    if INTERPRETED:
        return "cuda:80"
    with torch.cuda.device(index):
        target: Any = triton.runtime.driver.active.get_current_target()
    if target.backend == "cuda" and target.arch < 80:
        raise ValueError(
            f"backend='triton' needs compute capability 8.0 or later, got {target.arch / 10}: use backend='torch'"
        )
    return f"{target.backend}:{target.arch}"


@contextlib.contextmanager
def target_settings(target: str) -> Iterator[None]:
    """Triton's settings for a target while a kernel is compiled.

    AMD's buffer loads take their base from scalar registers. Ours follow from loaded numbers, which stand in vector
    registers, so that each load would loop over its lanes; plain loads do not.
    """
    if not target.startswith("hip"):
        yield
        return
    with knobs.amd.scope():
        knobs.amd.use_buffer_ops = False
        yield


def device_target(tensor: Tensor) -> str:
    """The name of a tensor's device in the table of configurations."""
    return target_of(tensor.device.index or 0)


def precision(dtype: torch.dtype, target: str) -> str:
    """How float32 products are made, by PyTorch's own setting; narrower dtypes have but one way."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        # Three products of tensor cores give float32's precision where plain float32 products would not use them.
        return "tf32x3" if dtype == torch.float32 and target.startswith("cuda") and not INTERPRETED else "ieee"
    return "tf32"


def run(
    kernel: str,
    function: Any,
    query: Tensor,
    tile: int,
    block: int,
    arguments: Callable[[Launch], tuple[int, tuple[Any, ...], dict[str, Any]]],
) -> None:
    """Launch a kernel in its configuration, or in the next smaller one that fits the device's shared memory.

    arguments: of a launch, the number of programs, the arguments and the constants.
    """
    assert kernel in KERNELS
    launch: Launch | None = fitting(kernel, query, tile, block)
    while launch is not None:
        programs, given, constants = arguments(launch)
        if not programs:
            return
        try:
            with target_settings(device_target(query)):
                function[(programs,)](*given, **constants, **options(device_target(query), launch))
        except triton.runtime.errors.OutOfResources as error:
            narrower = smaller(kernel, launch, block)
            log.debug("%s as %s needs too much %s, taking %s", kernel, launch, error.name, narrower)
            launch = narrower
            continue
        _fitted[_key(kernel, query, tile, block)] = launch
        return
    raise ValueError(
        f"head_dim {query.shape[-1]} with blocks of {block} rows does not fit this GPU's shared memory "
        "in any configuration: use backend='torch'"
    )


_fitted: dict[tuple[Any, ...], Launch] = {}


def _key(kernel: str, query: Tensor, tile: int, block: int) -> tuple[Any, ...]:
    return kernel, query.device.index, query.dtype, query.shape[-1], tile, block


def fitting(kernel: str, query: Tensor, tile: int, block: int) -> Launch:
    """The launch that was found to fit, or else the table's."""
    known = _fitted.get(_key(kernel, query, tile, block))
    if known is not None:
        return known
    table = config(device_target(query), query.shape[-1], block, wide=query.dtype == torch.float32)
    return fit(kernel, getattr(table, kernel), tile, block)


def rows_first(tensor: Tensor) -> Tensor:
    """The tensor itself if the vectors of its tokens are contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """The first three strides of each."""
    return tuple(step for tensor in tensors for step in tensor.stride()[:3])


def broadcast(tensor: Tensor, *dims: int) -> tuple[int, ...]:
    """Strides of the given dimensions, 0 where there is one entry for all."""
    return tuple(0 if tensor.shape[dim] == 1 else tensor.stride(dim) for dim in dims)


def scale_log2(scale: float) -> float:
    return scale / math.log(2)


def constants(query: Tensor, block: int, compute: torch.dtype) -> dict[str, Any]:
    """What every kernel is specialised for."""
    head_dim = query.shape[-1]
    return {
        "BLOCK": block,
        "D": head_dim,
        "WIDE": padded(head_dim),
        "COMPUTE": DTYPES[compute],
        "PRECISION": precision(compute, device_target(query)),
    }
