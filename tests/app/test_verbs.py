"""The verbs beside `generate` hand their options on and say what came of it; signals."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from ziggurat.app.cli import main
from ziggurat.app.console import sentence, told


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


def test_train_hands_its_options_on(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("ziggurat.pipelines.shapes.train.train", lambda out, **options: seen.append((out, options)))
    assert call("train", "shapes", "--out", "here", "--stage", "tiny", "--steps", "5", "--no-compile") == 0
    (out, options), *_ = seen
    assert out == Path("here")
    assert (options["stages"], options["steps"], options["compiled"]) == (["tiny"], 5, False)
    assert options["plan"] is None
    assert capsys.readouterr().out == "out      here\n"


def test_train_refuses_an_unknown_stage(capsys):
    assert call("train", "shapes", "--stage", "huge") == 1
    assert "error: stages must be among" in capsys.readouterr().err


def test_evaluate_prints_scores_and_json(monkeypatch, capsys, wan_folder, tmp_path):
    share = {"share": 0.975, "low": 0.95, "high": 0.99, "count": 39, "of": 40}
    result = {"dense": {"all": share}, "sparse": {"all": share}, "lost": share | {"count": 1}, "density": 0.25}
    result["lost_at"] = [{"caption": "a caption", "seed": 7}]

    def evaluate(pipe, plan, *, captions, first, report, cache, figures, **_):
        assert (plan, captions, first) == ("auto", 40, 5)
        assert (cache, figures) == (tmp_path, tmp_path / "figures")
        report("dense", 40, 40)
        return result

    monkeypatch.setattr("ziggurat.pipelines.shapes.evaluate.evaluate", evaluate)
    arguments = ["--model", str(wan_folder), "--plan", "auto", "--captions", "40", "--cache", str(tmp_path), "--json"]
    arguments += ["--first", "5", "--figures", str(tmp_path / "figures")]
    assert call("evaluate", *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = json.loads(lines[-1])
    assert {"model": str(wan_folder), **result}.items() <= printed.items()
    assert printed["versions"]["torch"] == torch.__version__
    assert printed["machine"]["cores"] == os.cpu_count()
    assert lines[0] == "dense    all 97.5%"
    assert lines[2].startswith("lost     1 of 40 that dense gets right")
    assert lines[3].split() == ["a", "caption,", "seed", "7"]


def test_termination_unwinds_like_ctrl_c():
    before = signal.getsignal(signal.SIGTERM)
    removed = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            removed.append(True)

    with pytest.raises(SystemExit) as stop, told():
        work()
    assert (stop.value.code, removed) == (143, [True])
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.json"), "No such file or directory: a.json"),
        (PermissionError("out may not be written"), "out may not be written"),
        (MemoryError(), "memory ran out: take fewer frames or a smaller size"),
        (ValueError(""), "ValueError"),
        (ValueError("x" * 5000), "x" * 1000 + " ..."),
    ],
    ids=["system", "ours", "memory", "silent", "long"],
)
def test_every_error_is_one_line(error: Exception, words: str):
    assert sentence(error) == words


def test_a_card_needs_a_folder_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("ziggurat.pipelines.loading.load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert call("evaluate", "--card", "--model", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers") == 1
    assert "is a Hub id: give a folder" in capsys.readouterr().err
