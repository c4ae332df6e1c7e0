"""Token vectors in the order of a row map."""

from __future__ import annotations

import torch
from torch import Tensor


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


def _shape(tokens: Tensor, rows: Tensor) -> tuple[int, int, int, int]:
    return tokens.shape[0], tokens.shape[1], rows.shape[1], tokens.shape[3]
