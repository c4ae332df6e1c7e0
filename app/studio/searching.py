"""A search as a job: its choices, its front as a picture to click, and what it leaves behind."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...attention.selectors import SELECTORS
from ...search.findings import Findings
from ...search.prompts import default_prompts
from .jobs import Job, Store
from .models import Shelf
from .queue import Stopped
from .texts import duration
from .worker import Worker

FOLDER = "search"
REPORT = "report.html"
GOALS = {
    "budget": "A share of dense attention's time",
    "max_error": "A bound on the error",
    "target_psnr": "A PSNR against dense",
}
PHASES = {
    "capture": "measuring candidates in dense runs",
    "sensitivity": "how much each layer matters",
    "cost": "timing candidates",
    "choice": "choosing",
    "proof": "proving on prompts it never saw",
    "pictures": "drawing the report",
}
WIDTH, HEIGHT, EDGE = 620, 340, 52


def families() -> list[str]:
    """The families of selectors that a search may try; dense is always among the candidates."""
    return [name for name in SELECTORS if name != "dense"]


def make_search(worker: Worker, job: Job) -> None:
    """Search for a plan, and keep it among the plans."""
    from ...search.run import search
    from ...search.scoring import Cancelled

    ask = job.ask
    model = worker.shelf.model(ask["model"])
    worker.phase(job, "loading the model")
    pipe = worker.pipe(ask["model"])
    prompts, held_out = default_prompts(model.settings.captions)

    def report(stage: str, done: int, total: int) -> None:
        worker.phase(job, PHASES.get(stage, stage), done, total)

    try:
        found = search(
            pipe,
            worker.store.home(job) / FOLDER,
            **{ask["goal"]: ask["value"]},
            prompts=prompts[: ask["prompts"]],
            held_out=held_out,
            families=ask["families"],
            expert=ask["expert"],
            noise_steps=ask["noise_steps"],
            steps=ask["steps"],
            frames=ask["frames"],
            proofs=ask["proofs"],
            seed=ask["seed"],
            report=report,
            cancelled=lambda: job.wanted == "stop",
        )
    except Cancelled:
        raise Stopped from None
    points = [point.model_dump(include={"seconds", "error", "density"}) for point in found.front]
    proof = found.proof.model_dump(exclude={"point"}) if found.proof is not None else {}
    job.result = {
        "front": points,
        "chosen": found.findings.chosen,
        "plans": {str(found.findings.chosen): worker.shelf.keep_plan(found.plan)},
        "met": found.met,
        "proof": proof,
    }


def take_point(store: Store, shelf: Shelf, job: Job, point: int) -> str:
    """Keep a point of the front among the plans; returns its name."""
    known = job.result["plans"]
    if str(point) not in known:
        found = Findings.load(store.home(job) / FOLDER)
        known[str(point)] = shelf.keep_plan(found.plan(point))
        store.save(job)
    return known[str(point)]


def front(points: Sequence[dict[str, float]], chosen: int | None, picked: int | None) -> str:
    """The Pareto front as an SVG of buttons: seconds across, error up; the chosen plan filled."""
    if not points:
        return ""
    seconds, errors = [point["seconds"] for point in points], [point["error"] for point in points]
    low, high = min(seconds), max(seconds)
    top = max(errors) or 1.0

    def across(value: float) -> float:
        return EDGE + (WIDTH - 2 * EDGE) * ((value - low) / (high - low) if high > low else 0.5)

    def up(value: float) -> float:
        return HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * value / top

    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in sorted(zip(seconds, errors, strict=True)))
    dots = []
    for number, point in enumerate(points):
        label = escape(
            f"plan {number}: attention {duration(point['seconds'])}, error {point['error']:.3g},"
            f" density {point['density']:.0%}",
            quote=True,
        )
        fill = "var(--color-accent)" if number == chosen else "var(--background-fill-primary)"
        size = 8 if number == picked else 6
        dots.append(
            f"<circle cx='{across(point['seconds']):.1f}' cy='{up(point['error']):.1f}' r='{size}' fill='{fill}'"
            f" stroke='var(--color-accent)' stroke-width='2' tabindex='0' role='button' data-act='point'"
            f" data-point='{number}' aria-label='{label}' aria-pressed='{'true' if number == picked else 'false'}'>"
            f"<title>{label}</title></circle>"
        )
    ink = "fill='var(--body-text-color-subdued)' font-size='12'"
    axes = (
        f"<path d='M{EDGE} {EDGE / 2} V{HEIGHT - EDGE} H{WIDTH - EDGE / 2}' fill='none'"
        " stroke='var(--border-color-primary)'/>"
        f"<text x='{EDGE}' y='{HEIGHT - EDGE + 22}' {ink}>{duration(low)}</text>"
        f"<text x='{WIDTH - EDGE}' y='{HEIGHT - EDGE + 22}' text-anchor='end' {ink}>{duration(high)}</text>"
        f"<text x='{WIDTH / 2}' y='{HEIGHT - 12}' text-anchor='middle' {ink}>predicted attention of one video</text>"
        f"<text x='{EDGE - 12}' y='{EDGE + 4}' text-anchor='end' {ink}>{top:.2g}</text>"
        f"<text x='{EDGE - 12}' y='{HEIGHT - EDGE + 4}' text-anchor='end' {ink}>0</text>"
        f"<text x='14' y='{HEIGHT / 2}' text-anchor='middle' transform='rotate(-90 14 {HEIGHT / 2})' {ink}>"
        "predicted error</text>"
    )
    return (
        f"<div class='zg-front'><svg viewBox='0 0 {WIDTH} {HEIGHT}' role='group' aria-label='The front'>"
        f"{axes}<polyline points='{path}' fill='none' stroke='var(--color-accent)' opacity='.5'/>{''.join(dots)}</svg>"
        "<p class='zg-hint'>Every point is a plan; the filled one was chosen. Click another to take it instead.</p>"
        "</div>"
    )


def result_text(job: Job, picked: int | None, name: str) -> str:
    """The picked plan in figures, with the proof of the chosen one."""
    point = job.result["front"][picked if picked is not None else job.result["chosen"]]
    rows: list[tuple[str, Any]] = [
        ("Plan", name),
        ("Predicted attention", duration(point["seconds"])),
        ("Predicted error", f"{point['error']:.3g}"),
        ("Predicted density", f"{point['density']:.1%}"),
    ]
    proof = job.result["proof"]
    if proof and picked in (None, job.result["chosen"]):
        rows += [
            ("Measured", f"PSNR {proof['psnr']:.1f} dB, SSIM {proof['ssim']:.3f}, density {proof['density']:.1%}"),
            ("Whole call", f"{duration(proof['seconds'])}; stock attention {duration(proof['stock_seconds'])}"),
            ("Proved on", f"{proof['prompts']} prompts that the search never saw"),
        ]
    if not job.result["met"]:
        rows.append(("Note", "no plan meets the goal; this is the nearest"))
    body = "".join(f"<tr><th scope='row'>{key}</th><td>{escape(str(value))}</td></tr>" for key, value in rows)
    return f"<table class='zg-table'><caption>The plan, saved and chosen on the first page</caption>{body}</table>"


def report_frame(home: Path) -> str:
    """The search's own report inside the page: in a frame of its own, that may run nothing."""
    path = home / FOLDER / REPORT
    return _framed(path, path.stat().st_mtime_ns) if path.is_file() else ""


@functools.lru_cache(maxsize=4)
def _framed(path: Path, _changed: int) -> str:
    return f"<iframe class='zg-report' sandbox title='Report' srcdoc='{escape(path.read_text(), quote=True)}'></iframe>"
