"""The app without its pages: the queue, what is kept, what is refused."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from ziggurat.app.cli import main
from ziggurat.app.studio import texts
from ziggurat.app.studio.estimates import Estimates
from ziggurat.app.studio.jobs import Job, Store
from ziggurat.app.studio.queue import Full, Queue, Stopped
from ziggurat.app.studio.studio import Form
from ziggurat.pipelines.watch import Moment

PROMPT = "a large red circle moving left"


class Hand:
    """A worker that does what a test tells it to: it goes on when `job.ask["go"]` is there."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def warm_up(self) -> None:
        pass

    def __call__(self, job: Job) -> None:
        while not job.ask.get("go"):
            if job.wanted:
                raise Stopped
            time.sleep(0.002)
        if job.ask["go"] == "fail":
            raise KeyError("lost")
        self.done.append(job.ask["prompt"])


@pytest.fixture
def line(tmp_path, wait_until):
    """A queue of one hand, with its first job running."""
    hand = Hand()
    queue = Queue(Store(tmp_path), [hand], most=3)
    queue.start()
    first = queue.add("video", {"prompt": "first"})
    wait_until(lambda: first.status == "running")
    yield queue, hand, first
    queue.close()


def test_jobs_run_one_at_a_time_in_an_order_that_can_be_changed(line, wait_until):
    queue, hand, first = line
    second, third, fourth = (queue.add("video", {"prompt": name, "go": "on"}) for name in ("second", "third", "fourth"))
    with pytest.raises(Full, match="3 jobs wait already"):
        queue.add("video", {"prompt": "fifth"})
    assert [queue.ahead(job) for job in (second, third, fourth)] == [1, 2, 3]
    queue.move(fourth.id, -1)
    queue.move(second.id, -1)
    assert queue.waiting() == [second, fourth, third]
    queue.delete(second.id)
    assert not (queue.store.folder / second.id).exists()
    with pytest.raises(ValueError, match="stop it first"):
        queue.delete(first.id)
    first.ask["go"] = "on"
    wait_until(lambda: third.ended)
    assert hand.done == ["first", "fourth", "third"]
    with pytest.raises(ValueError, match="no job"):
        queue.get(second.id)


def test_a_crash_in_one_job_leaves_the_next(line, wait_until):
    queue, hand, first = line
    queue.add("video", {"prompt": "second", "go": "on"})
    first.ask["go"] = "fail"
    wait_until(lambda: hand.done == ["second"])
    assert (first.status, first.error) == ("failed", "unexpected KeyError: 'lost'; run again with --debug to see where")


def test_a_full_disk_leaves_the_queue_at_work(line, wait_until, monkeypatch):
    queue, hand, first = line
    queue.add("video", {"prompt": "second", "go": "on"})

    def full(_job: Job) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(queue.store, "save", full)
    first.ask["go"] = "on"
    wait_until(lambda: hand.done == ["first", "second"])
    assert queue.trouble == "No space left on device"
    with pytest.raises(OSError, match="No space left"):
        queue.add("video", {"prompt": "third"})
    assert len([path for path in queue.store.folder.iterdir() if path.name[0].isdigit()]) == 2


def test_stopping(line, wait_until):
    queue, hand, first = line
    second = queue.add("video", {"prompt": "second", "go": "on"})
    queue.stop(second.id)
    with pytest.raises(ValueError, match="nothing to keep yet"):
        queue.stop(first.id, keep=True)
    queue.stop(first.id)
    wait_until(lambda: first.ended)
    assert (first.status, second.status, hand.done) == ("stopped", "stopped", [])


def test_jobs_outlive_the_app(line):
    queue, _, first = line
    second = queue.add("video", {"prompt": "second"})
    (queue.store.folder / "20260101-000000-abcdef").mkdir()
    (queue.store.folder / "20260101-000000-abcdef" / "job.json").write_text("{}")
    # As after a power cut: what the folder holds is all there is.
    again = Queue(Store(queue.store.folder), [])
    assert [job.id for job in again.waiting()] == [second.id]
    assert again.get(first.id).status == "failed"
    assert again.get(first.id).error == "the app ended while this ran: run it again"
    assert len(again.all()) == 2


def finished(studio: Any, form: Form, wait_until: Any) -> Job:
    job = studio.submit(form)
    # Through the queue's lock: a job ends a moment before its file is written.
    wait_until(lambda: studio.queue.get(job.id).ended, what=lambda: job)
    assert job.made, job.error
    return job


def test_a_video_beside_dense_and_again_by_its_command_line(
    make_studio, video_model, sparse_plan, tmp_path, wait_until
):
    studio = make_studio(video_model)
    plan = studio.shelf.take_plan(sparse_plan(name="small", rest="pooled").save(tmp_path / "plan.json"))
    form = Form(prompt=PROMPT, model=str(video_model), plan=plan, compare=True)
    assert studio.estimate(form).startswith("Time unknown until the first run; ")
    studio.queue.start()
    job = finished(studio, form, wait_until)
    home = studio.store.home(job)
    assert sorted(path.name for path in home.iterdir()) == [
        *("dense.mp4", "job.json", "thumb.webp", "video.mp4", "video.mp4.json")
    ]
    assert iio.imread(home / "video.mp4").shape == iio.imread(home / "dense.mp4").shape == (9, 32, 48, 3)
    assert job.result["figures"].keys() >= {"psnr", "ssim", "dense_seconds", "density", "attention_share"}
    assert "About " in studio.estimate(form)
    assert len(studio.screens(job)) == 2
    assert "small" in texts.figures(job)
    record = json.loads((home / "video.mp4.json").read_text())
    assert (record["model"], record["compare"]) == (str(video_model), True)
    words = shlex.split(texts.command_line(studio.store, job, record["model"]))
    out = tmp_path / "again.mp4"
    with pytest.raises(SystemExit) as stop:
        main([*words[1:-3], "--out", str(out), "--dtype", "fp32", "--device", "cpu"])
    assert not stop.value.code
    assert np.array_equal(iio.imread(out), iio.imread(home / "video.mp4"))
    scope: dict[str, Any] = {}
    code = texts.python_code(studio.store, job, record["model"]).replace("video.mp4", str(tmp_path / "code.mp4"))
    exec(code.replace("    compare=True,\n", "    dtype='float32',\n"), scope)
    assert np.array_equal(iio.imread(tmp_path / "code.mp4"), iio.imread(out))


def test_an_image_pipeline_end_to_end(make_studio, image_model, wait_until):
    studio = make_studio(image_model)
    model = studio.shelf.model(str(image_model))
    assert (model.video, model.takes_image, model.defaults.frames) == (False, False, None)
    studio.queue.start()
    job = finished(studio, Form(prompt=PROMPT, model=str(image_model), plan="none", frames=7, seed=3), wait_until)
    with Image.open(studio.store.home(job) / "video.png") as picture:
        assert picture.size == (32, 32)
    assert job.ask["seed"] == 3
    assert "video.png" in texts.command_line(studio.store, job, "m")


def test_stop_and_keep_leaves_a_whole_video(make_studio, video_model, wait_until):
    studio = make_studio(video_model)
    studio.queue.start()
    job = studio.submit(Form(prompt=PROMPT, model=str(video_model), plan="none", steps=5000))
    wait_until(lambda: job.progress.preview)
    assert (studio.store.home(job) / "preview.webp").is_file()
    assert job.progress.step_seconds
    assert job.progress.left
    studio.queue.stop(job.id, keep=True)
    wait_until(lambda: job.ended)
    assert job.status == "kept", job.error
    assert iio.imread(studio.store.home(job) / "video.mp4").shape == (9, 32, 48, 3)
    assert 1 < job.result["ended_at"] < 5000


def test_a_straight_line_is_followed_to_its_end():
    import torch

    from ziggurat.pipelines.preview import finished_estimate

    class Flow:
        sigmas = torch.tensor([1.0, 0.75, 0.25, 0.0])

    noise, clean = torch.randn(4, 4), torch.randn(4, 4)
    at = [clean + sigma * (noise - clean) for sigma in Flow.sigmas]
    for step in (1, 2):
        found = finished_estimate(Flow(), at[step - 1], at[step], step)
        assert found is not None
        assert torch.allclose(found, clean, atol=1e-5)
    Flow.sigmas = torch.tensor([14.6, 3.0, 0.0])
    assert finished_estimate(Flow(), at[0], at[1], 1) is None
    assert Moment(stage="denoise", done=1, total=3, latents=clean, estimate=None).estimate is None


REFUSED = {
    "prompt": ({"prompt": " "}, "prompt is empty"),
    "model": ({"model": "/etc"}, "was not allowed when the app was started"),
    "plan": ({"plan": "/etc/passwd"}, "there is no plan '/etc/passwd' here"),
    "size": ({"height": 40}, "nearest that work are 32 and 48"),
    "memory": ({"frames": 1_000_001}, "need about"),
    "compare": ({"compare": True}, "compare needs a plan"),
    "image": ({"image": __file__}, "takes no image"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_can_not_run_is_refused_before_it_waits(make_studio, video_model, how):
    studio = make_studio(video_model)
    changes, words = REFUSED[how]
    form = Form(**{"prompt": PROMPT, "model": str(video_model), "plan": "none", **changes})
    with pytest.raises(ValueError, match=words):
        studio.submit(form)
    assert not studio.queue.all()
    if how in ("memory", "size"):
        assert studio.estimate(form).startswith("Can't run: ")


def test_an_upload_is_validated_and_never_run(make_studio, video_model, sparse_plan, tmp_path):
    studio = make_studio(video_model)
    model = studio.shelf.model(str(video_model))
    bad = tmp_path / "plan.json"
    for text in ("import os", "[]", '{"version": 1, "__class__": "os.system"}', "\0"):
        bad.write_text(text)
        with pytest.raises(ValueError, match="plan"):
            studio.shelf.take_plan(bad)
    other = studio.shelf.take_plan(sparse_plan(name="../../other", heads=3, head_dim=32).save(bad))
    assert other.startswith("mine: ------other-")
    with pytest.raises(ValueError, match="head"):
        studio.shelf.check_plan(other, model)
    assert [path.parent for path in studio.store.folder.rglob("*.json")] == [studio.store.plans]


def test_an_uploaded_image_is_kept_as_pixels(make_studio, tmp_path, video_model):
    from ziggurat.app.studio.studio import _copy_image

    source, target = tmp_path / "in.gif", tmp_path / "out.png"
    Image.new("P", (8, 6), 3).save(source, comment=b"secret")
    _copy_image(str(source), target)
    assert b"secret" not in target.read_bytes()
    target.unlink()
    source.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="can't be read"):
        _copy_image(str(source), target)
    assert os.listdir(tmp_path) == ["in.gif"]


def test_estimates_scale_with_steps_and_size():
    estimates = Estimates()
    ask = {"model": "m", "plan": "auto", "frames": 10, "height": 10, "width": 10, "steps": 4, "compare": False}
    assert estimates.seconds(ask) is None
    estimates.add("m", "none", step=1.0, rest=2.0, pixels=1000)
    assert estimates.seconds(ask) == pytest.approx(6.0)
    assert estimates.seconds({**ask, "compare": True}) == pytest.approx(12.0)
    estimates.add("m", "auto", step=0.5, rest=2.0, pixels=1000)
    assert estimates.seconds({**ask, "compare": True}) == pytest.approx(10.0)
    assert estimates.seconds({**ask, "frames": 20}) == pytest.approx(0.5 * 2**1.2 * 4 + 4)
    assert texts.duration(estimates.seconds(ask)) == "4.0 s"


def test_what_users_write_is_escaped(tmp_path):
    store = Store(tmp_path)
    job = store.new("video", {"prompt": "<script>alert(1)</script>'\"", "compare": False})
    queue = Queue(store, [])
    shown = texts.line([], queue.waiting()) + texts.gallery(store, queue.all(), None)
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown
    job.status, job.error = "failed", "<b>no</b>"
    assert "<b>no" not in texts.progress(job, None)


@pytest.mark.parametrize("seconds", [None, 3.21, 61, 200, 7300])
def test_durations(seconds):
    known = {None: "unknown", 3.21: "3.2 s", 61: "61 s", 200: "3 min 20 s", 7300: "2 h 1 min"}
    assert texts.duration(seconds) == known[seconds]


def test_presets(make_studio, video_model):
    studio = make_studio(video_model)
    model = studio.shelf.model(str(video_model))
    assert studio.preset("The model's own", model) == {"frames": 9, "steps": 3, "height": 32, "width": 48}
    assert studio.preset("Quick look", model) == {"frames": 5, "steps": 2, "height": 32, "width": 48}
    assert studio.preset("Fine", model)["steps"] == 6


def test_the_app_verb_refuses_what_it_can_not_serve(tmp_path, capsys):
    for arguments, code, words in (
        (["--auth", "name"], 2, "USER:PASSWORD"),
        (["--model", "nothing"], 1, "neither an embedded model"),
        (["--dtype", "int9"], 1, "dtype must be"),
        (["--port", "0"], 2, "port"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["app", "--out", str(tmp_path / "out"), *arguments])
        assert stop.value.code == code
        assert words in capsys.readouterr().err


def test_the_folder_is_made_where_it_was_asked_for(tmp_path: Path):
    assert Store(tmp_path / "a" / "b").plans == tmp_path.resolve() / "a/b/plans"
