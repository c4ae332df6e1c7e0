"""What the pages say, as HTML and plain text; everything that a user wrote is escaped."""

from __future__ import annotations

import shlex
import time
from html import escape
from typing import Any
from urllib.parse import quote

from ...pipelines.sizes import in_bytes
from .jobs import Job, Store

SETTINGS = ("frames", "height", "width", "steps", "guidance", "seed", "negative")
STATUS = {
    "waiting": "waiting",
    "running": "running",
    "done": "done",
    "kept": "ended early, kept",
    "stopped": "stopped",
    "failed": "failed",
}


def duration(seconds: float | None) -> str:
    """13.04 as "13 s", 200 as "3 min 20 s"."""
    if seconds is None:
        return "unknown"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def file_url(store: Store, job: Job, name: str, version: object = "") -> str:
    """Where Gradio serves a file of a job's folder; `version` makes a changed file a new address."""
    path = quote(str(store.home(job) / name))
    return f"gradio_api/file={path}" + (f"?v={quote(str(version))}" if version != "" else "")


def title(job: Job, longest: int = 90) -> str:
    """A job in a line."""
    text = " ".join(str(job.ask.get("prompt") or job.kind).split())
    if job.kind == "search":
        text = f"search: {job.ask['goal'].replace('_', ' ')} {job.ask['value']:g}, {job.ask['model']}"
    if job.kind == "maps":
        text = f"attention maps of layer {job.ask['layer']}: {text}"
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def sizes(ask: dict[str, Any]) -> str:
    frames = ask.get("frames")
    shape = f"{ask.get('width') or '?'}x{ask.get('height') or '?'}"
    return f"{frames} frames of {shape}" if frames else shape


def estimate_line(seconds: float | None, memory: tuple[int, int] | None) -> str:
    """What a run would take, before it is started."""
    said = "Time unknown until the first run" if seconds is None else f"About {duration(seconds)}"
    if memory is None:
        return f"{said}; memory unknown for this pipeline."
    needed, free = memory
    room = "fits" if needed < 0.7 * free else "tight"
    return f"{said}; {in_bytes(needed)} of memory beside the weights, {in_bytes(free)} free: {room}."


def progress(job: Job | None, ahead: int | None) -> str:
    """The state of the job that is shown."""
    if job is None:
        return "<p class='zg-hint'>Nothing made yet. Write a sentence and press <b>Generate</b>.</p>"
    if job.status == "waiting":
        place = "next in line" if not ahead else f"{ahead} ahead of it"
        return f"<p class='zg-state' role='status'>Waiting: {place}.</p>"
    if job.status == "running":
        return _running(job)
    if job.status == "failed":
        return f"<p class='zg-state zg-error' role='alert'><b>Failed.</b> {escape(job.error)}</p>"
    if job.status == "stopped":
        return "<p class='zg-state' role='status'>Stopped; nothing was kept.</p>"
    took = duration((job.ended_at or 0) - (job.started_at or 0))
    early = f" Ended early, after step {job.result.get('ended_at')}." if job.status == "kept" else ""
    warned = "".join(f"<li>{escape(text)}</li>" for text in job.warnings)
    notes = f"<ul class='zg-notes'>{warned}</ul>" if warned else ""
    return f"<p class='zg-state' role='status'>Done in {took}.{early}</p>{notes}"


def _running(job: Job) -> str:
    stand = job.progress
    share = round(100 * stand.done / stand.total) if stand.total else 0
    ending = {"stop": "stopping: ", "keep": "ending early: "}.get(job.wanted, "")
    facts = [f"step {stand.done} of {stand.total}"] if stand.total else []
    if stand.step_seconds is not None:
        facts.append(f"{stand.step_seconds:.2f} s a step")
    if stand.left is not None:
        facts.append(f"about {duration(stand.left)} left, then decoding")
    return (
        f"<div class='zg-state'><span role='status'><b>{escape(ending + (stand.phase or 'starting'))}</b></span>"
        f" <span>{' · '.join(facts)}</span>"
        f"<div class='zg-bar' role='progressbar' aria-label='Progress' aria-valuemin='0' aria-valuemax='100'"
        f" aria-valuenow='{share}'><div style='width:{share}%'></div></div></div>"
    )


def figures(job: Job | None) -> str:
    """What a finished job measured, as a table."""
    if job is None or job.kind != "video" or not job.made:
        return ""
    found, ask = job.result["figures"], job.ask
    rows = [("Seconds", f"{found['seconds']:.1f} s, {found.get('steps') or '?'} steps")]
    if "dense_seconds" in found:
        ratio = found["dense_seconds"] / found["seconds"]
        rows.append(("Dense", f"{found['dense_seconds']:.1f} s ({ratio:.2f} times the plan's)"))
        rows.append(("Against dense", f"PSNR {found['psnr']:.1f} dB, SSIM {found['ssim']:.3f}"))
    elif ask.get("compare"):
        rows.append(("Against dense", "not measured: the run was ended early"))
    if "attention_share" in found:
        rows.append(("Attention", f"{found['attention_share']:.0%} of the time"))
    rows.append(("Density", f"{found['density']:.1%} of the rows read; {found['list_density']:.1%} where it is sparse"))
    if predicted := job.result["predicted"]:
        said = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in predicted.items())
        rows.append(("Predicted", said))
    rows += [("Plan", job.result["plan"]), ("Seed", str(ask["seed"])), ("Size", sizes(ask))]
    rows.append(("Ran on", f"{job.result['device']}, {job.result['dtype']}"))
    body = "".join(f"<tr><th scope='row'>{name}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table class='zg-table'><caption>What it cost</caption>{body}</table>"


def command_line(store: Store, job: Job, model: str) -> str:
    """The job as `ziggurat generate ...`."""
    ask = job.ask
    words = ["ziggurat", "generate", ask["prompt"], "--model", model, "--plan", _plan(job)]
    for name in SETTINGS:
        if ask.get(name) not in (None, ""):
            words += [f"--{name}", str(ask[name])]
    if ask.get("image"):
        words += ["--image", str(store.home(job) / ask["image"])]
    words += ["--compare"] if ask["compare"] else []
    return shlex.join([*words, "--out", "video.png" if ask.get("frames") in (None, 1) else "video.mp4"])


def python_code(store: Store, job: Job, model: str) -> str:
    """The job as a few lines of Python."""
    given = {name: job.ask[name] for name in SETTINGS if job.ask.get(name) not in (None, "")}
    if job.ask.get("image"):
        given["image"] = str(store.home(job) / job.ask["image"])
    if job.ask["compare"]:
        given["compare"] = True
    lines = "".join(f"    {name}={value!r},\n" for name, value in {"plan": _plan(job), **given}.items())
    return (
        "from ziggurat.pipelines.generate import generate\n"
        "from ziggurat.pipelines.media import write_video\n\n"
        f"made = generate(\n    {model!r},\n    {job.ask['prompt']!r},\n{lines})\n"
        f"write_video({'video.png' if job.ask.get('frames') in (None, 1) else 'video.mp4'!r}, made.frames, made.fps)\n"
    )


def recipe(store: Store, job: Job, model: str) -> str:
    """Both of these, each with a button that copies it."""
    parts = (("As a command line", command_line(store, job, model)), ("As Python", python_code(store, job, model)))
    return "".join(
        f"<section class='zg-code'><div><span>{title}</span><button type='button' data-copy"
        f" aria-label='Copy: {title}'>Copy</button></div><pre tabindex='0' aria-label='{title}'>{escape(text)}</pre>"
        "</section>"
        for title, text in parts
    )


def _plan(job: Job) -> str:
    if job.ask["plan"] in ("auto", "none"):
        return job.ask["plan"]
    return job.result.get("plan_path") or job.ask["plan_path"]


def line(running: list[Job], waiting: list[Job]) -> str:
    """The queue: what runs and what waits, with buttons to move and delete."""
    if not running and not waiting:
        return "<p class='zg-hint'>The queue is empty.</p>"
    rows = [
        f"<li><span class='zg-place'>now</span> <span class='zg-what'>{escape(title(job))}</span>"
        f"{_button('show', job, 'Show', 'Show')}{_button('stop', job, 'Stop', 'Stop')}</li>"
        for job in running
    ]
    for place, job in enumerate(waiting, 1):
        rows.append(
            f"<li><span class='zg-place'>{place}</span> <span class='zg-what'>{escape(title(job))}</span>"
            f"{_button('up', job, '↑', 'Move up')}{_button('down', job, '↓', 'Move down')}"
            f"{_button('show', job, 'Show', 'Show')}{_button('delete', job, '✕', 'Delete')}</li>"
        )
    return f"<ol class='zg-line' aria-label='Queue'>{''.join(rows)}</ol>"


def _button(act: str, job: Job, face: str, label: str) -> str:
    name = escape(f"{label}: {title(job, 40)}", quote=True)
    return f"<button type='button' data-act='{act}' data-id='{job.id}' aria-label='{name}'>{face}</button>"


def gallery(store: Store, jobs: list[Job], chosen: str | None) -> str:
    """What was made, as a grid of buttons with thumbnails."""
    if not jobs:
        return "<p class='zg-hint'>Nothing here yet: what you generate is kept, and found here again.</p>"
    cards = []
    for job in jobs:
        picture = "<span class='zg-blank' aria-hidden='true'></span>"
        if job.made and job.kind == "video":
            picture = f"<img src='{file_url(store, job, 'thumb.webp')}' alt='' loading='lazy'>"
        when = time.strftime("%d %b %H:%M", time.localtime(job.asked_at))
        pressed = "true" if job.id == chosen else "false"
        cards.append(
            f"<button type='button' data-act='choose' data-id='{job.id}' aria-pressed='{pressed}'>{picture}"
            f"<span class='zg-what'>{escape(title(job, 70))}</span>"
            f"<span class='zg-when'>{when} · {STATUS[job.status]}</span></button>"
        )
    return f"<div class='zg-gallery' role='group' aria-label='What was made'>{''.join(cards)}</div>"
