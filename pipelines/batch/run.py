"""generate_many(model, rows, out): a folder of videos or images, taken up again wherever an earlier run ended."""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..loading import Offload, embedded_models
from ..media import EXTENSIONS, check_output
from .engines import Engine, choose_engine
from .estimate import Estimate, estimate
from .identity import fingerprint, weightless
from .items import Item, Items, Planner, in_order_of_work
from .make import Job, Outcome
from .manifest import JOURNAL, Manifest, finished, locked, read_entries, sweep
from .rows import BadRow, Row, read_rows, said
from .sheet import write_sheet

Progress = Callable[[int, int, Outcome | None], None]


@dataclass(kw_only=True)
class Batch:
    """What a call of `generate_many` came to.

    items: that the rows ask for, each once; repeated: further rows for the same pixels. done: made before.
    made: by this call. failed: the manifest's entries. bad: rows. left: items that this call was not to make.
    estimate: of what was to be made when the call began.
    """

    folder: Path
    items: int
    repeated: int
    done: int
    made: list[str] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    left: list[Item] = field(default_factory=list)
    estimate: Estimate
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every row that was to be made is there."""
        return not self.failed and not self.bad


def _silent(done: int, total: int, outcome: Outcome | None) -> None:
    pass


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def generate_many(
    model: str | Path,
    rows: str | os.PathLike[str] | Iterable[Any],
    out: str | os.PathLike[str],
    *,
    plan: str | os.PathLike[str] = "auto",
    seeds: int = 1,
    strict: bool = False,
    retry_failed: bool = False,
    dry_run: bool = False,
    wait: bool = False,
    format: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    offload: Offload | None = None,
    devices: Sequence[str] = (),
    ray: str | None = None,
    workers: int | None = None,
    progress: Progress = _silent,
    warn: Callable[[str], None] = _warn,
    **settings: Any,
) -> Batch | None:
    """Make a video or image of every row and seed in a folder, each named by a hash of all that decides its pixels.

    What is there already, video and record, is not made again; a run that was ended at any moment loses and repeats
    nothing that was done. Beside the files stand their records, `manifest.jsonl` and `index.html`.

    Args:
        model: an embedded model's name, a folder or a Hub id.
        rows: a file (see `read_rows`), or sentences and mappings of `generate`'s settings.
        out: the folder; made if it is not there.
        plan: for rows that name none; "auto", "none", or a file's path.
        seeds: videos a row: of its seed and those that follow it; a row without one has `seed`, 0 if not given.
        strict: raise ValueError for a bad row before any work, instead of reporting it and going on.
        retry_failed: make only what failed before.
        dry_run: make nothing; the result's `left` is what would be made.
        wait: until another batch on the folder has ended.
        format: "mp4", "gif" or "png"; mp4 if None, and png for one frame.
        device, devices: one device for this process, or one worker process on each of several ("0" is "cuda:0").
        ray: the address of a Ray cluster ("auto": the one this machine is in, "local": a new one), with `workers`
            actors (one a GPU, else one a machine); they and we share the storage that `out` lies on.
        progress: called with the items done, the items to do, and the outcome.
        settings: `generate`'s frames, height, width, steps, guidance, seed, negative, image, arguments for rows that
            do not say.

    Under `accelerate launch` every process calls this alike; the first returns the result, the others None.
    Raises ValueError for what no row can be made with, OSError where the disk is full.
    """
    started = time.perf_counter()
    engine = choose_engine(device, devices, ray, workers)
    if engine.follow():
        return None
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    if format is not None and f".{format}" not in EXTENSIONS:
        raise ValueError(f"format must be {', '.join(name[1:] for name in EXTENSIONS)}, got {format!r}")
    defaults = _defaults(settings | {"plan": os.fspath(plan)})
    lines = read_rows(rows)
    chosen = engine.dtype(dtype)
    found = fingerprint(model)
    planner = Planner(
        weightless(model),
        model=found,
        dtype=chosen,
        defaults=defaults,
        seeds=seeds,
        extension=f".{format}" if format else None,
        warn=warn,
    )
    items = planner.items(lines)
    if strict and items.bad:
        raise ValueError(f"{len(items.bad)} of {len(lines)} rows are bad: {'; '.join(map(str, items.bad[:5]))}")
    folder = Path(out)
    if dry_run:
        todo, result = _to_do(folder, items, retry_failed, read_entries(folder / JOURNAL), engine.workers)
        engine.dismiss()
        result.left = todo
        return result
    folder.mkdir(parents=True, exist_ok=True)
    for extension in {Path(item.name).suffix for item in items.items}:
        check_output(folder / f"item{extension}")
    model = str(model)
    known = model if model in embedded_models() or not Path(model).is_dir() else str(Path(model).resolve())
    job = Job(model=model, known=known, folder=folder.resolve(), dtype=chosen, offload=offload, plans=items.plans)
    with locked(folder, wait=wait):
        sweep(folder)
        manifest = Manifest(folder)
        todo, result = _to_do(folder, items, retry_failed, manifest.entries, engine.workers)
        try:
            _make(engine, job, todo, manifest, result, progress, warn)
        finally:
            sweep(folder)
        manifest.compact()
        write_sheet(folder, manifest.entries.values(), items.bad)
    result.seconds = time.perf_counter() - started
    return result


def _make(
    engine: Engine,
    job: Job,
    todo: list[Item],
    manifest: Manifest,
    result: Batch,
    progress: Progress,
    warn: Callable[[str], None],
) -> None:
    by_name = {item.name: item for item in todo}
    told: set[str] = set()
    progress(0, len(todo), None)
    with closing(engine.run(job, in_order_of_work(todo))) as outcomes:
        for count, outcome in enumerate(outcomes, 1):
            if outcome.full:
                raise OSError(errno.ENOSPC, f"{manifest.folder} is full: free some space and run again")
            entry = _entry(by_name[outcome.name], outcome)
            manifest.add(entry)
            if outcome.error:
                result.failed.append(entry)
            else:
                result.made.append(outcome.name)
            for message in outcome.warnings:
                if message not in told:
                    told.add(message)
                    warn(message)
            progress(count, len(todo), outcome)


def _entry(item: Item, outcome: Outcome) -> dict[str, Any]:
    """The manifest's line for an outcome."""
    asked = item.request
    entry = {
        "name": item.name,
        "status": "failed" if outcome.error else "done",
        "prompt": asked.prompt,
        **{name: getattr(asked, name) for name in ("frames", "height", "width", "steps", "seed")},
        "plan": item.plan,
        "lines": list(item.lines),
        "error": outcome.error or None,
        "seconds": outcome.seconds,
        "bytes": outcome.bytes,
        "density": outcome.density,
        "worker": outcome.worker or None,
        "attempts": outcome.attempts,
    }
    return {name: value for name, value in entry.items() if value is not None}


def _defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The batch's own settings by `Row`'s names, those that are given."""
    try:
        row = Row.model_validate({"prompt": "any", **settings}, strict=True)
    except ValidationError as error:
        raise ValueError(f"the batch's settings are not valid: {said(error)}") from None
    return {name: getattr(row, name) for name in row.model_fields_set - {"prompt"} if getattr(row, name) is not None}


def _to_do(
    folder: Path, items: Items, retry_failed: bool, entries: Mapping[str, Mapping[str, Any]], workers: int
) -> tuple[list[Item], Batch]:
    done = finished(folder) if folder.is_dir() else set()
    missing = [item for item in items.items if item.name not in done]
    failed = {name for name, entry in entries.items() if entry.get("status") == "failed"}
    todo = [item for item in missing if item.name in failed] if retry_failed else missing
    names = {item.name for item in todo}
    result = Batch(
        folder=folder,
        items=len(items.items),
        repeated=items.repeated,
        done=len(items.items) - len(missing),
        bad=items.bad,
        left=[item for item in missing if item.name not in names],
        estimate=estimate(todo, entries.values(), min(workers, max(len(todo), 1))),
    )
    return todo, result
