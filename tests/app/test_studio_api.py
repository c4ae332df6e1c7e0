"""The app for programs, by `gradio_client`; and what it serves, and what not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest


@pytest.fixture(scope="module")
def client(served) -> Any:
    from gradio_client import Client

    return Client(served[1], verbose=False, analytics_enabled=False)


def test_four_at_once(served, client, wait_until):
    studio, address = served
    from gradio_client import Client

    def call(seed: int) -> dict[str, Any]:
        own = Client(address, verbose=False, analytics_enabled=False)
        name = own.predict(prompt="a red circle", plan="none", steps=2, seed=seed, api_name="/generate")
        return wait_until(lambda: (found := own.predict(name=name, api_name="/job"))["status"] == "done" and found)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, range(4)))
    assert [one["settings"]["seed"] for one in found] == [0, 1, 2, 3]
    jobs = {job.ask["seed"]: job for job in studio.queue.all() if job.ask["prompt"] == "a red circle"}
    spans = sorted((jobs[seed].started_at, jobs[seed].ended_at) for seed in range(4))
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_refusals_and_stopping(client, wait_until):
    for changes, words in (
        ({"prompt": ""}, "prompt is empty"),
        ({"plan": "../../etc/passwd"}, "there is no plan"),
        ({"frames": 1_000_001}, "need about"),
        ({"model": "Wan-AI/Wan2.1-T2V-14B-Diffusers"}, "was not allowed when the app was started"),
    ):
        with pytest.raises(Exception, match=words):
            client.predict(**{"prompt": "a circle", "plan": "none", **changes}, api_name="/generate")
    name = client.predict(prompt="a circle", plan="none", steps=20_000, api_name="/generate")
    waiting = [client.predict(prompt="a circle", plan="none", steps=2, api_name="/generate") for _ in range(6)]
    with pytest.raises(Exception, match="6 jobs wait already"):
        client.predict(prompt="a circle", plan="none", steps=2, api_name="/generate")
    assert client.predict(name=waiting[2], api_name="/job")["ahead"] in (3, 2)
    for each in [*waiting, name]:
        client.predict(name=each, api_name="/stop")
    wait_until(lambda: client.predict(name=name, api_name="/job")["status"] == "stopped")
    with pytest.raises(Exception, match="there is no job"):
        client.predict(name="../..", api_name="/job")


def test_nothing_outside_the_folder_is_served(served, tmp_path):
    import httpx

    studio, address = served
    secret = tmp_path / "secret.txt"
    secret.write_text("hush")
    inside = studio.store.folder / "20260101-000000-abcdef"
    inside.mkdir()
    (inside / "link.txt").symlink_to(secret)
    (inside / "seen.txt").write_text("seen")
    base = f"{address.rstrip('/')}/gradio_api/file="
    assert httpx.get(f"{base}{inside}/seen.txt").text == "seen"
    for path in (
        *("/etc/passwd", str(secret), f"{studio.store.folder}/../secret.txt", f"{inside}/link.txt"),
        *(f"{studio.store.folder}/%2e%2e/%2e%2e/secret.txt", __file__, "pyproject.toml"),
    ):
        answer = httpx.get(f"{base}{path}")
        assert answer.status_code in (403, 404), path
        assert "hush" not in answer.text


def test_the_app_can_not_be_made_to_ask_other_hosts(served):
    import httpx

    base = served[1].rstrip("/")
    for path in ("file=http://example.com/a", "file=https://example.com/a", "proxy=https://example.com/a"):
        assert httpx.get(f"{base}/gradio_api/{path}").status_code in (403, 404)
    page = httpx.get(base)
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "fonts.googleapis" not in page.text
    assert "cdnjs" not in page.text
