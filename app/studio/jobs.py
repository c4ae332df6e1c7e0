"""Jobs and where they are kept: a folder each, so that they outlive the page and the app."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...pipelines.media import whole

Status = Literal["waiting", "running", "done", "kept", "stopped", "failed"]
ENDED: tuple[Status, ...] = ("done", "kept", "stopped", "failed")
FILE = "job.json"
_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")


@dataclass(kw_only=True)
class Progress:
    """Where a running job stands; `left` counts seconds, None while nothing is known."""

    phase: str = ""
    done: int = 0
    total: int = 0
    step_seconds: float | None = None
    left: float | None = None
    preview: int = 0
    can_keep: bool = False


@dataclass(kw_only=True)
class Job:
    """One thing to make: kind says what, ask holds its settings as plain JSON, result what came of it."""

    id: str
    kind: str
    ask: dict[str, Any]
    status: Status = "waiting"
    asked_at: float = field(default_factory=time.time)
    started_at: float | None = None
    ended_at: float | None = None
    place: float = 0.0
    error: str = ""
    warnings: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    wanted: Literal["", "stop", "keep"] = ""

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def made(self) -> bool:
        """Is there something to see?"""
        return self.status in ("done", "kept")


class Store:
    """The output folder: a folder per job, and the plans that were uploaded or found."""

    def __init__(self, folder: Path):
        self.folder = folder.expanduser().resolve()
        self.plans = self.folder / "plans"
        self.uploads = self.folder / "uploads"
        for each in (self.folder, self.plans, self.uploads):
            each.mkdir(parents=True, exist_ok=True)

    def home(self, job: Job) -> Path:
        return self.folder / job.id

    def new(self, kind: str, ask: dict[str, Any]) -> Job:
        """A job with a folder of its own."""
        now = time.time()
        name = f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{secrets.token_hex(3)}"
        job = Job(id=name, kind=kind, ask=ask, asked_at=now, place=now)
        self.home(job).mkdir()
        try:
            self.save(job)
        except BaseException:
            self.remove(job)
            raise
        return job

    def save(self, job: Job) -> None:
        """Write a job's state, whole or not at all."""
        kept = asdict(job)
        del kept["progress"], kept["wanted"]
        with whole(self.home(job) / FILE) as part:
            part.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def remove(self, job: Job) -> None:
        shutil.rmtree(self.home(job))

    def load(self) -> list[Job]:
        """The jobs of this folder, oldest first. One that ran when the app ended failed, and says so."""
        found = []
        for path in sorted(self.folder.glob(f"*/{FILE}")):
            if not _ID.fullmatch(path.parent.name):
                continue
            try:
                job = Job(**json.loads(path.read_bytes()))
            except (ValueError, TypeError, RecursionError):
                # Someone else's file, or another version's: left alone, and not shown.
                continue
            if job.id != path.parent.name:
                continue
            if job.status == "running":
                job.status, job.ended_at = "failed", time.time()
                job.error = "the app ended while this ran: run it again"
                self.save(job)
            found.append(job)
        return found
