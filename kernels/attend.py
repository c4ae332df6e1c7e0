"""Attention over a key/value pyramid: the one operation, in its backends."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .blocklist import BlockList
from .checks import check_query
from .pyramid import KVPyramid


def attend(
    query: Tensor,
    pyramid: KVPyramid,
    blocks: BlockList,
    *,
    scale: float | None = None,
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query tile over the pyramid rows that its block list reads.

    query: [B, H, Nq, D], of the pyramid's dtype, any strides; Nq may differ from the keys' N.
    scale: factor on the logits; None = D ** -0.5. A row's log-weight is added after scaling.
    backend: "torch" (gathers blocks; differentiable by recomputing), "triton" (GPUs; differentiable), "flex" (PyTorch's
        FlexAttention, forward only), "reference" (dense) or "auto": see `kernels.backends.choose`.
    compute_dtype: the dtype of the matrix products, e.g. bfloat16 for float32 input; None = query's own.

    Returns out [B, H, Nq, D] in query's dtype, and lse [B, H, Nq], natural log, float32 (float64 for float64), both
    in token order. A query that reads nothing, or stands in no tile, gets zeros and -inf. `lse` has no gradient.

    Raises ValueError for mismatched shapes, dtypes or devices, an invalid list, an unknown backend, or
    one that lacks what is asked of it; ImportError for one whose package is missing.
    """
    name = backends.choose(query.device)[0] if backend == "auto" else backend
    run = backends.attend_of(name)
    check(query, pyramid, blocks, compute_dtype)
    # A compiled graph can't look at a list's numbers: there Triton's operator does, when it runs.
    if name != "triton" or not torch.compiler.is_compiling():
        blocks.validate(pyramid, query.shape[2])
    factor = float(query.shape[-1]) ** -0.5 if scale is None else scale
    return run(query, pyramid, blocks, scale=factor, compute_dtype=compute_dtype or query.dtype)


def check(query: Tensor, pyramid: KVPyramid, blocks: BlockList, compute_dtype: torch.dtype | None = None) -> None:
    """Raise ValueError, naming the argument, unless the shapes and dtypes of query, pyramid and list fit each other."""
    check_query(query, pyramid)
    batch, heads = query.shape[:2]
    if compute_dtype is not None and not compute_dtype.is_floating_point:
        raise ValueError(f"compute_dtype must be a floating dtype, got {compute_dtype}: for example torch.bfloat16")
    if pyramid.block != blocks.block:
        raise ValueError(
            f"blocks must have the pyramid's block of {pyramid.block} rows, got {blocks.block}: build both with one"
        )
    if blocks.batch not in (1, batch) or blocks.heads not in (1, heads):
        raise ValueError(
            f"blocks must be for batch 1 or {batch} and heads 1 or {heads}, got {blocks.batch} and {blocks.heads}: "
            "select or concatenate its heads"
        )
