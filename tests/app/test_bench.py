"""`ziggurat bench fidelity` hands its options on, and prints what comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ziggurat.app.cli import main
from ziggurat.search import bench
from ziggurat.search.fidelity import Row


def test_prints_the_rows_as_its_last_line(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path):
    row = Row(
        source="local",
        selector="topk",
        order="raster",
        list_density=0.15,
        recall=0.5,
        relative_error=0.25,
        select_seconds=0.01,
        attend_seconds=0.02,
    )
    asked = {}

    def run(model, out, **options):
        asked.update(options, model=model, out=out)
        options["report"]("bench", 1, 2)
        return bench.Result(rows=[row], to_topk={"local": {"topk": 1.0}}, overhead=[])

    monkeypatch.setattr(bench, "run", run)
    arguments = [
        "bench",
        "fidelity",
        "--model",
        "none",
        "--out",
        str(tmp_path / "a.png"),
        "--order",
        "raster",
        "--json",
    ]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--density", "0.1", "--density", "0.2", "--layer", "3"])
    assert not stopped.value.code
    assert (asked["model"], asked["out"], asked["layers"]) == (None, tmp_path / "a.png", [3])
    assert (asked["orders"], asked["densities"]) == (["raster"], [0.1, 0.2])
    lines = capsys.readouterr().out.splitlines()
    said = json.loads(lines[-1])
    assert said["rows"] == [
        {
            "source": "local",
            "selector": "topk",
            "order": "raster",
            "list_density": 0.15,
            "recall": 0.5,
            "relative_error": 0.25,
            "select_seconds": 0.01,
            "attend_seconds": 0.02,
        }
    ]
    assert "machine" in said
    assert "   1.00  topk" in lines


def test_wrong_numbers_are_one_sentence(capsys, tmp_path: Path):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "fidelity", "--model", "none", "--density", "1.5", "--out", str(tmp_path / "a.png")])
    assert stopped.value.code == 1
    assert "error: densities must lie above 0" in capsys.readouterr().err
