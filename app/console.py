"""What the command line says to people: notes and errors on stderr, results on stdout."""

from __future__ import annotations

import logging
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

LONGEST = 1000
INTERRUPTED = 130

_debug = False


def _set_debug(value: bool) -> bool:
    global _debug
    _debug = _debug or value
    if value:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("ziggurat").setLevel(logging.DEBUG)
    return value


Debug = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_set_debug, is_eager=True, help="Show the traceback of an error, and what is logged."
    ),
]


def note(message: str) -> None:
    """A line for people, beside the results."""
    print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """A line that begins with "warning"."""
    note(f"warning: {message}")


def sentence(error: BaseException) -> str:
    """An error in one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, OSError) and error.filename:
        said = f"{said}: {error.filename}"
    said = " ".join(said.split()) or type(error).__name__
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in said:
        return "memory ran out: take fewer frames or a smaller size"
    if not isinstance(error, ValueError | OSError | NotImplementedError | ImportError):
        said = f"unexpected {type(error).__name__}: {said}; run again with --debug to see where"
    return said if len(said) <= LONGEST else f"{said[:LONGEST]} ..."


def show_traceback() -> None:
    """The traceback of the error in hand, with --debug alone."""
    if _debug:
        traceback.print_exc()


def _terminated(_number: int, _frame: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)


@contextmanager
def told() -> Iterator[None]:
    """The one place where errors end: one sentence and exit code 1, 130 for Ctrl-C; a traceback with --debug alone."""
    global _debug
    _debug = False
    before = signal.getsignal(signal.SIGTERM)
    try:
        # So that a run ended from outside also removes its half file.
        signal.signal(signal.SIGTERM, _terminated)
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        # Typer turns a Ctrl-C within a command into an exit with this code.
        if isinstance(stop, SystemExit) and stop.code != INTERRUPTED:
            raise
        note("stopped; no file was left half written, run the same command to begin again")
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        show_traceback()
        note(f"error: {sentence(error)}")
        raise SystemExit(1) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def progress_bars(labels: dict[str, str], *, rate: str = "") -> Iterator[Any]:
    """A function (stage, done, total) that draws one bar a stage on stderr; stages without a label are not drawn.

    rate: what is counted, to show how many of them an hour.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
        *([TextColumn("{task.fields[rate]}")] if rate else []),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}
        started = time.monotonic()

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks and stage in labels:
                tasks[stage] = bars.add_task(labels[stage], total=total, rate="")
            if stage in tasks:
                hourly = 3600 * done / max(time.monotonic() - started, 1e-3)
                bars.update(tasks[stage], completed=done, total=total, rate=f"{hourly:.3g} {rate} an hour")

        yield report


def quiet_libraries() -> None:
    """Loading bars and advice of Hugging Face's libraries would bury what we say; with --debug they stay."""
    if _debug:
        return
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
