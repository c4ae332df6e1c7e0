"""The pages put together, and served: to this machine alone unless the operator says otherwise."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..studio import Studio
from .api import add_api
from .generate_tab import GenerateTab
from .guard import Guard
from .history_tab import HistoryTab
from .look import CSS, theme
from .plan_tab import PlanTab

POLL_SECONDS = 1.0


def build(studio: Studio) -> gr.Blocks:
    """The app's pages over a studio."""
    with gr.Blocks(title="Ziggurat", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            "<h1>Ziggurat</h1><p>Video and image diffusion under sparse attention plans</p>",
            elem_classes="zg-title",
            apply_default_css=False,
            padding=False,
            js_on_load=None,
        )
        signs = gr.State({})
        with gr.Tabs(selected="generate") as tabs:
            with gr.Tab("Generate", id="generate"):
                generate = GenerateTab(studio)
            with gr.Tab("Plan", id="plan"):
                plans = PlanTab(studio)
            with gr.Tab("History", id="history"):
                history = HistoryTab(studio, generate)
        watched = [*generate.watched, history.gallery]
        history.wire(tabs)

        def look(shown: str | None, chosen: str | None, seen: dict[int, Any]) -> list[Any]:
            found = [*generate.look(shown), history.look(chosen)]
            # What did not change is not sent: a page that is drawn anew loses the keyboard's place.
            fresh = [value if seen.get(i) != value else gr.skip() for i, value in enumerate(found)]
            return [*fresh, dict(enumerate(found))]

        def look_at_maps(model: str, plan: str, chosen: list[int] | None, seen: Any) -> list[Any]:
            now = plans.signature(model, plan, chosen)
            if not chosen or now == seen:
                return [*[gr.skip()] * len(plans.watched), now]
            return [*plans.look_at_head(model, plan, chosen)[1:], now]

        def first() -> list[Any]:
            jobs = studio.queue.all()
            videos = [job for job in jobs if job.kind == "video"]
            at_work = studio.queue.running() + studio.queue.waiting()
            shown = next(iter(at_work or [job for job in videos if job.made] or videos), None)
            latest = next(iter(videos), None)
            fields = generate.load(latest)
            name = shown.id if shown else None
            found = [*generate.look(name), history.look(None)]
            estimate = generate.first_estimate(latest)
            return [name, estimate, *fields, *found, dict(enumerate(found))]

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        page.load(first, None, [generate.shown, generate.estimate, *generate.fields, *watched, signs], **quiet)
        page.load(
            lambda: plans.look(next(iter(studio.shelf.models)), "auto", None),
            None,
            [plans.heat, plans.about, plans.summary, plans.head, *plans.watched],
            **quiet,
        )
        maps_seen = gr.State(None)
        clock = gr.Timer(POLL_SECONDS)
        clock.tick(
            look_at_maps,
            [plans.model, plans.plan, plans.chosen, maps_seen],
            [*plans.watched, maps_seen],
            trigger_mode="once",
            **quiet,
        )
        clock.tick(look, [generate.shown, history.chosen, signs], [*watched, signs], trigger_mode="once", **quiet)
        add_api(studio)
    return page


def serve(
    studio: Studio,
    *,
    host: str,
    port: int | None,
    share: bool = False,
    auth: list[tuple[str, str]] | None = None,
    wait: bool = True,
) -> tuple[gr.Blocks, str]:
    """Serve the pages; returns them and their address, at once unless `wait`."""
    from starlette.middleware import Middleware

    page = build(studio)
    page.queue(default_concurrency_limit=8)
    studio.queue.start()
    _, local, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        auth=auth,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        inbrowser=False,
        ssr_mode=False,
        run_history=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size="64mb",
        allowed_paths=[str(studio.store.folder)],
        theme=theme(),
        css_paths=CSS,
        app_kwargs={"middleware": [Middleware(Guard)]},
    )
    return page, public or local
