"""What makes up for keys that a list leaves out: measured at refreshes, added in between."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ziggurat.attention.correct import measure
from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.levels import level0_reads
from ziggurat.attention.order import TokenOrder
from ziggurat.attention.plan import Correction, HeadGroup, HeadPlan, Plan
from ziggurat.attention.precise import Precise
from ziggurat.attention.run import PlanRun
from ziggurat.attention.schedule import Schedule
from ziggurat.attention.selectors import AnySelector
from ziggurat.attention.topk import TopK
from ziggurat.attention.window import Window

GRID = TokenGrid.video(4, 6, 7, text_after=9)
HEADS, DIM = 3, 16
KINDS = [TopK(density=0.2), Window(frames=1), Precise(density=0.2)]


def qkv_of(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(1, HEADS, GRID.tokens, DIM, generator=generator) for _ in range(3)]


def dense(qkv: list[Tensor]) -> Tensor:
    query, key, value = qkv
    return F.scaled_dot_product_attention(query, key, value)


def run_of(selector: AnySelector, correction: Correction = "none", **schedule: Any) -> PlanRun:
    entry = HeadPlan(heads=tuple(range(HEADS)), selector=selector, correction=correction, rest="drop")
    group = HeadGroup(order=TokenOrder(name="morton"), tile=16, block=8, entries=(entry,))
    about: dict[str, Any] = {"model_class": "Tiny", "heads": HEADS, "head_dim": DIM, "grid": (4, 6, 7)}
    return PlanRun(Plan.uniform([group], layers=1, schedule=Schedule(**schedule), **about))


def call(run: PlanRun, qkv: list[Tensor], level: float = 0.5, branch: str = "cond") -> Tensor:
    out = run.attend_layer(qkv[0], qkv[1], qkv[2], layer=0, noise_level=level, step=0, branch=branch, grid=GRID)
    assert out is not None
    return out


def clock(level: float) -> float:
    return log(1 - level)


def sparse_of(selector: AnySelector, qkv: list[Tensor], *, lists_of: list[Tensor]) -> Tensor:
    """The output of a list alone that another call's queries and keys built."""
    run = run_of(selector)
    call(run, lists_of)
    if isinstance(selector, Precise):
        call(run, lists_of)  # the first has no lse yet, and is dense
    return call(run, qkv)


@pytest.mark.parametrize("correction", ["rho", "residual"])
@pytest.mark.parametrize("selector", KINDS, ids=lambda s: s.name)
def test_correction_is_that_of_the_refresh_step(correction: Correction, selector: AnySelector):
    run = run_of(selector, correction, refresh_at=(0.4,))
    first, later = qkv_of(0), qkv_of(1)
    torch.testing.assert_close(call(run, first, 0.9), dense(first))
    sparse_first, sparse_later = (sparse_of(selector, qkv, lists_of=first) for qkv in (first, later))

    rho = run.reuse._corrections["cond", ((0, 0), 0)].measured.rho.float()
    assert bool((rho <= 1).all())
    assert bool((rho > 0).all())
    assert float(rho[:, :, -9:].min()) > 0.999, "text reads everything"
    wanted = rho[..., None] * sparse_later
    if correction == "residual":
        wanted = wanted + dense(first) - rho[..., None] * sparse_first
    torch.testing.assert_close(call(run, later, 0.8), wanted, rtol=1e-4, atol=1e-4)
    if correction == "residual":
        # The same input again: the residual makes it dense.
        torch.testing.assert_close(call(run, first, 0.7), dense(first), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(call(run, later, 0.3), dense(later))
    rows = HEADS * GRID.tokens
    assert run.reuse.peak["corrections"] == rows * 2 + (rows * DIM * 4 if correction == "residual" else 0)


def test_rho_is_the_share_of_the_sum_that_the_list_kept():
    run = run_of(Window(frames=1), "rho")
    qkv = qkv_of(0)
    call(run, qkv)
    rho = run.reuse._corrections["cond", ((0, 0), 0)].measured.rho.float()
    blocks = run.lists.prepare(0, run.plan.layers[0].groups[0], GRID, torch.device("cpu"))
    assert blocks.blocks is not None
    layout = blocks.layouts[0]
    reads = level0_reads(blocks.blocks, layout.blocks)
    shares = (qkv[0] @ qkv[1].mT * DIM**-0.5).softmax(-1)
    for tile in range(layout.tiles):
        rows = layout.key_rows.view(-1, 8)[reads[tile]].flatten()
        keys, queries = rows[rows >= 0].long(), layout.query_rows[0, tile]
        queries = queries[queries >= 0].long()
        torch.testing.assert_close(rho[:, :, queries], shares[:, :, queries][..., keys].sum(-1), rtol=2e-3, atol=2e-3)


def test_branches_have_corrections_of_their_own():
    run = run_of(TopK(density=0.2), "rho", share_branches=True)
    for branch, seed in (("cond", 0), ("uncond", 1)):
        qkv = qkv_of(seed)
        torch.testing.assert_close(call(run, qkv, branch=branch), dense(qkv))
    assert run.lists.built == 1
    assert not torch.equal(*(item.measured.rho for item in run.reuse._corrections.values()))


@pytest.mark.parametrize("selector", KINDS, ids=lambda s: s.name)
def test_a_trend_moves_the_residual_on(selector: AnySelector):
    run = run_of(selector, "trend", refresh_at=(0.8, 0.4))
    first, second, third = (qkv_of(seed) for seed in range(3))
    sizes = []
    residuals: dict[float, Tensor] = {}
    for level, qkv in ((0.9, first), (0.8, second), (0.4, third)):
        torch.testing.assert_close(call(run, qkv, level), dense(qkv))
        sizes.append(run.reuse.nbytes)
        kept = run.reuse._corrections["cond", ((0, 0), 0)].measured
        rho = kept.rho.float()[..., None]
        residuals[level] = dense(qkv) - rho * sparse_of(selector, qkv, lists_of=qkv)
        for later in (level - 0.02, level - 0.05):
            # The same input again: what the list lacks is known, and what is added beside it is the trend.
            moved = call(run, qkv, later) - dense(qkv)
            if level == 0.9:
                assert float(moved.abs().max()) < 1e-3, "one measurement has no trend"
                continue
            before = {0.8: 0.9, 0.4: 0.8}[level]
            share = (clock(later) - clock(level)) / (clock(level) - clock(before))
            wanted = 0.5 * share * (residuals[level] - residuals[before])
            assert float(wanted.abs().max()) > 0.05
            torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=5e-3)
    rows = HEADS * GRID.tokens
    assert run.reuse.peak["corrections"] == rows * (2 + 2 * DIM * 4)
    assert sizes[1] - sizes[0] >= rows * DIM * 4


def test_a_trend_begins_with_the_run_and_with_its_grid():
    run = run_of(Window(frames=1), "trend", refresh_at=(0.8,))
    for _ in range(2):
        run.begin()
        call(run, qkv_of(0), 0.9)
        assert run.reuse._corrections["cond", ((0, 0), 0)].measured.trend is None
        call(run, qkv_of(1), 0.8)
        assert run.reuse._corrections["cond", ((0, 0), 0)].measured.trend is not None
    other = TokenGrid.video(4, 6, 7, text_before=9)
    run.attend_layer(*qkv_of(0), layer=0, noise_level=0.7, step=0, branch="cond", grid=other)
    assert run.reuse._corrections["cond", ((0, 0), 0)].measured.trend is None


def test_pure_noise_stands_at_a_finite_time():
    """1 - noise level is 0 there: its logarithm is taken no further back than at 0.999."""
    out, full = torch.zeros(2, 1, 5, 4), torch.ones(2, 1, 5, 4)
    lse = torch.zeros(2, 1, 5)
    first = measure("trend", out, lse, 2 * full, lse, noise_level=1.0)
    second = measure("trend", out, lse, full, lse, noise_level=0.9, before=first)
    assert second.trend is not None
    passed = log(0.1) - log(0.001)
    torch.testing.assert_close(second.trend, -full / passed)
    torch.testing.assert_close(second.apply(out, 0.5), full * (1 - 0.5 * (log(0.5) - log(0.1)) / passed))
    # Two at one time have none.
    assert measure("trend", out, lse, full, lse, noise_level=0.9999, before=first).trend is None
