"""Scores are those of attention itself: planted patterns, lists as old as a plan reads them, samples of tiles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ziggurat.attention.dense import Dense
from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.loglinear import LogLinear
from ziggurat.attention.order import TokenOrder, coordinates
from ziggurat.attention.plan import LayerPlan, Plan
from ziggurat.attention.precise import Precise
from ziggurat.attention.pyramid import Pyramid
from ziggurat.attention.run import PlanRun
from ziggurat.attention.schedule import Schedule
from ziggurat.attention.skip import Skip
from ziggurat.attention.stripe import Box, Stripe
from ziggurat.attention.topk import TopK
from ziggurat.attention.window import Window
from ziggurat.search import scoring
from ziggurat.search.candidates import with_dense
from ziggurat.search.capture import Sample
from ziggurat.search.choose import Problem, choose
from ziggurat.search.entry import Call, entries_of
from ziggurat.search.findings import Candidate
from ziggurat.search.journal import Journal
from ziggurat.search.scoring import score

FRAME = Candidate(selector=Window(frames=1), rest="pooled", tile=32, block=16)
PRECISE = Precise(density=0.3)
TOPK = Candidate(selector=TopK(density=0.3), rest="drop", tile=32, block=16)


def planted(grid: TokenGrid) -> Sample:
    """Four heads: one looks at its own frame, one at every second row and column, one at the first frame, one at
    everything alike."""
    frame, row, column = coordinates(grid.visual[0].grid)
    parity = 2 * (row % 2) + column % 2
    first = (frame > 0).long()
    dead = torch.zeros_like(frame)
    generator = torch.Generator().manual_seed(0)
    codes = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    key = torch.stack([codes[kind] for kind in (frame, parity, first, dead)])[None]
    query = torch.stack([codes[frame], codes[parity], codes[dead], codes[dead] * 0])[None] * 200
    # Without it keys of a kind would be equal, and reading them pooled would be exact.
    key = key + 0.1 * torch.randn(key.shape, generator=generator)
    value = torch.randn(1, 4, grid.tokens, 32, generator=generator)
    return Sample(source="planted", query=query, key=key, value=value, grid=grid)


def test_planted_patterns_give_those_families_back():
    """All four heads of one layer in one choice, among candidates that read as much or more, and dynamic ones."""
    grid = TokenGrid.video(6, 8, 8)
    layout: Any = {"tile": 64, "block": 16}
    raster, strided, temporal = (TokenOrder.model_validate(name) for name in ("raster", "strided(2)", "temporal"))
    stripe = Stripe(boxes=(Box(frames=(0, 1)),))
    wanted = [
        Candidate(selector=Window(frames=1), rest="drop", order=raster, **layout),
        Candidate(selector=Window(dilation=(1, 2, 2)), rest="drop", order=strided, **layout),
        Candidate(selector=stripe, rest="drop", order=raster, **layout),
        Candidate(selector=Skip(), rest="pooled", order=raster, **layout),
    ]
    others = [
        Candidate(selector=Skip(), rest="drop", order=raster, **layout),
        Candidate(selector=Window(frames=3), rest="drop", order=raster, **layout),
        Candidate(selector=Window(height=3, width=3), rest="drop", order=temporal, **layout),
        Candidate(selector=Window(frames=3, height=5, width=5), rest="pooled", order=raster, **layout),
        *(Candidate(selector=TopK(density=share), rest="drop", order=raster, **layout) for share in (0.1, 0.25)),
        Candidate(selector=Precise(density=0.2, by="error"), rest="pooled", order=raster, **layout),
    ]
    tried = with_dense([*others, *wanted])
    found = score(Call(planted(grid)), entries_of(tried, grid))
    # What the cost model knows: lists that look at queries and keys take time to build.
    built = np.array([0.0 if one.selector.static else 0.1 for one in tried])
    problem = Problem(
        errors=np.array(found["errors"])[None],
        seconds=np.array(found["densities"])[None] + built,
        groups=[[raster, strided, temporal].index(one.order) for one in tried],
        launch=0.01,
        stock=4.0,
    )
    choice = choose(problem, max_error=0.25)
    assert choice is not None
    assert choice.picks[0] is not None
    assert [str(tried[number]) for number in choice.picks[0]] == [str(one) for one in wanted]


def random_sample(grid: TokenGrid, seed: int = 1, *, heads: int = 2, head_dim: int = 16) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, heads, grid.tokens, head_dim, generator=generator) for _ in range(3))
    return Sample(source="captured", query=query, key=key, value=value, grid=grid)


EVERY_KIND = [
    Candidate(selector=Dense(), tile=32, block=16),
    Candidate(selector=Skip(), rest="pooled", tile=32, block=16),
    FRAME,
    TOPK,
    Candidate(selector=TopK(density=0.3, by="error"), rest="pooled", tile=32, block=16),
    Candidate(selector=PRECISE, rest="drop", tile=32, block=16),
    Candidate(selector=Precise(density=0.5), rest="pooled", tile=32, block=16),
    Candidate(selector=LogLinear(keep=2), tile=32, block=16),
    Candidate(selector=Pyramid(), rest="pooled", tile=32, block=16),
    Candidate(selector=Stripe(boxes=(Box(frames=(0, 1)),)), rest="pooled", tile=32, block=16),
    Candidate(selector=Window(height=3, width=3), order=TokenOrder(name="temporal"), tile=32, block=16),
]


def test_scores_are_those_of_attention_itself():
    """Every selector's score is the error of what the plan's own run would compute."""
    grid = TokenGrid.video(3, 7, 5)
    sample = random_sample(grid)
    tried = with_dense(EVERY_KIND)
    found = score(Call(sample), entries_of(tried, grid))
    query, key, value = sample.query, sample.key, sample.value
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    shares = torch.softmax(query @ key.mT / 4, -1)
    for number, candidate in enumerate(tried):
        group = candidate.group.model_copy(update={"entries": (candidate.entry.model_copy(update={"heads": (0, 1)}),)})
        plan = Plan(model_class="X", heads=2, head_dim=16, grid=(3, 7, 5), layers=(LayerPlan(groups=(group,)),))
        run = PlanRun(plan)
        for step in (0, 1):
            # The first step of lists that need an lse is exact.
            out = run.attend_layer(query, key, value, layer=0, noise_level=0.5, step=step, grid=grid)
        assert out is not None
        for head in range(2):
            error = float((out - exact)[0, head].norm() / exact[0, head].norm())
            assert found["errors"][head][number] == pytest.approx(error, abs=1e-5), str(candidate)
        if candidate.family not in ("precise", "dense"):
            assert np.mean([row[number] for row in found["densities"]]) == pytest.approx(run.list_density())
    frame_by_frame = tried.index(FRAME)
    layout = entries_of(tried, grid)[frame_by_frame].layout
    own = torch.zeros(grid.tokens, grid.tokens)
    for tile in layout.query_rows[0]:
        queries = tile[tile >= 0].long()
        near = {int(token) // 35 for token in queries}
        for block in layout.key_rows[0].view(-1, 16):
            keys = block[block >= 0].long()
            own[queries[:, None], keys] = float(bool(near & {int(token) // 35 for token in keys}))
    recall = (shares[0] * own).sum((1, 2)) / grid.tokens
    assert [row[frame_by_frame] for row in found["recalls"]] == pytest.approx(recall.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("correction", "scored"),
    [("none", [1, 2, 3, 4, 5]), ("rho", [2, 4, 5]), ("residual", [2, 4, 5]), ("trend", [2, 4, 5])],
)
def test_lists_and_corrections_are_as_old_as_the_schedule_leaves_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, correction: Any, scored: list[int]
):
    """A score at a step is the error of the plan's own run, whose lists and corrections an earlier step may have made:
    where corrections are measured there is none."""
    grid, levels = TokenGrid.video(3, 7, 5), [0.99, 0.9, 0.7, 0.4, 0.2, 0.1]
    schedule = Schedule(dense_until=0.95, refresh_at=(0.5,))
    # Without corrections a precise list of a later epoch is built from an older lse, which scores do not follow.
    more = [LogLinear(keep=1), *([PRECISE] if correction != "none" else [])]
    kinds = [TOPK, FRAME, *(Candidate(selector=one, tile=32, block=16) for one in more)]
    tried = with_dense([one.model_copy(update={"correction": correction}) for one in kinds])
    samples = [random_sample(grid, seed) for seed in range(len(levels))]
    measured: list[str] = []
    original = scoring.measure
    monkeypatch.setattr(
        scoring, "measure", lambda kind, *given, **more: (measured.append(kind), original(kind, *given, **more))[1]
    )
    run = scoring.ScoringRun(
        Plan.dense(model_class="X", config_hash="0", layers=1, heads=2, head_dim=16, grid=(1, 1, 1)),
        tried,
        Journal(tmp_path / "scores", {}),
        schedule=schedule,
        count=5,
        rows=None,
        takes_part=lambda level: True,
        report=lambda: None,
        cancelled=lambda: False,
    )
    plans = [
        Plan(
            **{"model_class": "X", "heads": 2, "head_dim": 16, "grid": (3, 7, 5), "schedule": schedule},
            layers=(LayerPlan(groups=(one.group.model_copy(update={"entries": (entry,)}),)),),
        )
        for one in tried
        for entry in [one.entry.model_copy(update={"heads": (0, 1)})]
    ]
    own = [PlanRun(plan) for plan in plans]
    for each in (run, *own):
        each.begin(levels)
    assert run.wanted == scored
    assert run.builds == {step: {1: 1, 2: 1, 3: 3, 4: 3, 5: 3}[step] for step in scored}
    wanted: dict[int, list[list[float]]] = {}
    for step, (level, sample) in enumerate(zip(levels, samples, strict=True)):
        qkv = sample.query, sample.key, sample.value
        call = {"layer": 0, "noise_level": level, "step": step, "branch": "cond", "grid": grid}
        run.attend_layer(*qkv, **call)
        exact = torch.nn.functional.scaled_dot_product_attention(*qkv)
        outputs = [each.attend_layer(*qkv, **call) for each in own]
        if step in scored:
            off = [(out - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3)) for out in outputs if out is not None]
            wanted[step] = torch.stack(off)[:, 0].T.tolist()
        elif step and correction != "none":
            assert all(torch.allclose(out, exact, atol=1e-5) for out in outputs if out is not None)
    found = {score.step: score.errors for score in run.journal.scores.values()}
    assert found.keys() == wanted.keys()
    # Once for each of four lists at either build, and for trends once more at the first; never for a step alone.
    assert measured == [correction] * {"none": 0, "rho": 8, "residual": 8, "trend": 12}[correction]
    for step in wanted:
        assert np.allclose(found[step], wanted[step], atol=1e-5), step
    if correction != "none":
        assert np.array(score(Call(samples[2]), entries_of(tried, grid))["errors"]).max() == 0
        return
    fresh = score(Call(samples[2]), entries_of(tried, grid))["errors"]
    assert not np.allclose(found[2], fresh, atol=1e-2)


def test_lists_that_are_the_same_on_a_grid_are_scored_once():
    """Of one frame a window has no others to look at; what is dropped or pooled, and corrected, still tells apart."""
    grid = TokenGrid.video(1, 9, 7)
    near = [Candidate(selector=Window(frames=n, height=3, width=3), rest="drop", tile=16, block=16) for n in (1, 3, 5)]
    pooled, corrected = near[2].model_copy(update={"rest": "pooled"}), near[2].model_copy(update={"correction": "rho"})
    entries = entries_of([*near, pooled, corrected, pooled, TOPK, TOPK], grid)
    assert [entry.twin for entry in entries] == [None, 0, 0, None, None, 3, None, None]
    sample = random_sample(grid)
    found = score(Call(sample, rows=32), entries)
    assert found == score(Call(sample, rows=32), [replace(entry, twin=None) for entry in entries])
    assert found["errors"][0][0] > 0.01


def test_of_long_sequences_tiles_take_turns():
    """Together the turns measure every query once: their squared errors add up to those of all."""
    grid = TokenGrid.video(4, 8, 8)
    sample = random_sample(grid)
    entries = entries_of(EVERY_KIND, grid)
    whole = score(Call(sample), entries)
    turns = [score(Call(sample, rows=64, turn=turn), entries) for turn in range(4)]
    assert [part["rows"] for part in turns] == [64] * 4
    norms = np.array([part["norms"] for part in turns])[:, :, None]
    off = ((np.array([part["errors"] for part in turns]) * norms) ** 2).sum(0)
    everything = (np.array(whole["errors"]) * np.array(whole["norms"])[:, None]) ** 2
    own = [number for number, one in enumerate(EVERY_KIND) if one.order.name != "temporal"]
    assert np.allclose(off[:, own], everything[:, own], rtol=1e-3, atol=1e-6)
    assert turns[0]["errors"] != turns[1]["errors"]
    assert np.allclose(np.mean([part["densities"] for part in turns], 0), whole["densities"], rtol=1e-6)
    assert np.allclose(np.mean([part["recalls"] for part in turns], 0), whole["recalls"], atol=1e-3)


def test_text_is_read_and_counted_but_not_sampled():
    grid = TokenGrid.video(4, 8, 8, text_after=40)
    sample = random_sample(grid)
    entries = entries_of(EVERY_KIND, grid)
    whole = score(Call(sample), entries)
    turns = [score(Call(sample, rows=100, turn=turn), entries) for turn in range(3)]
    assert sum(part["rows"] for part in turns) == 256
    assert whole["rows"] == 296
    # Two tiles or three of eight are of equal weight where all tiles read equally much.
    assert np.allclose(np.mean([part["densities"] for part in turns], 0), whole["densities"], rtol=0.05)
