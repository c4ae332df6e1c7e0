"""The app in a real browser: what a person does, on tiny models; the browser asks nothing of any other host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

SECONDS = 300_000
# Messages go after a while, which on a busy machine may be before anyone looked.
KEEP_MESSAGES = """window.told = new Set();
new MutationObserver(() => document.querySelectorAll('[data-testid=toast-body]').forEach(e => told.add(e.textContent)))
  .observe(document, {subtree: true, childList: true, characterData: true});"""
OURS = ("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:", "about:")


@pytest.fixture(scope="module")
def context(chromium) -> Iterator[Any]:
    made = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    made.set_default_timeout(SECONDS)
    yield made
    made.close()


@pytest.fixture
def page(context, served) -> Iterator[Any]:
    """A fresh page on the app; in the end, nothing outside was asked for and no script failed."""
    opened = context.new_page()
    opened.add_init_script(KEEP_MESSAGES)
    outside: list[str] = []
    errors: list[str] = []
    opened.on("request", lambda request: None if request.url.startswith(OURS) else outside.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    visit(opened, served[1])
    yield opened
    opened.close()
    assert not outside
    assert not errors


def visit(page: Any, address: str) -> None:
    page.goto(address)
    # The page is filled by its first event, which would overwrite settings made by a quicker hand than a person's.
    page.wait_for_selector("#ready [data-ready]", state="attached")


def fill(page: Any, label: str, value: object) -> None:
    field = page.get_by_label(label, exact=True).first
    field.fill(str(value))
    field.press("Tab")


def check(page: Any, label: str, on: bool) -> None:
    page.get_by_label(label, exact=True).set_checked(on)


def newest(studio: Any) -> Any:
    return studio.queue.all()[0]


def ask(page: Any, studio: Any, wait_until: Any, *, prompt: str, steps: int = 3) -> Any:
    """Fill the form in and press Generate; returns the job."""
    before = len(studio.queue.all())
    fill(page, "Prompt", prompt)
    fill(page, "Steps", steps)
    # By the keyboard: a press does not miss, wherever the layout moves the button meanwhile.
    page.locator("#generate").press("Enter")
    wait_until(
        lambda: len(studio.queue.all()) > before, what=lambda: page.get_by_test_id("toast-body").all_inner_texts()
    )
    return newest(studio)


def choose(page: Any, field: str, option: str) -> None:
    """Choose in a dropdown."""
    page.locator(field).click()
    page.get_by_role("option", name=option, exact=True).click()


def test_generate_and_compare(page, served, sparse_plan, tmp_path, wait_until):
    studio, _ = served
    plan = sparse_plan(name="small", rest="pooled").save(tmp_path / "plan.json")
    page.locator("input[type=file]").first.set_input_files(plan)
    page.wait_for_function("[...document.querySelectorAll('input')].some(i => i.value.startsWith('mine: small'))")
    check(page, "Compare with dense attention", True)
    job = ask(page, studio, wait_until, prompt="a large red circle")
    page.wait_for_selector("#player video >> nth=1")
    assert job.status == "done"
    page.wait_for_function("[...document.querySelectorAll('#player video')].every(v => v.readyState >= 2 && !v.error)")
    page.get_by_label("Pause").click()
    page.get_by_label("One frame on").click()
    page.wait_for_timeout(200)
    times = page.evaluate("[...document.querySelectorAll('#player video')].map(v => v.currentTime)")
    assert times[0] == pytest.approx(times[1], abs=0.01)
    assert page.evaluate("[...document.querySelectorAll('#player video')].every(v => v.paused)")
    figures = page.locator("#figures").inner_text()
    assert "PSNR" in figures
    assert str(job.ask["seed"]) in figures
    with page.expect_download() as download:
        page.get_by_text("Download dense").click()
    assert Path(download.value.path()).read_bytes() == (studio.store.home(job) / "dense.mp4").read_bytes()
    page.get_by_text("Make it again elsewhere").click()
    assert "--compare" in page.get_by_label("As a command line", exact=True).inner_text()
    page.get_by_label("Copy: As Python").click()
    page.get_by_text("Copied").wait_for()
    page.get_by_text("Reuse this seed").click()
    page.wait_for_function(f"[...document.querySelectorAll('input')].some(i => i.value === '{job.ask['seed']}')")
    check(page, "Compare with dense attention", False)


def test_a_reloaded_page_finds_its_run_and_can_stop_it(page, served, wait_until):
    studio, address = served
    job = ask(page, studio, wait_until, prompt="a blue circle", steps=20_000)
    page.wait_for_selector("#preview img")
    second = ask(page, studio, wait_until, prompt="moving left", steps=2)
    third = ask(page, studio, wait_until, prompt="moving circle", steps=2)
    page.get_by_label("Move up: moving circle").click()
    wait_until(lambda: studio.queue.waiting() == [third, second])
    page.get_by_label("Delete: moving circle").click()
    wait_until(lambda: studio.queue.waiting() == [second])
    visit(page, address)
    assert job.status == "running"
    page.wait_for_function("document.querySelector('#progress').innerText.includes('of 20000')")
    page.click("#stop")
    page.wait_for_function("document.querySelector('#progress').innerText.includes('Stopped')")
    wait_until(lambda: second.ended)
    assert (job.status, second.status) == ("stopped", "done")


def test_a_sentence_typed_before_the_page_is_filled_stays(page, served, wait_until):
    studio, address = served
    job = ask(page, studio, wait_until, prompt="a red circle", steps=2)
    wait_until(lambda: job.ended)
    visit(page, address)
    prompt = page.get_by_label("Prompt", exact=True).first
    page.wait_for_function("[...document.querySelectorAll('textarea')].some(e => e.value === 'a red circle')")
    held: list[Any] = []
    page.route("**/gradio_api/run/**", lambda route: held.append(route))
    page.goto(address)
    prompt.fill("a blue square")
    wait_until(lambda: page.wait_for_timeout(50) is None and bool(held))
    page.route("**/gradio_api/run/**", lambda route: route.continue_())
    for one in held:
        one.continue_()
    page.wait_for_selector("#ready [data-ready]", state="attached")
    page.wait_for_timeout(1500)
    assert prompt.input_value() == "a blue square"


def test_stop_and_keep(page, served, wait_until):
    studio, _ = served
    job = ask(page, studio, wait_until, prompt="a red circle", steps=20_000)
    page.wait_for_selector("#preview img")
    page.click("#keep")
    page.wait_for_selector("#player video")
    assert job.status == "kept"
    assert "Ended early" in page.locator("#progress").inner_text()


def test_errors_are_sentences_and_the_app_goes_on(page, served, monkeypatch, wait_until):
    studio, _ = served
    fill(page, "Height", 40)
    page.wait_for_function("document.querySelector('#estimate').innerText.includes('nearest that work are 32 and 48')")
    page.click("#generate")
    page.wait_for_function("[...told].some(t => t.includes('nearest that work are 32 and 48'))")
    fill(page, "Height", 32)

    def broken(*_args: Any, **_more: Any) -> None:
        raise RuntimeError("<b>the kernel broke</b>")

    with monkeypatch.context() as patch:
        patch.setattr("ziggurat.app.studio.worker.generate", broken)
        job = ask(page, studio, wait_until, prompt="a circle", steps=2)
        page.wait_for_function("document.querySelector('#progress').innerText.includes('<b>the kernel broke</b>')")
    assert job.status == "failed"
    assert ask(page, studio, wait_until, prompt="a circle", steps=2)
    page.wait_for_selector("#player video")


def test_plan_and_its_attention_maps(page, served, sparse_plan, tmp_path, wait_until):
    studio, _ = served
    name = studio.shelf.take_plan(sparse_plan(name="looked at", rest="pooled").save(tmp_path / "plan.json"))
    from ziggurat.app.studio.studio import Form

    run = studio.submit(Form(prompt="a red circle", model=next(iter(studio.shelf.models)), plan=name))
    wait_until(lambda: run.ended)
    page.get_by_role("tab", name="Plan").click()
    page.locator("#plan-plan input").click()
    page.get_by_role("option", name=name).click()
    page.get_by_label("layer 1, head 1: stripe").click()
    assert "sparse" in page.locator("#summary").inner_text()
    page.click("#draw")
    page.wait_for_selector("#map img")
    page.locator("#map-steps input").last.check()
    page.wait_for_selector("#map img[alt='Attention map of layer 1, head 1 at step 2']")
    # By the keyboard too.
    page.get_by_label("layer 1, head 0: window").press("Enter")
    page.wait_for_selector("#map img[alt^='Attention map of layer 1, head 0']")


@pytest.fixture
def second_plan(monkeypatch):
    """Searches whose front holds one more plan: on a model this small stock attention is cheapest, and alone there."""
    from ziggurat.search import run

    real = run.search

    def search(pipe: Any, folder: Path, **asked: Any) -> Any:
        done = real(pipe, folder, **asked)
        found = done.findings
        assert found.chosen is not None
        number = next(i for i, one in enumerate(found.candidates) if one.family == "window")
        cheapest = found.front[found.chosen]
        picks: list[Any] = [[number] * found.shape.heads] * found.shape.layers
        more = cheapest.model_copy(update={"seconds": 2 * cheapest.seconds, "density": 0.5, "picks": picks})
        longer = found.model_copy(update={"front": [*found.front, more]})
        longer.save(Path(folder))
        return replace(done, findings=longer)

    monkeypatch.setattr(run, "search", search)


def test_a_short_search(page, served, second_plan, wait_until):
    studio, address = served
    page.get_by_role("tab", name="Search").click()
    for family in ("stripe", "skip", "topk", "precise", "loglinear", "pyramid"):
        page.get_by_label(family, exact=True).uncheck()
    fill(page, "Steps of a run", 2)
    fill(page, "number input for Prompts to measure on", 1)
    fill(page, "number input for Steps to measure at", 1)
    page.locator("#search").press("Enter")
    page.wait_for_selector("#front circle")
    job = newest(studio)
    assert (job.kind, job.ask["families"], job.ask["steps"]) == ("search", ["window"], 2)
    assert page.frame_locator("#report iframe").locator("body").inner_text()
    holds = "[...document.querySelectorAll('input')].some(i => i.value === '{}')"
    page.wait_for_function(holds.format(job.result["plans"][str(job.result["chosen"])]))
    other = next(i for i in range(len(job.result["front"])) if i != job.result["chosen"])
    page.locator(f"#front [data-point='{other}']").press("Enter")
    wait_until(lambda: str(other) in job.result["plans"])
    name = job.result["plans"][str(other)]
    page.get_by_role("tab", name="Generate").click()
    page.wait_for_function(holds.format(name))
    ask(page, studio, wait_until, prompt="a red circle", steps=2)
    assert newest(studio).ask["plan"] == name
    # A page that opens later is as the last video was made, and not as the last search would have it.
    choose(page, "#plan input", "none")
    ask(page, studio, wait_until, prompt="a red circle", steps=2)
    visit(page, address)
    page.wait_for_timeout(1500)
    assert page.locator("#plan input").input_value() == "none"


def test_history(page, served, wait_until):
    studio, _ = served
    first = ask(page, studio, wait_until, prompt="a red circle", steps=2)
    second = ask(page, studio, wait_until, prompt="a large blue circle", steps=2)
    wait_until(lambda: first.made and second.made)
    page.wait_for_selector("#player video")
    made = [job for job in studio.queue.all() if job.made and job.kind == "video"]
    page.get_by_role("tab", name="History").click()
    page.locator(f"#history [data-id='{made[0].id}']").click()
    page.wait_for_selector("#history-player video")
    page.locator("#beside input").click()
    page.get_by_role("option", name=made[1].id).click()
    page.wait_for_selector("#history-player video >> nth=1")
    page.get_by_role("button", name="Run again").click()
    wait_until(lambda: newest(studio).id != made[0].id and newest(studio).made)
    assert newest(studio).ask == made[0].ask
    page.get_by_role("tab", name="History").click()
    page.get_by_role("button", name="Load settings").click()
    page.wait_for_function(f"[...document.querySelectorAll('input')].some(i => i.value === '{made[0].ask['seed']}')")
    page.get_by_role("tab", name="History").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    wait_until(lambda: studio.queue.find(made[0].id) is None)
    assert not (studio.store.folder / made[0].id).exists()


def test_an_image_model(page, served, image_model, sparse_plan, tmp_path, wait_until):
    studio, _ = served
    # A plan for the other model must not stay chosen.
    page.locator("input[type=file]").first.set_input_files(sparse_plan(name="video").save(tmp_path / "plan.json"))
    page.wait_for_function("document.querySelector('#plan input').value.startsWith('mine: video')")
    choose(page, "#model input", str(image_model))
    page.get_by_label("Frames", exact=True).first.wait_for(state="hidden")
    page.wait_for_function("document.querySelector('#plan input').value === 'auto'")
    job = ask(page, studio, wait_until, prompt="a red circle", steps=2)
    page.wait_for_selector("#player img")
    assert job.result["video"] == "video.png"


def test_the_keyboard_goes_all_the_way(page, served, wait_until):
    studio, _ = served
    before = len(studio.queue.all())
    page.get_by_label("Prompt", exact=True).first.focus()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("a red circle")
    passed = []
    while (now := page.evaluate("document.activeElement.id || document.activeElement.ariaLabel")) != "generate":
        passed.append(now)
        assert len(passed) < 60, passed
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_until(lambda: len(studio.queue.all()) > before)
    assert newest(studio).ask["prompt"] == "a red circle"
    for name in ("Plan", "Search", "History"):
        tab = page.get_by_role("tab", name=name)
        assert int(tab.get_attribute("tabindex") or 0) >= 0
        tab.press("Enter")
        page.wait_for_function(
            "name => document.querySelector('[role=tab][aria-selected=true]').innerText === name", arg=name
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(chromium, served, scheme):
    small = chromium.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    small.set_default_timeout(SECONDS)
    visit(small, served[1])
    for tab in small.get_by_role("tab").all():
        tab.click()
        assert small.evaluate("document.documentElement.scrollWidth") == 390
    unnamed = "[...document.querySelectorAll('button, select, input:not([type=hidden]), textarea')].filter("
    named = "e.getAttribute('aria-label') || e.labels?.length || e.innerText?.trim() || e.title || e.type == 'file'"
    assert small.evaluate(f"{unnamed}e => e.offsetParent && !({named})).map(e => e.outerHTML.slice(0, 200))") == []
    small.close()
