"""generate_many: going on after any end, locks, full disks, interrupts, kills."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ziggurat.pipelines.batch import make
from ziggurat.pipelines.batch.manifest import append, locked

ROOT = Path(__file__).parents[2]
PROMPT = "a large red circle moving left"


def half_record(folder: Path, name: str) -> None:
    (folder / name).unlink()


def half_video(folder: Path, name: str) -> None:
    (folder / f"{name}.json").unlink()


def part(folder: Path, name: str) -> None:
    half_record(folder, name)
    half_record(folder, f"{name}.json")
    for of in (name, f"{name}.json", "manifest.jsonl", "index.html"):
        (folder / f".{of}.x1y2.part").write_bytes(b"half")


def without_line(folder: Path, name: str) -> None:
    lines = (folder / "manifest.jsonl").read_text().splitlines(keepends=True)
    (folder / "manifest.jsonl").write_text("".join(line for line in lines if name not in line))


def torn_line(folder: Path, name: str) -> None:
    text = (folder / "manifest.jsonl").read_text()
    (folder / "manifest.jsonl").write_text(text[: text.index(name) + 30])


def no_manifest(folder: Path, name: str) -> None:
    (folder / "manifest.jsonl").unlink()


def said_to_have_failed(folder: Path, name: str) -> None:
    append(folder / "manifest.jsonl", {"name": name, "status": "failed", "error": "x"})


@pytest.mark.parametrize(
    ("phase", "again"),
    [
        *((half_record, 1), (half_video, 1), (part, 1), (without_line, 0), (torn_line, 0), (no_manifest, 0)),
        (said_to_have_failed, 0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_goes_on_after_each_phase(batch, tmp_path, phase, again, files):
    out = tmp_path / "out"
    made = batch([PROMPT, "blue"])
    whole = files(out)
    (out / ".mine.part").write_text("not a batch's")
    (out / "notes.json").write_text("{}")
    phase(out, made.made[1])
    result = batch([PROMPT, "blue"])
    assert (len(result.made), result.ok) == (again, True)
    after = files(out)
    assert after.keys() == whole.keys() | {".mine.part", "notes.json"}
    assert after[made.made[0]] == whole[made.made[0]]
    entries = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert sorted(entry["name"] for entry in entries) == sorted(made.made)
    assert {entry["status"] for entry in entries} == {"done"}
    assert {entry["prompt"] for entry in entries} == {PROMPT, "blue"}


def test_another_file_is_not_taken_for_a_manifest(batch, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.jsonl").write_text("my own notes\n")
    with pytest.raises(ValueError, match="is not a batch's manifest"):
        batch([PROMPT])
    assert (tmp_path / "out/manifest.jsonl").read_text() == "my own notes\n"


HOLD = """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print(1, flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def holder(tmp_path) -> Iterator[Any]:
    """Another process that holds the folder."""
    started = []

    def hold(seconds: float) -> subprocess.Popen[str]:
        (tmp_path / "out").mkdir(exist_ok=True)
        command = [sys.executable, "-S", "-c", HOLD, str(tmp_path / "out"), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_batch_is_refused_or_waits_and_the_dead_hold_nothing(batch, holder, tmp_path):
    first = holder(600)
    with pytest.raises(ValueError, match=r"is being written by another batch: wait for it \(--wait\)"):
        batch([PROMPT])
    assert os.listdir(tmp_path / "out") == []
    first.send_signal(signal.SIGKILL)
    first.wait()
    with locked(tmp_path / "out"):
        pass
    holder(1.5)
    started = time.monotonic()
    with locked(tmp_path / "out", wait=True):
        assert time.monotonic() - started > 0.5
    assert os.listdir(tmp_path / "out") == [], "a lock is no file"


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_batch_and_loses_nothing(batch, small_disk, files):
    out, many = small_disk / "out", [f"{PROMPT} {index}" for index in range(20)]
    with pytest.raises(OSError, match="free some space") as stop:
        batch(many, out=out, format="png")
    assert stop.value.errno == errno.ENOSPC
    kept = {name: where for name, where in files(out).items() if name.endswith(".png")}
    assert 0 < len(kept) < 20
    assert set(files(out)) == kept.keys() | {f"{name}.json" for name in kept}, "something half was left over"
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    result = batch(many, out=out, format="png")
    assert (result.done, len(result.made), result.ok) == (len(kept), 20 - len(kept), True)
    assert kept.items() <= files(out).items()


def test_an_interrupt_leaves_nothing_half(batch, tmp_path, monkeypatch, files):
    def interrupted(*_args: Any, **_more: Any) -> None:
        (tmp_path / "out" / f".{'0' * 24}.png.abc.part").write_bytes(b"half")
        raise KeyboardInterrupt

    batch([PROMPT])
    before = files(tmp_path / "out")
    monkeypatch.setattr(make, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batch([PROMPT, "blue"])
    assert files(tmp_path / "out") == before
    with locked(tmp_path / "out"):
        pass


def test_ten_thousand_rows_are_planned_and_resumed_in_seconds(batch, wan_folder, tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    text = (json.dumps({"prompt": f"{PROMPT} {index}", "seed": index, "guidance": index}) for index in range(10_000))
    rows.write_text("\n".join(text))
    started = time.process_time()
    planned = batch(rows, dry_run=True)
    assert len(planned.left) == 10_000
    spent = time.process_time() - started
    out.mkdir()
    with (out / "manifest.jsonl").open("w") as journal:
        for item in planned.left:
            (out / item.name).touch()
            (out / f"{item.name}.json").touch()
            journal.write(json.dumps({"name": item.name, "status": "done", "lines": [1], "prompt": "x"}) + "\n")
    started = time.process_time()
    found = batch(rows)
    assert (found.done, found.made, found.ok) == (10_000, [], True)
    # Of the processor, which a busy machine does not stretch.
    assert max(spent, time.process_time() - started) < 10


def test_killed_three_times(wan_folder, tmp_path):
    script, report = ROOT / "benchmarks/batch_kills.py", tmp_path / "kills.json"
    command = [sys.executable, "-P", str(script), "--kills", "3", "--seed", "5", "--model", str(wan_folder)]
    done = subprocess.run([*command, "--out", str(report)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text())["kills"] == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "absent"}, "neither an embedded model"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"format": "avi"}, "format must be mp4, gif, png"),
        ({"frames": "9"}, "frames: Input should be a valid integer"),
        ({"fames": 9}, "fames: Extra inputs"),
        ({"dtype": "int9"}, "dtype must be"),
        ({"devices": ["cpu"]}, "device and devices can't be given together"),
        ({"workers": 2}, "give it with ray"),
        ({"device": None, "devices": ["cpu", "0"]}, "devices must be of one kind"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_no_row_can_be_made_with(batch, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        batch([PROMPT], **changes)
    assert not (tmp_path / "out").exists()
