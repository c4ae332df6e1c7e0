"""Attention over keys of which many at the end are one and the same, as the padding of a prompt is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..kernels.attend import attend
from ..kernels.blocklist import identity_rows
from ..kernels.listops import all_blocks
from ..kernels.pyramid import KVPyramid, build_pyramid

TILE = 128


def repeated_rows(key: Tensor, value: Tensor) -> int:
    """How many rows at the end of key and value, [B, H, N, D], are equal in both: at least 1, of all heads and batches.

    On an accelerator this waits for the device.
    """
    rows = key.shape[2]
    equal = torch.ones(rows, dtype=torch.bool, device=key.device)
    for tensor in (key, value):
        equal &= (tensor == tensor[:, :, -1:]).all(3).flatten(0, 1).all(0)
    # A last row that holds NaN is not equal to itself: it stands alone.
    unequal = equal[:-1].logical_not().nonzero()
    return rows if len(unequal) == 0 else rows - 1 - int(unequal[-1])


def attend_repeats(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, int]:
    """Attention in which equal rows at the end are read once, with the logarithm of their number as log-weight.

    Exact but for rounding: c equal keys with equal values weigh in a softmax as one with log c added to its logit.

    query: [B, H, Nq, D]; key, value: [B, H, N, D]. Others: see `kernels.attend.attend`.
    Returns out [B, H, Nq, D], and the rows that were read.
    """
    repeated = repeated_rows(key, value)
    rows = key.shape[2] - repeated + 1
    weight = torch.zeros(1, 1, rows, device=key.device)
    weight[..., -1] = math.log(repeated)
    block = 16 if rows < 64 else 64
    read = build_pyramid(key[:, :, :rows], value[:, :, :rows], block=block, key_log_weight=weight)
    return attend_all(query, read, scale=scale, backend=backend, compute_dtype=compute_dtype), rows


def attend_all(query: Tensor, pyramid: KVPyramid, **options: Any) -> Tensor:
    """Attention [B, H, Nq, D] of every query to all of a pyramid's level 0; options: see `kernels.attend.attend`."""
    blocks = all_blocks(identity_rows(query.shape[2], TILE), pyramid.block).to(query.device)
    return attend(query, pyramid, blocks, **options)[0]
