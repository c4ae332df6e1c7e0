"""The worker of a batch: it loads the model once, keeps a plan attached, and writes its own files."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...attention.plan import Plan
from ..generate import generate
from ..handle import Handle, attach
from ..loading import Offload, load
from ..media import write_video
from ..record import record_of
from .items import Item, PlanText
from .manifest import JOURNAL
from .rows import said

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker of a batch is told once.

    known: the model's name in the records, which holds from anywhere.
    """

    model: str
    known: str
    folder: Path
    dtype: str
    offload: Offload | None
    plans: Mapping[str, PlanText]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of an item: a path's name and figures, never frames.

    error: why there is nothing, "" if there is. full: the disk is. worker: host and process. attempts: how often a
    worker was given it.
    """

    name: str
    error: str = ""
    full: bool = False
    seconds: float | None = None
    bytes: int | None = None
    fps: float | None = None
    density: float | None = None
    warnings: tuple[str, ...] = ()
    worker: str = ""
    attempts: int = 1


class Maker:
    """One device's worker; the model is loaded here, once.

    Raises ValueError where it can't be loaded.
    """

    def __init__(self, job: Job, device: str | None = None, threads: int | None = None):
        if not (job.folder / JOURNAL).is_file():
            raise ValueError(f"{platform.node()} does not see {job.folder}: out must lie on storage that all share")
        if threads is not None:
            torch.set_num_threads(threads)
        self._job = job
        self._pipe: Any = load(job.model, dtype=job.dtype, device=device, offload=job.offload)
        self._pipe.set_progress_bar_config(disable=True)
        self._handle: Handle | None = None
        self._attached = ""
        self.name = f"{platform.node()}:{os.getpid()}"

    def make(self, item: Item) -> Outcome:
        """Make an item and write it with its record; an error is an outcome too."""
        warnings: list[str] = []
        try:
            return self._make(item, warnings)
        except Exception as error:
            full = isinstance(error, OSError) and error.errno in DISK_FULL
            return Outcome(name=item.name, error=said(error), full=full, warnings=tuple(warnings), worker=self.name)

    def close(self) -> None:
        """Leave the pipeline as it was loaded."""
        if self._handle is not None:
            self._handle.detach()
            self._handle, self._attached = None, ""

    def _make(self, item: Item, warnings: list[str]) -> Outcome:
        job, asked = self._job, item.request
        handle = self._attach(item.plan)
        made = generate(self._pipe, asked.prompt, plan=handle, **asked.settings(), warn=warnings.append)
        if item.plan:
            plan = job.plans[item.plan]
            made = replace(made, plan_path=Path(plan.path) if plan.path else None)
        record = {**record_of(made), "model": job.known, "lines": list(item.lines)}
        path = write_video(job.folder / item.name, made.frames, made.fps, record=record)
        return Outcome(
            name=item.name,
            seconds=made.seconds,
            bytes=path.stat().st_size,
            fps=made.fps,
            density=made.density,
            warnings=tuple(warnings),
            worker=self.name,
        )

    def _attach(self, plan: str) -> Handle | None:
        if plan == self._attached:
            return self._handle
        self.close()
        if plan:
            text = self._job.plans[plan]
            chosen = Plan.from_json(text.text, source=text.path or text.name)
            timing = torch.device(self._pipe._execution_device).type == "cpu"
            self._handle = attach(self._pipe, chosen, timing=timing)
        self._attached = plan
        return self._handle
