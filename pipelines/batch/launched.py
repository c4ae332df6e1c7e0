"""Workers that a launcher started: every process runs the same command, and the first one leads."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from .engines import dtype_name
from .items import Item
from .make import Job, Maker, Outcome
from .manifest import JOURNAL, append

PATIENCE = timedelta(days=30)
"""How long followers wait for the leader, who may be waiting for another batch."""
POLL = 0.2


def is_launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ


def _journal(folder: Path, rank: int) -> Path:
    # Named like a part, so that what a killed batch leaves is swept.
    return folder / f".{JOURNAL}.{rank}.part"


class Launched:
    """The processes of `accelerate launch`, one a device; the items are dealt by index.

    There is one exchange, before the work, so that no process waits for a slower one with a clock running; outcomes
    come through the folder. Where a process dies, the launcher ends all.
    """

    def __init__(self, device: str | None = None):
        from accelerate import PartialState

        cpu = device == "cpu" or not torch.cuda.is_available()
        self.state = PartialState(cpu=cpu, timeout=PATIENCE)
        self.workers: int = self.state.num_processes
        self.rank: int = self.state.process_index
        self.device = str(self.state.device)

    def dtype(self, asked: str | None) -> str:
        return dtype_name(asked, self.device)

    def dismiss(self) -> None:
        self._exchange(None)
        self.state.destroy_process_group()

    def follow(self) -> bool:
        if self.rank == 0:
            return False
        told = self._exchange(None)
        self.state.destroy_process_group()
        if told is not None:
            job, items = told
            journal = _journal(job.folder, self.rank)
            for outcome in self._make(job, items):
                append(journal, asdict(outcome))
            append(journal, {"end": True})
        return True

    def run(self, job: Job, items: Sequence[Item]) -> Generator[Outcome, None, None]:
        self._exchange((job, list(items)))
        self.state.destroy_process_group()
        tails = [_Tail(_journal(job.folder, rank)) for rank in range(1, self.workers)]
        for outcome in self._make(job, items):
            yield outcome
            for tail in tails:
                yield from tail.read()
        while not all(tail.ended for tail in tails):
            time.sleep(POLL)
            for tail in tails:
                yield from tail.read()

    def _make(self, job: Job, items: Sequence[Item]) -> Generator[Outcome, None, None]:
        mine = items[self.rank :: self.workers]
        if not mine:
            return
        maker = Maker(job, self.device)
        try:
            for item in mine:
                yield maker.make(item)
        finally:
            maker.close()

    def _exchange(self, told: Any) -> Any:
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([told], from_process=0)[0]


class _Tail:
    """The outcomes that another process adds to its journal."""

    def __init__(self, path: Path):
        self.path, self.ended, self._offset = path, False, 0

    def read(self) -> Generator[Outcome, None, None]:
        if self.ended or not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            found = json.loads(line)
            if found.get("end"):
                self.ended = True
                return
            yield Outcome(**{**found, "warnings": tuple(found["warnings"])})
