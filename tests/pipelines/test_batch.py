"""generate_many: names, going on after any end, bad rows, locks, full disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ziggurat.attention.lists import ListCache
from ziggurat.pipelines import generate_many, load
from ziggurat.pipelines.batch import make
from ziggurat.pipelines.batch.identity import fingerprint, weightless
from ziggurat.pipelines.batch.items import Planner, in_order_of_work, item_key
from ziggurat.pipelines.batch.manifest import append, locked, read_entries
from ziggurat.pipelines.batch.rows import read_rows
from ziggurat.pipelines.batch.run import Batch
from ziggurat.pipelines.generate import generate
from ziggurat.pipelines.request import Request

ROOT = Path(__file__).parents[2]
PROMPT = "a large red circle moving left"
SMALL: dict[str, Any] = {"frames": 1, "height": 16, "width": 16, "steps": 1, "guidance": 1.0}
FRESH = {"index.html", "manifest.jsonl"}


@pytest.fixture
def batch(wan_folder, tmp_path):
    def run(rows: Any, **changes: Any) -> Batch:
        model = changes.pop("model", wan_folder)
        options = {"plan": "none", "dtype": "fp32", "device": "cpu", "out": tmp_path / "out", **SMALL, **changes}
        result = generate_many(model, rows, **options)
        assert result is not None
        return result

    return run


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """What stands in the folder beside manifest and page, and which files on the disk it is."""
    found = (path for path in folder.iterdir() if path.name not in FRESH)
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def test_names_are_the_same_everywhere():
    request = Request(prompt="“a” circle", frames=9, height=32, steps=2, guidance=5, seed=2**40, arguments={"b": 0.1})
    # A literal: another process, machine or version of Python that found another name would make all anew.
    key = item_key(model="m", plan="p", request=request, dtype="float32", image=None)
    assert key == "6d3745d54f206086bd1e660b"
    same = Request(prompt="“a” circle", frames=9, height=32, steps=2, guidance=5.0, seed=2**40, arguments={"b": 0.1})
    assert item_key(model="m", plan="p", request=same, dtype="float32", image=None) == key
    changes: list[dict[str, Any]] = [{"model": "n"}, {"plan": ""}, {"dtype": "bfloat16"}, {"image": "i"}]
    names = {
        item_key(**{"model": "m", "plan": "p", "request": request, "dtype": "float32", "image": None, **change})
        for change in changes
    }
    settings: list[dict[str, Any]] = [
        {"frames": 5},
        {"height": 16},
        {"width": 16},
        {"steps": 3},
        {"guidance": 4.0},
        {"seed": 1},
        {"negative": ""},
        {"arguments": {}},
        {"prompt": "b"},
    ]
    for change in settings:
        other = Request(**{**vars(request), **change})
        names.add(item_key(model="m", plan="p", request=other, dtype="float32", image=None))
    assert len(names - {key}) == len(changes) + len(settings)


def test_a_model_is_told_by_its_weights_and_configurations(wan_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(wan_folder, folder)
    assert fingerprint(folder) == fingerprint(wan_folder)
    (folder / "ziggurat.json").write_text('{"steps": 1}')
    (folder / "README.md").write_text("more")
    assert fingerprint(folder) == fingerprint(wan_folder)
    seen = {fingerprint(folder)}
    for name in (
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "scheduler/scheduler_config.json",
    ):
        path = folder / name
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
        seen.add(fingerprint(folder))
    assert len(seen) == 4


def test_what_a_pipeline_without_weights_says_holds_for_the_real_one(wan_folder, wan, sparse_plan, tmp_path):
    path = sparse_plan().save(tmp_path / "plan.json")
    rows = [
        {"prompt": PROMPT, "plan": str(path), "frames": 9, "height": 32, "width": 48},
        {"prompt": "blue", "seed": 4},
    ]
    defaults = {"plan": "none", "frames": 5, "height": 16, "width": 32}
    found = [
        Planner(pipe, model="m", dtype="float32", defaults=defaults, warn=pytest.fail).items(read_rows(rows))
        for pipe in (weightless(wan_folder), wan)
    ]
    assert found[0] == found[1]
    assert [item.request.steps for item in found[0].items] == [50, 50]
    assert not found[0].bad


def test_rows_become_files_and_are_not_made_again(batch, wan, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    first = {"prompt": PROMPT, "frames": 5, "seed": 7}
    second = {"prompt": "../<b>blue</b>", "set": {"max_sequence_length": 32}}
    rows.write_text(f"{json.dumps(first)}\n\n{json.dumps(second)}\n")
    made = batch(rows, seeds=2)
    assert (made.items, made.done, len(made.made), made.ok) == (4, 0, 4, True)
    before = files(tmp_path / "out")
    assert len(before) == 8
    assert {Path(name).suffix for name in made.made} == {".mp4", ".png"}
    entries = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert [(entry["lines"], entry["seed"]) for entry in entries] == [([1], 7), ([1], 8), ([3], 0), ([3], 1)]
    record = json.loads((tmp_path / "out" / f"{entries[2]['name']}.json").read_text())
    assert record["settings"]["arguments"] == {"max_sequence_length": 32}
    again = generate(wan, record["prompt"], plan="none", **record["settings"])
    import imageio.v3 as iio

    assert np.array_equal(iio.imread(tmp_path / "out" / entries[2]["name"])[..., :3], again.frames[0])
    page = (tmp_path / "out/index.html").read_text()
    assert "../&lt;b&gt;blue&lt;/b&gt;" in page
    assert "<b>" not in page
    assert all(f'src="{name}"' in page for name in made.made)
    assert "prefers-color-scheme: dark" in page

    def forbidden(*_args: Any, **_more: Any) -> None:
        raise AssertionError("a batch that is done loaded the model")

    monkeypatch.setattr(make, "load", forbidden)
    again = batch(rows, seeds=2)
    assert (again.done, again.made, again.ok) == (4, [], True)
    assert files(tmp_path / "out") == before
    monkeypatch.undo()
    more = batch(rows, seeds=2, steps=2)
    assert (more.done, len(more.made)) == (0, 4)
    assert before.items() <= files(tmp_path / "out").items()


def test_a_changed_default_or_image_is_another_item(batch, wan_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(wan_folder, folder)
    names = []
    for steps in (1, 2):
        (folder / "ziggurat.json").write_text(json.dumps({"steps": steps}))
        names += [item.name for item in batch([PROMPT], model=folder, steps=None, dry_run=True).left]
    names += [item.name for item in batch([PROMPT], model=folder, steps=1, dry_run=True).left]
    assert names[0] == names[2] != names[1]
    assert not (tmp_path / "out").exists(), "a dry run made a folder"


@pytest.fixture
def images(batch, wan_folder, monkeypatch):
    """A pipeline whose call takes an image, as far as planning looks."""
    pipe = weightless(wan_folder)

    class Takes(type(pipe)):
        def __call__(self, prompt=None, image=None, height=16, width=16, num_frames=1, num_inference_steps=1, **_):
            raise AssertionError

    pipe.__class__ = Takes
    return Planner(pipe, model="m", dtype="float32", defaults={"plan": "none"}, warn=pytest.fail)


def test_an_image_counts_by_its_content(images, tmp_path):
    for name, data in (("a.png", b"1"), ("b.png", b"1"), ("c.png", b"2")):
        (tmp_path / name).write_bytes(data)
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,image\nx,a.png\nx,b.png\nx,c.png\nx,\nx,absent.png\n")
    found = images.items(read_rows(rows))
    assert [item.lines for item in found.items] == [(2, 3), (4,), (5,)]
    assert found.repeated == 1
    assert [row.number for row in found.bad] == [6]
    assert "does not exist" in found.bad[0].error


def test_the_model_is_loaded_once_and_lists_are_built_once(batch, sparse_plan, tmp_path, monkeypatch):
    loads, built = [], []
    monkeypatch.setattr(make, "load", lambda *args, **more: loads.append(args) or load(*args, **more))
    build = ListCache._build
    monkeypatch.setattr(ListCache, "_build", lambda self, *args: built.append((args[1], args[3])) or build(self, *args))
    one, two = (str(sparse_plan(name=name).save(tmp_path / f"{name}.json")) for name in ("one", "two"))
    rows = [
        {"prompt": prompt, "plan": plan, "frames": frames, "height": 32, "width": 48}
        for prompt in ("red", "blue")
        for plan in (one, two)
        for frames in (9, 5)
    ]
    made = batch(rows)
    assert len(made.made) == 8
    assert len(loads) == 1
    # Two plans of two entries each on two grids.
    assert len(built) == 8
    assert all(built.count(one) == 2 for one in built)
    record = json.loads((tmp_path / "out" / f"{made.made[0]}.json").read_text())
    assert (record["plan"]["name"], record["plan"]["path"]) == ("one", one)
    assert 0 < record["figures"]["density"] < 1


def test_order_of_work_keeps_plans_and_sizes_together(wan_folder):
    pipe = weightless(wan_folder)
    planner = Planner(pipe, model="m", dtype="float32", defaults={"plan": "none", "steps": 1}, warn=pytest.fail)
    rows = [{"prompt": str(index), "frames": (5, 9)[index % 2], "height": 32, "width": 32} for index in range(6)]
    items = in_order_of_work(planner.items(read_rows(rows)).items)
    assert [item.request.prompt for item in items] == ["0", "2", "4", "1", "3", "5"]


def test_bad_rows_are_told_and_the_rest_is_made(batch, tmp_path):
    rows = [
        {"prompt": PROMPT},
        {"prompt": PROMPT, "height": 17},
        {"prompt": " "},
        {"prompt": "red " * 600},
        {"prompt": PROMPT, "fames": 1},
        {"prompt": PROMPT, "seed": -1},
        {"prompt": PROMPT, "set": {"strenght": 1}},
        {"prompt": PROMPT, "set": {"max_sequence_length": float("nan")}},
        {"prompt": PROMPT, "plan": "absent.json"},
        {"prompt": PROMPT, "image": __file__},
        {"prompt": "red"},
    ]
    with pytest.raises(ValueError, match="9 of 11 rows are bad: line 2: height must be a multiple of 16"):
        batch(rows, strict=True)
    assert not (tmp_path / "out").exists()
    made = batch(rows)
    assert (len(made.made), made.ok) == (2, False)
    words = ["height must", "prompt is empty", "601 tokens", "fames", "seed must lie", "no argument 'strenght'"]
    words += ["Out of range float", "absent.json does not exist", "takes no image"]
    assert [row.number for row in made.bad] == list(range(2, 11))
    for row, text in zip(made.bad, words, strict=True):
        assert text in row.error, row
    assert "takes no image" in (tmp_path / "out/index.html").read_text()


def test_failures_are_kept_and_retried_alone(batch, tmp_path, monkeypatch):
    def fail(pipe: Any, prompt: str, **more: Any):
        if prompt == "blue":
            raise RuntimeError("the moon\nis blue")
        return generate(pipe, prompt, **more)

    monkeypatch.setattr(make, "generate", fail)
    made = batch(["red", "blue"])
    assert (len(made.made), made.ok) == (1, False)
    assert made.failed[0]["error"] == "RuntimeError: the moon is blue"
    assert "the moon is blue" in (tmp_path / "out/index.html").read_text()
    monkeypatch.undo()
    found = batch(["red", "blue", "circle"], retry_failed=True)
    assert (found.done, len(found.made), len(found.left), found.ok) == (1, 1, 1, True)
    assert read_entries(tmp_path / "out/manifest.jsonl")[found.made[0]]["prompt"] == "blue"
    assert "failed" not in (tmp_path / "out/index.html").read_text()
    rest = batch(["red", "blue", "circle"])
    assert (rest.done, len(rest.made)) == (2, 1)


def test_dry_run_tells_time_and_size_from_what_was_made(batch, tmp_path):
    unknown = batch([PROMPT], seeds=3, dry_run=True)
    assert len(unknown.left) == 3
    assert (unknown.estimate.seconds, unknown.estimate.bytes, unknown.estimate.measured) == (None, None, 0)
    batch([PROMPT], seeds=2)
    entries = read_entries(tmp_path / "out/manifest.jsonl").values()
    before = files(tmp_path / "out")
    told = batch([PROMPT], seeds=4, dry_run=True)
    assert (told.done, len(told.left), told.estimate.measured) == (2, 2, 2)
    assert told.estimate.seconds == pytest.approx(sum(entry["seconds"] for entry in entries))
    longer = batch([PROMPT], seeds=4, steps=3, dry_run=True)
    assert longer.estimate.seconds == pytest.approx(told.estimate.seconds * 4 / 2 * 3, rel=0.5)
    assert files(tmp_path / "out") == before


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
def test_goes_on_after_each_phase(batch, tmp_path, phase, again):
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


def test_a_full_disk_ends_the_batch_and_loses_nothing(batch, small_disk):
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


def test_an_interrupt_leaves_nothing_half(batch, tmp_path, monkeypatch):
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
