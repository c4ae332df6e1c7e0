"""The evaluation: shares and their intervals, what a plan loses, and going on after an interruption."""

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ziggurat.attention.plan import Plan
from ziggurat.attention.schedule import Schedule
from ziggurat.pipelines.fidelity import object_boxes, psnr, ssim
from ziggurat.pipelines.shapes import evaluate as evaluating
from ziggurat.pipelines.shapes.evaluate import evaluate, wilson

SMALL = {"steps": 2, "guidance": 1.0, "frames": 5, "height": 32, "width": 32}


def test_psnr_and_ssim_of_known_errors():
    reference = np.full((3, 32, 48, 3), 100, np.uint8)
    assert psnr(reference, reference) == 100
    assert ssim(reference, reference) == pytest.approx(1)
    assert psnr(reference, reference + 10) == pytest.approx(20 * np.log10(255 / 10), abs=0.01)
    with pytest.raises(ValueError, match="one shape"):
        psnr(reference, reference[:2])


def test_boxes_hold_the_object_and_only_they_count():
    reference = np.zeros((2, 64, 64, 3), np.uint8)
    reference[0, 10:30, 40:60] = 255
    reference[1, 12:32, 2:4] = 255
    boxes = object_boxes(reference)
    assert boxes == [(6, 34, 36, 64), (8, 36, 0, 16)]
    worse = reference.copy()
    worse[0, 50:] += 60
    assert psnr(reference, worse, boxes) == 100
    assert psnr(reference, worse) < 25
    assert ssim(reference, worse, boxes) == pytest.approx(1)
    assert object_boxes(np.zeros((1, 32, 48, 3), np.uint8)) == [(0, 32, 0, 48)]


def test_wilson_intervals():
    # From Wilson's formula for 8 of 10 at 95 %.
    assert wilson(8, 10) == {
        "share": 0.8,
        "low": pytest.approx(0.4902, abs=1e-4),
        "high": pytest.approx(0.9433, abs=1e-4),
        "count": 8,
        "of": 10,
    }
    assert wilson(0, 0)["high"] == 1


def test_scores_are_cached_and_resumed(
    wan: Any, sparse_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[str] = []
    stock = type(wan).__call__

    @wraps(stock)
    def counted(self: Any, prompt: str, **arguments: Any) -> Any:
        if len(calls) == 3:
            calls.clear()
            raise KeyboardInterrupt
        calls.append(prompt)
        return stock(self, prompt, **arguments)

    monkeypatch.setattr(type(wan), "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(wan, sparse_plan(), captions=2, floors=1, cache=tmp_path, **SMALL)
    assert len(list(tmp_path.glob("*.npz"))) == 3
    result = evaluate(wan, sparse_plan(), captions=2, floors=1, cache=tmp_path, **SMALL)
    assert len(calls) == 3, "one under the plan, and two for the floors"
    again = evaluate(wan, sparse_plan(), captions=2, floors=1, cache=tmp_path, **SMALL)
    assert len(calls) == 3
    assert again == result

    assert result["dense"]["all"]["of"] == result["sparse"]["all"]["of"] == 2
    assert 0 < result["density"] < 1
    assert result["floors"]["all_blocks"]["psnr"]["median"] > result["fidelity"]["psnr"]["median"]
    assert result["floors"]["all_blocks"]["psnr"]["median"] > result["floors"]["other_seed"]["psnr"]["median"]


def test_figures_serve_without_the_videos(
    wan: Any, sparse_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two machines share the captions out; a third, with their lines, has nothing left to make."""
    plan, figures = sparse_plan(), tmp_path / "figures.jsonl"
    told = {"figures": figures, "floors": 1, **SMALL}
    halves = [evaluate(wan, plan, captions=1, first=i, cache=tmp_path / str(i), **told) for i in range(2)]
    with figures.open("a") as file:
        file.write('{"of": "cut o')
    monkeypatch.setattr(evaluating, "generate", None)
    # What is said of a plan makes no other videos of it.
    renamed = plan.model_copy(update={"name": "other", "note": "tried", "measured": {"psnr": 40.0}})
    whole = evaluate(wan, renamed, captions=2, cache=tmp_path / "empty", **told)
    assert whole["plan"] == "other"
    assert not list((tmp_path / "empty").iterdir())
    assert figures.read_text().endswith('"cut o\n'), "what comes next starts on a line of its own"
    for name in ("dense", "sparse"):
        assert whole[name]["count"]["count"] == sum(half[name]["count"]["count"] for half in halves)
    assert [one["seed"] for one in whole["wrong"]] == [one["seed"] for half in halves for one in half["wrong"]]
    psnrs = [half["fidelity"]["psnr"]["median"] for half in halves]
    assert whole["fidelity"]["psnr"]["median"] == pytest.approx(sum(psnrs) / 2)
    rescheduled = plan.model_copy(update={"schedule": Schedule(dense_first_steps=1)})
    with pytest.raises(TypeError, match="NoneType"):
        evaluate(wan, rescheduled, captions=2, cache=tmp_path / "empty", **told)


def test_what_is_lost_is_named(wan: Any, sparse_plan: Callable[..., Plan], tmp_path: Path):
    """The lines decide: a plan loses what dense had right and it has not."""
    plan, told = sparse_plan(), {"captions": 3, "floors": 0, "cache": tmp_path, **SMALL}
    evaluate(wan, plan, **told)
    lines = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    verdicts = [line for line in lines if "right" in line["found"]]
    for line, right in zip(verdicts, (True, True, False, True, False, False), strict=True):
        line["found"]["right"] = right
    (tmp_path / "figures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = evaluate(wan, plan, **told)
    assert [one["seed"] for one in result["wrong"]] == [2]
    assert [one["seed"] for one in result["lost_at"]] == [1]
    assert (result["lost"]["count"], result["lost"]["of"]) == (1, 2)


def test_a_verdict_of_another_judge_is_none(wan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures = tmp_path / "figures.jsonl"
    evaluate(wan, captions=1, cache=tmp_path, **SMALL)
    (tmp_path / "judge.py").write_text("another")
    monkeypatch.setattr(evaluating.judge, "__file__", str(tmp_path / "judge.py"))
    for _ in range(2):
        evaluate(wan, captions=1, cache=tmp_path, **SMALL)
        assert len(figures.read_text().splitlines()) == 2


def test_another_file_is_not_taken_for_figures(wan: Any, tmp_path: Path):
    other = tmp_path / "notes.txt"
    other.write_text("not JSON\n")
    with pytest.raises(ValueError, match="no line that evaluate wrote"):
        evaluate(wan, captions=1, cache=tmp_path, figures=other, **SMALL)
    assert other.read_text() == "not JSON\n"


def test_dense_videos_by_our_own_kernel(wan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They are the all-block plan's, and stock attention is asked for nothing but the floors."""
    plans: list[str | None] = []
    made = evaluating.generate

    def noted(pipe: Any, caption: str, *, plan: Plan | None, **settings: Any) -> Any:
        plans.append(plan and plan.name)
        return made(pipe, caption, plan=plan, **settings)

    monkeypatch.setattr(evaluating, "generate", noted)
    result = evaluate(wan, captions=2, dense_by="own", cache=tmp_path, **SMALL)
    assert result["dense_by"] == "own"
    assert plans == ["all blocks", "all blocks"]
    evaluate(wan, captions=2, cache=tmp_path, **SMALL)
    assert plans[2:] == [None, None]


def test_nothing_to_score_is_refused(wan: Any, tmp_path: Path):
    with pytest.raises(ValueError, match="captions must be at least 1"):
        evaluate(wan, captions=0, cache=tmp_path)
