"""generate_many: names, what is made again and what is not, bad rows, order of work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ziggurat.attention.lists import ListCache
from ziggurat.pipelines import load
from ziggurat.pipelines.batch import make
from ziggurat.pipelines.batch.identity import fingerprint, weightless
from ziggurat.pipelines.batch.items import Planner, in_order_of_work, item_key
from ziggurat.pipelines.batch.manifest import read_entries
from ziggurat.pipelines.batch.rows import read_rows
from ziggurat.pipelines.generate import generate
from ziggurat.pipelines.request import Request

PROMPT = "a large red circle moving left"


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


def test_rows_become_files_and_are_not_made_again(batch, wan, tmp_path, monkeypatch, files):
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


def test_dry_run_tells_time_and_size_from_what_was_made(batch, tmp_path, files):
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
