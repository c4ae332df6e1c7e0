"""One table of attention problems for tests and benchmarks: shapes, row maps and every kind of block list."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocklist import BlockList, identity_rows
from .listops import all_blocks, concat, from_dense
from .pyramid import KVPyramid, build_pyramid


@dataclass(frozen=True, kw_only=True)
class Case:
    """A problem to build: sizes, the kind of list, and how tokens are laid out.

    keys: tokens of key and value if other than the query's. layout: "plain", "shuffled" (key order ≠ query order, per
    head), "gaps" (padding amid the row maps) or "strided" (non-contiguous inputs). masked_keys: share of keys at -inf.
    """

    lists: str
    tokens: int = 200
    head_dim: int = 32
    block: int = 16
    tile: int = 32
    factors: tuple[int, ...] = (1,)
    batch: int = 2
    heads: int = 3
    keys: int | None = None
    layout: str = "plain"
    masked_keys: float = 0.0
    spread: float = 1.0

    def __str__(self) -> str:
        changed = {
            name: getattr(self, name)
            for name, given in self.__dataclass_fields__.items()
            if name != "lists" and getattr(self, name) != given.default
        }
        return "-".join([self.lists, *(f"{name}:{value}" for name, value in changed.items())])


@dataclass(frozen=True, kw_only=True)
class Problem:
    query: Tensor
    key: Tensor
    value: Tensor
    key_rows: Tensor | None
    key_log_weight: Tensor | None
    blocks: BlockList
    case: Case

    def pyramid(self, key: Tensor | None = None, value: Tensor | None = None) -> KVPyramid:
        """The problem's pyramid, over other tensors if given."""
        return build_pyramid(
            self.key if key is None else key,
            self.value if value is None else value,
            self.key_rows,
            block=self.case.block,
            factors=self.case.factors,
            key_log_weight=self.key_log_weight,
        )


def build(case: Case, dtype: torch.dtype, seed: int = 0) -> Problem:
    """The problem of a case, the same for the same seed and dtype up to rounding."""
    random = torch.Generator().manual_seed(seed)
    keys = case.tokens if case.keys is None else case.keys

    def tensor(tokens: int, spread: float) -> Tensor:
        shape = (case.batch, case.heads, tokens, case.head_dim)
        if case.layout == "strided":
            wide = torch.randn(shape[0], shape[2], shape[1], 2 * shape[3], generator=random, dtype=torch.float64)
            return (wide * spread).to(dtype).transpose(1, 2)[..., ::2]
        return (torch.randn(shape, generator=random, dtype=torch.float64) * spread).to(dtype)

    query, key, value = tensor(case.tokens, case.spread), tensor(keys, 1.0), tensor(keys, 1.0)
    query_rows, key_rows = identity_rows(case.tokens, case.tile), None
    if case.layout == "shuffled":
        key_rows = torch.stack([_padded(torch.randperm(keys, generator=random), case.block) for _ in range(case.heads)])
        query_rows = torch.stack(
            [_padded(torch.randperm(case.tokens, generator=random), case.tile) for _ in range(case.heads)]
        ).unflatten(1, (-1, case.tile))
    elif case.layout == "gaps":
        key_rows = _with_gap(keys, case.block)[None]
        query_rows = _with_gap(case.tokens, case.tile).view(1, -1, case.tile)
    weight = None
    if case.masked_keys:
        hidden = torch.rand(case.batch, 1, keys, generator=random) < case.masked_keys
        weight = torch.zeros(case.batch, 1, keys).masked_fill(hidden, -torch.inf)
    pyramid = build_pyramid(key, value, key_rows, block=case.block, factors=case.factors, key_log_weight=weight)
    return Problem(
        query=query,
        key=key,
        value=value,
        key_rows=key_rows,
        key_log_weight=weight,
        blocks=make_list(case.lists, pyramid, query_rows, case.batch, case.heads, random),
        case=case,
    )


def make_list(
    name: str, pyramid: KVPyramid, query_rows: Tensor, batch: int, heads: int, random: torch.Generator
) -> BlockList:
    """A list by name.

    One of all, none, single, random, sparse (3 %), shared, per_batch, some_all, masked, unread, one_level, overlapping
    (whole top levels over a random level 0) or joined (heads concatenated).
    """
    tiles, block, columns = query_rows.shape[1], pyramid.block, pyramid.blocks

    def chance(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    if name == "all":
        return all_blocks(query_rows, block)
    if name == "none":
        return from_dense(torch.zeros(1, heads, tiles, columns, dtype=torch.bool), query_rows, block)
    if name == "single":
        mask = torch.zeros(1, heads, tiles, columns, dtype=torch.bool)
        at = torch.randint(columns, (1, heads, tiles, 1), generator=random)
        return from_dense(mask.scatter(3, at, True), query_rows, block)
    if name in ("random", "shared", "per_batch", "some_all"):
        shape = (batch if name == "per_batch" else 1, 1 if name == "shared" else heads)
        mask = chance(*shape, tiles, columns) < chance(*shape, tiles, 1)
        listed = from_dense(mask, query_rows, block)
        if name != "some_all":
            return listed
        dense = chance(1, heads, tiles) < 0.5
        return BlockList(
            **{
                field: getattr(listed, field)
                for field in ("start", "pool", "mask_start", "row_masks", "query_rows", "block")
            },
            count=torch.where(dense, -1, listed.count),
            masked_count=listed.masked_count,
        )
    if name == "sparse":
        return from_dense(chance(1, heads, tiles, columns) < 0.03, query_rows, block)
    if name in ("masked", "unread"):
        mask = chance(1, heads, tiles, columns) < 0.5
        rows = chance(1, heads, tiles, columns, block) < (0.5 if name == "masked" else 0.0)
        # Half of the entries keep all their rows.
        rows |= (chance(1, heads, tiles, columns, 1) < 0.5) & (name == "masked")
        return from_dense(mask, query_rows, block, rows)
    if name == "one_level":
        read = _one_level(pyramid, heads * tiles, random).view(1, heads, tiles, columns, block)
        return from_dense(read.any(-1), query_rows, block, read)
    if name == "overlapping":
        first = torch.arange(columns) >= pyramid.blocks_at(1).start
        return from_dense((chance(1, heads, tiles, columns) < 0.3) | first, query_rows, block)
    if name == "joined":
        parts = [make_list("random", pyramid, query_rows[:1], 1, 1, random) for _ in range(heads)]
        return concat(parts)
    raise ValueError(f"there is no list {name!r}")


def _one_level(pyramid: KVPyramid, count: int, random: torch.Generator) -> Tensor:
    """Rows that read every level-0 row exactly once, in runs of the coarsest factor at a level each: [count, R]."""
    coarsest, level_rows = pyramid.factors[-1], pyramid.offsets[1]
    groups = -(-level_rows // coarsest)
    choice = torch.randint(pyramid.levels, (count, groups), generator=random)
    read = torch.zeros(count, pyramid.rows, dtype=torch.bool)
    for level, factor in enumerate(pyramid.factors):
        rows = (choice == level).repeat_interleave(coarsest // factor, 1)
        begin, end = pyramid.offsets[level], pyramid.offsets[level + 1]
        rows = rows[:, : end - begin]
        read[:, begin : begin + rows.shape[1]] = rows
    return read


def _padded(rows: Tensor, multiple: int) -> Tensor:
    missing = -rows.numel() % multiple
    return torch.nn.functional.pad(rows, (0, missing), value=-1).to(torch.int32)


def _with_gap(tokens: int, multiple: int) -> Tensor:
    """Two segments, neither a multiple of the tile or block: padding stands between them as well as at the end."""
    rows = torch.arange(tokens)
    return torch.cat([_padded(rows[: tokens // 3], multiple), _padded(rows[tokens // 3 :], multiple)])
