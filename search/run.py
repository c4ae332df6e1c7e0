"""search(model, folder): a plan for a model on this machine, what it will cost and gain, and the proof."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..attention.plan import Correction, Plan
from ..attention.schedule import Schedule
from ..attention.selectors import SELECTORS
from ..pipelines.plans import model_shape, transformers_of
from ..pipelines.record import surroundings
from ..pipelines.routing import attached
from ..pipelines.settings import model_settings
from .candidates import default_candidates, load_candidates, with_dense
from .captured import capture_scores
from .correction import affordable
from .cost import measure
from .cross import cross_by
from .findings import PLAN, Candidate, Findings, Point, Proof
from .measured import MEASURED, Measured
from .pictures import draw_all
from .prompts import default_prompts
from .prove import Prover, cheapest
from .scoring import ROWS, Cancelled
from .sensitivity import forwards_within, sensitivities
from .settle import bounded, front, gathered, knapsack, steadiness

SCHEDULE = Schedule(dense_until=0.96, refresh_at=(0.75,))
CORRECTED = Schedule(refresh_at=(0.99, 0.975, 0.957, 0.86, 0.45))
"""Of candidates whose correction is measured at every refresh, which is exact therefore: most of them early, for what
goes wrong there grows while the video takes shape (benchmarks/schedules.py)."""
BUDGET = 0.5
SENSITIVITY_PASSES = 24
MOST_PROMPTS = 16
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """plan: the one chosen. folder: what `load_result` reads. met: whether the bound or target holds; of one that
    can't, the nearest there is was chosen. seconds: of the search."""

    plan: Plan
    findings: Findings
    folder: Path
    met: bool

    @property
    def front(self) -> list[Point]:
        return self.findings.front

    @property
    def proof(self) -> Proof | None:
        return next((one for one in self.findings.proofs if one.point == self.findings.chosen), None)


def load_result(folder: str | os.PathLike[str]) -> SearchResult:
    """What a search wrote. Raises ValueError where it is not there or not whole."""
    found = Findings.load(folder)
    if found.chosen is None:
        raise ValueError(f"the search in {folder} did not come to its end: run it again with resume")
    return SearchResult(plan=Plan.load(Path(folder) / PLAN), findings=found, folder=Path(folder), met=True)


def search(
    model: Any,
    out: str | os.PathLike[str],
    *,
    budget: float | None = None,
    max_error: float | None = None,
    target_psnr: float | None = None,
    target_ssim: float | None = None,
    prompts: Sequence[str] | None = None,
    held_out: Sequence[str] | None = None,
    candidates: Sequence[Candidate] | str | Path | None = None,
    families: Collection[str] | None = None,
    correction: Correction | None = None,
    expert: str | None = None,
    noise_steps: int = 3,
    rows: int | None = ROWS,
    passes: int = SENSITIVITY_PASSES,
    steps: int | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    guidance: float | None = None,
    schedule: Schedule | Mapping[str, Any] = MappingProxyType({}),
    quantile: float = 1.0,
    proofs: int = 2,
    across: int = 0,
    seed: int = 0,
    resume: bool = False,
    report: Report = lambda stage, done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> SearchResult:
    """Find a plan, prove it, and write plan, figures, pictures and a report to `out`.

    Args:
        model: a pipeline, or what `load` takes.
        budget: share of our own dense attention's time that the plan may take, 0.5 if nothing else is given: the
            error is least. max_error: bound on the sensitivity-weighted sum of relative errors: the time is least.
            target_psnr (dB), target_ssim: against dense on held-out prompts, measured: the cheapest plan of the front
            that reaches it, found by bisection.
        prompts: to calibrate on; held_out: to prove on (the first `proofs` of them; 0 = no proof).
        candidates: what to try for each head, or a TOML file of it; else the default ones, of these families, all with
            this correction (see `HeadPlan`): None = "trend" where what it keeps fits a run's memory, else "residual"
            where that does, else "none".
        expert: of a pipeline with two transformers the one to search for, the first by default; the plan is for that
            one alone.
        noise_steps: at how many of the sparse denoising steps to measure, those of `middle_steps`.
        rows: queries of a call that errors are measured on, about; calls of a layer that read different lists take
            turns, so that they see more of the sequence between them. None = all queries of every call.
        passes: forwards of the transformer that sensitivities may take; of models with more layers some are measured.
        steps, frames, height, width, guidance: of every run, the model's own by default.
        schedule: of the plan, or in what it differs from the usual one: `CORRECTED` where a candidate has a correction,
            else `SCHEDULE`. Its dense steps go to our own kernel where that is the faster one here.
        across: how many plans spread over the front are proved beside the chosen one.
        quantile: of the errors over prompts, steps and branches that counts; 1 = the worst.
        resume: go on from what an interrupted search of the same settings left in `out`.
        report: called with stage, done, total. cancelled: asked often; true ends the search with `Cancelled`.

    Raises ValueError for a bound that is none, settings that the pipeline can't take, a folder of another search, and
    for NaN in the model's attention, naming the layer; Cancelled.
    """
    given = [name for name, value in _bounds(budget, max_error, target_psnr, target_ssim).items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"one bound can be searched for at a time, got {' and '.join(given)}: give one of them")
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must lie above 0 and at most at 1, got {quantile}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    pipe = _loaded(model)
    pipe.set_progress_bar_config(disable=True)
    experts = transformers_of(pipe)
    if expert is not None and expert not in experts:
        raise ValueError(f"expert must be one of {' and '.join(experts)}, got {expert!r}")
    name = expert or next(iter(experts))
    transformer = experts[name]
    if attached(transformer):
        raise ValueError("pipe already has a plan on its transformer: detach that handle first")
    shape = model_shape(transformer)
    told, unseen = default_prompts(model_settings(pipe).captions)
    prompts, held_out = list(prompts or told), list(held_out or unseen)
    if len(prompts) > MOST_PROMPTS:
        raise ValueError(f"prompts to calibrate on must be 1 to {MOST_PROMPTS}, got {len(prompts)}: give fewer")
    settings = {"steps": steps, "frames": frames, "height": height, "width": width, "guidance": guidance}
    settings = {name: value for name, value in settings.items() if value is not None}
    device = next(transformer.parameters()).device
    if candidates is None:
        why = f"{correction}: as asked for"
        if correction is None:
            correction, why = affordable(pipe, transformer, shape, prompts[0], settings)
        default = default_candidates(device, correction)
        candidates = [one for one in default if families is None or one.family in families]
        if not candidates:
            raise ValueError(f"families must name some of {', '.join(SELECTORS)}, got {', '.join(families or ())}")
    elif correction is not None or families is not None:
        raise ValueError("correction and families are of the default candidates: given ones say their own")
    else:
        candidates = load_candidates(candidates) if isinstance(candidates, str | Path) else candidates
        why = "each candidate's own"
    tried = with_dense(candidates)
    if not isinstance(schedule, Schedule):
        usual = CORRECTED if any(one.correction != "none" for one in tried) else SCHEDULE
        schedule = Schedule.model_validate({**usual.model_dump(), **schedule})

    captured = capture_scores(
        pipe,
        transformer,
        shape,
        folder,
        prompts=prompts,
        candidates=tried,
        settings=settings,
        noise_steps=noise_steps,
        rows=rows,
        forwards=forwards_within(passes, shape.layers),
        schedule=schedule,
        seed=seed,
        resume=resume,
        report=report,
        cancelled=cancelled,
    )
    measured = Measured.of(
        folder / MEASURED,
        resume=resume,
        sensitivities=lambda: sensitivities(
            pipe, transformer, captured.forwards, passes, lambda done, total: report("sensitivity", done, total)
        ),
        cost=lambda: measure(
            tried,
            captured.grid,
            heads=shape.heads,
            head_dim=shape.head_dim,
            dtype=captured.dtype,
            device=device,
            report=lambda done, total: report("cost", done, total),
        ),
        cross_by=lambda: cross_by(transformer, captured.forwards),
    )
    moved, cost = measured.sensitivities, measured.cost
    found = Findings(
        shape=shape,
        expert=name if len(experts) > 1 else None,
        text_length=captured.text_length,
        guidance=captured.guidance,
        grid=captured.grid,
        tokens=captured.tokens,
        dtype=str(captured.dtype).removeprefix("torch."),
        steps=len(captured.noise_levels),
        seed=seed,
        quantile=quantile,
        prompts=prompts,
        held_out=held_out[:proofs],
        measured_steps=list(captured.measured),
        noise_levels=[captured.noise_levels[step] for step in captured.measured],
        sampled_rows=min(score.rows for score in captured.scores),
        schedule=schedule.model_copy(update={"dense_by": "own"}) if cost.dense < cost.stock else schedule,
        cross_by=measured.cross_by,
        corrected=why,
        candidates=tried,
        **gathered(captured.scores, shape.layers, moved, quantile),  # type: ignore[arg-type]
        sensitivities=moved,
        seconds=[],
        dense_seconds=cost.dense,
        stock_seconds=cost.stock,
        launch_seconds=cost.launch,
        calls=captured.calls,
        dense_calls=captured.dense_calls,
        branches=captured.branches,
        refreshes=captured.refreshes,
        costs=cost.rows,
        machine=surroundings(str(device))["machine"],
    )
    problem, constant = knapsack(found, cost)
    sparse = max(found.calls - found.dense_calls, 1)
    found = found.model_copy(
        update={
            "seconds": (problem.seconds.mean((0, 1)) / sparse).tolist(),
            "front": front(found, problem, constant, report),
        }
    )
    allowed = (BUDGET if budget is None else budget) * cost.dense * captured.calls * shape.layers
    point, found, met = bounded(
        found, problem, constant, max_seconds=None if max_error is not None else allowed, max_error=max_error
    )
    prover = Prover(
        pipe=pipe,
        prompts=found.held_out,
        settings=settings,
        expert=found.expert,
        seed=seed + 1000,
        report=lambda done, total: report("proof", done, total),
    )
    videos: dict[str, Any] = {}
    kept: dict[int, Proof] = {}

    def prove(number: int) -> Proof:
        if cancelled():
            raise Cancelled
        if number not in kept:
            kept[number], shown = prover.prove(found.plan(number), number)
            videos[str(number)] = shown
        return kept[number]

    if target_psnr is not None or target_ssim is not None:
        if not found.held_out:
            raise ValueError("a target is measured on held-out prompts: give proofs of at least 1")
        value, target = ("psnr", target_psnr) if target_psnr is not None else ("ssim", target_ssim)
        assert target is not None
        point, met = cheapest(len(found.front), lambda number: getattr(prove(number), value), target)
    if found.held_out:
        prove(point)
        for number in spread(len(found.front), across):
            prove(number)
    chosen_one = found.front[point]
    steady = steadiness(found, cost, captured.scores, chosen_one.picks, chosen_one.seconds - constant)
    proved = [kept[number] for number in sorted(kept)]
    found = found.model_copy(update={"chosen": point, "proofs": proved, "steady": steady})
    plan = found.plan(point)
    found.save(folder)
    plan.save(folder / PLAN)
    report("pictures", 0, 1)
    draw_all(folder, found, plan, pipe, transformer, captured.forwards, videos.get(str(point), {}))
    report("pictures", 1, 1)
    return SearchResult(plan=plan, findings=found, folder=folder, met=met)


def spread(count: int, wanted: int) -> list[int]:
    """At most so many numbers below `count`, evenly spread from its first to its last."""
    wanted = min(wanted, count)
    return sorted({round(place * (count - 1) / max(wanted - 1, 1)) for place in range(wanted)})


def _bounds(budget: Any, max_error: Any, target_psnr: Any, target_ssim: Any) -> dict[str, float | None]:
    return {"budget": budget, "max_error": max_error, "target_psnr": target_psnr, "target_ssim": target_ssim}


def _loaded(model: Any) -> Any:
    if not isinstance(model, str | Path):
        return model
    from ..pipelines.loading import load

    return load(model)
