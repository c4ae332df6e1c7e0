"""The app's own queue: it goes on when a page is closed, and one job runs at a time on each device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ..console import sentence, show_traceback
from .jobs import Job, Store


class Work(Protocol):
    """What serves one device."""

    def warm_up(self) -> None:
        """Done once, before the first job."""
        ...

    def __call__(self, job: Job) -> None:
        """Do a job; raise what went wrong, and `Stopped` where the user ended it."""
        ...


class Stopped(BaseException):
    """The user stopped the job. Not an Exception, so that nothing on the way takes it for an error of its own."""


class Full(ValueError):
    """As many jobs wait as the operator allowed."""


class Queue:
    """Jobs in the order that they will run.

    workers: one for each device. most: jobs that may wait. trouble: what went wrong outside any job, "" if nothing.
    """

    def __init__(self, store: Store, workers: Sequence[Work], *, most: int = 16):
        self.store, self.most = store, most
        self.changes = 0
        self.trouble = ""
        self._jobs: dict[str, Job] = {job.id: job for job in store.load()}
        self._changed = threading.Condition(threading.RLock())
        self._closed = False
        self.threads = [
            threading.Thread(target=self._serve, args=(work,), name=f"worker {i}", daemon=True)
            for i, work in enumerate(workers)
        ]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """Stop what runs, and wait until it has; what waits is kept for the next start."""
        with self._changed:
            self._closed = True
            for job in self._jobs.values():
                if job.status == "running":
                    job.wanted = "stop"
            self._changed.notify_all()
        for thread in self.threads:
            thread.join(timeout=60)

    def add(self, kind: str, ask: Mapping[str, Any], prepare: Callable[[Job], None] | None = None) -> Job:
        """Put a job at the end; `prepare` may first write into its folder.

        Raises Full where too many wait.
        """
        with self._changed:
            if len(self.waiting()) >= self.most:
                raise Full(f"{self.most} jobs wait already, the most that this app takes: wait, or delete one")
            job = self.store.new(kind, dict(ask))
            try:
                if prepare is not None:
                    prepare(job)
                    self.store.save(job)
            except BaseException:
                self.store.remove(job)
                raise
            self._jobs[job.id] = job
            self._tell()
            return job

    def get(self, name: str | None) -> Job:
        """Raises ValueError for a job that is not there."""
        with self._changed:
            if name not in self._jobs:
                raise ValueError(f"there is no job {name!r}: it may have been deleted")
            return self._jobs[name]

    def find(self, name: str | None) -> Job | None:
        return self._jobs.get(name or "")

    def all(self) -> list[Job]:
        """Every job, newest first."""
        with self._changed:
            return sorted(self._jobs.values(), key=lambda job: job.asked_at, reverse=True)

    def waiting(self) -> list[Job]:
        """In the order that they will run."""
        with self._changed:
            return sorted((job for job in self._jobs.values() if job.status == "waiting"), key=lambda job: job.place)

    def running(self) -> list[Job]:
        with self._changed:
            return [job for job in self._jobs.values() if job.status == "running"]

    def ahead(self, job: Job) -> int:
        """How many jobs run or wait before this one."""
        with self._changed:
            return len(self.running()) + [other.id for other in self.waiting()].index(job.id)

    def move(self, name: str, by: int) -> None:
        """Move a waiting job up (-1) or down (1); at an end it stays."""
        with self._changed:
            line = self.waiting()
            here = next((i for i, job in enumerate(line) if job.id == name), None)
            if here is None:
                raise ValueError("only a waiting job can be moved")
            there = min(max(here + by, 0), len(line) - 1)
            line[here].place, line[there].place = line[there].place, line[here].place
            for job in (line[here], line[there]):
                self._save(job)
            self._tell()

    def delete(self, name: str) -> None:
        """Remove a job that does not run, with everything that it made."""
        with self._changed:
            job = self.get(name)
            if job.status == "running":
                raise ValueError("a running job can't be deleted: stop it first")
            del self._jobs[job.id]
            self.store.remove(job)
            self._tell()

    def stop(self, name: str, *, keep: bool = False) -> None:
        """End a running job, at once or keeping what there is; a waiting one is taken out of the line."""
        with self._changed:
            job = self.get(name)
            if job.status == "waiting":
                self._end(job, "stopped")
            elif job.status == "running" and keep and not job.progress.can_keep:
                raise ValueError("there is nothing to keep yet, or this pipeline can't end early: wait, or stop now")
            elif job.status == "running":
                job.wanted = "keep" if keep else "stop"
                self._tell()

    def touch(self) -> None:
        """Something that is shown has changed."""
        with self._changed:
            self._tell()

    def _tell(self) -> None:
        self.changes += 1
        self._changed.notify_all()

    def _save(self, job: Job) -> None:
        """A full disk must not end the thread that serves a device."""
        try:
            self.store.save(job)
        except OSError as wrong:
            self.trouble = sentence(wrong)

    def _end(self, job: Job, status: Any, error: str = "") -> None:
        job.status, job.error, job.ended_at = status, error, time.time()
        self._save(job)
        self._tell()

    def _next(self) -> Job | None:
        with self._changed:
            while not self._closed:
                line = self.waiting()
                if line:
                    job = line[0]
                    job.status, job.started_at = "running", time.time()
                    self._save(job)
                    self._tell()
                    return job
                self._changed.wait()
            return None

    def _serve(self, work: Work) -> None:
        try:
            work.warm_up()
        except Exception as wrong:
            show_traceback()
            self.trouble = sentence(wrong)
        self.touch()
        while (job := self._next()) is not None:
            status, error = "done", ""
            try:
                work(job)
            except Stopped:
                status = "stopped"
            # Whatever went wrong in one job, the app goes on with the next.
            except Exception as wrong:
                show_traceback()
                status, error = "failed", sentence(wrong)
            if status == "done" and job.result.get("ended_at"):
                status = "kept"
            with self._changed:
                self._end(job, status, error)
