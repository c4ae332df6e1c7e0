"""A plan at work, against attention written out densely from the plan's own words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ziggurat.attention.dense import Dense
from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.order import TokenOrder, coordinates
from ziggurat.attention.plan import HeadGroup, HeadPlan, LayerPlan, Plan
from ziggurat.attention.run import PlanRun
from ziggurat.attention.schedule import Schedule
from ziggurat.attention.select import DynamicSelector, Selector, level0_list
from ziggurat.attention.skip import Skip
from ziggurat.attention.stripe import Box, Stripe
from ziggurat.attention.window import Window

HEADS, HEAD_DIM = 4, 48
TILE, BLOCK = 16, 8
Reads = Callable[[Tensor, Tensor], Tensor]  # tokens of a tile, tokens of a block -> is it read?


def tensors(grid: TokenGrid, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    # [B, N, H, D] transposed: strided, as diffusers' own layout is.
    return [
        torch.randn(batch, grid.tokens, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        for _ in range(3)
    ]


def plan_of(*groups: HeadGroup, layers: int = 1, schedule: Schedule | None = None) -> Plan:
    return Plan(
        model_class="Tiny",
        heads=HEADS,
        head_dim=HEAD_DIM,
        grid=(3, 4, 5),
        schedule=schedule or Schedule(),
        layers=(LayerPlan(groups=groups),) * layers,
    )


def group_of(
    *entries: tuple[tuple[int, ...], Selector], order: str = "temporal", rest: Literal["drop", "pooled"] = "drop"
) -> HeadGroup:
    return HeadGroup(
        order=TokenOrder.model_validate(order),
        tile=TILE,
        block=BLOCK,
        entries=tuple(HeadPlan(heads=heads, selector=selector, rest=rest) for heads, selector in entries),  # type: ignore[arg-type]
    )


def call(run: PlanRun, qkv: list[Tensor], grid: TokenGrid | None, **more) -> Tensor | None:
    return run.attend_layer(*qkv, **{"layer": 0, "noise_level": 0.5, "step": 0, "grid": grid, **more})


def chunks(grid: TokenGrid, order: Tensor, width: int) -> list[tuple[str, Tensor]]:
    """Tiles or blocks of a grid: kind and tokens of each."""
    parts = []
    for segment in grid.segments:
        tokens = segment.positions()
        tokens = tokens[order] if segment.kind == "visual" else tokens
        parts += [(segment.kind, part) for part in tokens.split(width)]
    return parts


def oracle(
    qkv: list[Tensor], grid: TokenGrid, query_order: Tensor, key_order: Tensor, reads: Reads, rest: str
) -> Tensor:
    """One head, [B, N, D] each: tile by tile, block by block, text exact, the rest as one mean key per block."""
    query, key, value = qkv
    out = torch.zeros_like(query)
    blocks = chunks(grid, key_order, BLOCK)
    for kind, tile in chunks(grid, query_order, TILE):
        keys, values, weights = [], [], []
        for block_kind, block in blocks:
            whole = kind == "text" or reads(tile, block) or (block_kind == "text" and rest == "pooled")
            if whole:
                keys.append(key[:, block])
                values.append(value[:, block])
                weights.append(torch.zeros(len(block), dtype=query.dtype))
            elif rest == "pooled":
                keys.append(key[:, block].mean(1, keepdim=True))
                values.append(value[:, block].mean(1, keepdim=True))
                weights.append(torch.tensor([len(block)], dtype=query.dtype).log())
        if keys:
            bias = torch.cat(weights).expand(len(query), len(tile), -1)
            out[:, tile] = F.scaled_dot_product_attention(
                query[:, tile], torch.cat(keys, 1), torch.cat(values, 1), attn_mask=bias
            )
    return out


def window_reads(grid: TokenGrid, half: int) -> Reads:
    """Some pair lies within `half` rows and columns; text always does."""
    segment = grid.visual[0]
    place = torch.full((grid.tokens, 2), -1)
    _, row, column = coordinates(segment.grid)
    place[segment.positions()] = torch.stack([row, column], 1)

    def reads(tile: Tensor, block: Tensor) -> Tensor:
        near = ((place[tile][:, None] - place[block][None]).abs() <= half).all(-1)
        return (near | (place[block][None, :, 0] < 0)).any()

    return reads


GRIDS = {
    "video": TokenGrid.video(3, 4, 5),
    "one token": TokenGrid.video(1, 1, 1),
    "prime": TokenGrid.video(1, 1, 37),
    "text": TokenGrid.video(3, 4, 7, text_before=3, text_after=11),
}


@pytest.mark.parametrize("rest", ["drop", "pooled"])
@pytest.mark.parametrize("where", GRIDS)
def test_end_to_end_against_dense(where: str, rest: Literal["drop", "pooled"]):
    grid = GRIDS[where]
    stripe = Stripe(boxes=(Box(frames=(0, 1), width=(0, 2)),))
    plan = plan_of(
        group_of(((2, 0), Window(height=3, width=3)), ((3,), stripe), order="temporal", rest=rest),
        group_of(((1,), Skip()), order="morton", rest=rest),
    )
    qkv = tensors(grid)
    out = call(PlanRun(plan), qkv, grid)
    assert out is not None

    shape = grid.visual[0].grid
    temporal, morton = (TokenOrder.model_validate(name).indices(shape) for name in ("temporal", "morton"))
    columns = stripe.columns(shape)
    front = torch.cat([temporal[columns[temporal]], temporal[~columns[temporal]]])
    first = set(grid.visual[0].positions()[front[: -(-int(columns.sum()) // BLOCK) * BLOCK]].tolist())
    text = {token for s in grid.segments if s.kind == "text" for token in s.positions().tolist()}

    def stripe_reads(tile: Tensor, block: Tensor) -> Tensor:
        return torch.tensor(int(block[0]) in first | text)

    def nothing(tile: Tensor, block: Tensor) -> Tensor:
        return torch.tensor(False)

    cases = {
        0: (temporal, temporal, window_reads(grid, 1)),
        2: (temporal, temporal, window_reads(grid, 1)),
        3: (temporal, front, stripe_reads),
        1: (morton, morton, nothing),
    }
    for head, (query_order, key_order, reads) in cases.items():
        expected = oracle([x[:, head] for x in qkv], grid, query_order, key_order, reads, rest)
        torch.testing.assert_close(out[:, head], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ["raster", "temporal", "tile(2,2,2)", "hilbert", "strided(2)"])
@pytest.mark.parametrize("where", GRIDS)
def test_all_blocks_in_any_order_are_plain_attention(where: str, order: str):
    qkv = tensors(GRIDS[where])
    for tensor in qkv:
        tensor.requires_grad_()
    expected = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
    out = call(PlanRun(plan_of(group_of(((3, 1), Dense()), ((0, 2), Dense()), order=order))), qkv, GRIDS[where])
    assert out is not None
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(expected)
    for got, want in zip(
        torch.autograd.grad(out, qkv, upstream), torch.autograd.grad(expected, qkv, upstream), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_order_inside_a_block_does_not_matter():
    grid = TokenGrid.video(4, 4, 4)
    inside = torch.stack([torch.randperm(BLOCK) for _ in range(grid.tokens // BLOCK)])
    shuffled = (inside + torch.arange(0, grid.tokens, BLOCK)[:, None]).flatten().tolist()
    orders = (TokenOrder(), TokenOrder(name="explicit", permutation=tuple(shuffled)))
    entries = (HeadPlan(heads=tuple(range(4)), selector=Window(frames=2, height=1)),)
    runs = [PlanRun(plan_of(HeadGroup(order=order, tile=TILE, block=BLOCK, entries=entries))) for order in orders]
    plain, moved = (call(run, tensors(grid), grid) for run in runs)
    assert plain is not None
    torch.testing.assert_close(moved, plain)
    assert runs[0].density() == runs[1].density() < 1


def test_masked_keys_never_matter():
    grid = GRIDS["text"]
    hidden = torch.zeros(1, 1, grid.tokens)
    hidden[..., -5:] = -torch.inf
    hidden[..., 7] = -torch.inf
    qkv = tensors(grid)
    run = PlanRun(plan_of(group_of((tuple(range(4)), Window(height=3, width=1)), rest="pooled")), check_finite=True)
    clean = call(run, qkv, grid, key_log_weight=hidden)
    for tensor in qkv[1:]:
        tensor[:, :, hidden[0, 0] < 0] = torch.nan
    assert clean is not None
    torch.testing.assert_close(call(run, qkv, grid, key_log_weight=hidden), clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_stays_near(dtype: torch.dtype):
    grid = GRIDS["text"]
    plan = plan_of(group_of((tuple(range(4)), Window(height=3, width=3)), rest="pooled"))
    exact = call(PlanRun(plan), tensors(grid), grid)
    out = call(PlanRun(plan), tensors(grid, dtype=dtype), grid)
    assert out is not None
    assert exact is not None
    assert out.dtype == dtype
    assert float((out.double() - exact).norm() / exact.norm()) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_lists_are_built_once_per_entry_and_grid():
    window = Window(height=3, width=3)
    one, two = (group_of((heads, window), (tuple({0, 1, 2, 3} - set(heads)), Skip())) for heads in ((0, 1), (3,)))
    plan = Plan(
        model_class="Tiny",
        heads=HEADS,
        head_dim=HEAD_DIM,
        grid=(3, 4, 5),
        layers=(LayerPlan(groups=(one,)), LayerPlan(groups=(two,)), LayerPlan(groups=(one,))),
    )
    run = PlanRun(plan)
    grid, other = GRIDS["video"], GRIDS["text"]
    for step in range(3):
        for layer in range(3):
            call(run, tensors(grid), grid, layer=layer, step=step)
    assert run.lists.built == 2
    memory = run.lists.nbytes
    run.begin()
    call(run, tensors(grid), grid)
    assert (run.lists.built, run.lists.nbytes) == (2, memory)
    call(run, tensors(other), other)
    assert run.lists.built == 4
    for length in range(1, 20):
        changing = TokenGrid.video(3, 4, 5, text_after=length)
        call(run, tensors(changing), changing)
    assert run.lists.nbytes < 20 * memory


def test_density_counts_every_call():
    grid = TokenGrid.video(4, 4, 4)
    # Raster order, one frame = one tile = two blocks: a window of one frame reads 2 blocks of 8.
    group = group_of((tuple(range(4)), Window(frames=1)), order="raster")
    plan = plan_of(group, layers=2, schedule=Schedule(dense_until=0.9))
    plan = plan.model_copy(update={"layers": (LayerPlan(dense="first"), plan.layers[1])})
    run = PlanRun(plan)
    run.begin([1.0, 0.8, 0.6])
    assert run.describe_steps() == "3 steps: 0 dense, 1 refresh, 2 reuse"
    assert run.density() == 1.0
    results = [
        call(run, tensors(grid), grid, layer=layer, noise_level=level, step=step) is None
        for step, level in enumerate(run.noise_levels or ())
        for layer in range(2)
    ]
    assert results == [True, True, True, False, True, False]
    assert run.density() == pytest.approx((4 * 1 + 2 * 0.25) / 6)
    assert run.list_density() == pytest.approx(0.25)
    first, second = run.status()
    assert (first.state, first.reason, first.calls, first.density) == ("dense", "first (3 calls)", 3, 1.0)
    assert (second.state, second.dense_calls, second.list_density) == ("sparse", 1, 0.25)
    assert second.reason == "the schedule says dense (1 calls)"
    run.begin()
    assert run.density() == 1.0
    assert [status.state for status in run.status()] == ["not called"] * 2
    assert call(run, tensors(grid), None, layer=1) is None
    assert run.status()[1].reason == "the token grid is unknown (1 calls)"


def test_density_weighs_heads_and_the_pooled_rest():
    grid = TokenGrid.video(4, 4, 4)
    half = group_of(((0, 1), Window(frames=1)), ((2,), Skip()), ((3,), Dense()), order="raster", rest="pooled")
    run = PlanRun(plan_of(half))
    call(run, tensors(grid), grid)
    # 8 blocks at level 0; the rest takes the one coarse block.
    assert run.list_density() == pytest.approx((2 * 3 / 8 + 1 / 8 + 1) / 4)


class Latest(DynamicSelector):
    """The blocks whose mean key is most like the tile's first query."""

    name: Literal["latest"] = "latest"

    def choose(self, query, layout, pyramid, *, scale, lse):
        assert query.shape == pyramid.key.shape
        assert scale == HEAD_DIM**-0.5
        assert lse is None
        rows = layout.query_rows[0, :, 0].long()
        score = query[:, :, rows] @ pyramid.pooled_key[:, :, : layout.blocks].transpose(2, 3)
        return level0_list(score >= score.amax(-1, keepdim=True), layout)


def test_dense_steps_by_our_own_kernel():
    grid = TokenGrid.video(3, 4, 5, text_after=6)
    query, key, value = tensors(grid)
    for own in (None, "own"):
        schedule = Schedule(dense_until=0.5, dense_by=own)
        run = PlanRun(plan_of(group_of((tuple(range(HEADS)), Skip())), schedule=schedule))
        early, late = (
            run.attend_layer(query, key, value, layer=0, noise_level=level, step=step, grid=grid)
            for step, level in enumerate((0.9, 0.1))
        )
        assert late is not None
        if own is None:
            assert early is None
        else:
            assert early is not None
            torch.testing.assert_close(early, F.scaled_dot_product_attention(query, key, value))
        (status,) = run.status()
        assert (status.calls, status.dense_calls) == (2, 1)
        assert ("by our kernel" in status.reason) == (own == "own")
        # Counted like any other dense step.
        assert run.density() == pytest.approx((1 + run.list_density()) / 2)


def dynamic_run(*heads: tuple[int, ...], schedule: Schedule, layers: int = 1) -> PlanRun:
    """Heads 0 and 3 by a window, the others by `Latest`, in one entry for each tuple of heads."""
    # A plan file can't name this selector: built without validation.
    entries = tuple(HeadPlan.model_construct(heads=own, selector=Latest(), rest="pooled") for own in heads)
    group = HeadGroup.model_construct(
        order=TokenOrder(name="temporal"),
        tile=TILE,
        block=BLOCK,
        factors=(1, BLOCK),
        entries=(HeadPlan(heads=(0, 3), selector=Window(height=1)), *entries),
    )
    layer = LayerPlan.model_construct(dense=None, groups=(group,), schedule=None)
    base = plan_of(group_of((tuple(range(4)), Skip())), schedule=schedule)
    return PlanRun(base.model_copy(update={"layers": (layer,) * layers}))


def test_dynamic_lists_are_refreshed_by_the_schedule():
    grid = TokenGrid.video(4, 4, 4)
    run = dynamic_run((1, 2), schedule=Schedule(dense_until=0.9, refresh_at=(0.5,)), layers=2)
    levels = (1.0, 0.8, 0.7, 0.5, 0.2)
    for _ in range(2):
        run.begin(levels)
        start = run.lists.built
        built = []
        for step, level in enumerate(levels):
            for number in range(2):
                for branch in ("cond", "uncond"):
                    call(run, tensors(grid), grid, layer=number, noise_level=level, step=step, branch=branch)
            built.append(run.lists.built - start)
        static = 1 if start == 0 else 0
        assert built == [0, 4 + static, 4 + static, 8 + static, 8 + static]
    assert run.list_density() < 0.75


def test_dynamic_lists_are_kept_within_a_run_and_belong_to_their_heads():
    grid = TokenGrid.video(4, 4, 4)
    first, other = tensors(grid), tensors(grid)[::-1]
    run, apart = (dynamic_run(*heads, schedule=Schedule()) for heads in (((1, 2),), ((1,), (2,))))
    fresh = call(run, first, grid)
    torch.testing.assert_close(call(apart, first, grid), fresh)
    reused = call(run, other, grid)
    run.begin()
    rebuilt = call(run, other, grid)
    assert fresh is not None
    assert reused is not None
    assert rebuilt is not None
    assert not torch.allclose(reused, rebuilt)
    torch.testing.assert_close(rebuilt, call(dynamic_run((1, 2), schedule=Schedule()), other, grid))
    assert run.lists.built == 3


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("dense", [False, True])
def test_nan_is_named(name: str, dense: bool):
    grid = GRIDS["video"]
    plan = plan_of(group_of((tuple(range(4)), Skip())), schedule=Schedule(dense_until=0.4 if dense else 1.0))
    qkv = tensors(grid)
    qkv[("query", "key", "value").index(name)][1, 2, 3, 4] = torch.nan
    call(PlanRun(plan), qkv, grid)
    with pytest.raises(ValueError, match=f"{name} of layer 0 holds NaN or inf at step 7"):
        call(PlanRun(plan, check_finite=True), qkv, grid, step=7)


def test_refused():
    grid = GRIDS["video"]
    run = PlanRun(plan_of(group_of((tuple(range(4)), Skip()))))
    query, key, value = tensors(grid)
    with pytest.raises(ValueError, match="layer must lie in 0"):
        call(run, [query, key, value], grid, layer=1)
    with pytest.raises(ValueError, match="share one shape"):
        call(run, [query, key[:, :, :5], value], grid)
    with pytest.raises(ValueError, match="the plan's 4 heads of 48, got 2 of 48"):
        call(run, [x[:, :2] for x in (query, key, value)], grid)
    with pytest.raises(ValueError, match="must have the grid's 98 tokens"):
        call(run, [query, key, value], GRIDS["text"])
    with pytest.raises(ValueError, match="noise_level must lie in 0"):
        call(run, [query, key, value], grid, noise_level=500.0)
    with pytest.raises(ValueError, match="backend must be one of"):
        call(PlanRun(run.plan, backend="magic"), [query, key, value], grid)
