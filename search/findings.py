"""What a search has found, as its folder keeps it: candidates, their errors and costs, the front, and the proof."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..attention.order import TokenOrder
from ..attention.plan import Correction, HeadGroup, HeadPlan, Plan
from ..attention.rest import Rest
from ..attention.schedule import Schedule
from ..attention.selectors import AnySelector
from ..pipelines.plans import ModelShape

FILE = "search.json"
PLAN = "plan.json"

PerHead = list[list[float]]
"""[layer][head]."""
PerChoice = list[list[list[float]]]
"""[layer][head][candidate]."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Candidate(Record):
    """One way to compute a head: a selector with its parameters, and the layout that it works in."""

    selector: AnySelector
    rest: Rest = "drop"
    order: TokenOrder = TokenOrder()
    tile: Annotated[int, Field(ge=1, le=1 << 16)] = 128
    block: Annotated[int, Field(ge=1, le=1 << 16)] = 16
    correction: Correction = "none"

    @property
    def family(self) -> str:
        return self.selector.name

    @property
    def layout(self) -> tuple[TokenOrder, int, int]:
        """What heads of one group share."""
        return self.order, self.tile, self.block

    @property
    def entry(self) -> HeadPlan:
        """The plan's entry for one head."""
        return HeadPlan(heads=(0,), selector=self.selector, rest=self.rest, correction=self.correction)

    @property
    def group(self) -> HeadGroup:
        """The candidate alone in a group of one head."""
        return HeadGroup(order=self.order, tile=self.tile, block=self.block, entries=(self.entry,))

    def __str__(self) -> str:
        parts = self.selector.model_dump(exclude_defaults=True, exclude={"name"})
        given = " ".join(f"{name}={value}" for name, value in parts.items())
        said = f"{self.family} {given} {self.rest}, {self.order}, block {self.block}".replace("  ", " ")
        return said if self.correction == "none" else f"{said}, {self.correction}"


class CostRow(Record):
    """One measurement that the cost model was fitted to: seconds of a call, and what the model says of it."""

    block: int
    tokens: int
    head_dim: int
    heads: int
    pooled: bool
    list_density: float
    seconds: float
    fitted: float


class Point(Record):
    """One plan on the front. picks: a candidate's number for each [layer][head]; a layer of None runs stock attention.

    seconds: predicted self-attention of one video. error: the sensitivity-weighted sum. density: predicted, over the
    whole run.
    """

    seconds: float
    error: float
    density: float
    picks: list[list[int] | None]


class Proof(Record):
    """One plan held against dense on prompts that the search never saw; seconds are medians of whole pipeline calls."""

    point: int
    prompts: int
    psnr: float
    ssim: float
    density: float
    seconds: float
    own_dense_seconds: float
    stock_seconds: float
    attention_seconds: float
    own_dense_attention_seconds: float


class Findings(Record):
    """Everything a search found; `plan` makes any point of the front into a plan.

    shape: of the model; expert: of its transformers the one searched, None if there is but one. text_length, guidance:
    see `Plan`. grid: frames, height, width in latent patches. corrected: which correction the candidates have, and why.
    prompts: calibrated on; held_out: proved on. noise_levels: captured, at measured_steps. sampled_rows: query rows
    measured at each call, of `tokens`. errors: ‖O - O*‖ / ‖O*‖ at the chosen quantile over prompts, steps and branches.
    recalls: mean share of the dense softmax mass that is read at level 0. densities: mean. weights: how much a head's
    relative error moves the final prediction (the layer's sensitivity times the head's share of the layer's output).
    sensitivities: of each layer. seconds: predicted, of one head in one call for each candidate. dense_seconds: of one
    call of one layer by our own kernel reading everything; stock_seconds: by SDPA. launch_seconds: of one more head
    group in a layer. calls: of one layer in a run. dense_calls: of those, dense by the schedule. branches: calls of one
    layer at a step. refreshes: steps of a run that build dynamic lists. steady: the share of heads that keep their
    family under the chosen plan whichever quarter of the prompts is left out.
    """

    shape: ModelShape
    expert: str | None = None
    text_length: int | None = None
    guidance: float | None = None
    grid: tuple[int, int, int]
    tokens: int
    dtype: str
    steps: int
    seed: int
    quantile: float
    prompts: list[str]
    held_out: list[str]
    noise_levels: list[float]
    measured_steps: list[int] = [0]
    sampled_rows: int
    schedule: Schedule
    cross_by: Literal["own"] | None = None
    corrected: str = ""
    candidates: list[Candidate]
    errors: PerChoice
    recalls: PerChoice
    densities: PerChoice
    weights: PerHead
    sensitivities: list[float]
    seconds: list[float]
    dense_seconds: float
    stock_seconds: float
    launch_seconds: float
    calls: int
    dense_calls: int
    branches: int = 1
    refreshes: int = 1
    costs: list[CostRow] = []
    front: list[Point] = []
    chosen: int | None = None
    steady: float | None = None
    proofs: list[Proof] = []
    machine: dict[str, str | int | float | None] = {}

    def save(self, folder: Path) -> Path:
        """Write `search.json` into the folder, whole or not at all."""
        part = folder / f".{FILE}.part"
        part.write_text(self.model_dump_json() + "\n")
        os.replace(part, folder / FILE)
        return folder / FILE

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Findings:
        """What a search wrote to its folder. Raises ValueError, naming the field, for anything else."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise ValueError(f"{path} does not exist: give the folder that a search wrote its results to")
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(
                f"{path} is not a search's result: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from None

    def plan(self, point: int) -> Plan:
        """The plan of a point of the front. Raises ValueError for a number that the front does not have."""
        from .compose import compose

        return compose(self, point)
