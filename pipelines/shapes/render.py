"""Scenes to clips: anti-aliased shapes in straight motion, rendered on the fly at any size and frame count.

Lengths are in units of the frame's shorter side, positions run from the frame's top left corner, and a clip's motion
takes its whole length, so that the same scene looks alike at every size and frame count.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from .scenes import BACKGROUNDS, COLOURS, SHAPES, Scene

RADIUS = {"small": (0.11, 0.13), "large": (0.19, 0.22)}
TRAVEL = (0.34, 0.44)
DIRECTION = {
    "moving left": (-1, 0),
    "moving right": (1, 0),
    "moving up": (0, -1),
    "moving down": (0, 1),
    "staying still": (0, 0),
}
# Factors that make a circle, square and triangle of one nominal radius look equally large.
HALF_SIDE, CIRCUMRADIUS = 0.9, 1.25
GAP = 0.02


@dataclass(frozen=True)
class Track:
    """Where an object is: centre (x, y) at the first and the last frame, and its nominal radius."""

    start: tuple[float, float]
    end: tuple[float, float]
    radius: float


def place(scene: Scene, random: Random, aspect: float = 1.0) -> tuple[Track, ...]:
    """Random tracks for a scene's objects, inside the frame and clear of each other throughout.

    Args:
        scene: what to place.
        random: the source of chance.
        aspect: width ÷ height of the frame.

    Raises:
        ValueError: there is no room, as for two large objects that have to pass each other.
    """
    for _ in range(2000):
        tracks = tuple(_track(thing.size, thing.motion, random, aspect) for thing in scene.things)
        if len(tracks) == 1 or _clear(*tracks):
            return tracks
    raise ValueError(f"no room found for {str(scene)!r}: make one of its objects small")


def _track(size: str, motion: str, random: Random, aspect: float) -> Track:
    radius, travel = random.uniform(*RADIUS[size]), random.uniform(*TRAVEL)
    start, end = [], []
    for direction, extent in zip(DIRECTION[motion], (max(aspect, 1.0), max(1 / aspect, 1.0)), strict=True):
        margin = radius * CIRCUMRADIUS
        low = random.uniform(margin, extent - margin - abs(direction) * travel)
        ends = (low, low + abs(direction) * travel)
        start.append(ends[direction < 0])
        end.append(ends[direction > 0])
    return Track((start[0], start[1]), (end[0], end[1]), radius)


def _clear(one: Track, two: Track) -> bool:
    reach = (one.radius + two.radius) * CIRCUMRADIUS + GAP
    for i in range(9):
        x, y = ((one.start[a] - two.start[a]) * (1 - i / 8) + (one.end[a] - two.end[a]) * (i / 8) for a in range(2))
        if math.hypot(x, y) < reach:
            return False
    return True


def shorten(track: Track, begin: float, end: float) -> Track:
    """The part of a track between two times of 0…1."""

    def at(time: float) -> tuple[float, float]:
        x, y = (a * (1 - time) + b * time for a, b in zip(track.start, track.end, strict=True))
        return x, y

    return Track(at(begin), at(end), track.radius)


def render(scenes: Sequence[Scene], tracks: Sequence[Sequence[Track]], frames: int, height: int, width: int) -> Tensor:
    """Clips of `scenes` along `tracks`: float32 [len(scenes), 3, frames, height, width] in −1…1."""
    count, most = len(scenes), max(len(scene.things) for scene in scenes)
    clip = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes]).float().view(count, 3, 1, 1, 1)
    unit = min(height, width)
    y = ((torch.arange(height) + 0.5) / unit).view(1, 1, height, 1)
    x = ((torch.arange(width) + 0.5) / unit).view(1, 1, 1, width)
    time = torch.linspace(0, 1, frames).view(1, frames, 1)
    for i in range(most):
        here = [n for n in range(count) if len(scenes[n].things) > i]
        things = [scenes[n].things[i] for n in here]
        ends = torch.tensor([(tracks[n][i].start, tracks[n][i].end) for n in here])  # [n, 2, 2]
        centre = ends[:, None, 0] * (1 - time) + ends[:, None, 1] * time  # [n, frames, 2]
        radius = torch.tensor([tracks[n][i].radius for n in here]).view(-1, 1, 1, 1)
        dx, dy = x - centre[..., 0, None, None], y - centre[..., 1, None, None]
        kind = torch.tensor([SHAPES.index(thing.shape) for thing in things]).view(-1, 1, 1, 1)
        distance = _circle(dx, dy, radius)
        for k, shape in enumerate(SHAPES[1:], 1):
            distance = torch.where(kind == k, distance_to(shape, dx, dy, radius), distance)
        cover = (0.5 - distance * unit).clamp(0, 1)[:, None]
        colour = torch.tensor([COLOURS[thing.colour] for thing in things]).float().view(-1, 3, 1, 1, 1)
        drawn = clip[here] * (1 - cover) + colour * cover
        if len(here) == count:
            clip = drawn
        else:
            clip = clip.expand(count, 3, frames, height, width).clone()
            clip[here] = drawn
    return clip.expand(count, 3, frames, height, width) / 127.5 - 1


def distance_to(shape: str, dx: Tensor, dy: Tensor, radius: Tensor | float) -> Tensor:
    """Signed distance to a shape's outline, negative inside, at (dx, dy) from its centre."""
    return {"circle": _circle, "square": _square, "triangle": _triangle}[shape](dx, dy, radius)


def _circle(dx: Tensor, dy: Tensor, radius: Tensor | float) -> Tensor:
    return torch.hypot(dx, dy) - radius


def _square(dx: Tensor, dy: Tensor, radius: Tensor | float) -> Tensor:
    return torch.maximum(dx.abs(), dy.abs()) - radius * HALF_SIDE


def _triangle(dx: Tensor, dy: Tensor, radius: Tensor | float) -> Tensor:
    inner = radius * CIRCUMRADIUS / 2
    return torch.maximum(dy, (dx.abs() * math.sqrt(3) - dy) / 2) - inner
