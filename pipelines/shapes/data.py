"""Endless training clips, each batch following from its random source alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from .render import CIRCUMRADIUS, Track, place, render, shorten
from .scenes import Scene, draw_scene


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Rendered clips: pixels [B, 3, frames, height, width] in −1…1, float32, and what they show.

    unit: pixels that a length of 1 is. corners: (top, left) of what is shown, in pixels of the whole frame.
    """

    pixels: Tensor
    scenes: list[Scene]
    tracks: list[tuple[Track, ...]]
    unit: int
    corners: list[tuple[int, int]]

    @property
    def captions(self) -> list[str]:
        return [str(scene) for scene in self.scenes]


def draw_clips(
    random: Random,
    count: int,
    frames: int,
    height: int,
    width: int,
    *,
    two_share: float = 0.0,
    span: int | None = None,
    crop: int | None = None,
) -> Clips:
    """Random clips.

    span: frames of the clip of which these are a window, so that objects move at its pace; None = the window is all.
    crop: height and width in pixels of a random part that is returned instead, the objects in it if they fit.
    """
    scenes = [draw_scene(random, two_share) for _ in range(count)]
    tracks = [place(scene, random, width / height) for scene in scenes]
    if span is not None and span > frames:
        share = (frames - 1) / (span - 1)
        begins = [random.uniform(0, 1 - share) for _ in scenes]
        tracks = [
            tuple(shorten(track, begin, begin + share) for track in each)
            for each, begin in zip(tracks, begins, strict=True)
        ]
    pixels, unit = render(scenes, tracks, frames, height, width), min(height, width)
    corners = [(0, 0)] * count
    if crop is not None:
        sides = ((1, height), (0, width))
        for index, each in enumerate(tracks):
            top, left = (_corner(random, each, axis, unit, side, crop) for axis, side in sides)
            corners[index] = (top, left)
        pixels = torch.stack(
            [clip[..., top : top + crop, left : left + crop] for clip, (top, left) in zip(pixels, corners, strict=True)]
        )
    return Clips(pixels=pixels, scenes=scenes, tracks=tracks, unit=unit, corners=corners)


def _corner(random: Random, tracks: Sequence[Track], axis: int, unit: int, side: int, crop: int) -> int:
    """Where a crop begins along an axis (0 = x), such that it holds the objects as far as it can."""
    reach = [CIRCUMRADIUS * track.radius for track in tracks]
    low = min(min(t.start[axis], t.end[axis]) - r for t, r in zip(tracks, reach, strict=True)) * unit
    high = max(max(t.start[axis], t.end[axis]) + r for t, r in zip(tracks, reach, strict=True)) * unit
    first, last = sorted((math.ceil(high) - crop, math.floor(low)))
    return min(max(random.randint(first, last), 0), side - crop)


def draw_windows(random: Random, count: int, frames: int, size: int) -> Tensor:
    """Random windows, in space and time, of clips at several scales and speeds: what a VAE has to know.

    Returns:
        float32 [count, 3, frames, size, size] in −1…1.
    """
    full = int(size * random.choice((1, 1, 1.5, 2)))
    length = max(frames, random.choice((frames, 2 * frames, 33)))
    first = random.randint(0, length - frames) / max(length - 1, 1)
    scenes = [draw_scene(random, 0.3) for _ in range(count)]
    tracks = [place(scene, random) for scene in scenes]
    share = (frames - 1) / max(length - 1, 1)
    windows = [[shorten(track, first, first + share) for track in each] for each in tracks]
    clips = render(scenes, windows, frames, full, full)
    top, left = random.randint(0, full - size), random.randint(0, full - size)
    return clips[..., top : top + size, left : left + size]


def draw_patchwork(random: Random, count: int, frames: int, size: int) -> Tensor:
    """Still patches of random colours, in which nothing but looking closely helps: float32 as `draw_windows`."""
    generator = torch.Generator().manual_seed(random.getrandbits(62))
    patch = random.choice((4, 8, 12))
    colours = torch.rand(count, 3, 1, size // patch + 2, size // patch + 2, generator=generator) * 1.8 - 0.9
    pixels = colours.repeat_interleave(patch, 3).repeat_interleave(patch, 4)
    top, left = random.randrange(patch), random.randrange(patch)
    return pixels[..., top : top + size, left : left + size].expand(-1, -1, frames, -1, -1)
