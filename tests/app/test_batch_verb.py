"""`ziggurat batch`: in a fresh process, its exit status, and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ziggurat.app.batch import duration
from ziggurat.app.cli import main

SMALL = ["--height=16", "--width=16", "--frames=1", "--steps=1", "--plan=none", "--dtype=fp32", "--device=cpu"]


@pytest.fixture
def run(wan_folder, capsys, tmp_path, monkeypatch):
    """The verb in an empty folder: exit code, stdout and stderr lines."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, list[str], list[str]]:
        with pytest.raises(SystemExit) as stop:
            main(["batch", *arguments, "--out", "out", "--model", str(wan_folder), *SMALL])
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out.splitlines(), said.err.splitlines()

    return call


def test_in_a_fresh_process_and_again(run, wan_folder, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_bytes(b'\xef\xbb\xbfprompt,seed\r\n"a red, circle",\r\nblue,two\r\n')
    command = [sys.executable, "-c", "from ziggurat.app.cli import main; main()", "batch", "rows.csv", "--seeds", "2"]
    done = subprocess.run(
        [*command, "--seed", "5", "--out", "out", "--model", str(wan_folder), *SMALL, "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "bad row: line 3: seed: Input should be a valid integer" in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (len(result["made"]), result["failed"], list(result["bad"])) == (2, {}, ["3"])
    seeds = [json.loads((tmp_path / "out" / f"{name}.json").read_text())["seed"] for name in result["made"]]
    assert seeds == [5, 6]

    Path("rows.txt").write_text("a red, circle\n")
    code, out, err = run("rows.txt", "--seeds", "3", "--seed", "5", "--dry-run")
    assert code == 0, err
    assert out[0].endswith("line 1, seed 7, 1x16x16, 1 steps: a red, circle")
    assert out[-1].startswith("to make  1 of 3, 2 done; about ")
    assert out[-1].endswith("going by 2 made here")
    code, out, err = run("rows.txt", "--seeds", "3", "--seed", "5")
    assert (code, out[0]) == (0, "made     1 of 3, 2 done before, 0 failed"), err
    assert out[-1] == "out      out (index.html, manifest.jsonl)"


def test_settings_reach_every_row_and_failures_are_told(run):
    Path("rows.txt").write_text("red\nblue\n")
    code, out, err = run("rows.txt", "--set", "max_sequence_length=32", "--negative", "blue", "--dry-run", "--json")
    assert code == 0, err
    assert "time and size unknown: nothing was made here yet to tell from" in out[-2]
    assert len(json.loads(out[-1])["left"]) == 2
    code, out, err = run("rows.txt", "--set", "strenght=1")
    assert code == 1
    assert sum(line.startswith("bad row: line ") and "strenght" in line for line in err) == 2
    assert out[0] == "made     0 of 0, 0 done before, 0 failed, 2 bad rows"
    code, out, err = run("rows.txt", "--set", "strenght=1", "--strict")
    assert (code, out) == (1, [])
    assert err[-1].startswith("error: 2 of 2 rows are bad: line 1: WanPipeline has no argument 'strenght'")


def test_a_file_that_is_not_there(run, tmp_path):
    code, out, err = run("absent.csv")
    assert (code, out) == (1, [])
    assert err == ["error: rows absent.csv does not exist or is no file: give a .jsonl, .csv or .txt file of prompts"]
    assert not list(tmp_path.iterdir())


def test_durations():
    assert [duration(seconds) for seconds in (5.04, 75, 3600, 7290)] == [
        "5.0 s",
        "1 min 15 s",
        "1 h 0 min",
        "2 h 2 min",
    ]
