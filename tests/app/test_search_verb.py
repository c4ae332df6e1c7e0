"""`ziggurat search` hands its options on, prints what came of it, and says what it keeps when it is ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ziggurat.app.cli import main
from ziggurat.attention.plan import Plan
from ziggurat.search import run as searching

SMALL = ["--frames", "9", "--height", "32", "--width", "48", "--steps", "3", "--noise-steps", "1", "--dense-until", "1"]
CANDIDATES = """
[[candidate]]
selector = { name = "window", frames = 1 }
rest = "pooled"
tile = 32

[[candidate]]
selector = { name = "skip" }
rest = "pooled"
tile = 32
"""
KEYS = {"plan", "candidates", "heads", "density", "predicted_speedup", "measured_speedup", "psnr", "ssim", "seconds"}


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(one) for one in arguments])
    return int(stop.value.code or 0)


@pytest.fixture
def asked(wan_folder: Path, tmp_path: Path) -> list[str | Path]:
    """A search of seconds: one prompt, two candidates."""
    (tmp_path / "mine.toml").write_text(CANDIDATES)
    (tmp_path / "prompts.txt").write_text("# calibrated on\na large red circle\n")
    files = ["--candidates", tmp_path / "mine.toml", "--prompts", tmp_path / "prompts.txt", "--held-out"]
    return [
        "search",
        "--model",
        wan_folder,
        *SMALL,
        *files,
        tmp_path / "prompts.txt",
        "--proofs",
        "1",
        "--dtype",
        "fp32",
    ]


def test_a_search_from_the_command_line(asked, tmp_path, capsys):
    out = tmp_path / "found"
    assert call(*asked, "--out", out, "--max-error", "5", "--pareto", "--across", "2", "--json") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    said = json.loads(last)
    assert said.keys() >= KEYS
    assert said["heads"] == 4
    assert (said["measured_speedup"], said["psnr"]) != (None, None)
    plan = Plan.load(said["plan"])
    assert plan.measured["psnr"] == said["psnr"]
    front = [line for line in lines if " s  error " in line]
    assert len(front) == len(searching.load_result(out).front)
    assert sum("<- plan.json" in line for line in front) == 1
    for number in range(len(front)):
        assert Plan.load(out / f"plan-{number}.json").model_class == plan.model_class
    # Those spread over the front were proved too.
    assert {0, len(front) - 1} <= {proof.point for proof in searching.load_result(out).findings.proofs}


def test_what_can_not_be_reached_exits_with_the_nearest(asked, tmp_path, capsys):
    out = tmp_path / "nearest"
    assert call(*asked, "--out", out, "--target-psnr", "1000", "--json") == 1
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["psnr"] < 1000
    assert f"error: no plan of this search keeps the bound: {out / 'plan.json'} is the nearest" in said.err
    assert (out / "report.html").is_file()
    Plan.load(out / "plan.json")


def test_refresh_levels_reach_the_schedule_falling(asked, tmp_path, monkeypatch):
    given = []

    def ended(*_, schedule, **__):
        given.append(schedule)
        raise KeyboardInterrupt

    monkeypatch.setattr(searching, "search", ended)
    call(*asked, "--out", tmp_path / "levels", "--refresh-at", "0.3", "--refresh-at", "0.8")
    call(*asked, "--out", tmp_path / "levels")
    assert given == [{"dense_until": 1.0, "refresh_at": (0.8, 0.3)}, {"dense_until": 1.0}]


def test_an_ended_search_says_what_it_keeps(asked, tmp_path, capsys, monkeypatch):
    def ended(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(searching, "search", ended)
    assert call(*asked, "--out", tmp_path / "ended") == 130
    assert f"kept in {tmp_path / 'ended'}: the same command with --resume" in capsys.readouterr().err


def test_the_default_candidates_are_written_to_be_edited(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    assert call("search", "--write-candidates", path) == 0
    assert path.read_text().count("[[candidate]]") >= 30
    assert 'correction = "trend"' in path.read_text()
    assert call("search", "--write-candidates", tmp_path / "plain.toml", "--correction", "none") == 0
    assert "residual" not in (tmp_path / "plain.toml").read_text()
    assert call("search", "--write-candidates", path) == 1
    assert "is there already" in capsys.readouterr().err
