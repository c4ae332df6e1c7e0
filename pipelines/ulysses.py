"""Ulysses sequence parallelism (arXiv 2309.14509): each rank holds a part of the tokens, and attends for its heads.

Around an attention call tokens are gathered and heads dealt out by one all-to-all, and back by another. Heads are
permuted first so that each rank gets the same share of every entry of the plan, and thus of the cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.grid import Segment, TokenGrid
from ..attention.plan import HeadGroup, LayerPlan, Plan


@dataclass(frozen=True)
class Share:
    """One rank's place among the `world` that share a sequence."""

    world: int
    rank: int
    group: Any


def share_of(parallel: Any) -> Share | None:
    """The share that diffusers' parallel configuration gives this process; None without context parallelism.

    Raises ValueError for ring attention and for uneven splits, on which no plan can run.
    """
    context = None if parallel is None else parallel.context_parallel_config
    if context is None:
        return None
    if context.ring_degree > 1:
        raise ValueError(
            "ring attention shows a rank one shard of the keys at a time, and a plan needs all of them:"
            " set ulysses_degree in place of ring_degree"
        )
    if getattr(context, "ulysses_anything", False):
        raise ValueError("ulysses_anything splits heads and tokens unevenly: a plan runs on even splits alone")
    mesh = context._ulysses_mesh
    return Share(context.ulysses_degree, mesh.get_local_rank(), mesh.get_group())


def deal(layer: LayerPlan, heads: int, world: int) -> list[int]:
    """The heads in the order in which ranks take them, `heads` / `world` each: dealt in turn from entry after entry."""
    order = [head for group in layer.groups for entry in group.entries for head in entry.heads] or list(range(heads))
    return [head for rank in range(world) for head in order[rank::world]]


def shared_plan(plan: Plan, share: Share) -> Plan:
    """The plan of one rank: of each layer the heads that it was dealt, numbered as they come.

    Raises ValueError if the heads can't be dealt out evenly.
    """
    if plan.heads % share.world:
        raise ValueError(f"ulysses_degree must divide the model's {plan.heads} heads, got {share.world}")
    count = plan.heads // share.world
    layers = []
    for layer in plan.layers:
        mine = deal(layer, plan.heads, share.world)[share.rank * count :][:count]
        groups = (_restricted(group, {head: place for place, head in enumerate(mine)}) for group in layer.groups)
        layers.append(layer.model_copy(update={"groups": tuple(group for group in groups if group.entries)}))
    return plan.model_copy(update={"heads": count, "layers": tuple(layers)})


def own_plan(plan: Plan, transformer: Any) -> Plan:
    """What of a plan this process runs on a transformer: all of it without context parallelism.

    Raises ValueError as `share_of` and `shared_plan` do.
    """
    share = share_of(getattr(transformer, "_parallel_config", None))
    return plan if share is None else shared_plan(plan, share)


def _restricted(group: HeadGroup, place: dict[int, int]) -> HeadGroup:
    entries = []
    for entry in group.entries:
        heads = tuple(place[head] for head in entry.heads if head in place)
        if heads:
            entries.append(entry.model_copy(update={"heads": heads}))
    return group.model_copy(update={"entries": tuple(entries)})


def interleaved(grid: TokenGrid, world: int) -> TokenGrid | str:
    """The grid of the gathered sequence: text and the rest are split each by itself, so T V becomes T0 V0 T1 V1.

    Or why there is none.
    """
    streams: list[list[Segment]] = []
    for segment in sorted(grid.segments, key=lambda one: one.runs[0]):
        if not streams or (segment.kind == "text") != (streams[-1][0].kind == "text"):
            streams.append([])
        streams[-1].append(segment)
    lengths = [sum(segment.tokens for segment in stream) for stream in streams]
    if any(length % world for length in lengths):
        return f"{' + '.join(map(str, lengths))} tokens are not split evenly over {world} ranks"
    chunks = [length // world for length in lengths]
    segments = []
    for index, stream in enumerate(streams):
        chunk, offset, start = chunks[index], sum(chunks[:index]), 0
        for segment in stream:
            runs = []
            for rank in range(world):
                first, last = max(start, rank * chunk), min(start + segment.tokens, (rank + 1) * chunk)
                if first < last:
                    origin = rank * (sum(chunks) - chunk) + offset
                    runs.append((origin + first, origin + last))
            segments.append(Segment(kind=segment.kind, shape=segment.shape, runs=tuple(runs)))
            start += segment.tokens
    return TokenGrid(tuple(segments))


def _exchanged(tensor: Tensor, share: Share) -> Tensor:
    """Slice r of the first dimension goes to rank r; differentiable."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

    return wait_tensor(all_to_all_single_autograd(tensor.contiguous(), None, None, share.group))


def gather_tokens(tensor: Tensor, order: list[int], share: Share) -> Tensor:
    """[B, N / world, H, D] of every head to [B, H / world, N, D] of this rank's."""
    index = torch.tensor(order, device=tensor.device)
    split = tensor.index_select(2, index).unflatten(2, (share.world, -1))
    return _exchanged(split.permute(2, 1, 0, 3, 4), share).flatten(0, 1).permute(1, 2, 0, 3)


def gather_heads(tensor: Tensor, order: list[int], share: Share) -> Tensor:
    """The way back: [B, H / world, N, D] to [B, N / world, H, D]."""
    split = tensor.unflatten(2, (share.world, -1)).permute(2, 3, 0, 1, 4)
    whole = _exchanged(split, share).permute(2, 1, 0, 3, 4).flatten(2, 3)
    return whole.index_select(2, torch.tensor(order, device=tensor.device).argsort())


def gather_mask(mask: Tensor | None, tokens: int, share: Share) -> Tensor | None:
    """A key mask over this rank's `tokens` as one over all; any other as it is."""
    if mask is None or mask.shape[-1] != tokens:
        return mask
    parts = [torch.empty_like(mask, memory_format=torch.contiguous_format) for _ in range(share.world)]
    dist.all_gather(parts, mask.contiguous(), group=share.group)
    return torch.cat(parts, -1)
