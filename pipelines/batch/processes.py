"""Workers as processes of this machine, one a device."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from .engines import Alone, dtype_name
from .items import Item
from .make import Job, Outcome
from .pool import Died, Event, Worker, deal


class Processes(Alone):
    """One worker process on each of several devices ("cpu" and "cuda:1" are such)."""

    def __init__(self, devices: Sequence[str]):
        kinds = {torch.device(device).type for device in devices}
        if len(kinds) > 1:
            raise ValueError(f"devices must be of one kind, got {', '.join(sorted(kinds))}: their dtypes would differ")
        self.devices = list(devices)
        self.workers = len(self.devices)

    def dtype(self, asked: str | None) -> str:
        return dtype_name(asked, self.devices[0])

    def run(self, job: Job, items: Sequence[Item]) -> Generator[Outcome, None, None]:
        # Processes on the CPU share its cores.
        on_cpu = torch.device(self.devices[0]).type == "cpu"
        threads = max(torch.get_num_threads() // self.workers, 1) if on_cpu else None
        yield from deal([_Seat(Worker(job, device, threads)) for device in self.devices], _hear, items)


class _Seat:
    def __init__(self, worker: Worker):
        self._worker = worker
        self.process: BaseProcess | None = None
        self.pipe: Any = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._worker), daemon=True)
        process.start()
        self.process = process
        # Only the worker holds its end: then its death is heard.
        theirs.close()

    def give(self, item: Item) -> None:
        # Where the worker has died, that is heard next.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(item)

    def stop(self) -> None:
        if self.process is not None and self.pipe is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
        self.process = self.pipe = None


def _hear(seats: list[_Seat]) -> list[tuple[_Seat, Event]]:
    pipes: dict[Any, _Seat] = {seat.pipe: seat for seat in seats if seat.pipe is not None}
    heard: list[tuple[_Seat, Event]] = []
    for pipe in wait(list(pipes)):
        seat = pipes[pipe]
        assert seat.process is not None
        try:
            heard.append((seat, seat.pipe.recv()))
        except (EOFError, ConnectionResetError):
            seat.process.join()
            heard.append((seat, Died(f"its process ended with exit code {seat.process.exitcode}")))
    return heard


def _serve(pipe: Any, worker: Worker) -> None:
    # The terminal's Ctrl-C is for the parent, who ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    loaded = worker.load()
    pipe.send(loaded)
    while not loaded.error:
        try:
            item = pipe.recv()
        except EOFError:
            return
        pipe.send(worker.make(item))


def _end_with_parent() -> None:
    """A parent that was killed holds the lock no more: nobody may go on writing for it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
