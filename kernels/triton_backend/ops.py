"""The Triton backend: `attend` and `block_mass` as operators of PyTorch, with fake kernels and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..blocklist import BlockList
from ..checks import check_list
from ..pyramid import KVPyramid
from ..transpose import BlockTiles, transpose
from . import host
from .launch import check_device, rows_first

LIST = ("query_rows", "start", "count", "pool", "masked_count", "mask_start", "row_masks")
TILES = ("start", "count", "pool", "mask", "all_start", "all_count", "all_pool")
# A list keeps its transpose for the next backward up to this many bytes; a longer one is made anew each time.
KEPT_BYTES = 256 << 20


def attend(
    query: Tensor, pyramid: KVPyramid, blocks: BlockList, *, scale: float, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `kernels.attend.attend`: one launch forward; three and two short ones backward."""
    check_device(query.device, query.dtype, compute_dtype)
    sources = (query, pyramid.key, pyramid.value, pyramid.pooled_key, pyramid.pooled_value)
    derived: list[Tensor] = []
    # A compiled graph keeps no memo: there, what derives from the list is made within the operators.
    if not torch.compiler.is_compiling():
        tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in sources)
        derived = [_order(blocks, query, pyramid), *(_transposed(blocks, pyramid) if tracked else ())]
    out, lse = attend_op(
        *sources, pyramid.key_rows, pyramid.log_weight, [getattr(blocks, name) for name in LIST], derived,
        blocks.block, scale, compute_dtype,
    )  # fmt: skip
    return out, lse.detach()


def block_mass(query: Tensor, pyramid: KVPyramid, lse: Tensor, query_rows: Tensor, *, scale: float) -> Tensor:
    """See `kernels.mass.block_mass`."""
    check_device(query.device, query.dtype, query.dtype)
    return block_mass_op(
        query.detach(), pyramid.key.detach(), pyramid.key_rows, pyramid.log_weight, lse.detach(), query_rows,
        pyramid.block, scale,
    )  # fmt: skip


@torch.library.custom_op("ziggurat::attend", mutates_args=())
def attend_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    key_rows: Tensor,
    log_weight: Tensor,
    blocks: list[Tensor],
    derived: list[Tensor],
    block: int,
    scale: float,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Output and lse. blocks: the tensors `LIST` of a block list. derived: [], or its order, or order and `TILES`.

    A list that comes without its order has passed no check yet: it is checked here.
    """
    inputs = host.Inputs(query, key, value, pooled_key, pooled_value, key_rows, log_weight, scale, compute_dtype)
    listed = _list(blocks, block)
    if not derived:
        check_list(listed, log_weight.shape[2] // block, query.shape[2])
    return host.forward(inputs, listed, _derived_order(derived, inputs, listed))


@attend_op.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = query.shape
    return query.new_empty(shape), query.new_empty(shape[:3], dtype=torch.float32)


@torch.library.custom_op("ziggurat::attend_backward", mutates_args=())
def attend_backward_op(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    key_rows: Tensor,
    log_weight: Tensor,
    blocks: list[Tensor],
    derived: list[Tensor],
    block: int,
    scale: float,
    compute_dtype: torch.dtype,
    of_query: bool,
    of_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, pooled key and pooled value; empty where not asked for."""
    inputs = host.Inputs(query, key, value, pooled_key, pooled_value, key_rows, log_weight, scale, compute_dtype)
    listed = _list(blocks, block)
    grad = rows_first(grad)
    delta = host.dots(out, grad)
    results = [query.new_empty(0) for _ in range(5)]
    if of_query:
        results[0] = host.grad_query(inputs, listed, _derived_order(derived, inputs, listed), grad, lse, delta)
    if of_rows:
        given = derived[1:] or _tensors(transpose(listed, _pyramid(inputs, block)))
        tiles = BlockTiles(**dict(zip(TILES, given, strict=True)))
        results[1:] = host.grad_rows(inputs, listed, tiles, grad, lse, delta)
    return results[0], results[1], results[2], results[3], results[4]


@attend_backward_op.register_fake
def _(grad: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, of_query, of_rows = arguments
    wanted = (of_query, *[of_rows] * 4)
    return tuple(t.new_empty(t.shape if want else 0) for t, want in zip(arguments[:5], wanted, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, blocks, derived, block, scale, compute_dtype = inputs
    ctx.save_for_backward(*output, *tensors, *blocks, *derived)
    ctx.rest = (len(tensors), block, scale, compute_dtype)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    count, block, scale, compute_dtype = ctx.rest
    out, lse, *saved = ctx.saved_tensors
    lists = saved[count:]
    need = ctx.needs_input_grad[:5]
    results = attend_backward_op(
        grad, out, lse, *saved[:count], lists[: len(LIST)], lists[len(LIST) :], block, scale, compute_dtype,
        need[0], any(need[1:]),
    )  # fmt: skip
    wanted = [result if needed else None for result, needed in zip(results, need, strict=True)]
    return *wanted, *[None] * (count - 5), [None] * len(LIST), [None] * (len(lists) - len(LIST)), None, None, None


torch.library.register_autograd("ziggurat::attend", _backward, setup_context=_setup)


@torch.library.custom_op("ziggurat::block_mass", mutates_args=())
def block_mass_op(
    query: Tensor,
    key: Tensor,
    key_rows: Tensor,
    log_weight: Tensor,
    lse: Tensor,
    query_rows: Tensor,
    block: int,
    scale: float,
) -> Tensor:
    """Softmax mass of each query tile on each level-0 block: float32 [B, H, T, blocks]."""
    inputs = host.Inputs(query, key, key, key[:, :, :0], key[:, :, :0], key_rows, log_weight, scale, query.dtype)
    return host.masses(inputs, lse.float().contiguous(), query_rows.contiguous(), block)


@block_mass_op.register_fake
def _(query: Tensor, key: Tensor, key_rows: Tensor, *arguments: Any) -> Tensor:
    _, _, query_rows, block, _ = arguments
    shape = (*query.shape[:2], query_rows.shape[1], key_rows.shape[1] // block)
    return query.new_empty(shape, dtype=torch.float32)


def _list(tensors: list[Tensor], block: int) -> BlockList:
    return BlockList(**dict(zip(LIST, (tensor.contiguous() for tensor in tensors), strict=True)), block=block)


def _derived_order(derived: list[Tensor], inputs: host.Inputs, blocks: BlockList) -> Tensor:
    batch, heads = inputs.query.shape[:2]
    return derived[0] if derived else host.tile_order(blocks, batch, heads, inputs.level_rows // blocks.block)


def _pyramid(inputs: host.Inputs, block: int) -> KVPyramid:
    """The pyramid, its coarser levels taken for one: where level 0 ends is all that a list's transpose asks."""
    _, key, value, pooled_key, pooled_value = inputs.sources
    return KVPyramid(
        key=key,
        value=value,
        key_rows=inputs.key_rows,
        pooled_key=pooled_key,
        pooled_value=pooled_value,
        log_weight=inputs.log_weight,
        offsets=(0, inputs.level_rows, inputs.log_weight.shape[2]),
        factors=(1, 1),
        block=block,
    )


def _tensors(tiles: BlockTiles) -> list[Tensor]:
    return [getattr(tiles, name) for name in TILES]


def _order(blocks: BlockList, query: Tensor, pyramid: KVPyramid) -> Tensor:
    batch, heads = query.shape[:2]
    key = ("tile order", batch, heads, len(pyramid.blocks_at(0)))
    if key not in blocks.memo:
        blocks.memo[key] = host.tile_order(blocks, batch, heads, len(pyramid.blocks_at(0)))
    return blocks.memo[key]


def _transposed(blocks: BlockList, pyramid: KVPyramid) -> list[Tensor]:
    key = ("transposed", pyramid.blocks)
    kept = blocks.memo.get(key)
    if kept is None:
        tiles = transpose(blocks, pyramid)
        kept = _tensors(tiles)
        if tiles.nbytes <= KEPT_BYTES:
            blocks.memo[key] = kept
    return kept
