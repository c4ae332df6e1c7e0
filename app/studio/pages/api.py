"""The same app for programs: what `gradio_client` calls by name."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.events import api

from ..studio import Form, Studio
from ..texts import SETTINGS, file_url


def add_api(studio: Studio) -> None:
    """Add the routes `generate`, `job` and `stop` to the pages that are being built."""
    first = next(iter(studio.shelf.models))

    def generate(
        prompt: str,
        model: str = first,
        plan: str = "auto",
        negative: str | None = None,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        compare: bool = False,
    ) -> str:
        """Put a video in the queue; returns the job's name."""
        form = Form(
            prompt=prompt,
            model=model,
            plan=plan,
            negative=negative,
            height=height,
            width=width,
            frames=frames,
            steps=steps,
            guidance=guidance,
            seed=seed,
            compare=compare,
        )
        return _told(lambda: studio.submit(form).id)

    def job(name: str) -> dict[str, Any]:
        """Where a job stands: status, place, phase, step and seconds left; when done, files and figures."""
        found = _told(lambda: studio.queue.get(name))
        files = {kind: found.result.get(kind) for kind in ("video", "dense")}
        return {
            "status": found.status,
            "ahead": studio.queue.ahead(found) if found.status == "waiting" else 0,
            "phase": found.progress.phase,
            "step": found.progress.done,
            "steps": found.progress.total,
            "seconds_left": found.progress.left,
            "error": found.error,
            "warnings": found.warnings,
            "settings": {name: found.ask.get(name) for name in ("prompt", "model", "plan", *SETTINGS)},
            "files": {kind: file_url(studio.store, found, file) for kind, file in files.items() if file},
            "figures": found.result.get("figures", {}),
        }

    def stop(name: str, keep: bool = False) -> str:
        """End a job, at once or keeping what there is; returns its status."""
        _told(lambda: studio.queue.stop(name, keep=keep))
        return studio.queue.get(name).status

    for function in (generate, job, stop):
        api(function, api_name=function.__name__, queue=False)


def _told(function: Any) -> Any:
    try:
        return function()
    except (ValueError, OSError) as error:
        raise gr.Error(str(error), print_exception=False) from error
