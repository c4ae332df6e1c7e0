"""Make the README's pictures: `python benchmarks/pictures.py`.

A video under the shipped plan beside dense, and two pages of the app, photographed in Chromium: a run compared with
dense, and what one of the plan's heads looks at. They show times: on a machine that does nothing else.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ziggurat.pipelines.generate import generate
from ziggurat.pipelines.record import figures

PROMPT = "a large red circle moving left on a gray background"
OUT = Path(__file__).parents[1] / "docs" / "pictures"
FRAMES, GAP = 6, 4
LAYER, HEAD = 1, 1


def strip(rows: list[np.ndarray]) -> Image.Image:
    """Frames of each video, uint8 [frames, height, width, 3], evenly spaced from left to right, a row a video."""
    picked = [video[np.linspace(0, len(video) - 1, FRAMES).round().astype(int)] for video in rows]
    padded = np.pad(np.stack(picked), ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    count, _, height, width, _ = padded.shape
    image = padded.transpose(0, 2, 1, 3, 4).reshape(count * height, FRAMES * width, 3)
    return Image.fromarray(image[:-GAP, :-GAP])


def photograph(folder: Path) -> None:
    """The app's pages Generate and Plan, the app's own files in `folder`."""
    from playwright.sync_api import sync_playwright

    from ziggurat.app.studio.pages.site import serve
    from ziggurat.app.studio.studio import Studio

    studio = Studio(folder, ["shapes"], ["cpu"])
    site, address = serve(studio, host="127.0.0.1", port=None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page: Any = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(300_000)
        page.goto(address)
        page.wait_for_selector("#ready [data-ready]", state="attached")
        page.get_by_label("Prompt", exact=True).first.fill(PROMPT)
        page.get_by_label("Compare with dense attention", exact=True).set_checked(True)
        page.locator("#generate").press("Enter")
        page.wait_for_selector("#player video >> nth=1")
        page.wait_for_function(
            "[...document.querySelectorAll('#player video')].every(v => v.readyState >= 2 && !v.error)"
        )
        page.wait_for_timeout(500)
        page.get_by_label("Pause").click()
        page.screenshot(path=OUT / "app-generate.png")
        page.get_by_role("tab", name="Plan").click()
        page.locator(f"[aria-label^='layer {LAYER}, head {HEAD}:']").click()
        page.click("#draw")
        page.wait_for_selector(f"#map img[alt^='Attention map of layer {LAYER}, head {HEAD}']")
        page.wait_for_timeout(500)
        page.screenshot(path=OUT / "app-plan.png")
        browser.close()
    studio.queue.close()
    site.close(verbose=False)


def main() -> None:
    made = generate("shapes", PROMPT, seed=0, compare=True)
    assert made.dense_frames is not None
    OUT.mkdir(parents=True, exist_ok=True)
    strip([made.dense_frames, made.frames]).save(OUT / "strip.png", optimize=True)
    print(json.dumps(figures(made)))
    with tempfile.TemporaryDirectory() as folder:
        photograph(Path(folder))


if __name__ == "__main__":
    main()
