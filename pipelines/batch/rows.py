"""The rows of a batch: JSON lines, CSV or plain text to checked settings with their line numbers."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES = {".csv": ",", ".tsv": "\t"}
_BOM = b"\xef\xbb\xbf"


def _path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


PathText = Annotated[str, BeforeValidator(_path)]


class Row(BaseModel):
    """One row: the settings of `generate` by its names; None is left to the batch, then to the model.

    arguments: more of the pipeline's own by name; `set` is another name for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: str
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    negative: str | None = None
    image: PathText | None = None
    plan: PathText | None = None
    arguments: dict[str, Any] = Field(default_factory=dict, validation_alias=AliasChoices("arguments", "set"))


COLUMNS = (*Row.model_fields, "set")


@dataclass(frozen=True)
class Line:
    """A row and where it stood, counted from 1."""

    number: int
    row: Row


@dataclass(frozen=True)
class BadRow:
    """A row that nothing can be made of, and why."""

    number: int
    error: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.error}"


def read_rows(source: str | os.PathLike[str] | Iterable[Any]) -> list[Line | BadRow]:
    """The rows of a file (.jsonl, .csv or .tsv, anything else one prompt a line), or of mappings and sentences.

    Paths in a file are relative to it. UTF-8, with or without a byte order mark; empty lines are skipped.
    Raises ValueError for a file that does not exist, is in another encoding, or a table without a prompt column.
    """
    if not isinstance(source, str | os.PathLike):
        return [
            _checked(number, {"prompt": one} if isinstance(one, str) else one, strict=True)
            for number, one in enumerate(source, 1)
        ]
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"rows {path} does not exist or is no file: give a .jsonl, .csv or .txt file of prompts")
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"rows {path} is UTF-16: save it as UTF-8")
    # What is no UTF-8 stays in its own row, as surrogates, which `_checked` refuses.
    text = data.removeprefix(_BOM).decode("utf-8", "surrogateescape")
    suffix = path.suffix.lower()
    if suffix in TABLES:
        rows = _table(text, TABLES[suffix], path)
    else:
        read = _json_line if suffix in JSON_LINES else _sentence
        # Not splitlines: a prompt may hold U+2028, which ends no line of JSON.
        lines = enumerate(text.split("\n"), 1)
        rows = (read(number, line) for number, line in lines if line.strip())
    return [_beside(path.parent, one) for one in rows]


def said(error: BaseException) -> str:
    """An error in one line; the kind is told of those that are nobody's fault but ours."""
    if isinstance(error, ValidationError):
        found = error.errors(include_url=False)
        return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'the row'}: {one['msg']}" for one in found[:3])
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    words = " ".join(words.split())[:1000]
    if isinstance(error, ValueError | OSError | NotImplementedError) and words:
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _checked(number: int, values: Any, *, strict: bool) -> Line | BadRow:
    if not isinstance(values, Mapping):
        return BadRow(number, f"a row is an object of settings, got {type(values).__name__}")
    try:
        row = Row.model_validate(dict(values), strict=strict)
        for name in ("prompt", "negative", "image", "plan"):
            _check_text(name, getattr(row, name))
    except (ValueError, RecursionError) as error:
        return BadRow(number, said(error))
    return Line(number, row)


def _check_text(name: str, text: str | None) -> None:
    if text is None:
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not valid UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{name} holds a NUL character")


def _json_line(number: int, line: str) -> Line | BadRow:
    try:
        return _checked(number, json.loads(line, parse_constant=_no_constant), strict=True)
    except (ValueError, RecursionError) as error:
        return BadRow(number, f"not valid JSON: {said(error)}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _sentence(number: int, line: str) -> Line | BadRow:
    return _checked(number, {"prompt": line.strip()}, strict=True)


def _table(text: str, delimiter: str, path: Path) -> Iterator[Line | BadRow]:
    first = text.partition("\n")[0]
    # Spreadsheets write semicolons where the comma is a decimal sign.
    if delimiter == "," and "," not in first and ";" in first:
        delimiter = ";"
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = [cell.strip().lower() for cell in next(reader, [])]
    unknown = [name for name in header if name not in COLUMNS]
    if unknown or "prompt" not in header or len(set(header)) < len(header):
        wrong = f"the unknown column {unknown[0]!r}" if unknown else f"the columns {', '.join(header) or '(none)'}"
        raise ValueError(f"rows {path} has {wrong}: a table needs prompt, once, and may have {', '.join(COLUMNS[1:])}")
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield BadRow(number, f"not valid CSV: {error}")
            continue
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            yield BadRow(number, f"has {len(cells)} cells, but the header {len(header)}")
            continue
        yield _cells(number, {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()})


def _cells(number: int, values: dict[str, Any]) -> Line | BadRow:
    for name in ("arguments", "set"):
        if name in values:
            try:
                values[name] = json.loads(values[name], parse_constant=_no_constant)
            except (ValueError, RecursionError) as error:
                return BadRow(number, f"{name} is not valid JSON: {said(error)}")
    return _checked(number, values, strict=False)


def _beside(folder: Path, one: Line | BadRow) -> Line | BadRow:
    """Paths relative to the file's folder, made whole."""
    if isinstance(one, BadRow):
        return one
    values: dict[str, Any] = {}
    if one.row.image is not None:
        values["image"] = str(folder / Path(one.row.image).expanduser())
    if one.row.plan not in (None, "auto", "none"):
        values["plan"] = str(folder / Path(one.row.plan).expanduser())
    return Line(one.number, one.row.model_copy(update=values)) if values else one
