"""The dense runs of a search: every candidate scored on the way, and what else has to be known of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attention.plan import Plan
from ..attention.schedule import Schedule
from ..pipelines.clock import RunClock
from ..pipelines.models import row_of
from ..pipelines.plans import ModelShape, all_block_plan, transformers_of
from ..pipelines.request import Request, call_arguments, complete
from ..pipelines.routing import TransformerRun
from ..pipelines.settings import model_settings
from .capture import until_seen
from .cost import own_is_faster
from .findings import Candidate
from .journal import Journal, Score
from .scoring import ScoringRun
from .sensitivity import Forward, kept_forwards, middle_steps

JOURNAL = "scores.jsonl"


@dataclass(frozen=True, kw_only=True)
class Captured:
    """grid: of the visual segment. noise_levels: of all steps; measured: the steps that were scored. calls: of one
    layer in a run, of which dense_calls at steps that the schedule keeps dense; branches: calls at a step. refreshes:
    steps of a run at which dynamic lists are built. forwards: some of the transformer's, to look at anew. text_length:
    text tokens in the sequence of self-attention, None where there are none.
    """

    grid: tuple[int, int, int]
    tokens: int
    dtype: torch.dtype
    noise_levels: tuple[float, ...]
    measured: tuple[int, ...]
    calls: int
    dense_calls: int
    branches: int
    refreshes: int
    scores: list[Score]
    forwards: list[Forward]
    text_length: int | None
    guidance: float | None


def capture_scores(
    pipe: Any,
    transformer: nn.Module,
    shape: ModelShape,
    folder: Path,
    *,
    prompts: Sequence[str],
    candidates: Sequence[Candidate],
    settings: dict[str, Any],
    noise_steps: int,
    rows: int | None,
    forwards: int,
    schedule: Schedule,
    seed: int,
    resume: bool,
    report: Callable[[str, int, int], None],
    cancelled: Callable[[], bool],
) -> Captured:
    """Run the prompts dense, and score every candidate on some of the calls.

    Scores go to a journal in the folder as they come: with `resume`, those that are there are not made again, nor is
    the run of a prompt, beside the first, whose scores are all there. Our own kernel runs them where it is the faster.
    forwards: how many of the transformer's to keep.
    Raises ValueError for a sequence that is not one video, and where nothing was called.
    """
    journal_path = folder / JOURNAL
    if not resume:
        journal_path.unlink(missing_ok=True)
    weights = next(transformer.parameters())
    header = {
        # A journal that scored lists built anew at every step, or on other queries, is another search's.
        "lists": "as old as the schedule leaves them, on the queries of the call that built them",
        "shape": asdict(shape),
        "prompts": list(prompts),
        "candidates": [candidate.model_dump(mode="json") for candidate in candidates],
        "settings": json.loads(json.dumps(settings)),
        # Both at the steps of `middle_steps`; the sensitivities of so many forwards are kept beside the journal.
        "middle_steps": noise_steps,
        "forwards": forwards,
        "rows": rows,
        "schedule": schedule.model_dump(mode="json"),
        "seed": seed,
        "dtype": str(weights.dtype),
    }
    journal = Journal(journal_path, header)
    done, total = len(journal.scores), len(prompts) * noise_steps * shape.layers

    def told() -> None:
        nonlocal done, total
        done += 1
        # How many guidance branches there are shows as they come.
        total = max(total, done)
        report("capture", done, total)

    given = model_settings(pipe)
    _, grid = complete(pipe, Request(prompt=prompts[0], seed=seed, **settings), given, compare=False)
    sizes = {"heads": shape.heads, "head_dim": shape.head_dim, "dtype": weights.dtype, "device": weights.device}
    own_dense = grid is not None and own_is_faster(grid, **sizes)
    run = ScoringRun(
        all_block_plan(shape) if own_dense else Plan.dense(grid=(1, 1, 1), **asdict(shape)),
        candidates,
        journal,
        schedule=schedule,
        count=noise_steps,
        rows=rows,
        takes_part=takes_part(pipe, transformer),
        report=told,
        cancelled=cancelled,
    )
    clock = RunClock(pipe)
    hooks = TransformerRun(transformer, row_of(transformer), run.plan, run, clock, timing=False)

    def kept_steps() -> list[int]:
        return middle_steps(run.noise_levels or (), run.sparse, forwards)

    guidance: float | None = None
    calls = 0
    kept: list[Forward] = []
    try:
        with kept_forwards(transformer, kept_steps, lambda: clock.step) as found:
            for number, prompt in enumerate(prompts):
                own = sum(score.prompt == number for score in journal.scores.values())
                if number and own == len(run.wanted) * len(run.branches) * shape.layers:
                    continue
                run.prompt = number
                asked = Request(prompt=prompt, seed=seed + number, **settings)
                request, _ = complete(pipe, asked, given, compare=False)
                guidance = request.guidance
                generator = torch.Generator("cpu").manual_seed(seed + number)
                # The first tells of all steps; sensitivities are measured on its forwards.
                run.whole = number == 0
                arguments = call_arguments(pipe, request)
                until_seen(pipe, partial(pipe, **arguments, generator=generator, output_type="latent"))
                total = len(prompts) * max(len(run.wanted), 1) * max(len(run.branches), 1) * shape.layers
                if number == 0:
                    # One prompt's forwards tell enough, and more would only be held.
                    kept, calls = list(found), run.status()[0].calls
    finally:
        hooks.remove()
        clock.release()
    levels = run.noise_levels or ()
    scores = list(journal.scores.values())
    grid = run.grid
    if not scores or grid is None or not levels:
        raise ValueError("nothing was captured: no self-attention call of this pipeline could be reached")
    if len(grid.visual) != 1:
        raise ValueError(f"a search takes sequences of one video or image, this one has {len(grid.visual)}")
    own = [(step, level) for step, level in enumerate(levels) if run.takes_part(level)]
    per_step = round(calls / len(own))
    dense = sum(schedule.is_dense(level, step) for step, level in own)
    refreshes = {schedule.epoch(levels[step]) for step in run.sparse}
    texts = sum(segment.tokens for segment in grid.segments if segment.kind == "text")
    return Captured(
        grid=grid.visual[0].grid,
        tokens=grid.tokens,
        dtype=run.dtype or weights.dtype,
        noise_levels=tuple(levels),
        measured=tuple(run.wanted),
        calls=calls,
        dense_calls=per_step * dense,
        branches=per_step,
        refreshes=len(refreshes),
        scores=scores,
        forwards=kept,
        text_length=texts or None,
        guidance=guidance,
    )


def takes_part(pipe: Any, transformer: nn.Module) -> Callable[[float], bool]:
    """Whether a transformer runs at a noise level: of two experts the first does above a boundary, the other below."""
    experts = transformers_of(pipe)
    boundary = getattr(pipe.config, "boundary_ratio", None)
    if boundary is None or len(experts) == 1:
        return lambda level: True
    first = next(iter(experts.values())) is transformer
    return lambda level: (level >= boundary) == first
