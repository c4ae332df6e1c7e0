"""What the pages share: small makers of components, and errors that become a message on the page."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from ..studio import Studio


def html(value: str, **more: Any) -> gr.HTML:
    """An HTML part that styles itself."""
    return gr.HTML(value, apply_default_css=False, padding=False, **{"js_on_load": None, **more})


def number(label: str, value: int | None, step: int, *, minimum: int = 1, visible: bool = True) -> gr.Number:
    """A whole number."""
    return gr.Number(label=label, value=value, step=step, minimum=minimum, precision=0, min_width=90, visible=visible)


SHOWN_SECONDS = 20.0
"""A message's: long enough to read the longest twice."""


def refused(error: Exception, title: str = "Not done") -> gr.Error:
    """What went wrong, as a message on the page."""
    return gr.Error(escape(str(error), quote=False), title=title, duration=SHOWN_SECONDS, print_exception=False)


def told(function: Callable[..., Any], title: str = "Not done") -> Callable[..., Any]:
    """The function, with what it refuses shown on the page."""

    def call(*values: Any) -> Any:
        try:
            return function(*values)
        except (ValueError, OSError) as error:
            raise refused(error, title) from error

    return call


def act_on(studio: Studio) -> Callable[..., Any]:
    """What the buttons of the queue do; given the job that is shown, it returns the one to show."""

    def act(shown: str | None, event: gr.EventData) -> Any:
        asked, name = event._data["act"], event._data["id"]
        if asked == "show":
            return name
        queue = studio.queue
        try:
            if asked in ("up", "down"):
                queue.move(name, -1 if asked == "up" else 1)
            elif asked == "stop":
                queue.stop(name)
            elif asked == "delete":
                queue.delete(name)
        except ValueError as error:
            raise refused(error) from error
        return shown

    return act
