"""The engines of a batch: workers that die, items that kill them, more workers than items, and one manifest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ziggurat.pipelines import generate_many
from ziggurat.pipelines.batch.engines import Inline
from ziggurat.pipelines.batch.identity import weightless
from ziggurat.pipelines.batch.items import Item, Planner
from ziggurat.pipelines.batch.make import Job, Outcome
from ziggurat.pipelines.batch.manifest import Manifest, finished, read_entries
from ziggurat.pipelines.batch.pool import RETRIES, Died, Event, Loaded, Worker, deal
from ziggurat.pipelines.batch.processes import Processes, _Seat
from ziggurat.pipelines.batch.rows import read_rows
from ziggurat.pipelines.request import Request

SMALL: dict[str, Any] = {"frames": 1, "height": 16, "width": 16, "steps": 1, "guidance": 1.0}


def item(name: str) -> Item:
    return Item(name=name, lines=(1,), request=Request(prompt=name), plan="")


class Told:
    """A seat whose worker dies of the items it is told to, each so many times."""

    def __init__(self, deadly: dict[str, int], loads: Sequence[Event] = ()):
        self.deadly, self.loads = deadly, deque(loads)
        self.given: list[str] = []
        self.event: Event | None = None
        self.alive = False

    def start(self) -> None:
        self.alive, self.event = True, self.loads.popleft() if self.loads else Loaded()

    def give(self, item: Item) -> None:
        assert self.alive
        self.given.append(item.name)
        self.deadly[item.name] = self.deadly.get(item.name, 0) - 1
        dies = self.deadly[item.name] >= 0
        self.event = Died("exit code -9") if dies else Outcome(name=item.name)

    def stop(self) -> None:
        self.alive = False


def hear(seats: list[Told]) -> list[tuple[Told, Event]]:
    heard = [(seat, seat.event) for seat in seats if seat.event is not None]
    for seat in seats:
        seat.event = None
    assert heard, "nobody is left to be heard"
    return heard


def outcomes(seats: list[Told], names: str) -> dict[str, Outcome]:
    found = list(deal(seats, hear, [item(name) for name in names]))
    assert len(found) == len(names)
    assert not any(seat.alive for seat in seats)
    return {outcome.name: outcome for outcome in found}


def test_items_are_dealt_once_and_retried_after_a_death():
    deadly = {"b": 1}
    seats = [Told(deadly), Told(deadly)]
    found = outcomes(seats, "abcd")
    assert {name: one.attempts for name, one in found.items()} == {"a": 1, "b": 2, "c": 1, "d": 1}
    assert not any(one.error for one in found.values())
    assert sorted(seats[0].given + seats[1].given) == ["a", "b", "b", "c", "d"]


def test_an_item_that_kills_its_worker_each_time_does_not_end_the_batch():
    found = outcomes([Told({"b": 99})], "abcd")
    assert found["b"].error == "the worker died each time it was to make this, the last time so: exit code -9"
    assert found["b"].attempts == RETRIES + 1
    assert not any(found[name].error for name in "acd")


def test_more_workers_than_items():
    seats = [Told({}) for _ in range(5)]
    assert outcomes(seats, "ab").keys() == {"a", "b"}
    assert [len(seat.given) for seat in seats].count(0) == 3
    assert not outcomes([Told({})], "")


def test_a_worker_that_can_not_load_ends_the_batch():
    with pytest.raises(ValueError, match="no such weights"):
        outcomes([Told({}, [Loaded("cpu: no such weights")])], "ab")
    with pytest.raises(ValueError, match="died each time it loaded the model, the last time so: memory"):
        outcomes([Told({}, [Died("memory")] * 9)], "ab")
    assert outcomes([Told({}, [Died("memory")])], "ab").keys() == {"a", "b"}


def test_closing_early_stops_every_worker():
    seats = [Told({}), Told({})]
    dealing = deal(seats, hear, [item(name) for name in "abcd"])
    next(dealing)
    dealing.close()
    assert not any(seat.alive for seat in seats)


@pytest.fixture
def work(wan_folder, tmp_path) -> tuple[Job, list[Item]]:
    """Six items and a folder that is ready for them."""
    planner = Planner(
        weightless(wan_folder), model="m", dtype="float32", defaults=SMALL | {"plan": "none"}, warn=pytest.fail
    )
    items = planner.items(read_rows([f"a red circle {index}" for index in range(6)])).items
    out = tmp_path / "out"
    out.mkdir()
    Manifest(out)
    job = Job(model=str(wan_folder), known="m", folder=out, dtype="float32", offload=None, plans={})
    return job, items


def pictures(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in finished(folder)}


def killed_in_the_middle(engine: Any, job: Job, items: list[Item]) -> None:
    """Run a batch whose first worker is killed after its first outcome: all items are made, and rightly."""
    reference = job.folder.parent / "reference"
    reference.mkdir()
    Manifest(reference)
    assert not any(one.error for one in Inline("cpu").run(Job(**{**vars(job), "folder": reference}), items))
    running = engine.run(job, items)
    first = next(running)
    os.kill(int(first.worker.rpartition(":")[2]), signal.SIGKILL)
    found = [first, *running]
    assert sorted(one.name for one in found) == sorted(one.name for one in items)
    assert not [one.error for one in found if one.error]
    assert len({one.worker for one in found}) > 1
    assert pictures(job.folder) == pictures(reference)


def test_a_worker_process_is_killed(work):
    job, items = work
    killed_in_the_middle(Processes(["cpu", "cpu"]), job, items)


def test_workers_say_why_they_can_not_load(work):
    job, items = work
    absent = Job(**{**vars(job), "model": "absent"})
    assert Worker(absent, "cpu", None).load().error.startswith("cpu: model 'absent' is neither an embedded model")
    elsewhere = Job(**{**vars(job), "folder": job.folder / "elsewhere"})
    with pytest.raises(ValueError, match="out must lie on storage that all share"):
        list(Inline("cpu").run(elsewhere, items))


ORPHAN = """
import multiprocessing, time
from ziggurat.pipelines.batch.processes import _end_with_parent
worker = multiprocessing.get_context("fork").Process(target=_end_with_parent)
worker.start()
print(worker.pid, flush=True)
time.sleep(600)
"""


def test_a_worker_ends_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def ray_cluster():
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 << 20,
        logging_level="error",
    )
    yield ray
    ray.shutdown()


def test_a_ray_actor_is_killed(ray_cluster, work):
    from ziggurat.pipelines.batch.cluster import Cluster

    engine = Cluster("auto", workers=2)
    assert (engine.workers, engine.device) == (2, "cpu")
    assert engine.dtype("fp32") == "float32"
    job, items = work
    killed_in_the_middle(engine, job, items)


def test_more_ray_workers_than_the_cluster_has_room_for(ray_cluster, wan_folder, tmp_path):
    with pytest.raises(ValueError, match="workers must be at most 2, the cluster's CPUs"):
        generate_many(wan_folder, ["a"], tmp_path / "out", ray="auto", workers=3)


def test_ray_that_is_not_installed_is_told(monkeypatch, wan_folder, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'ziggurat\[batch\]'"):
        generate_many(wan_folder, ["a"], tmp_path / "out", ray="auto")


def test_accelerate_launch_splits_the_items(wan_folder, tmp_path):
    rows, out = tmp_path / "rows.txt", tmp_path / "out"
    rows.write_text("red\nblue\ncircle\n")
    script = tmp_path / "run.py"
    script.write_text("from ziggurat.app.cli import main\nmain()\n")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    sizes = [f"--{name}={value}" for name, value in SMALL.items()]
    command = [*launch, str(script), "batch", str(rows), "--out", str(out), "--model", str(wan_folder), *sizes]
    done = subprocess.run(
        [*command, "--plan=none", "--device=cpu", "--dtype=fp32", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, "one process alone speaks"
    assert len(json.loads(lines[0])["made"]) == 3
    entries = read_entries(out / "manifest.jsonl")
    assert {entry["status"] for entry in entries.values()} == {"done"}
    assert len({entry["worker"] for entry in entries.values()}) == 2
    names = {path.name for path in out.iterdir()}
    assert names == {*entries, *(f"{name}.json" for name in entries), "manifest.jsonl", "index.html"}


def test_a_seat_that_never_started_can_be_stopped():
    seat = _Seat(None)  # pyright: ignore[reportArgumentType]
    seat.stop()
    assert (seat.process, seat.pipe) == (None, None)
