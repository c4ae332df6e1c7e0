"""Candidates whose residual is made up for: what a search foretells of them, and whether it takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.plan import Correction
from ziggurat.attention.run import PlanRun
from ziggurat.attention.schedule import Schedule
from ziggurat.attention.topk import TopK
from ziggurat.attention.window import Window
from ziggurat.pipelines.plans import model_shape
from ziggurat.search import correction as corrections
from ziggurat.search import run as searching
from ziggurat.search.candidates import default_candidates, load_candidates, to_toml, with_dense
from ziggurat.search.choose import Choice
from ziggurat.search.correction import affordable
from ziggurat.search.cost import Cost, LayoutCost
from ziggurat.search.findings import Candidate
from ziggurat.search.settle import knapsack, point_of

LEVELS = [0.99, 0.98, 0.9, 0.8, 0.6, 0.5, 0.3, 0.1]
SCHEDULE = Schedule(dense_until=0.95, refresh_at=(0.55,), dense_by="own")


def corrected(made_up, correction: Correction):
    """A search of one window and one top-k, over eight steps of which two are dense and two refresh."""
    kinds = [Window(frames=1, height=5), TopK(density=0.3)]
    tried = with_dense([Candidate(selector=one, tile=32, block=16, correction=correction) for one in kinds])
    densities = [[[0.2, 0.3, 1.0]] * 4] * 6
    steps: dict[str, Any] = {"calls": 16, "dense_calls": 4, "branches": 2, "refreshes": 2, "schedule": SCHEDULE}
    return made_up(candidates=tried, densities=densities, errors=densities, seconds=[1, 1, 1], proofs=[], **steps)


@pytest.mark.parametrize("correction", ["none", "residual"])
def test_the_density_of_a_point_is_that_of_its_run(made_up, correction: Correction):
    found = corrected(made_up, correction)
    entry: list[list[int] | None] = [[0, 1, 1, 2]] * 6
    grid = TokenGrid.video(*found.grid)
    query, key, value = torch.randn(3, 1, 4, grid.tokens, 32, generator=torch.Generator().manual_seed(0))
    plan = found.model_copy(update={"front": [point_of(found, Choice(picks=entry, error=0, seconds=1), 0)]}).plan(0)
    run = PlanRun(plan)
    run.begin(LEVELS)
    for step, level in enumerate(LEVELS):
        for branch in ("cond", "uncond"):
            call: Any = {"noise_level": level, "step": step, "branch": branch, "grid": grid}
            assert run.attend_layer(query, key, value, layer=0, **call) is not None
    own = run.status()[0]
    # As calibration would have measured the two.
    shares = _list_densities(found, query, key, value, grid)
    measured = found.model_copy(update={"densities": [[[*shares, 1.0]] * 4] * 6})
    expected = point_of(measured, Choice(picks=entry, error=0, seconds=1), 0).density
    assert own.density == pytest.approx(expected, abs=1e-3)
    # Two steps of eight are dense, one head of four is, and the others are at two of six steps if they are measured.
    measuring = 1 / 3 if correction == "residual" else 0
    assert own.density > 0.25 + 0.75 * (0.25 + 0.75 * measuring)
    entries = [one for layer in plan.layers for group in layer.groups for one in group.entries]
    assert {one.correction for one in entries if one.selector.name != "dense"} == {correction}
    assert {one.correction for one in entries if one.selector.name == "dense"} == {"none"}


def _list_densities(found, query, key, value, grid: TokenGrid) -> list[float]:
    """Of each candidate's list alone."""
    shares = []
    for number in range(2):
        alone = Choice(picks=[[number] * 4] * 6, error=0, seconds=1)
        plan = found.model_copy(update={"front": [point_of(found, alone, 0)]}).plan(0)
        run = PlanRun(plan)
        for step in (2, 3):
            run.attend_layer(query, key, value, layer=0, noise_level=LEVELS[step], step=step, grid=grid)
        shares.append(run.list_density())
    return shares


def test_what_a_correction_takes_is_dense_attention_at_every_refresh(made_up):
    layout = LayoutCost(tile=32, block=16, fixed=1e-6, pooled=0, pair=1e-9)
    cost = Cost(
        **{"launch": 1e-3, "layouts": [layout], "own": [2e-3, 3e-3, 0], "own_density": [0.2, 0.3, 1.0]},
        **{"select": [0.0, 1e-3, 0.0], "dense": 0.04, "stock": 0.08, "rows": []},
    )
    plain, more = (knapsack(corrected(made_up, kind), cost)[0].seconds for kind in ("none", "residual"))
    # Two refreshes, two branches, one head of four.
    assert (more - plain)[..., :2] == pytest.approx(2 * 2 * 0.04 / 4)
    assert (more - plain)[..., 2] == pytest.approx(0)


def test_residuals_are_taken_where_they_fit(wan, monkeypatch: pytest.MonkeyPatch):
    shape = model_shape(wan.transformer)
    ask: Any = (wan, wan.transformer, shape, "a large red circle", {"frames": 9, "height": 32, "width": 48})
    kind, why = affordable(*ask)
    assert kind == "trend"
    assert why.startswith("trend: ")
    queries = shape.layers * shape.heads * 3 * 4 * 6
    monkeypatch.setattr(corrections, "MOST", queries * (2 * shape.head_dim * 4 + 2) - 1)
    kind, why = affordable(*ask)
    assert (kind, why.startswith("residual: ")) == ("residual", True)
    monkeypatch.setattr(corrections, "MOST", 1000)
    kind, why = affordable(*ask)
    assert kind == "none"
    assert "more than the 1 kB for them" in why
    monkeypatch.setattr(corrections, "complete", lambda *given, **more: (None, None))
    kind, why = affordable(*ask)
    assert (kind, "does not tell" in why) == ("none", True)


def test_the_default_candidates_have_one_and_a_file_keeps_it(wan, tmp_path: Path):
    tried = default_candidates("cpu", "residual")
    assert {one.correction for one in tried if one.family != "dense"} == {"residual"}
    assert {one.correction for one in tried if one.family == "dense"} == {"none"}
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(tried))
    assert load_candidates(path) == with_dense(tried)
    asked: Any = {"prompts": ["a large red circle"], "proofs": 0, "noise_steps": 1, "families": ["skip"]}
    asked |= {"frames": 9, "height": 32, "width": 48, "guidance": 5.0, "schedule": Schedule()}
    found = searching.search(wan, tmp_path / "search", steps=3, **asked).findings
    assert {(one.family, one.correction) for one in found.candidates} == {("skip", "trend"), ("dense", "none")}
    assert found.corrected.startswith("trend: ")
    # Of one step all is exact.
    found = searching.search(wan, tmp_path / "search", steps=1, **asked).findings
    assert found.measured_steps == [0]
    assert np.array(found.errors).max() == 0
    with pytest.raises(ValueError, match="given ones say their own"):
        searching.search(wan, tmp_path / "search", candidates=path, correction="none")
    with pytest.raises(ValueError, match="families must name some of"):
        searching.search(wan, tmp_path / "search", steps=3, **asked | {"families": ["absent"]})
