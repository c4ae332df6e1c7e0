"""What a search tries for every head: the selectors' own candidates in the layouts that suit them, or a file's."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from ..attention.dense import Dense
from ..attention.order import TokenOrder
from ..attention.plan import Correction
from ..attention.rest import Rest
from ..attention.select import Selector
from ..attention.selectors import SELECTORS
from ..attention.window import Window
from .findings import Candidate

ORDER = TokenOrder(name="hilbert")
TEMPORAL = TokenOrder(name="temporal")
BLOCK = 16


def default_candidates(device: torch.device | str, correction: Correction = "none") -> list[Candidate]:
    """Every selector's own candidates, dense among them, in Hilbert order, in which what is near in space and time is
    near in memory; windows over all frames in temporal order, which makes them one band, and strided ones in
    strided order.

    Static ones come with their rest pooled and dropped; dynamic ones by error, and pyramids, with it pooled, which they
    are made for, others as published. One tile and block, so that a layer's heads share a group.

    Tiles are of 128 queries, which GPUs' kernels are at their best with, and on CPUs of 64: our kernel there is as fast
    with them, and lists that fewer queries share leave 7 to 20 % less error at the same density.
    """
    tile = 64 if torch.device(device).type == "cpu" else 128
    found = []
    for kind in SELECTORS.values():
        for selector in kind.candidates():
            for rest in _rests(selector):
                own = correction if not isinstance(selector, Dense) else "none"
                layout: Any = {"order": _order(selector), "tile": tile, "block": BLOCK}
                found.append(Candidate(selector=selector, rest=rest, correction=own, **layout))
    return found


def _rests(selector: Selector) -> Sequence[Rest]:
    if selector.covers:
        return ("drop",)
    if selector.static:
        return ("pooled", "drop")
    return ("pooled",) if getattr(selector, "by", "error") == "error" else ("drop",)


def _order(selector: Selector) -> TokenOrder:
    if not isinstance(selector, Window):
        return ORDER
    if selector.dilation[1] > 1:
        # Only then are the cells that a strided window reads whole blocks.
        return TokenOrder(name="strided", sizes=selector.dilation[1:2])
    return TEMPORAL if selector.frames == "100%" and selector.height != "100%" else ORDER


def load_candidates(path: str | Path) -> list[Candidate]:
    """The candidates of a TOML file: tables `[[candidate]]` with `selector`, and `rest`, `order`, `tile`, `block`,
    `correction`.

    Raises ValueError, naming the candidate and its field, for a file that is not valid.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"candidates {path} does not exist: give a TOML file, or leave it out for the defaults")
    try:
        tables = tomllib.loads(path.read_text()).get("candidate", [])
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"candidates {path} is not valid TOML: {error}") from None
    found = []
    for number, table in enumerate(tables):
        try:
            found.append(Candidate.model_validate(table))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"candidates {path}: number {number + 1}: {field}: {first['msg']}") from None
    if not found:
        raise ValueError(f"candidates {path} holds no [[candidate]] table: write it anew with --write-candidates")
    return with_dense(found)


def with_dense(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates, and for each of their layouts one that reads everything: some plan always keeps any bound."""
    found = list(dict.fromkeys(candidates))
    for order, tile, block in dict.fromkeys(candidate.layout for candidate in candidates):
        everything = Candidate(selector=Dense(), order=order, tile=tile, block=block)
        if everything not in found:
            found.append(everything)
    return found


def to_toml(candidates: Sequence[Candidate]) -> str:
    """The text of a candidates file, for people to edit."""
    lines = ["# What `ziggurat search --candidates` tries for every head of every layer.\n"]
    for candidate in candidates:
        lines.append("[[candidate]]")
        for name, value in candidate.model_dump(mode="json").items():
            lines.append(f"{name} = {_toml(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml(value: object) -> str:
    if isinstance(value, dict):
        inside = ", ".join(f"{name} = {_toml(one)}" for name, one in value.items() if one is not None)
        return f"{{ {inside} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(one) for one in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)
