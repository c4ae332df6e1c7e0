"""The second page: what a plan does with each head, and what that head attends to."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .. import plan_view, texts
from ..jobs import Job
from ..studio import Studio
from .common import html, told
from .look import script

Chosen = list[int] | None
CAPTION = (
    "The last run's sentence and seed, run dense: queries down, keys across, in the plan's order. Outlined on the left"
    " and in colour on the right: blocks that the plan reads exactly; the rest is read pooled or left out."
)


class PlanTab:
    """`chosen` is the layer and head that this page looks at, `maps` the job that draws the layer's maps."""

    def __init__(self, studio: Studio):
        self.studio = studio
        names = list(studio.shelf.models)
        self.chosen = gr.State(None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                with gr.Row():
                    self.model = gr.Dropdown(names, value=names[0], label="Model", min_width=140, elem_id="plan-model")
                    self.plan = gr.Dropdown(
                        studio.shelf.plan_names(), value="auto", label="Plan", min_width=140, elem_id="plan-plan"
                    )
                self.heat = html("", elem_id="heat", label="Layers and heads", js_on_load=script("clicks.js"))
                self.about = html("", elem_id="plan-about", label="The plan")
            with gr.Column(scale=6, min_width=320):
                self.head = html("", elem_id="head", label="The chosen head")
                self.draw = gr.Button("Draw this layer's attention maps", size="sm", visible=False, elem_id="draw")
                self.state = html("", elem_id="maps-state", label="State of the maps")
                self.steps = gr.Radio([], label="Denoising step", visible=False, elem_id="map-steps")
                self.map = html("", elem_id="map", label="Attention map")
        self.summary = html("", elem_id="summary", label="Layers")
        self._wire()

    def _wire(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        where = [self.model, self.plan]
        shown = [self.heat, self.about, self.summary, self.head, self.draw, self.state, self.steps, self.map]
        for field in where:
            field.input(
                lambda model, plan: [None, *self.look(model, plan, None)], where, [self.chosen, *shown], **quiet
            )
        self.heat.click(self._choose, where, [self.chosen, *shown], **quiet)
        self.draw.click(told(self._draw), [*where, self.chosen], self.state, **quiet)
        self.steps.input(self._picture, [*where, self.chosen, self.steps], self.map, **quiet)

    def _choose(self, model: str, plan: str, event: gr.EventData) -> list[Any]:
        chosen = [int(event._data["layer"]), int(event._data["head"])]
        return [chosen, *self.look(model, plan, chosen)]

    def last_run(self, model: str, plan: str) -> Job | None:
        """The latest finished video under this plan."""
        for job in self.studio.queue.all():
            if job.kind == "video" and job.made and (job.ask["model"], job.ask["plan"]) == (model, plan):
                return job
        return None

    def maps_of(self, run: Job | None, layer: int) -> Job | None:
        """The latest job that drew, or is to draw, a layer of a run."""
        for job in self.studio.queue.all():
            if run is not None and job.kind == "maps" and (job.ask["run"], job.ask["layer"]) == (run.id, layer):
                return job
        return None

    def _draw(self, model: str, plan: str, chosen: Chosen) -> str:
        run = self.last_run(model, plan)
        if run is None or not chosen:
            raise ValueError("generate a video under this plan first: its run is what the maps show")
        known = self.maps_of(run, chosen[0])
        if known is None or known.status in ("failed", "stopped"):
            image = str(self.studio.store.home(run) / run.ask["image"]) if run.ask["image"] else None
            self.studio.submit_maps(run, chosen[0], image)
        return "<p class='zg-state' role='status'>In the queue.</p>"

    def look(self, model: str, plan: str, chosen: Chosen) -> list[Any]:
        """The page for a plan and a head."""
        try:
            self.studio.shelf.check_plan(plan, self.studio.shelf.model(model))
            found = self.studio.shelf.read_plan(plan, self.studio.shelf.model(model))
        except ValueError as error:
            said = f"<p class='zg-state zg-error' role='alert'>{texts.escape(str(error))}</p>"
            return [said, "", "", "", gr.update(visible=False), "", gr.update(visible=False), ""]
        if found is None:
            said = "<p class='zg-hint'>Stock attention runs: there is no plan to look into.</p>"
            return [said, "", "", "", gr.update(visible=False), "", gr.update(visible=False), ""]
        cells = plan_view.cells(found)
        run = self.last_run(model, plan)
        if run is not None and run.result.get("summary"):
            summary = plan_view.summary_table(run.result["summary"], f"The last run, {texts.title(run, 60)}")
        else:
            summary = plan_view.unrun_table(found, cells)
        place = (chosen[0], chosen[1]) if chosen else None
        return [
            plan_view.heat(found, cells, place),
            plan_view.plan_text(found, cells),
            summary,
            *self.look_at_head(model, plan, chosen, cells),
        ]

    def look_at_head(self, model: str, plan: str, chosen: Chosen, cells: Any = None) -> list[Any]:
        """The right side: the head in words, its maps, or how to get them."""
        if not chosen:
            hint = "<p class='zg-hint'>Click a square to look into that head.</p>"
            return [hint, gr.update(visible=False), "", gr.update(visible=False), ""]
        layer, head = chosen
        if cells is None:
            found = self.studio.shelf.read_plan(plan, self.studio.shelf.model(model))
            assert found is not None
            cells = plan_view.cells(found)
        run = self.last_run(model, plan)
        maps = self.maps_of(run, layer)
        words = plan_view.head_text(cells[layer][head], layer, head)
        if run is None:
            state = "<p class='zg-hint'>Generate a video under this plan to see what this head attends to.</p>"
        elif maps is not None and not maps.made:
            state = texts.progress(maps, self.studio.queue.ahead(maps) if maps.status == "waiting" else None)
        else:
            state = ""
        ready = maps is not None and maps.made
        steps = sorted(map(int, maps.result["maps"][str(head)])) if maps is not None and ready else []
        step = steps[len(steps) // 2] if steps else None
        drawable = run is not None and (maps is None or maps.status in ("failed", "stopped"))
        return [
            words,
            gr.update(visible=drawable),
            state,
            gr.update(visible=bool(steps), choices=steps, value=step),
            self._picture(model, plan, chosen, step),
        ]

    def _picture(self, model: str, plan: str, chosen: Chosen, step: int | None) -> str:
        maps = self.maps_of(self.last_run(model, plan), chosen[0]) if chosen else None
        if maps is None or not maps.made or not chosen or step is None:
            return ""
        name = maps.result["maps"][str(chosen[1])][str(step)]
        address = texts.file_url(self.studio.store, maps, name)
        about = f"Attention map of layer {chosen[0]}, head {chosen[1]} at step {step}"
        picture = f"<div><img src='{address}' alt='{about}'></div>"
        return f"<figure class='zg-map'>{picture}<figcaption>{CAPTION}</figcaption></figure>"

    def offer(self) -> Any:
        """The plans that there are by now."""
        return gr.update(choices=self.studio.shelf.plan_names())

    @property
    def watched(self) -> list[Any]:
        """What `watch` returns values for."""
        return [self.draw, self.state, self.steps, self.map]

    def signature(self, model: str, plan: str, chosen: Chosen) -> Any:
        """Changes when what `watched` shows does."""
        run = self.last_run(model, plan)
        maps = self.maps_of(run, chosen[0]) if chosen else None
        stand = (maps.id, maps.status, maps.progress.phase, maps.progress.done) if maps else None
        return [run.id if run else None, stand, chosen]
