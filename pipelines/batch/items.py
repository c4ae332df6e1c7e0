"""The items of a batch: each row and seed with every default filled in, named by all that decides its pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..generate import choose_plan
from ..plans import Grid, model_shape, transformers_of
from ..request import Request, check_lengths, complete
from ..settings import model_settings
from .identity import canonical
from .rows import BadRow, Line, Row, said

KEY_DIGITS = 24
VERSION = 1
"""Of the key's recipe: another recipe gives other names."""


@dataclass(frozen=True, kw_only=True)
class PlanText:
    """A plan as workers are sent it. text: its JSON, "" for stock attention. path: None where it came from no file."""

    text: str
    name: str
    path: str | None


@dataclass(frozen=True, kw_only=True)
class Item:
    """One video or image to be made.

    name: its file, the key and an extension. request: with every default filled in. plan: SHA-256 of the plan's text,
    "" for stock attention. lines: of the rows that ask for it.
    """

    name: str
    lines: tuple[int, ...]
    request: Request
    plan: str

    @property
    def work(self) -> tuple[Any, ...]:
        """What decides how long it takes, and which lists it needs."""
        asked = self.request
        return (self.plan, asked.frames, asked.height, asked.width, asked.steps)


@dataclass(kw_only=True)
class Items:
    """What the rows come to: items in the rows' order, each once, the plans they name, and the rows that are bad."""

    items: list[Item] = field(default_factory=list)
    plans: dict[str, PlanText] = field(default_factory=dict)
    bad: list[BadRow] = field(default_factory=list)
    repeated: int = 0


class Planner:
    """Turns rows into items for one model.

    pipe: the pipeline; it need not hold weights. model: its fingerprint. defaults: the batch's own, for rows that say
    nothing. extension: of the files, None for .mp4, and .png where there is one frame.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        model: str,
        dtype: str,
        defaults: Mapping[str, Any],
        seeds: int = 1,
        extension: str | None = None,
        warn: Callable[[str], None],
    ):
        self._pipe, self._model, self._dtype, self._warn = pipe, model, dtype, warn
        self._defaults, self._seeds, self._extension = dict(defaults), seeds, extension
        self._settings = model_settings(pipe)
        self._completed: dict[str, tuple[Request, Grid | None]] = {}
        self._chosen: dict[tuple[str, Grid | None], str] = {}
        self._images: dict[str, str] = {}
        self._plans: dict[str, PlanText] = {}

    def items(self, lines: Iterable[Line | BadRow]) -> Items:
        found, index = Items(plans=self._plans), {}
        for line in lines:
            if isinstance(line, BadRow):
                found.bad.append(line)
                continue
            try:
                made = list(self._of(line))
            except (ValueError, OSError) as error:
                found.bad.append(BadRow(line.number, said(error)))
                continue
            for item in made:
                if item.name in index:
                    found.repeated += 1
                    there = index[item.name]
                    both = (*found.items[there].lines, line.number)
                    found.items[there] = replace(found.items[there], lines=both)
                else:
                    index[item.name] = len(found.items)
                    found.items.append(item)
        return found

    def _of(self, line: Line) -> Iterable[Item]:
        row = self._with_defaults(line.row)
        request, grid = self._complete(row)
        plan = self._plan(row.plan or "auto", grid)
        first = 0 if row.seed is None else row.seed
        for seed in range(first, first + self._seeds):
            asked = replace(request, seed=seed)
            extension = self._extension or (".png" if (asked.frames or 1) == 1 else ".mp4")
            yield Item(name=self._key(asked, plan) + extension, lines=(line.number,), request=asked, plan=plan)

    def _with_defaults(self, row: Row) -> Row:
        said = {name: value for name, value in row if value is not None}
        arguments = {**self._defaults.get("arguments", {}), **row.arguments}
        return row.model_copy(update={**self._defaults, **said, "arguments": arguments})

    def _complete(self, row: Row) -> tuple[Request, Grid | None]:
        """As `complete` does; rows that differ in words and numbers alone share the checks, which take milliseconds."""
        values: dict[str, Any] = row.model_dump(exclude={"plan"})
        values["seed"] = row.seed or 0
        asked = Request(**values)
        own = ("guidance", "negative", "image", "steps")
        shape = [asked.frames, asked.height, asked.width, asked.arguments]
        place = canonical([*shape, *(getattr(asked, name) is None for name in own)])
        if place not in self._completed:
            self._completed[place] = complete(self._pipe, asked, self._settings, compare=False)
            return self._completed[place]
        request, grid = self._completed[place]
        changes = {name: getattr(asked, name) for name in own if getattr(asked, name) is not None}
        request = replace(request, prompt=asked.prompt, seed=asked.seed, **changes)
        check_lengths(self._pipe, request)
        return request, grid

    def _plan(self, plan: str, grid: Grid | None) -> str:
        place = (plan, grid if plan == "auto" else None)
        if place not in self._chosen:
            chosen, path = choose_plan(self._pipe, plan, grid, self._warn)
            key = ""
            if chosen is not None:
                for transformer in transformers_of(self._pipe).values():
                    chosen.check(**asdict(model_shape(transformer)))
                text = chosen.to_json()
                key = hashlib.sha256(text.encode()).hexdigest()
                name = chosen.name or (path.stem if path else "unnamed")
                self._plans[key] = PlanText(text=text, name=name, path=str(path.resolve()) if path else None)
            self._chosen[place] = key
        return self._chosen[place]

    def _key(self, request: Request, plan: str) -> str:
        image = None
        if request.image is not None:
            image = self._images.get(request.image)
            if image is None:
                image = hashlib.sha256(Path(request.image).read_bytes()).hexdigest()
                self._images[request.image] = image
        return item_key(model=self._model, plan=plan, request=request, dtype=self._dtype, image=image)


def item_key(*, model: str, plan: str, request: Request, dtype: str, image: str | None) -> str:
    """24 hex digits that stand for everything that decides the pixels.

    model: its fingerprint. plan: SHA-256 of its text. image: of its file's bytes, wherever that lies.
    Raises ValueError for arguments that JSON does not hold.
    """
    settings = request.settings() | {"image": image}
    if settings["guidance"] is not None:
        settings["guidance"] = float(settings["guidance"])
    facts = {
        "version": VERSION,
        "model": model,
        "plan": plan,
        "prompt": request.prompt,
        "dtype": dtype,
        "settings": settings,
    }
    return hashlib.sha256(canonical(facts).encode()).hexdigest()[:KEY_DIGITS]


def in_order_of_work(items: Sequence[Item]) -> list[Item]:
    """The items of one plan and size together, in the order they first come: each process builds their lists once."""
    ranks: dict[Any, int] = {}
    for item in items:
        ranks.setdefault(item.plan, len(ranks))
        ranks.setdefault(item.work, len(ranks))
    return sorted(items, key=lambda item: (ranks[item.plan], ranks[item.work]))
