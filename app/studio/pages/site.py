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
from .search_tab import SearchTab

POLL_SECONDS = 1.0
READY = "<i data-ready></i>"


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
        # Says that the page's first event has filled it: but for the sentence, what is set before may be overwritten.
        ready = gr.HTML("", elem_id="ready", apply_default_css=False, padding=False, js_on_load=None)
        signs = gr.State({})
        with gr.Tabs(selected="generate") as tabs:
            with gr.Tab("Generate", id="generate"):
                generate = GenerateTab(studio)
            with gr.Tab("Plan", id="plan") as plan_page:
                plans = PlanTab(studio)
            with gr.Tab("Search", id="search"):
                searches = SearchTab(studio)
            with gr.Tab("History", id="history"):
                history = HistoryTab(studio, generate)
        watched = [*generate.watched, history.gallery, *searches.watched]
        history.wire(tabs)
        searches.wire(generate.model, generate.plan, plans.plan)

        def look(
            shown: str | None, chosen: str | None, search: str | None, picked: int | None, seen: dict[int, Any]
        ) -> list[Any]:
            found = [*generate.look(shown), history.look(chosen), *searches.look(search, picked)]
            # What did not change is not sent: a page that is drawn anew loses the keyboard's place.
            fresh = [value if seen.get(i) != value else gr.skip() for i, value in enumerate(found)]
            return [*fresh, dict(enumerate(found))]

        def look_at_maps(model: str, plan: str, chosen: list[int] | None, seen: Any) -> list[Any]:
            now = plans.signature(model, plan, chosen)
            if not chosen or now == seen:
                return [*[gr.skip()] * len(plans.watched), now]
            return [*plans.look_at_head(model, plan, chosen)[1:], now]

        def first() -> list[Any]:
            videos = [job for job in studio.queue.all() if job.kind == "video"]
            at_work = [job for job in studio.queue.running() + studio.queue.waiting() if job.kind == "video"]
            shown = next(iter(at_work or [job for job in videos if job.made] or videos), None)
            latest = next(iter(videos), None)
            fields = generate.load(latest)
            name = shown.id if shown else None
            search, offered = searches.latest()
            found = [*generate.look(name), history.look(None), *searches.look(search, None)]
            estimate = generate.first_estimate(latest)
            return [READY, name, search, offered, estimate, *fields, *found, dict(enumerate(found))]

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        places = [ready, generate.shown, searches.shown, searches.offered]
        # All but the sentence, which a quick hand may have typed by then.
        fields = [generate.earlier, *generate.fields[1:]]
        filled = page.load(first, None, [*places, generate.estimate, *fields, *watched, signs], **quiet)
        keep = "(typed, earlier) => typed || earlier || ''"
        filled.then(None, [generate.prompt, generate.earlier], generate.prompt, js=keep, **quiet)
        page.load(
            lambda: plans.look(next(iter(studio.shelf.models)), "auto", None),
            None,
            [plans.heat, plans.about, plans.summary, plans.head, *plans.watched],
            **quiet,
        )
        plan_page.select(plans.offer, None, plans.plan, **quiet)
        maps_seen = gr.State(None)
        clock = gr.Timer(POLL_SECONDS)
        clock.tick(
            look_at_maps,
            [plans.model, plans.plan, plans.chosen, maps_seen],
            [*plans.watched, maps_seen],
            trigger_mode="once",
            **quiet,
        )
        states = [generate.shown, history.chosen, searches.shown, searches.picked, signs]
        clock.tick(look, states, [*watched, signs], trigger_mode="once", **quiet)
        add_api(studio)
    return page


def serve(
    studio: Studio,
    *,
    host: str,
    port: int | None,
    share: bool = False,
    auth: list[tuple[str, str]] | None = None,
) -> tuple[gr.Blocks, str]:
    """Serve the pages; returns them and their address."""
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
