"""`ziggurat plan` shows, checks and compares plan files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ziggurat.app.cli import main
from ziggurat.attention.order import TokenOrder
from ziggurat.attention.plan import HeadGroup, HeadPlan, LayerPlan, Plan
from ziggurat.attention.schedule import Schedule
from ziggurat.attention.tell import differences, ranges
from ziggurat.attention.topk import TopK
from ziggurat.attention.window import Window
from ziggurat.pipelines.plans import model_shape


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(one) for one in arguments])
    return int(stop.value.code or 0)


@pytest.fixture
def mixed(sparse_plan) -> Plan:
    """A sparse layer, and one that is left to the host."""
    plan = sparse_plan(schedule=Schedule(dense_until=0.9), name="mixed", predicted={"error": 0.25})
    return plan.model_copy(update={"layers": (plan.layers[0], LayerPlan(dense="it is the last"))})


def test_show_tells_layers_heads_and_figures(mixed, tmp_path, capsys):
    path, picture = mixed.save(tmp_path / "plan.json"), tmp_path / "plan.png"
    assert call("plan", "show", path, "--picture", picture, "--json") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    said = dict(line.split(None, 1) for line in lines if not line.startswith(("layer", " ")))
    assert said["name"] == "mixed"
    assert said["grid"] == "5x4x6 latent patches, 120 tokens"
    assert (said["schedule"], said["predicted"]) == ("dense_until 0.9", "error 0.25")
    assert said["heads"] == "2 stock, 1 window, 1 stripe"
    first, second, third = lines[-3:]
    assert first.startswith("layer 0")
    assert first.endswith("temporal order, tile 16, block 16  head 0: window frames=2 height=3, rest dropped")
    assert second.strip().startswith("head 1: stripe")
    assert third == "layer 1     100.0%  dense: it is the last"
    found = json.loads(last)
    assert found["families"] == [["window", "stripe"], ["stock", "stock"]]
    assert found["dense"] == {"1": "it is the last"}
    assert found["density"] == pytest.approx(sum(map(sum, found["densities"])) / 4)
    with Image.open(picture) as image:
        assert image.format == "PNG"


def test_show_tells_what_to_expect_at_another_size(sparse_plan, tmp_path, capsys):
    path = sparse_plan().save(tmp_path / "plan.json")
    assert call("plan", "show", path, "--grid", "5x8x6", "--json") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    here = json.loads(last)
    assert here["on"] == [5, 8, 6]
    assert call("plan", "show", path, "--json") == 0
    own = json.loads(capsys.readouterr().out.splitlines()[-1])
    # A window of two by three patches reads a smaller share of a larger grid.
    assert here["density"] < own["density"]
    assert any(line.startswith("density") and "on 5x8x6, which it was not made for" in line for line in lines)
    assert call("plan", "show", path, "--grid", "5x8") != 0
    assert "17x16x16" in capsys.readouterr().err


def test_show_says_equal_layers_once(sparse_plan, tmp_path, capsys):
    path = sparse_plan(layers=5).save(tmp_path / "plan.json")
    assert call("plan", "show", path) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("layer")]
    assert [line.split("  ")[0] for line in lines] == ["layers 0-4"]


def test_show_refuses_a_picture_that_is_none(mixed, tmp_path, capsys):
    path = mixed.save(tmp_path / "plan.json")
    for name in ("plan.jpg", "none/plan.png"):
        assert call("plan", "show", path, "--picture", tmp_path / name) == 1
        assert "error: --picture must name a .png" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["plan.json"]


def test_validate_checks_the_file(mixed, tmp_path, capsys):
    path = mixed.save(tmp_path / "plan.json")
    assert call("plan", "validate", path, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["valid"] is True
    data = json.loads(path.read_text())
    data["layers"][0]["groups"][0]["entries"][0]["selector"]["frames"] = -1
    path.write_text(json.dumps(data))
    assert call("plan", "validate", path) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "layers.0.groups.0.entries.0.selector" in said.err
    assert call("plan", "validate", tmp_path / "nothing.json") == 1


def test_validate_checks_against_a_model(sparse_plan, wan, wan_folder, experts_folder, tmp_path, capsys):
    own = sparse_plan(config_hash=model_shape(wan.transformer).config_hash).save(tmp_path / "own.json")
    assert call("plan", "validate", own, "--model", wan_folder) == 0
    assert f"it fits the transformer of {wan_folder}" in capsys.readouterr().out
    assert call("plan", "validate", own, "--model", experts_folder) == 0
    assert "it fits the transformer and the transformer_2 of" in capsys.readouterr().out
    for field, plan in {
        "layers": sparse_plan(layers=3),
        "head_dim": sparse_plan(head_dim=8),
        "config_hash": sparse_plan(config_hash="0"),
    }.items():
        path = plan.save(tmp_path / "other.json")
        assert call("plan", "validate", path, "--model", wan_folder) == 1
        assert f"its {field} is" in capsys.readouterr().err


def test_diff_exits_like_diff(mixed, sparse_plan, tmp_path, capsys):
    one = mixed.save(tmp_path / "one.json")
    other = sparse_plan(name="mixed", predicted={"error": 0.5}).save(tmp_path / "other.json")
    assert call("plan", "diff", one, one) == 0
    assert capsys.readouterr().out == ""
    assert call("plan", "diff", one, other, "--json") == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["schedule.dense_until: 0.9 -> 1", "predicted.error: 0.25 -> 0.5"]
    assert [line.split(":")[0] for line in lines[2:]] == ["layer 1, head 0", "layer 1, head 1"]
    assert lines[2].startswith("layer 1, head 0: dense (it is the last) -> window frames=2 height=3, rest dropped")
    found = json.loads(last)
    assert not found["equal"]
    assert len(found["differences"]) == len(lines)
    assert call("plan", "diff", one, tmp_path / "nothing.json") == 2
    assert capsys.readouterr().err.startswith("error: plan ")


def grouped(*groups: HeadGroup, **fields) -> Plan:
    common = {"model_class": "Any", "heads": 2, "head_dim": 8, "grid": (2, 2, 2), "layers": (LayerPlan(groups=groups),)}
    return Plan(**{**common, **fields})


def entry(*heads: int, **fields) -> HeadPlan:
    return HeadPlan(**{"heads": heads, "selector": TopK(density=0.1), "rest": "drop", **fields})


BASE = grouped(HeadGroup(entries=(entry(0, 1),)))


@pytest.mark.parametrize(
    ("other", "wanted"),
    [
        (grouped(HeadGroup(entries=(entry(0), entry(1, rest="pooled")))), ["layer 0, head 1"]),
        (grouped(HeadGroup(entries=(entry(0), entry(1, correction="rho")))), ["layer 0, head 1"]),
        (grouped(HeadGroup(entries=(entry(0, 1, selector=TopK(density=0.2)),))), ["layer 0, heads 0-1"]),
        (grouped(HeadGroup(block=32, entries=(entry(0, 1),))), ["layer 0, heads 0-1"]),
        (grouped(HeadGroup(entries=(entry(0, 1),), factors=(1, 4))), ["layer 0, heads 0-1"]),
        (grouped(HeadGroup(entries=(entry(0, 1),), factors=(1, 64))), ["layer 0, groups"]),
        (grouped(HeadGroup(entries=(entry(0),)), HeadGroup(entries=(entry(1),))), ["layer 0, groups"]),
        (BASE.model_copy(update={"layers": BASE.layers * 2}), ["layers"]),
        (BASE.model_copy(update={"layers": (BASE.layers[0].model_copy(update={"schedule": Schedule()}),)}),
         ["layer 0, schedule"]),
        (BASE.model_copy(update={"grid": (2, 2, 4)}), ["grid"]),
        (BASE.model_copy(update={"measured": {"psnr": 30.0}}), ["measured.psnr"]),
    ],
)  # fmt: skip
def test_whatever_differs_is_told(other, wanted):
    there, back = differences(BASE, other), differences(other, BASE)
    assert [where for where, _, _ in there] == [where for where, _, _ in back] == wanted
    assert all(before != after for _, before, after in there + back)
    assert differences(other, other) == []


def test_orders_and_figures_that_look_alike_are_told_apart():
    one, other = (
        grouped(
            HeadGroup(order=TokenOrder(name="explicit", permutation=tuple(order)), entries=(entry(0, 1),)),
            predicted={"error": error},
        )
        for order, error in ((range(8), 0.1234567), (reversed(range(8)), 0.1234568))
    )
    (_, before, after), (where, *said) = differences(one, other)
    assert (before, after) == ("0.1234567", "0.1234568")
    assert where == "layer 0, heads 0-1"
    assert said[1] == f"{said[0]}, in another permutation"


def test_a_change_in_many_layers_is_told_once():
    layers = (*BASE.layers, LayerPlan(groups=(HeadGroup(entries=(entry(0, 1, selector=Window(frames=1)),)),)))
    one, other = (BASE.model_copy(update={"layers": own * 2}) for own in (BASE.layers * 2, layers))
    assert [where for where, _, _ in differences(one, other)] == ["layers 1, 3, heads 0-1"]


def test_ranges():
    assert ranges([7, 3, 0, 1, 2, 9, 10]) == "0-3, 7, 9-10"
    assert ranges([]) == ""
