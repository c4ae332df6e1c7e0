"""What a run keeps: lists once or twice, lse for later refreshes, corrections, all within a cap."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.order import TokenOrder
from ziggurat.attention.plan import HeadGroup, HeadPlan, LayerPlan, Plan
from ziggurat.attention.precise import Precise
from ziggurat.attention.rest import pool_rest
from ziggurat.attention.rows import lay_out
from ziggurat.attention.run import PlanRun
from ziggurat.attention.schedule import Schedule
from ziggurat.attention.select import DynamicSelector, Selector
from ziggurat.attention.topk import TopK
from ziggurat.attention.window import Window
from ziggurat.kernels.bitsets import BitList, to_bits
from ziggurat.kernels.blocklist import BlockList
from ziggurat.kernels.listops import from_dense
from ziggurat.kernels.pyramid import build_pyramid

GRID = TokenGrid.video(4, 6, 7, text_after=9)
HEADS, DIM = 3, 16


def qkv_of(seed: int, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(batch, HEADS, GRID.tokens, DIM, generator=generator) for _ in range(3)]


def dense(qkv: list[Tensor]) -> Tensor:
    query, key, value = qkv
    return F.scaled_dot_product_attention(query, key, value)


def run_of(
    *selectors: Selector,
    schedule: Schedule | None = None,
    correction: str = "none",
    rest: str = "drop",
    layers: int = 1,
    **more,
) -> PlanRun:
    """One entry per selector, the heads dealt out among them."""
    entries = tuple(
        HeadPlan(heads=tuple(range(i, HEADS, len(selectors))), selector=s, correction=correction, rest=rest)  # type: ignore[arg-type]
        for i, s in enumerate(selectors)
    )
    group = HeadGroup(order=TokenOrder(name="morton"), tile=16, block=8, entries=entries)
    plan = Plan(
        model_class="Tiny",
        heads=HEADS,
        head_dim=DIM,
        grid=(4, 6, 7),
        schedule=schedule or Schedule(),
        layers=(LayerPlan(groups=(group,)),) * layers,
    )
    return PlanRun(plan, **more)


def call(run: PlanRun, qkv: list[Tensor], level: float = 0.5, layer: int = 0, branch: str = "cond") -> Tensor:
    out = run.attend_layer(*qkv, layer=layer, noise_level=level, step=0, branch=branch, grid=GRID)
    assert out is not None
    return out


@pytest.fixture
def chosen(monkeypatch):
    """Which selector built lists, and with which lse."""
    seen: list[tuple[str, Tensor | None]] = []
    original = DynamicSelector.select

    def spy(self, *args, **kwargs):
        seen.append((self.name, kwargs["lse"]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DynamicSelector, "select", spy)
    return seen


def test_precise_runs_dense_once_and_takes_its_lse_again(chosen):
    run = run_of(Precise(density=0.2), schedule=Schedule(refresh_at=(0.6, 0.3)))
    first, later = qkv_of(0), qkv_of(1)
    torch.testing.assert_close(call(run, first, 0.9), dense(first))
    assert run.list_density() == 1.0, "no call has run sparse"
    reused = call(run, first, 0.8)
    assert not torch.allclose(reused, dense(first), atol=1e-3)
    assert run.reuse.peak["lse"] == HEADS * GRID.tokens * 4
    call(run, later, 0.5)
    (_, lse), (_, again) = chosen
    assert again is lse
    torch.testing.assert_close(lse, (first[0] @ first[1].mT * DIM**-0.5).logsumexp(-1))
    assert run.reuse.peak["lse"] > 0
    call(run, later, 0.2)
    assert len(chosen) == 3
    assert run.reuse._bytes()["lse"] == 0, "no refresh follows: nothing needs it"


def test_a_dense_step_of_our_own_kernel_lends_its_lse(chosen):
    schedule = Schedule(dense_until=0.8, dense_by="own", refresh_at=(0.5,))
    run = run_of(Window(frames=1), Precise(density=0.2), schedule=schedule)
    first, later = qkv_of(0), qkv_of(1)
    torch.testing.assert_close(call(run, first, 0.9), dense(first))
    assert chosen == []
    sparse = call(run, later, 0.7)
    # Heads 0 and 2 are the window's.
    (_, lse) = chosen[0]
    torch.testing.assert_close(lse, (first[0] @ first[1].mT * DIM**-0.5).logsumexp(-1)[:, 1:2])
    assert not torch.allclose(sparse[:, 1], dense(later)[:, 1], atol=1e-3)
    call(run, later, 0.4)
    assert torch.equal(chosen[1][1], lse), "taken again by the refresh"
    assert run.reuse._bytes()["lse"] == 0, "and given up: no refresh follows"

    fresh = run_of(Window(frames=1), Precise(density=0.2), schedule=schedule)
    call(fresh, first, 0.9, branch="cond")
    out = call(fresh, later, 0.7, branch="uncond")
    torch.testing.assert_close(out[:, 1], dense(later)[:, 1], msg="the other branch has lent nothing")


@pytest.mark.parametrize(("selector", "noise_level"), [(TopK(density=0.2), 0.9), (Precise(density=0.2), 0.1)])
def test_nothing_is_lent_where_no_list_wants_it(selector: Selector, noise_level: float):
    run = run_of(selector, schedule=Schedule(dense_until=0.8, dense_from=0.2, dense_by="own"))
    call(run, qkv_of(0), noise_level)
    assert run.reuse.nbytes == 0


def test_refresh_with_an_old_lse_chooses_what_the_new_keys_want():
    run = run_of(Precise(density=0.2), schedule=Schedule(refresh_at=(0.6,)))
    first = qkv_of(0)
    call(run, first, 0.9)
    # The same keys and values at other places: the queries want other blocks now, with the same lse.
    moved = [first[0], *(torch.cat([tensor[:, :, :168].flip(2), tensor[:, :, 168:]], 2) for tensor in first[1:])]
    out = call(run, moved, 0.5)
    fresh = run_of(Precise(density=0.2))
    call(fresh, moved)
    torch.testing.assert_close(out, call(fresh, moved))
    stale = run_of(Precise(density=0.2))
    call(stale, first)
    assert not torch.allclose(out, call(stale, moved), atol=1e-2)


def test_heads_beside_precise_ones_stay_sparse_while_those_run_dense():
    qkv = qkv_of(0)
    run = run_of(Precise(density=0.2), Window(frames=1, height=3), TopK(density=0.2))
    first = call(run, qkv)
    exact = dense(qkv)
    torch.testing.assert_close(first[:, 0], exact[:, 0])
    alone = call(run_of(Window(frames=1, height=3)), qkv)
    torch.testing.assert_close(first[:, 1], alone[:, 1])
    torch.testing.assert_close(first[:, 2], call(run_of(TopK(density=0.2)), qkv)[:, 2])
    second = call(run, qkv)
    torch.testing.assert_close(second[:, 1:], first[:, 1:])
    assert not torch.allclose(second[:, 0], exact[:, 0], atol=1e-3)
    assert run.density() < 0.85


@pytest.mark.parametrize("shared", [False, True])
def test_branches_share_a_list_only_if_asked(shared: bool, chosen):
    run = run_of(TopK(density=0.2), schedule=Schedule(share_branches=shared, refresh_at=(0.5,)))
    cond, uncond = qkv_of(0), qkv_of(1)
    for level in (0.9, 0.7, 0.4):
        call(run, cond, level, branch="cond")
        out = call(run, uncond, level, branch="uncond")
    assert len(chosen) == (2 if shared else 4)
    own = call(run_of(TopK(density=0.2)), uncond)
    assert torch.allclose(out, own) == (not shared)


def test_layers_have_lists_of_their_own(chosen):
    run = run_of(TopK(density=0.2), layers=3)
    for _ in range(2):
        for layer in range(3):
            call(run, qkv_of(layer), layer=layer)
    assert len(chosen) == 3


def test_another_batch_or_grid_is_no_reuse(chosen):
    run = run_of(TopK(density=0.2))
    call(run, qkv_of(0))
    call(run, qkv_of(0, batch=2))
    call(run, qkv_of(0, batch=2))
    other = TokenGrid.video(4, 6, 7, text_before=9)
    run.attend_layer(*qkv_of(0, batch=2), layer=0, noise_level=0.5, step=0, branch="cond", grid=other)
    assert len(chosen) == 3


def test_nothing_outlives_the_run():
    run = run_of(Precise(density=0.2), schedule=Schedule(refresh_at=(0.1,)), correction="residual")
    call(run, qkv_of(0))
    assert run.reuse.nbytes > 0
    peak = dict(run.reuse.peak)
    run.end()
    assert run.reuse.nbytes == 0
    assert run.reuse.peak == peak, "the figures stay"
    torch.testing.assert_close(call(run, qkv_of(0)), dense(qkv_of(0)))
    run.begin()
    assert (run.reuse.nbytes, run.reuse.peak) == (0, {})


@pytest.mark.parametrize("selector", [TopK(density=0.2), Precise(density=0.2)], ids=lambda s: s.name)
def test_over_the_cap_lists_are_rebuilt_instead_of_kept(selector: DynamicSelector, chosen):
    free, tight = run_of(selector), run_of(selector, max_cache_bytes=100)
    qkv = qkv_of(0)
    outputs = [(call(free, qkv), call(tight, qkv)) for _ in range(3)]
    assert tight.reuse.nbytes == 0
    assert tight.reuse.unkept == 3
    assert free.reuse.unkept == 0
    assert len(chosen) == 4
    wanted, got = outputs[-1]
    torch.testing.assert_close(got, dense(qkv) if selector.needs_lse else wanted)


def test_the_cap_is_per_branch():
    size = run_of(TopK(density=0.2))
    call(size, qkv_of(0))
    one = size.reuse.peak["lists"]
    run = run_of(TopK(density=0.2), layers=2, max_cache_bytes=one)
    for branch in ("cond", "uncond"):
        for layer in range(2):
            call(run, qkv_of(0), layer=layer, branch=branch)
    assert run.reuse.unkept == 2
    assert run.reuse.nbytes == 2 * one


def test_joined_lists_are_kept_while_there_is_room_and_give_way_first():
    run = run_of(TopK(density=0.2), Window(frames=1), schedule=Schedule(refresh_at=(0.5,)))
    first = call(run, qkv_of(0), 0.9)
    (joined,) = run.reuse._ready.values()
    torch.testing.assert_close(call(run, qkv_of(0), 0.8), first, rtol=0, atol=0)
    assert next(iter(run.reuse._ready.values())) is joined
    call(run, qkv_of(1), 0.4)
    assert next(iter(run.reuse._ready.values())) is not joined, "of another epoch"

    lists, together = run.reuse.peak["lists"], run.reuse.nbytes
    narrow = run_of(TopK(density=0.2), Window(frames=1), layers=4, max_cache_bytes=2 * together)
    for layer in range(4):
        call(narrow, qkv_of(0), layer=layer)
    assert narrow.reuse.unkept == 0
    assert len(narrow.reuse._lists) == 4
    assert len(narrow.reuse._ready) < 4, "no more than half of the cap"
    full = run_of(TopK(density=0.2), Window(frames=1), layers=2, max_cache_bytes=2 * together)
    call(full, qkv_of(0))
    assert len(full.reuse._ready) == 1
    full.reuse.max_bytes = full.reuse.nbytes + lists - 1
    call(full, qkv_of(0), layer=1)
    assert not full.reuse._ready
    assert (len(full.reuse._lists), full.reuse.unkept) == (2, 0)


def test_the_smaller_form_is_kept():
    kept = []
    for density in (0.04, 0.5):
        run = run_of(TopK(density=density), rest="drop")
        call(run, qkv_of(0))
        (entry,) = run.reuse._lists.values()
        (form,) = entry.lists
        assert form is not None
        blocks = form.to_list() if isinstance(form, BitList) else form
        assert isinstance(blocks, BlockList)
        kept.append(type(form))
        again = run_of(TopK(density=density), rest="drop")
        torch.testing.assert_close(call(run, qkv_of(0)), call(again, qkv_of(0)))
    assert kept[1] is BitList


def test_a_large_video_stays_under_the_default_cap():
    """75,600 tokens × 40 heads × 40 layers at 15 %, the rest pooled: bits of one head, times all of them."""
    grid = TokenGrid.video(21, 45, 80)
    layout = lay_out(grid, TokenOrder(), tile=128, block=64)
    reads = torch.rand(1, 1, layout.tiles, layout.blocks, generator=torch.Generator().manual_seed(0)) < 0.15
    key = torch.zeros(1, 1, grid.tokens, 1)
    pyramid = build_pyramid(key, key, layout.key_rows, block=64, factors=(1, 64))
    blocks = pool_rest(from_dense(reads, layout.query_rows, 64), layout, factors=(1, 64))
    bits = to_bits(blocks, pyramid)
    kept = min(blocks.nbytes, bits.nbytes) - bits.query_rows.nbytes
    lse = grid.tokens * 4
    assert 40 * 40 * kept < 1 << 29
    assert 40 * 40 * (kept + lse) < 1 << 30


def test_gradients_flow_through_dynamic_and_dense_steps():
    run = run_of(Precise(density=0.2), correction="residual")
    for _ in range(2):
        qkv = [tensor.requires_grad_() for tensor in qkv_of(0)]
        grads = torch.autograd.grad(call(run, qkv).square().sum(), qkv)
        assert all(bool(torch.isfinite(grad).all()) and float(grad.norm()) > 0 for grad in grads)


def test_layers_that_the_schedule_keeps_dense():
    schedule = Schedule(dense_first_layers=1, dense_last_layers=1, dense_layers=("blocks.2.*",))
    run = run_of(TopK(), layers=5, schedule=schedule)
    run.name_layers([f"blocks.{index}.attn1" for index in range(5)])
    for layer in range(5):
        run.attend_layer(*qkv_of(0), layer=layer, noise_level=0.5, step=0, grid=GRID)
    assert [status.state for status in run.status()] == ["dense", "sparse", "dense", "sparse", "dense"]
    assert run.status()[2].reason == "the schedule keeps this layer dense (1 calls)"
    with pytest.raises(ValueError, match=r"dense_layers must name layers such as 'a', got 'blocks.2.\*'"):
        run.name_layers(["a", "b", "c", "d", "e"])


@pytest.mark.parametrize("correction", ["none", "residual"])
@pytest.mark.parametrize("dense_by", [None, "own"])
def test_entries_whose_heads_stand_between_others_give_them_what_is_theirs(correction: str, dense_by):
    """Heads 0 and 2 in one entry, 1 in another, against three entries; lse built now, lent, kept, and outputs exact."""
    schedule = Schedule(dense_until=0.8, dense_by=dense_by, refresh_at=(0.3,))
    chosen, window = TopK(density=0.2, by="error"), Window(frames=1)
    more = {"schedule": schedule, "correction": correction, "rest": "pooled"}
    between, apart = run_of(chosen, window, **more), run_of(chosen, window, chosen, **more)
    for step, level in enumerate((0.9, 0.7, 0.6, 0.3, 0.2)):
        if level > 0.8 and dense_by is None:
            continue
        qkv = qkv_of(step)
        got, expected = call(between, qkv, level), call(apart, qkv, level)
        torch.testing.assert_close(got, expected)
        # The heads differ, and the step is sparse unless it measures.
        assert not torch.allclose(got[:, 0], got[:, 2])
        assert torch.allclose(got, dense(qkv), atol=1e-5) == (
            level > 0.8 or (correction != "none" and level in (0.7, 0.3))
        )
    assert between.density() == pytest.approx(apart.density())


@pytest.mark.parametrize("selector", [TopK(density=0.2), Window(frames=1), Precise(density=0.2)])
def test_a_layer_measures_at_the_steps_of_its_own_schedule(selector: Selector):
    usual = Schedule(dense_until=0.85, dense_by="own", refresh_at=(0.5,))
    own = Schedule(dense_until=0.95, dense_by="own", refresh_at=(0.75, 0.3))
    run = run_of(selector, correction="residual", schedule=usual, layers=3)
    plain, other = run.plan.layers[0], run.plan.layers[1].model_copy(update={"schedule": own})
    run = PlanRun(run.plan.model_copy(update={"layers": (plain, other, plain)}))
    levels = (1.0, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1)
    run.begin(levels)
    assert run.describe_steps() == (
        "7 steps: 0-1 dense, 2 refresh, 3 reuse, 4 refresh, 5-6 reuse; "
        "layer 1: 0 dense, 1 refresh, 2 reuse, 3 refresh, 4 reuse, 5 refresh, 6 reuse"
    )
    exact: list[list[int]] = [[], [], []]
    for step, level in enumerate(levels):
        qkv = qkv_of(step)
        for layer, steps in enumerate(exact):
            if torch.allclose(call(run, qkv, level, layer), dense(qkv), atol=1e-5):
                steps.append(step)
    assert exact == [[0, 1, 2, 4], [0, 1, 3, 5], [0, 1, 2, 4]]
    assert [status.dense_calls for status in run.status()] == [2, 1, 2]
