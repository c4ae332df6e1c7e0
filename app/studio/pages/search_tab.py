"""The third page: the offline search, its front, and its report."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .. import searching, texts
from ..jobs import Job
from ..studio import Studio
from .common import html, number, told
from .look import script

SLIDERS = {
    "budget": {"label": "Share of dense attention's time, %", "minimum": 5, "maximum": 100, "value": 30, "step": 1},
    "max_error": {"label": "Most error", "minimum": 0.01, "maximum": 5.0, "value": 0.5, "step": 0.01},
    "target_psnr": {"label": "PSNR, dB", "minimum": 10, "maximum": 50, "value": 30, "step": 0.5},
}


class SearchTab:
    """`shown` is the search that this page looks at, `picked` the point of its front, `offered` the search whose plan
    has been chosen on the first page already."""

    def __init__(self, studio: Studio):
        self.studio = studio
        names = list(studio.shelf.models)
        first = studio.shelf.model(names[0])
        self.shown = gr.State(None)
        self.picked = gr.State(None)
        self.offered = gr.State(None)
        goals = [(label, name) for name, label in searching.GOALS.items()]
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self.model = gr.Dropdown(names, value=names[0], label="Model", elem_id="search-model")
                self.expert = gr.Dropdown(
                    first.experts,
                    value=next(iter(first.experts), None),
                    label="Expert",
                    info="Of its two transformers, the one to search for",
                    visible=bool(first.experts),
                    elem_id="search-expert",
                )
                self.goal = gr.Radio(goals, value="budget", label="Search for")
                self.value = gr.Slider(**SLIDERS["budget"], elem_id="search-value")
                self.families = gr.CheckboxGroup(
                    searching.families(), value=searching.families(), label="Families to try", elem_id="families"
                )
                with gr.Row():
                    self.prompts = gr.Slider(1, 8, value=2, step=1, label="Prompts to measure on", min_width=140)
                    self.noise_steps = gr.Slider(1, 8, value=3, step=1, label="Steps to measure at", min_width=140)
                    self.proofs = gr.Slider(0, 4, value=1, step=1, label="Prompts to prove on", min_width=140)
                with gr.Row():
                    self.steps = number("Steps of a run", first.defaults.steps, 1)
                    self.frames = number("Frames of a run", first.defaults.frames, first.rule.frame_step)
                    self.seed = number("Seed of the search", 0, 1, minimum=0)
                self.go = gr.Button("Search", variant="primary", elem_id="search")
            with gr.Column(scale=6, min_width=320):
                self.progress = html("", elem_id="search-progress", label="Progress of the search")
                self.stop = gr.Button(
                    "Stop the search", variant="stop", size="sm", visible=False, elem_id="search-stop"
                )
                self.front = html("", elem_id="front", label="The front", js_on_load=script("clicks.js"))
                self.result = html("", elem_id="search-result", label="The plan that was found")
        self.report = html("", elem_id="report", label="The report")

    def wire(self, model: gr.Dropdown, plan: gr.Dropdown, plan_page: gr.Dropdown) -> None:
        """Connect it; what is found is chosen in `plan` if it is for the model there, and offered in `plan_page`."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self.goal.input(lambda goal: gr.update(**SLIDERS[goal]), self.goal, self.value, **quiet)
        self.model.input(self._choose_model, self.model, [self.expert, self.steps, self.frames], **quiet)
        asked = [
            self.model,
            self.expert,
            self.goal,
            self.value,
            self.families,
            self.prompts,
            self.noise_steps,
            self.proofs,
        ]
        asked += [self.steps, self.frames, self.seed]
        self.go.click(told(self._submit), asked, [self.shown, self.picked], **quiet)
        self.stop.click(told(lambda shown: self.studio.queue.stop(shown)), self.shown, None, **quiet)
        shown = [self.picked, self.front, self.result, plan, plan_page]
        self.front.click(self._pick, [self.shown, model], shown, **quiet)
        # What a search has found is chosen when its text appears.
        self.result.change(self._offer, [self.shown, self.offered, model], [self.offered, plan, plan_page], **quiet)

    def _choose_model(self, name: str) -> list[Any]:
        model = self.studio.shelf.model(name)
        experts = model.experts
        return [
            gr.update(choices=experts, value=next(iter(experts), None), visible=bool(experts)),
            model.defaults.steps,
            gr.update(value=model.defaults.frames, visible=model.video),
        ]

    def _submit(self, *values: Any) -> tuple[str, None]:
        names = ("model", "expert", "goal", "value", "families", "prompts", "noise_steps", "proofs")
        names += ("steps", "frames", "seed")
        return self.studio.submit_search(dict(zip(names, values, strict=True))).id, None

    def _name(self, job: Job, picked: int | None) -> str:
        point = job.result["chosen"] if picked is None else picked
        return searching.take_point(self.studio.store, self.studio.shelf, job, point)

    def _pick(self, shown: str | None, model: str, event: gr.EventData) -> list[Any]:
        job = self.studio.queue.get(shown)
        picked = int(event._data["point"])
        name = self._name(job, picked)
        points, chosen = job.result["front"], job.result["chosen"]
        text = searching.result_text(job, picked, name)
        return [picked, searching.front(points, chosen, picked), text, *self._choice(job, name, model)]

    def _choice(self, job: Job, name: str, model: str) -> list[Any]:
        """The plan as the choice of the first page, if its model is the search's, and as an offer of the second."""
        names = self.studio.shelf.plan_names()
        chosen = gr.update(choices=names, value=name) if job.ask["model"] == model else gr.update(choices=names)
        return [chosen, gr.update(choices=names, value=name)]

    def _offer(self, shown: str | None, offered: str | None, model: str) -> list[Any]:
        job = self.studio.queue.find(shown)
        if job is None or not job.made or job.id == offered:
            return [gr.skip(), gr.skip(), gr.skip()]
        return [job.id, *self._choice(job, self._name(job, None), model)]

    @property
    def watched(self) -> list[Any]:
        """What `look` returns values for."""
        return [self.progress, self.stop, self.front, self.result, self.report]

    def look(self, shown: str | None, picked: int | None) -> list[Any]:
        """The state of the search that is shown."""
        job = self.studio.queue.find(shown)
        if job is None:
            hint = "<p class='zg-hint'>A search measures every candidate in every head, and proves what it finds.</p>"
            return [hint, gr.update(visible=False), "", "", ""]
        state = texts.progress(job, self.studio.queue.ahead(job) if job.status == "waiting" else None)
        running = gr.update(visible=job.status == "running")
        if not job.made:
            return [state, running, "", "", ""]
        home = self.studio.store.home(job)
        points, chosen = job.result["front"], job.result["chosen"]
        text = searching.result_text(job, picked, self._name(job, picked))
        return [state, running, searching.front(points, chosen, picked), text, searching.report_frame(home)]

    def latest(self) -> list[str | None]:
        """The search that a page opens on, and whether its plan was chosen before."""
        job = next((job for job in self.studio.queue.all() if job.kind == "search"), None)
        return [job.id if job else None, job.id if job and job.ended else None]
