"""Make the README's picture, a video under the shipped plan beside dense: `python benchmarks/pictures.py`."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ziggurat.pipelines.generate import generate
from ziggurat.pipelines.record import figures

PROMPT = "a large red circle moving left on a gray background"
OUT = Path(__file__).parents[1] / "docs" / "pictures"
FRAMES, GAP = 6, 4


def strip(rows: list[np.ndarray]) -> Image.Image:
    """Frames of each video, uint8 [frames, height, width, 3], evenly spaced from left to right, a row a video."""
    picked = [video[np.linspace(0, len(video) - 1, FRAMES).round().astype(int)] for video in rows]
    padded = np.pad(np.stack(picked), ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    count, _, height, width, _ = padded.shape
    image = padded.transpose(0, 2, 1, 3, 4).reshape(count * height, FRAMES * width, 3)
    return Image.fromarray(image[:-GAP, :-GAP])


def main() -> None:
    made = generate("shapes", PROMPT, seed=0, compare=True)
    assert made.dense_frames is not None
    OUT.mkdir(parents=True, exist_ok=True)
    strip([made.dense_frames, made.frames]).save(OUT / "strip.png", optimize=True)
    print(json.dumps(figures(made)))


if __name__ == "__main__":
    main()
