"""Workers as actors of a Ray cluster: they write their own files, and only paths and figures come back."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Sequence
from typing import Any

from .engines import Alone, dtype_name
from .items import Item
from .make import Job, Outcome
from .pool import Died, Event, Worker, deal


class Cluster(Alone):
    """Actors on the Ray cluster at an address; "auto" is the one that this machine is in, "local" a new one here.

    workers: actors; one a GPU if None, without GPUs one a machine. An actor that dies is replaced by us, not by Ray,
    which would begin again without end.
    Raises ImportError where Ray is not installed, ConnectionError where no cluster answers.
    """

    def __init__(self, address: str, *, workers: int | None = None, device: str | None = None):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise ImportError("ray is not installed: pip install 'ziggurat[batch]'") from error
        self._ray: Any = ray
        if not ray.is_initialized():
            ray.init(address=address, include_dashboard=None, log_to_driver=False, logging_level=logging.ERROR)
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        on_gpus = gpus > 0 and device != "cpu"
        self.device = "cuda" if on_gpus else "cpu"
        machines = sum(node["Alive"] for node in ray.nodes())
        self.workers = workers or (gpus if on_gpus else machines)
        # What an actor asks for beyond what there is would be waited for without end.
        most = gpus if on_gpus else cpus
        if self.workers > most:
            raise ValueError(f"workers must be at most {most}, the cluster's {'GPUs' if on_gpus else 'CPUs'}")
        self._share = {"num_gpus": 1, "num_cpus": 1} if on_gpus else {"num_gpus": 0, "num_cpus": cpus // self.workers}

    def dtype(self, asked: str | None) -> str:
        if asked not in (None, "auto"):
            return dtype_name(asked, "cpu")
        # Of the machines that will do the work, which may have other chips than ours.
        remote = self._ray.remote(**self._share, max_retries=0)(dtype_name)
        return self._ray.get(remote.remote(None, self.device))

    def run(self, job: Job, items: Sequence[Item]) -> Generator[Outcome, None, None]:
        actor = self._ray.remote(**self._share, max_restarts=0, max_task_retries=0)(Worker)
        threads = int(self._share["num_cpus"]) if self.device == "cpu" else None
        seats = [_Seat(self._ray, actor, (job, self.device, threads)) for _ in range(self.workers)]
        yield from deal(seats, self._hear, items)

    def _hear(self, seats: list[_Seat]) -> list[tuple[_Seat, Event]]:
        ready, _ = self._ray.wait([seat.reply for seat in seats], num_returns=1)
        heard: list[tuple[_Seat, Event]] = []
        for seat in seats:
            if seat.reply not in ready:
                continue
            try:
                heard.append((seat, self._ray.get(seat.reply)))
            except self._ray.exceptions.RayActorError as error:
                heard.append((seat, Died(str(error).strip().splitlines()[0])))
        return heard


class _Seat:
    def __init__(self, ray: Any, actor: Any, arguments: tuple[Any, ...]):
        self._ray, self._actor, self._arguments = ray, actor, arguments
        self._worker: Any = None
        self.reply: Any = None

    def start(self) -> None:
        self._worker = self._actor.remote(*self._arguments)
        self.reply = self._worker.load.remote()

    def give(self, item: Item) -> None:
        self.reply = self._worker.make.remote(item)

    def stop(self) -> None:
        if self._worker is not None:
            self._ray.kill(self._worker)
        self._worker = None
