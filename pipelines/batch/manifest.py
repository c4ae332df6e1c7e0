"""What a batch's folder holds: its lock, its journal, and what a run that was ended left over."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..media import EXTENSIONS, record_path, whole

JOURNAL = "manifest.jsonl"
SHEET = "index.html"
_NAME = r"[0-9a-f]{24}(?:" + "|".join(re.escape(extension) for extension in EXTENSIONS) + ")"
_ITEM = re.compile(_NAME)
_RECORD = re.compile(rf"({_NAME})\.json")
_PART = re.compile(rf"\.(?:{_NAME}(?:\.json)?|{re.escape(JOURNAL)}|{re.escape(SHEET)})\.[^.]+\.part")


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder for one batch. The lock is the kernel's, on the folder itself: a process that died holds nothing.

    wait: until another batch has ended. Raises ValueError where one is at work and `wait` is False, OSError where the
    file system knows no locks.
    """
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(
                f"out {folder} is being written by another batch: wait for it (--wait), or give another folder"
            ) from None
        except OSError as error:
            raise OSError(
                error.errno, f"out {folder} lies on a file system without locks ({error.strerror}): give another folder"
            ) from error
        yield
    finally:
        os.close(descriptor)


def finished(folder: Path) -> set[str]:
    """The names of the items that are done: file and record both there."""
    found = {entry.name for entry in os.scandir(folder)}
    return {name for name in found if _ITEM.fullmatch(name) and f"{name}.json" in found}


def sweep(folder: Path) -> None:
    """Remove what a run that was ended left over: parts, and a file or record without its other half.

    Only names that a batch gives are touched.
    """
    found = {entry.name for entry in os.scandir(folder)}
    for name in found:
        record = _RECORD.fullmatch(name)
        half = (record and record[1] not in found) or (_ITEM.fullmatch(name) and f"{name}.json" not in found)
        if half or _PART.fullmatch(name):
            (folder / name).unlink(missing_ok=True)


def read_entries(path: Path) -> dict[str, dict[str, Any]]:
    """The last entry of each name in a journal; a torn line, of a run that was ended while writing it, is passed over.

    Raises ValueError where the file is no journal at all.
    """
    entries: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return entries
    lines = path.read_bytes().split(b"\n")
    for line in lines:
        try:
            entry = json.loads(line)
            entries[entry["name"]] = entry
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    if not entries and any(line.strip() for line in lines[:-1]):
        raise ValueError(f"{path} is not a batch's manifest: give another folder, or remove the file")
    return entries


class Manifest:
    """The journal of a folder, written by one process, which holds the folder's lock.

    One line per outcome, on the disk before the next item is dealt; `entries` is the last of each name.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / JOURNAL
        self.entries = read_entries(self.path)
        done = finished(folder)
        self.entries = {
            name: entry for name, entry in self.entries.items() if entry.get("status") != "done" or name in done
        }
        for name in done:
            # Written whole, and ended before its line.
            if self.entries.get(name, {}).get("status") != "done":
                self.entries[name] = _adopted(folder / name)
        self.compact()

    def compact(self) -> None:
        """Rewrite the journal, whole or not at all: one line a name."""
        text = "".join(_line(entry) for entry in self.entries.values())
        with whole(self.path) as part, part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append an entry, and return when it is on the disk."""
        self.entries[entry["name"]] = dict(entry)
        append(self.path, entry)

    def done(self, name: str) -> bool:
        return self.entries.get(name, {}).get("status") == "done"


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Append a line to a journal, and return when it is on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        line = _line(entry).encode()
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, f"{path} could not be written: free some space and run again")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _adopted(path: Path) -> dict[str, Any]:
    """An item's entry from its record."""
    try:
        record = json.loads(record_path(path).read_bytes())
        settings = record["settings"]
        found = {name: settings[name] for name in ("frames", "height", "width", "steps", "seed")}
        return {
            **{"name": path.name, "status": "done", "prompt": record["prompt"], **found},
            **{"plan": record["plan"]["sha256"] or "", "seconds": record["figures"]["seconds"]},
            **{"bytes": path.stat().st_size, "lines": record.get("lines", [])},
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record_path(path)} is not the record of a batch's item: remove it and run again") from error
