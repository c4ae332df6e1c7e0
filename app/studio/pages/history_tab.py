"""What this machine made: to see again, to make again, and to hold side by side."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .. import texts
from ..jobs import Job
from ..player import player
from ..studio import Studio
from .common import html, told
from .generate_tab import GenerateTab
from .look import script

MOST = 200


class HistoryTab:
    """The gallery and the chosen job; `chosen` is this page's own."""

    def __init__(self, studio: Studio, generate: GenerateTab):
        self.studio, self.generate = studio, generate
        self.chosen = gr.State(None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self.gallery = html("", elem_id="history", label="What was made", js_on_load=script("clicks.js"))
            with gr.Column(scale=6, min_width=320):
                self.title = gr.Markdown("Choose one to see it.", elem_id="chosen")
                self.beside = gr.Dropdown([("nothing", "")], value="", label="Beside it", elem_id="beside")
                self.player = html("", elem_id="history-player", label="Chosen", js_on_load=script("player.js"))
                self.state = html("", label="State")
                self.figures = html("", elem_id="history-figures", label="Figures")
                with gr.Row():
                    self.load = gr.Button("Load settings", size="sm")
                    self.again = gr.Button("Run again", size="sm")
                    self.delete = gr.Button("Delete", size="sm", variant="stop")

    def wire(self, tabs: gr.Tabs) -> None:
        """Connect the buttons; `tabs` are turned to the first page where a job goes there."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        details = [self.title, self.player, self.state, self.figures, self.beside, self.gallery]
        self.gallery.click(self._choose, None, [self.chosen, *details], **quiet)
        self.beside.input(self._side_by_side, [self.chosen, self.beside], self.player, **quiet)
        self.load.click(
            lambda chosen: [gr.Tabs(selected="generate"), *self.generate.load(self.studio.queue.find(chosen)), False],
            self.chosen,
            [tabs, *self.generate.fields, self.generate.random],
            **quiet,
        )
        self.again.click(
            told(lambda chosen: (gr.Tabs(selected="generate"), self.studio.again(self.studio.queue.get(chosen)).id)),
            self.chosen,
            [tabs, self.generate.shown],
            **quiet,
        )
        self.delete.click(told(self._delete), self.chosen, [self.chosen, *details], **quiet)

    def _choose(self, event: gr.EventData) -> list[Any]:
        return self._details(self.studio.queue.find(event._data["id"]))

    def _delete(self, chosen: str | None) -> list[Any]:
        self.studio.queue.delete(self.studio.queue.get(chosen).id)
        return self._details(None)

    def _details(self, job: Job | None) -> list[Any]:
        if job is None:
            return [
                None,
                "Choose one to see it.",
                "",
                "",
                "",
                gr.update(choices=[("nothing", "")], value=""),
                self.look(None),
            ]
        others = [other for other in self._made() if other.id != job.id]
        choices = [("nothing", ""), *((f"{texts.title(other, 50)} · {other.id}", other.id) for other in others)]
        ahead = self.studio.queue.ahead(job) if job.status == "waiting" else None
        return [
            job.id,
            f"**{_plain(texts.title(job, 300))}**",
            self._side_by_side(job.id, ""),
            texts.progress(job, ahead),
            texts.figures(job),
            gr.update(choices=choices, value=""),
            self.look(job.id),
        ]

    def _made(self) -> list[Job]:
        return [job for job in self.studio.queue.all() if job.made and job.kind == "video"][:MOST]

    def _side_by_side(self, chosen: str | None, other: str) -> str:
        job, second = self.studio.queue.find(chosen), self.studio.queue.find(other)
        screens = self.studio.screens(job)
        if job is None or not screens:
            return ""
        if second is not None and (theirs := self.studio.screens(second)):
            screens = [
                (address, f"{label} · {each.id}") for each, (address, label) in ((job, screens[0]), (second, theirs[0]))
            ]
        return player(screens, job.result["fps"], job.ask["prompt"])

    def look(self, chosen: str | None) -> str:
        """The gallery as it is now."""
        jobs = [job for job in self.studio.queue.all() if job.kind == "video"]
        return texts.gallery(self.studio.store, jobs[:MOST], chosen)


def _plain(text: str) -> str:
    """Text in which Markdown finds nothing to do."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+-.!|~$" else c for c in text)
