"""The flex backend: the same list handed to PyTorch's FlexAttention, a second opinion on every product and softmax.

Forward only. On a CPU its compiled form returns no logsumexp, so that `attend` runs its eager one, which holds all
scores at once; `prepare` gives what the compiled form takes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .blocklist import BlockList
from .checks import ragged
from .listops import to_pairs
from .pyramid import KVPyramid
from .reference import scatter_tiles
from .rows import gather_rows

LACKS = "it has no backward: use backend='torch', or torch.no_grad()"


@dataclass(frozen=True)
class FlexProblem:
    """What `flex_attention` takes: query [B, H, T · tile, D] in tile order, key and value [B, H, R, D] in row order."""

    query: Tensor
    key: Tensor
    value: Tensor
    block_mask: BlockMask
    score_mod: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    scale: float


def prepare(query: Tensor, pyramid: KVPyramid, blocks: BlockList, *, scale: float, dtype: torch.dtype) -> FlexProblem:
    """The problem of `attend` as a `BlockMask` (its whole blocks skip the mask) and a score modification."""
    batch, heads = query.shape[:2]
    live = pyramid.log_weight > -math.inf
    level, pooled = live.split([pyramid.offsets[1], pyramid.rows - pyramid.offsets[1]], 2)
    key, value = (
        torch.cat([gather_rows(tokens, pyramid.key_rows, level), torch.where(pooled[..., None], rows, 0)], 2).to(dtype)
        for tokens, rows in ((pyramid.key, pyramid.pooled_key), (pyramid.value, pyramid.pooled_value))
    )
    weight = pyramid.log_weight.expand(batch, heads, -1)
    state = _states(blocks, pyramid).expand(batch, heads, -1, -1)
    words = blocks.row_masks if len(blocks.row_masks) else blocks.row_masks.new_zeros(1, blocks.row_masks.shape[1])
    tile, block = blocks.tile, blocks.block

    def is_read(b: Tensor, h: Tensor, q: Tensor, row: Tensor) -> Tensor:
        entry = state[b, h, q // tile, row // block]
        bit = (words[entry.clamp(min=1) - 1, row % block // 32] >> (row % block % 32)) & 1
        return (entry >= 0) & ((entry == 0) | (bit == 1))

    def add_weight(score: Tensor, b: Tensor, h: Tensor, q: Tensor, row: Tensor) -> Tensor:
        return score + weight[b, h, row]

    partial, whole = (_columns(chosen) for chosen in (state > 0, state == 0))
    mask = BlockMask.from_kv_blocks(
        *partial,
        *whole,
        BLOCK_SIZE=(tile, block),
        mask_mod=is_read,
        seq_lengths=(blocks.tiles * tile, pyramid.rows),
    )
    packed = gather_rows(query, blocks.query_rows.flatten(1)).to(dtype)
    return FlexProblem(packed, key, value, mask, add_weight, scale)


def compiled(query: Tensor, pyramid: KVPyramid, blocks: BlockList) -> Callable[[], Tensor]:
    """A call of FlexAttention's compiled form on the problem of `attend`, for timing it; the first one compiles.

    Returns what gives the output in tile order [B, H, T · tile, D]. It is not charged for log-weights where all are 0.
    """
    problem = prepare(query, pyramid, blocks, scale=query.shape[-1] ** -0.5, dtype=query.dtype)
    run = torch.compile(flex_attention, dynamic=False)
    weighs = bool((pyramid.log_weight != 0).any())
    return lambda: run(
        problem.query,
        problem.key,
        problem.value,
        score_mod=problem.score_mod if weighs else None,
        block_mask=problem.block_mask,
        scale=problem.scale,
    )


def attend(
    query: Tensor, pyramid: KVPyramid, blocks: BlockList, *, scale: float, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `kernels.attend.attend`; asked for gradients, it says that it has none."""
    sources = (query, pyramid.key, pyramid.value, pyramid.pooled_key, pyramid.pooled_value)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in sources):
        raise ValueError(f"backend 'flex' was asked for gradients, but {LACKS}")
    problem = prepare(query, pyramid, blocks, scale=scale, dtype=compute_dtype)
    with warnings.catch_warnings():
        # Eager is what is wanted here: the compiled form has no logsumexp on a CPU.
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out, extra = flex_attention(
            problem.query,
            problem.key,
            problem.value,
            score_mod=problem.score_mod,
            block_mask=problem.block_mask,
            scale=scale,
            return_aux=AuxRequest(lse=True),
        )
    assert extra.lse is not None
    lse = torch.where(torch.isnan(extra.lse), -math.inf, extra.lse)
    out = torch.where(lse[..., None] > -math.inf, out, 0)
    shape, tokens = blocks.query_rows.shape[1:], query.shape[2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (
        scatter_tiles(out.unflatten(2, shape), blocks.query_rows, tokens, 0.0).to(query.dtype),
        scatter_tiles(lse.unflatten(2, shape)[..., None], blocks.query_rows, tokens, -math.inf)[..., 0].to(wide),
    )


def _states(blocks: BlockList, pyramid: KVPyramid) -> Tensor:
    """int32 [B|1, H|1, T, C]: -1 = not read, 0 = read whole, m + 1 = read by row mask m."""
    state = torch.full((blocks.start.numel(), pyramid.blocks), -1, dtype=torch.int32, device=blocks.pool.device)
    state[to_pairs(blocks, pyramid)] = 0
    tile, entry = ragged(blocks.start, blocks.masked_count)
    _, slot = ragged(blocks.mask_start, blocks.masked_count)
    state[tile, blocks.pool[entry].long()] = slot.to(torch.int32) + 1
    return state.view(*blocks.start.shape, -1)


def _columns(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row of tiles are chosen, int32 [B, H, T], and which, these first, [B, H, T, C]."""
    order = (~chosen).to(torch.int8).argsort(dim=-1, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)
