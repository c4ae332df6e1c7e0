"""The fidelity bench: what it must find on maps of a known kind, on few tokens of the embedded model; its output."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.order import TokenOrder
from ziggurat.attention.topk import TopK
from ziggurat.kernels.listops import to_dense
from ziggurat.search import fidelity as bench
from ziggurat.search.bench import run, summary
from ziggurat.search.charts import draw
from ziggurat.search.contenders import CONTENDERS
from ziggurat.search.maps import MAPS, synthetic

GRID = TokenGrid.video(5, 8, 12)
SETTINGS = {"orders": ("hilbert",), "densities": (0.15, 0.4), "tile": 32, "block": 8}


@pytest.fixture(scope="module")
def rows() -> list[bench.Row]:
    return bench.fidelity([synthetic(name, GRID) for name in MAPS], **SETTINGS)


@pytest.mark.parametrize("name", MAPS)
def test_maps_are_what_they_are_called(name: str):
    sample = synthetic(name, GRID)
    again = synthetic(name, GRID)
    assert torch.equal(sample.query, again.query)
    assert not torch.equal(sample.query, synthetic(name, GRID, seed=1).query)
    shares = (sample.query @ sample.key.mT * sample.query.shape[-1] ** -0.5).softmax(-1)[0, 0]
    frame, row, column = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, (5, 8, 12)), indexing="ij"))
    near = (
        ((row[:, None] - row).abs() <= 2)
        & ((column[:, None] - column).abs() <= 2)
        & ((frame[:, None] - frame).abs() <= 2)
    )
    equal = (row[:, None] % 4 == row % 4) & (column[:, None] % 4 == column % 4)
    held = {"local": near, "strided": equal}.get(name)
    if held is not None:
        assert float((shares * held).sum(-1).mean()) > 3 * float(held.float().mean())
    entropy = float(-(shares * shares.clamp(min=1e-30).log()).sum(-1).mean())
    # The mass of a uniform map lies on most tokens, that of the others on a part of them.
    assert (entropy > 5.9) == (name == "uniform")


def test_rows_hold_medians_of_what_was_asked(rows: list[bench.Row]):
    names = {contender.name for contender in CONTENDERS}
    for source in MAPS:
        own = [row for row in rows if row.source == source]
        assert {row.selector for row in own} <= names
        assert {"topk", "precise", "loglinear", "pyramid", "precise by error, pooled rest"} <= {r.selector for r in own}
        for row in own:
            assert 0 < row.list_density < 0.6
            assert 0 <= row.recall <= 1 + 1e-5
            assert row.relative_error > 0
            assert row.select_seconds > 0
            assert row.attend_seconds > 0


def test_densities_are_met(rows: list[bench.Row]):
    # 60 blocks; the pooled rest takes 8 of them, and shares its coarse blocks with none.
    for row in rows:
        assert min(abs(row.list_density - wanted) for wanted in (0.15, 0.4)) < 0.09, row


def test_exact_masses_recall_most(rows: list[bench.Row]):
    for source in MAPS:
        for wanted in (0.15, 0.4):
            recall = {
                row.selector: row.recall
                for row in rows
                if row.source == source
                and abs(row.list_density - wanted) < 0.02
                and row.selector in ("topk", "precise")
            }
            assert recall["precise"] >= recall["topk"] - 1e-6


def test_a_selector_that_recalls_more_than_exact_masses_is_an_error(monkeypatch: pytest.MonkeyPatch):
    wrong = [bench.Contender("precise", lambda share, _: TopK(density=share), level0=True), CONTENDERS[3]]
    assert CONTENDERS[3].name == "precise"
    right = bench.Contender("other", CONTENDERS[3].make, level0=True)
    with pytest.raises(RuntimeError, match="on clustered exact masses recall"):
        bench.fidelity([synthetic("clustered", GRID)], contenders=[wrong[0], right], **SETTINGS)


def test_what_reads_everything_but_is_not_dense_is_an_error(monkeypatch: pytest.MonkeyPatch):
    problem = bench.pose(synthetic("local", GRID), TokenOrder(), tile=32, block=8)
    bench._check_covering(problem, "local")
    problem.exact = problem.exact * 1.01
    with pytest.raises(RuntimeError, match="on local TopK reads everything, yet is"):
        bench._check_covering(problem, "local")


def test_on_a_uniform_map_the_pooled_rest_says_nearly_everything(rows: list[bench.Row]):
    verdict = bench.verdicts(rows, most=0.4)["uniform"]
    assert verdict["topk"] == 1.0
    assert verdict["precise, pooled rest"] < 0.3
    assert verdict["loglinear"] < 0.3


def test_verdicts_compare_rows_of_one_order_and_density():
    def row(selector: str, order: str, density: float, error: float) -> bench.Row:
        return bench.Row(
            source="s",
            selector=selector,
            order=order,
            list_density=density,
            recall=0.5,
            relative_error=error,
            select_seconds=1.0,
            attend_seconds=1.0,
        )

    rows = [row("topk", "a", 0.1, 0.4), row("topk", "b", 0.1, 0.8), row("topk", "a", 0.5, 0.1)]
    rows += [row("x", "a", 0.105, 0.1), row("x", "b", 0.1, 0.4), row("x", "a", 0.13, 9.0), row("x", "a", 0.5, 0.2)]
    assert bench.verdicts(rows) == {"s": {"topk": 1.0, "x": pytest.approx(0.375)}}


def test_selection_is_measured_on_the_list_that_runs():
    problem = bench.pose(synthetic("clustered", GRID), TokenOrder(), tile=32, block=8)
    blocks, pyramid = problem.select(TopK(density=0.2), "pooled")
    weight = (to_dense(blocks, pyramid) * pyramid.log_weight.exp()).sum(-1)
    torch.testing.assert_close(weight, torch.full_like(weight, GRID.tokens))


def test_picture(rows: list[bench.Row], tmp_path: Path):
    path = draw(rows, tmp_path / "fidelity.png")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500
    assert [item.name for item in tmp_path.iterdir()] == ["fidelity.png"]


def test_on_the_embedded_model(tmp_path: Path):
    result = run(
        "shapes",
        tmp_path / "made" / "fidelity.png",
        prompts=["a large red circle"],
        layers=[1, 4],
        orders=("temporal",),
        densities=(0.15,),
        steps=4,
        frames=9,
        size=64,
        tile=64,
        block=8,
        map_grid=(3, 8, 8),
    )
    captured = [row for row in result.rows if row.source == "captured"]
    assert {row.source for row in result.rows} == {"captured", *MAPS}
    assert len(captured) >= 8
    assert set(result.to_topk["captured"]) >= {"topk", "precise", "loglinear"}
    assert (tmp_path / "made" / "fidelity.png").is_file()
    assert "captured" in summary(result)
    json.dumps([asdict(row) for row in result.rows], allow_nan=False)
