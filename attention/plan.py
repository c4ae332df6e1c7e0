"""The plan: for every layer and head, how its self-attention is computed, and on which steps. A small JSON file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .order import TokenOrder
from .rest import Rest, rest_factor
from .schedule import Schedule
from .selectors import AnySelector

VERSION = 1
MAX_GROUPS = 3
MAX_BYTES = 32 << 20
"""Far above any honest plan (1,600 different heads take half a megabyte); a larger file is not read."""

Positive = Annotated[int, Field(ge=1, le=1 << 16)]
Text = Annotated[str, Field(max_length=2000)]
Grid = tuple[int, int, int]
"""Frames, height and width in latent patches."""
Correction = Literal["none", "rho", "residual", "trend"]
Figures = dict[Annotated[str, Field(max_length=100)], Annotated[float, Field(allow_inf_nan=False)]]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class HeadPlan(_Part):
    """Heads of one layer that use one selector with the same parameters.

    rest: "drop" what the selector leaves out, or read it "pooled", exactly once, at the group's coarser level.
    correction: what makes up for keys left out, measured at every refresh, which therefore runs dense (Re-ttention,
        arXiv 2505.22918): "rho" scales outputs by the share of the softmax's sum that the list kept; "residual" also
        adds what the scaled output then lacked; "trend" also moves that on, by half of how it moved between the last
        two measurements. Costs a number, and a vector or two, per query, head and branch.
    """

    heads: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    selector: AnySelector
    rest: Rest = "pooled"
    correction: Correction = "none"

    @property
    def pooled(self) -> bool:
        return self.rest == "pooled" and not self.selector.covers


class HeadGroup(_Part):
    """Heads of a layer that share token order, query tile, block and levels: one pyramid, one list, one launch.

    factors: level-0 rows that a row of each level stands for; by default what the selectors read, and the block where
    a rest is pooled; left empty where a selector's levels depend on the grid. A rest is pooled at the coarsest factor
    that divides the block.
    """

    order: TokenOrder = TokenOrder()
    tile: Positive = 128
    block: Positive = 64
    factors: tuple[Positive, ...] = ()
    entries: tuple[HeadPlan, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> HeadGroup:
        pooled = any(entry.pooled for entry in self.entries)
        if not self.factors and (wanted := self._wanted(None)) is not None:
            object.__setattr__(self, "factors", wanted)
        if not self.factors:
            return self
        for entry in self.entries:
            if missing := set(entry.selector.factors(self.block, None) or ()) - set(self.factors):
                raise ValueError(
                    f"factors must hold {sorted(missing)} for the {entry.selector.name} selector, got {self.factors}"
                )
        if self.factors[0] != 1 or any(b <= a for a, b in zip(self.factors, self.factors[1:], strict=False)):
            raise ValueError(f"factors must start with 1 and increase, got {self.factors}")
        if pooled and rest_factor(self.factors, self.block) < 2:
            raise ValueError(
                f"factors must hold a divisor of block {self.block} above 1 for the rest to be pooled, "
                f"got {self.factors}"
            )
        return self

    def _wanted(self, rows: int | None) -> tuple[int, ...] | None:
        wanted = {1}
        for entry in self.entries:
            own = entry.selector.factors(self.block, rows)
            if own is None:
                return None
            wanted |= {*own, *((self.block,) if entry.pooled else ())}
        return tuple(sorted(wanted))

    def levels(self, rows: int) -> tuple[int, ...]:
        """The pyramid's factors for `rows` level-0 rows."""
        return self.factors or self._wanted(rows) or (1,)

    @property
    def corrected(self) -> bool:
        return any(entry.correction != "none" for entry in self.entries)

    @property
    def heads(self) -> tuple[int, ...]:
        """In the model's order, so that most groups take theirs as they stand."""
        return tuple(sorted(head for entry in self.entries for head in entry.heads))

    def places(self) -> list[list[int]]:
        """Where each entry's heads stand among the group's."""
        place = {head: number for number, head in enumerate(self.heads)}
        return [[place[head] for head in entry.heads] for entry in self.entries]


class LayerPlan(_Part):
    """One self-attention layer: either head groups that hold every head once, or `dense` with the reason for it.

    schedule: this layer's own, in place of the plan's.
    """

    dense: Text | None = None
    groups: tuple[HeadGroup, ...] = Field(default=(), max_length=MAX_GROUPS)
    schedule: Schedule | None = None

    @model_validator(mode="after")
    def _check(self) -> LayerPlan:
        if (self.dense is None) != bool(self.groups):
            raise ValueError("a layer must have either groups or dense with a reason")
        own = self.schedule
        if own is not None and (own.dense_first_layers or own.dense_last_layers or own.dense_layers):
            raise ValueError("a layer's own schedule can't say which layers are dense: say so in the plan's schedule")
        return self

    @property
    def needs_lse(self) -> bool:
        """Whether some list of the layer is built from the lse of dense attention."""
        return any(entry.selector.needs_lse for group in self.groups for entry in group.entries)


class Plan(_Part):
    """A sparse attention plan for one model.

    model_class: the diffusers transformer class, e.g. "WanTransformer3DModel"; config_hash: of its configuration.
    heads, head_dim: of every layer. layers: one entry for each self-attention layer, in order.
    expert: of a pipeline's transformers the one that it is for ("transformer_2"); None = each of them.
    grid: (frames, height, width) in latent patches that the plan was made for; it runs on any other.
    text_length, guidance: text tokens in the sequence of self-attention and guidance scale where it was made. They bind
        nothing: text is always read whole, and each branch of guidance has dynamic lists of its own.
    cross_by: who runs cross-attention: None = the host's chosen attention, "own" = this package's kernel, which reads
        the equal rows that pad a prompt once (`repeats.attend_repeats`); exact but for rounding.
    predicted, measured: finite figures by name (error, seconds, density, ...).
    """

    version: Literal[1] = VERSION
    name: Text = ""
    note: Text = ""
    model_class: Text = Field(min_length=1)
    config_hash: Text | None = None
    heads: Positive
    head_dim: Positive
    expert: Text | None = None
    grid: tuple[Positive, Positive, Positive]
    text_length: Annotated[int, Field(ge=0)] | None = None
    guidance: float | None = None
    schedule: Schedule = Schedule()
    cross_by: Literal["own"] | None = None
    predicted: Figures = Field(default_factory=dict)
    measured: Figures = Field(default_factory=dict)
    layers: tuple[LayerPlan, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_heads(self) -> Plan:
        wanted = list(range(self.heads))
        for index, layer in enumerate(self.layers):
            got = sorted(head for group in layer.groups for head in group.heads)
            if layer.groups and got != wanted:
                wrong = sorted({h for h in got if got.count(h) > 1 or h >= self.heads} | (set(wanted) - set(got)))
                raise ValueError(
                    f"layers.{index}.groups must hold each of the {self.heads} heads once, wrong are {wrong[:8]}"
                )
        return self

    @classmethod
    def uniform(
        cls, groups: Iterable[HeadGroup], *, layers: int, dense_layers: dict[int, str] | None = None, **fields: Any
    ) -> Plan:
        """The same groups in every layer, but for `dense_layers` (index: reason). `fields` are the plan's others."""
        dense, shared = dense_layers or {}, tuple(groups)
        return cls(
            layers=tuple(
                LayerPlan(dense=dense[index]) if index in dense else LayerPlan(groups=shared) for index in range(layers)
            ),
            **fields,
        )

    @classmethod
    def dense(cls, *, layers: int, reason: str = "a dense plan", **fields: Any) -> Plan:
        """Every layer left to the attention that the host has chosen."""
        return cls(layers=(LayerPlan(dense=reason),) * layers, **fields)

    def check(
        self, *, model_class: str, layers: int, heads: int, head_dim: int, config_hash: str | None = None
    ) -> None:
        """Raise ValueError naming the first field in which the plan is for another model."""
        mine = {
            "model_class": self.model_class,
            "layers": len(self.layers),
            "heads": self.heads,
            "head_dim": self.head_dim,
            "config_hash": self.config_hash if config_hash is not None else None,
        }
        theirs = {
            "model_class": model_class,
            "layers": layers,
            "heads": heads,
            "head_dim": head_dim,
            "config_hash": config_hash if self.config_hash is not None else None,
        }
        for field, value in mine.items():
            if value != theirs[field]:
                raise ValueError(
                    f"plan is for another model: its {field} is {value!r}, the model's is {theirs[field]!r}; "
                    "use a plan made for this model"
                )

    def to_json(self) -> str:
        """The file's text: one plan has one text, whatever it was read from."""
        return json.dumps(self.model_dump(mode="json", exclude_none=True), indent=1, ensure_ascii=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan, whole or not at all."""
        path = Path(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(self.to_json())
            # mkstemp makes the file private; a plan is an ordinary file.
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file. Raises ValueError, one sentence naming file and field, for anything but a valid plan."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"plan {path} does not exist or is no file; give the path of a plan's JSON file")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"plan {path} has {size} bytes, more than any plan ({MAX_BYTES}); is it another file?")
        return cls.from_json(path.read_bytes(), source=str(path))

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "(text)") -> Plan:
        """Read a plan's text; see `load`."""
        try:
            data = json.loads(text)
        except RecursionError:
            raise ValueError(f"plan {source} is nested too deeply to be a plan") from None
        except ValueError as error:
            raise ValueError(f"plan {source} is not valid JSON ({error}); it may be truncated") from None
        if not isinstance(data, dict):
            raise ValueError(f"plan {source} must be a JSON object, got {type(data).__name__}")
        if data.get("version") != VERSION:
            got = repr(data.get("version"))[:40]
            raise ValueError(f"plan {source} has version {got}, this Ziggurat reads version {VERSION}; make it anew")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ValueError(f"plan {source} is invalid: {_first(error)}") from None
        except RecursionError:
            raise ValueError(f"plan {source} is nested too deeply to be a plan") from None


def _first(error: ValidationError) -> str:
    """The first thing wrong, as field: message (got value)."""
    details = error.errors(include_url=False, include_context=False)
    first = details[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] in ("missing", "value_error") else f", got {repr(first['input'])[:60]}"
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{field}: {message}{got}{more}" if field else f"{message}{more}"
