"""The app over tiny pipelines, and a real browser: a chromium on the path, or the one that ZIGGURAT_CHROMIUM names.

Where there is none the tests that need it are skipped; where the variable is set, as .ci/run does, they fail.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="session")
def image_folder(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PixArt pipeline of a few thousand parameters: it makes images, and takes no frames."""
    import diffusers

    from ziggurat.pipelines import load

    # Type checkers see nothing of what diffusers imports late.
    library: Any = diffusers
    parts = load(wan_folder, dtype=torch.float32).components
    torch.manual_seed(0)
    transformer = library.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=32,
        patch_size=2,
        norm_num_groups=1,
        use_additional_conditions=False,
    )
    vae = library.AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=1,
    )
    pipe = library.PixArtSigmaPipeline(
        tokenizer=parts["tokenizer"],
        text_encoder=parts["text_encoder"],
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=library.DPMSolverMultistepScheduler(),
    )
    folder = tmp_path_factory.mktemp("image") / "tiny-image"
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def small(folder: Path, target: Path, **settings: Any) -> Path:
    """A copy of a model's folder whose own settings are small."""
    import json

    shutil.copytree(folder, target)
    (target / "ziggurat.json").write_text(json.dumps(settings))
    return target


@pytest.fixture(scope="session")
def video_model(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return small(wan_folder, folder, frames=9, height=32, width=48, steps=3, guidance=4.0, fps=8)


@pytest.fixture(scope="session")
def image_model(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "picture"
    return small(image_folder, folder, height=32, width=32, steps=2)


@pytest.fixture
def make_studio(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A function that makes studios; those that were started are closed again."""
    from ziggurat.app.studio.studio import Studio

    made: list[Any] = []

    def make(*models: Path, folder: Path | None = None, **more: Any) -> Any:
        studio = Studio(folder or tmp_path / "out", [str(model) for model in models], ["cpu"], dtype="fp32", **more)
        made.append(studio)
        return studio

    yield make
    for studio in made:
        if any(thread.is_alive() for thread in studio.queue.threads):
            studio.queue.close()


def until(true: Callable[[], Any], *, seconds: float = 300, what: Callable[[], object] = lambda: "") -> Any:
    """Wait until something is true, and return it; `what` is said where it never is."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.05)
    raise AssertionError(f"still not after {seconds:g} s: {what()}")


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    return until


@pytest.fixture(scope="module")
def served(video_model: Path, image_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    """The app over a tiny video model and a tiny image model: the studio and its address."""
    folder = tmp_path_factory.mktemp("served") / "out"
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    from ziggurat.app.studio.pages.site import serve
    from ziggurat.app.studio.studio import Studio

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    studio = Studio(folder, [str(video_model), str(image_model)], ["cpu"], dtype="fp32", most=6)
    page, address = serve(studio, host="127.0.0.1", port=port)
    yield studio, address
    studio.queue.close()
    page.close(verbose=False)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One browser for the whole run, with a profile of its own."""
    from playwright.sync_api import sync_playwright

    named = os.environ.get("ZIGGURAT_CHROMIUM")
    path = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    if named and not Path(named).is_file():
        raise RuntimeError(f"ZIGGURAT_CHROMIUM names {named}, which is missing: apt-get install chromium")
    if path is None:
        pytest.skip("no browser: apt-get install chromium, or name one in ZIGGURAT_CHROMIUM")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(QUIET))
        yield browser
        browser.close()
