"""The first page: a sentence, its settings, and the video as it emerges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gradio as gr

from .. import texts
from ..jobs import Job
from ..player import player
from ..studio import PRESETS, Form, Studio
from .common import act_on, html, number, refused, told
from .look import script

EXAMPLES = (
    "a large red circle moving left on a gray background",
    "a small yellow triangle moving up on a navy background",
    "a large green square staying still on a black background",
    "a small blue square moving up and a large white circle moving right on a gray background",
)


class GenerateTab:
    """Its components, and what happens when they are used.

    shown: which job this page shows; every page has its own. fields: the form, in the order of `form`.
    """

    def __init__(self, studio: Studio):
        self.studio = studio
        first = next(iter(studio.shelf.models.values()))
        usual = first.defaults
        self.shown = gr.State(None)
        # The sentence that a page opens with goes by way of this, so that what was typed meanwhile stays.
        self.earlier = gr.Textbox(visible=False)
        # Beside each other, or below each other with the settings last: the style sheet places the three.
        with gr.Row(equal_height=False, elem_id="workbench"):
            with gr.Column(min_width=320, elem_id="ask"):
                self.prompt = gr.Textbox(
                    label="Prompt", lines=3, placeholder="What the video is to show", autofocus=True
                )
                self.image = gr.Image(
                    label="Image to start from",
                    type="filepath",
                    sources=["upload"],
                    visible=first.takes_image,
                    height=200,
                )
                self.go = gr.Button("Generate", variant="primary", elem_id="generate")
                self.estimate = gr.Markdown("", elem_id="estimate")
                embedded = first.settings.captions == "shapes"
                self.examples = (
                    gr.Examples([[one] for one in EXAMPLES], [self.prompt], label="Examples") if embedded else None
                )
            with gr.Column(min_width=320, elem_id="settings"):
                with gr.Row():
                    names = list(studio.shelf.models)
                    self.model = gr.Dropdown(names, value=names[0], label="Model", min_width=140, elem_id="model")
                    self.plan = gr.Dropdown(
                        studio.shelf.plan_names(), value="auto", label="Plan", min_width=140, elem_id="plan"
                    )
                with gr.Row():
                    self.random = gr.Checkbox(label="Random seed", value=True, min_width=140)
                    self.compare = gr.Checkbox(label="Compare with dense attention", value=False, min_width=140)
                self.preset = gr.Radio(list(PRESETS), value=PRESETS[1], label="Preset")
                with gr.Row():
                    self.width = number("Width", usual.width, first.rule.width_step)
                    self.height = number("Height", usual.height, first.rule.height_step)
                    self.frames = number("Frames", usual.frames, first.rule.frame_step, visible=first.video)
                with gr.Row():
                    self.steps = number("Steps", usual.steps, 1)
                    self.guidance = gr.Number(
                        label="Guidance",
                        value=usual.guidance,
                        minimum=0,
                        step=0.5,
                        min_width=90,
                        visible="guidance_scale" in first.parameters,
                    )
                    self.seed = number("Seed", 0, 1, minimum=0)
                self.negative = gr.Textbox(
                    label="Negative prompt",
                    placeholder="What it is not to show",
                    visible="negative_prompt" in first.parameters,
                )
                self.upload = gr.UploadButton("Upload a plan file", file_types=[".json"], size="sm")
            with gr.Column(min_width=320, elem_id="outcome"):
                self.progress = html("", elem_id="progress", label="Progress")
                with gr.Row(visible=False) as self.stops:
                    self.stop = gr.Button("Stop now", variant="stop", size="sm", elem_id="stop")
                    self.keep = gr.Button("Stop and keep", size="sm", elem_id="keep")
                self.preview = html("", elem_id="preview", label="Preview")
                self.player = html("", elem_id="player", label="Result", js_on_load=script("player.js"))
                self.figures = html("", elem_id="figures", label="Figures")
                self.reuse = gr.Button("Reuse this seed", size="sm", visible=False)
                with gr.Accordion("Make it again elsewhere", open=False, visible=False) as self.recipe:
                    self.code = html("", elem_id="code", label="Code", js_on_load=script("copy.js"))
                with gr.Accordion("Queue", open=True):
                    self.line = html("", elem_id="queue", label="Queue", js_on_load=script("clicks.js"))
        self.fields = [
            *(self.prompt, self.negative, self.image, self.model, self.plan, self.width, self.height, self.frames),
            *(self.steps, self.guidance, self.seed, self.random, self.compare),
        ]
        self._wire()

    def _wire(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        self.go.click(self._submit, self.fields, [self.shown, self.seed], **quiet)
        self.prompt.submit(self._submit, self.fields, [self.shown, self.seed], **quiet)
        looked = [field for field in self.fields if field not in (self.prompt, self.negative, self.seed, self.random)]
        # One event for them all: of several, an earlier one's answer may come last. A finished run teaches estimates.
        changes = [field.change for field in (*looked, self.figures)]
        gr.on(changes, self._estimate, self.fields, self.estimate, queue=False, trigger_mode="always_last", **quiet)
        shape = [self.negative, self.image, self.guidance]
        sizes = [self.width, self.height, self.frames, self.steps]
        self.model.input(self._choose_model, [self.model, self.plan], [self.plan, *shape, *sizes], **quiet)
        self.preset.input(self._preset, [self.preset, self.model], sizes, **quiet)
        self.upload.upload(self._take_plan, [self.upload, self.model], self.plan, **quiet)
        self.stop.click(told(lambda shown: self.studio.queue.stop(shown)), self.shown, None, **quiet)
        self.keep.click(told(lambda shown: self.studio.queue.stop(shown, keep=True)), self.shown, None, **quiet)
        self.reuse.click(self._reuse, self.shown, [self.seed, self.random], **quiet)
        self.line.click(act_on(self.studio), self.shown, self.shown, **quiet)

    def form(self, *values: Any) -> Form:
        """The values of `fields` as a form."""
        names = (
            "prompt",
            "negative",
            "image",
            "model",
            "plan",
            "width",
            "height",
            "frames",
            "steps",
            "guidance",
            "seed",
        )
        given: dict[str, Any] = dict(zip(names, values[:-2], strict=True))
        random, compare = values[-2:]
        model = self.studio.shelf.model(given["model"])
        for name, theirs in (("negative", "negative_prompt"), ("image", "image"), ("guidance", "guidance_scale")):
            if theirs not in model.parameters or given[name] == "":
                given[name] = None
        for name in ("width", "height", "frames", "steps", "seed"):
            given[name] = None if given[name] is None else int(given[name])
        if random:
            given["seed"] = None
        return Form(**given, compare=bool(compare))

    def _submit(self, *values: Any) -> tuple[str, int]:
        try:
            job = self.studio.submit(self.form(*values))
        except (ValueError, OSError) as error:
            raise refused(error, "Not started") from error
        return job.id, job.ask["seed"]

    def _estimate(self, *values: Any) -> str:
        return self.studio.estimate(self.form(*values))

    def _choose_model(self, name: str, plan: str) -> list[Any]:
        model = self.studio.shelf.model(name)
        usual, rule = model.defaults, model.rule
        return [
            # A plan for another model would only be refused.
            gr.skip() if self.studio.shelf.fits(plan, model) else "auto",
            gr.update(visible="negative_prompt" in model.parameters),
            gr.update(visible=model.takes_image),
            gr.update(visible="guidance_scale" in model.parameters, value=usual.guidance),
            gr.update(value=usual.width, step=rule.width_step),
            gr.update(value=usual.height, step=rule.height_step),
            gr.update(value=usual.frames, step=rule.frame_step, visible=model.video),
            gr.update(value=usual.steps),
        ]

    def _preset(self, name: str, model: str) -> list[Any]:
        found = self.studio.preset(name, self.studio.shelf.model(model))
        return [found[each] for each in ("width", "height", "frames", "steps")]

    def _take_plan(self, path: str, model: str) -> Any:
        try:
            name = self.studio.shelf.take_plan(path)
            self.studio.shelf.check_plan(name, self.studio.shelf.model(model))
        except (ValueError, OSError) as error:
            raise refused(error, "Not a plan for this model") from error
        return gr.update(choices=self.studio.shelf.plan_names(), value=name)

    def _reuse(self, shown: str | None) -> tuple[Any, bool]:
        job = self.studio.queue.find(shown)
        return (job.ask["seed"] if job else gr.skip()), False

    def load(self, job: Job | None) -> list[Any]:
        """The fields filled with a job's settings, its seed among them."""
        if job is None or job.kind != "video" or job.ask["model"] not in self.studio.shelf.models:
            return [gr.skip()] * len(self.fields)
        form = self.studio.form_of(job)
        if form.plan not in self.studio.shelf.plan_names():
            form = replace(form, plan="auto")
        model = self.studio.shelf.model(form.model)
        return [
            *(form.prompt, gr.update(value=form.negative or "", visible="negative_prompt" in model.parameters)),
            gr.update(value=form.image, visible=model.takes_image),
            *(form.model, gr.update(value=form.plan, choices=self.studio.shelf.plan_names())),
            *(form.width, form.height, gr.update(value=form.frames, visible=model.video), form.steps),
            gr.update(value=form.guidance, visible="guidance_scale" in model.parameters),
            *(form.seed, gr.skip(), form.compare),
        ]

    def first_estimate(self, job: Job | None) -> str:
        """The estimate of a page that was just opened with a job's settings."""
        usual = Form(prompt="", model=next(iter(self.studio.shelf.models)))
        known = job is not None and job.ask["model"] in self.studio.shelf.models
        return self.studio.estimate(self.studio.form_of(job) if job is not None and known else usual)

    @property
    def watched(self) -> list[Any]:
        """What `look` returns values for."""
        return [
            *(self.progress, self.stops, self.keep, self.preview, self.player, self.figures, self.reuse, self.recipe),
            *(self.code, self.line),
        ]

    def look(self, shown: str | None) -> list[Any]:
        """The state of the shown job and of the queue, as updates of `watched`."""
        studio = self.studio
        job = studio.queue.find(shown)
        running = job if job is not None and job.status == "running" else None
        ahead = studio.queue.ahead(job) if job is not None and job.status == "waiting" else None
        state = texts.progress(job, ahead)
        if studio.queue.trouble:
            state += f"<p class='zg-state zg-error' role='alert'>{texts.escape(studio.queue.trouble)}</p>"
        made = job if job is not None and job.made and job.kind == "video" else None
        code = ""
        if made:
            model = studio.shelf.models.get(made.ask["model"])
            code = texts.recipe(studio.store, made, model.known if model else made.ask["model"])
        screens = studio.screens(job)
        return [
            state,
            gr.update(visible=bool(running)),
            gr.update(interactive=bool(running and running.progress.can_keep)),
            self._preview(running) if running else "",
            player(screens, made.result["fps"], made.ask["prompt"]) if made else "",
            texts.figures(job),
            gr.update(visible=bool(made)),
            gr.update(visible=bool(made)),
            code,
            texts.line(studio.queue.running(), studio.queue.waiting()),
        ]

    def _preview(self, job: Job) -> str:
        stand = job.progress
        if not stand.preview:
            return ""
        address = texts.file_url(self.studio.store, job, "preview.webp", stand.preview)
        return (
            f"<div class='zg-preview'><figure><img src='{address}' alt='Preview after step {stand.preview}'>"
            f"<figcaption>Preview after step {stand.preview}: where the noise is heading, decoded small</figcaption>"
            "</figure></div>"
        )
