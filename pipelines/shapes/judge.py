"""The judge: which scene a video shows, from its pixels alone, and what in it no scene of the grammar would show.

Made for a small model's videos: soft edges, shifted colours, noise and a mild wobble pass; what a viewer would not
call "a small red circle" has no word here, and an attribute without a word is wrong. Training never reads this file.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from torch import Tensor

from .measure import AREA, Path, as_frames, watch
from .render import DIRECTION, RADIUS, TRAVEL
from .scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, parse_caption

ATTRIBUTES = ("size", "colour", "shape", "motion")
# CIELAB distances. The nearest two colours of the grammar (blue, purple) are 37 apart, the backgrounds 43.
COLOUR_REACH, BACKGROUND_REACH, CLEARLY_NEARER = 32.0, 22.0, 0.7
COLOUR_DRIFT, BACKGROUND_DRIFT = 22.0, 10.0
# Spread of sRGB within an object's core: noise that a viewer sees through stays below.
COLOUR_SPREAD = 45.0
MOVES, STILL = TRAVEL[0] / 2, TRAVEL[0] / 4
SIZE_LIMIT = (RADIUS["small"][1] + RADIUS["large"][0]) / 2
SIZE_CHANGE = 1.25
# Length of each shape's outline over the root of its area.
OUTLINE = {"circle": 3.54, "square": 4.0, "triangle": 4.56}
# Lengths of the frame's shorter side.
JUMP, STRAY, SWAY, SHAKE = 0.05, 0.06, 0.05, 0.02


@dataclass(frozen=True)
class Object:
    """One object of a video: its words (None where none fits), and the geometry measured.

    Lengths are in units of the frame's shorter side, positions (x, y) from the top left corner.
    """

    size: str | None
    colour: str | None
    shape: str | None
    motion: str | None
    radius: float  # nominal, as in `render.RADIUS`
    start: tuple[float, float]
    end: tuple[float, float]
    rgb: tuple[int, int, int]
    fit: float  # overlap with the outline of `shape` (or of the nearest one), 0…1
    frames: tuple[int, ...]  # the frames it was seen in, counted from 0

    @property
    def name(self) -> str:
        return f"the {self.colour or 'strange-coloured'} {self.shape or 'object'}"


@dataclass(frozen=True)
class Verdict:
    """What a video shows.

    `scene` is None when any word is missing: an attribute is unclear, there are no or more than two objects, or the
    video is a single frame, which shows no motion. `faults` are sentences on what changes or breaks over the frames,
    counted from 0; a video with any is wrong whatever its scene.
    """

    scene: Scene | None
    objects: tuple[Object, ...]
    background: str | None
    faults: tuple[str, ...]
    frames: int


@dataclass(frozen=True)
class Result:
    """A video held against a caption, attribute by attribute; `motion` is None for a single frame.

    Each attribute of an object is right when it is right for every object of the caption; when an object is missing,
    none is.
    """

    count: bool
    size: bool
    colour: bool
    shape: bool
    motion: bool | None
    background: bool
    verdict: Verdict

    @property
    def right(self) -> bool:
        attributes = (self.count, self.size, self.colour, self.shape, self.motion, self.background)
        return not self.verdict.faults and False not in attributes


def check(video: np.ndarray | Tensor, caption: str | Scene) -> Result:
    """Whether a video shows what its caption says.

    Args:
        video: [frames, height, width, 3], uint8 in 0…255 or any float in 0…1.
        caption: a caption of the grammar, or its scene.

    Raises:
        ValueError: for a video of another form, or a caption that is not in the grammar.
    """
    return compare(judge(video), caption)


def compare(verdict: Verdict, caption: str | Scene) -> Result:
    """A verdict already reached, held against a caption of the grammar or its scene."""
    scene = parse_caption(caption) if isinstance(caption, str) else caption
    seen, asked = verdict.objects, scene.things
    best = dict.fromkeys(ATTRIBUTES, False)
    # Which object is which is not said: the assignment that gets most right counts. One that tells too many objects
    # apart to try them all is wrong in any case.
    for order in permutations(seen[:6], len(asked)):
        pairs = list(zip(order, asked, strict=True))
        right = {word: all(getattr(one, word) == getattr(thing, word) for one, thing in pairs) for word in ATTRIBUTES}
        best = max(best, right, key=lambda words: sum(words.values()))
    return Result(
        count=len(seen) == len(asked),
        size=best["size"],
        colour=best["colour"],
        shape=best["shape"],
        motion=best["motion"] if verdict.frames > 1 else None,
        background=verdict.background == scene.background,
        verdict=verdict,
    )


def judge(video: np.ndarray | Tensor) -> Verdict:
    """What a video shows, with no other knowledge of it.

    Args:
        video: [frames, height, width, 3], uint8 in 0…255 or any float in 0…1. Height and width from 32; one frame or
            more.

    Raises:
        ValueError: for a video of another form or size.
    """
    frames = as_frames(video)
    count, height, width, _ = frames.shape
    if min(height, width) < 32:
        raise ValueError(f"video must be at least 32 pixels high and wide to tell shapes, got {height}x{width}")
    backdrop, paths = watch(frames)
    background, faults = _background(backdrop)
    lasting = [path for path in paths if len(path.frames) >= count / 2]
    objects = tuple(_object(path, count, min(height, width)) for path in lasting)
    if not objects:
        faults.append("no object is seen throughout")
    for path, one in zip(lasting, objects, strict=True):
        faults += _faults(path, one, count, min(height, width))
    faults += [f"a passing object is seen in {_span(path.frames)}" for path in paths[len(lasting) :]]
    return Verdict(_scene(objects, background), objects, background, tuple(faults), count)


def _scene(objects: tuple[Object, ...], background: str | None) -> Scene | None:
    things = [
        Thing(o.size, o.colour, o.shape, o.motion) for o in objects if o.size and o.colour and o.shape and o.motion
    ]
    return Scene(tuple(things), background) if background and len(things) == len(objects) in (1, 2) else None


def _object(path: Path, count: int, unit: int) -> Object:
    fit = path.fit.mean(0)
    order = fit.argsort()[::-1]
    nearest = SHAPES[order[0]]
    pixels = float(np.sqrt(np.median(path.area))) * unit
    clear = fit[order[0]] > _least_fit(pixels)[order[0]] and fit[order[0]] - fit[order[1]] > 0.06 - 0.15 / pixels
    radius = float(np.sqrt(np.median(path.area) / AREA[nearest]))
    rgb = np.median(path.colour, axis=0)
    red, green, blue = rgb.round()
    even = np.median(path.spread) < COLOUR_SPREAD
    start, velocity = _line(path)
    return Object(
        size="large" if radius > SIZE_LIMIT else "small",
        colour=_nearest(rgb, COLOURS, COLOUR_REACH) if even else None,
        shape=nearest if clear else None,
        motion=_motion(velocity * (count - 1)) if count > 1 else None,
        radius=radius,
        start=_point(start),
        end=_point(start + velocity * (count - 1)),
        rgb=(int(red), int(green), int(blue)),
        fit=float(fit[order[0]]),
        frames=tuple(int(frame) for frame in path.frames),
    )


def _faults(path: Path, one: Object, count: int, unit: int) -> list[str]:
    """What breaks over the frames in one object's path."""
    faults, name = [], one.name
    missing = np.setdiff1d(np.arange(count), path.frames)
    if len(missing):
        faults.append(f"{name} vanishes in {_span(missing)}")
    lab = _lab(path.colour)
    changed = np.linalg.norm(lab - np.median(lab, axis=0), axis=1) > COLOUR_DRIFT
    # What drifts slowly, or changes halfway, strays half as far from its middle as from end to end.
    if changed.any() or np.linalg.norm(np.ptp(lab, axis=0)) > 1.4 * COLOUR_DRIFT:
        at = path.frames[changed] if changed.any() else path.frames
        faults.append(f"{name} changes colour in {_span(at)}")
    radius, fit = _calm(np.sqrt(path.area)), _calm(path.fit)
    if radius.max() > SIZE_CHANGE * radius.min():
        faults.append(f"{name} changes size by {radius.max() / radius.min():.2f} times")
    mine, pixels = path.fit.mean(0).argmax(), float(np.sqrt(np.median(path.area))) * unit
    lost = (fit[:, mine] < _least_fit(pixels)[mine] - 0.07) | (fit[:, mine] < fit.max(1) - 0.02)
    if one.shape and lost.any():
        faults.append(f"{name} loses its shape in {_span(path.frames[lost])}")
    if len(path.frames) > 2:
        faults += [f"{name} {what}" for what in _unsteady(path, one.motion)]
    return faults


def _unsteady(path: Path, motion: str | None) -> list[str]:
    """How a path differs from straight motion at one speed, or from rest."""
    steps = np.diff(path.centre, axis=0) / np.diff(path.frames)[:, None]
    usual = np.median(steps, axis=0)
    off = np.linalg.norm(steps - usual, axis=1)
    jumps = off > JUMP + 0.5 * np.linalg.norm(usual)
    faults = [f"jumps in {_span(path.frames[1:][jumps])}"] if jumps.any() else []
    start, velocity = _line(path)
    stray = np.linalg.norm(path.centre - start - velocity * path.frames[:, None], axis=1).max()
    if motion == "staying still":
        sway = np.linalg.norm(path.centre - path.centre.mean(0), axis=1).max()
        if sway > SWAY:
            faults.append(f"sways by {sway:.2f} where it should rest")
    elif stray > STRAY:
        faults.append(f"strays by {stray:.2f} from straight and steady motion")
    if off.mean() > SHAKE + 0.1 * np.linalg.norm(usual):
        faults.append("shakes")
    if motion in DIRECTION and motion != "staying still" and len(path.frames) >= 7:
        along = _calm(path.centre) @ np.array(DIRECTION[motion])
        thirds = np.interp(np.linspace(path.frames[0], path.frames[-1], 4), path.frames, along)
        if np.diff(thirds).min() < 0.12 * (thirds[-1] - thirds[0]):
            faults.append("stops or turns on its way")
    return faults


def _motion(travel: np.ndarray) -> str | None:
    """The word for a displacement; None for one that is slow, or as much across as along."""
    across, along = np.sort(np.abs(travel))
    if along < STILL:
        return "staying still"
    if along < MOVES or across > along / 2:
        return None
    return max(DIRECTION, key=lambda motion: float(travel @ np.array(DIRECTION[motion])))


def _background(colours: np.ndarray) -> tuple[str | None, list[str]]:
    lab = _lab(colours)
    changed = np.linalg.norm(lab - np.median(lab, axis=0), axis=1) > BACKGROUND_DRIFT
    faults = [f"the background changes in {_span(np.flatnonzero(changed))}"] if changed.any() else []
    return _nearest(np.median(colours, axis=0), BACKGROUNDS, BACKGROUND_REACH), faults


def _least_fit(pixels: float) -> np.ndarray:
    """The least overlap that passes as each shape, for an area of `pixels`²: a share is lost along the outline."""
    return 1 - (0.1 + 0.5 / pixels) * np.array([OUTLINE[shape] for shape in SHAPES]) / 4


def _line(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Least squares: where the object is at frame 0, and how far it goes per frame."""
    if len(path.frames) == 1:
        return path.centre[0], np.zeros(2)
    velocity, start = np.polyfit(path.frames, path.centre, 1)
    return start, velocity


def _calm(values: np.ndarray) -> np.ndarray:
    """Median over three frames."""
    if len(values) < 3:
        return values
    padded = np.concatenate([values[:1], values, values[-1:]])
    return np.median(np.stack([padded[:-2], padded[1:-1], padded[2:]]), axis=0)


def _nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]], reach: float) -> str | None:
    apart = np.linalg.norm(_lab(np.array(list(palette.values()))) - _lab(rgb), axis=1)
    first, second = apart.argsort()[:2]
    near = apart[first] < reach and apart[first] < CLEARLY_NEARER * apart[second]
    return list(palette)[first] if near else None


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0…255 as CIELAB (D65), [..., 3]."""
    value = np.clip(np.asarray(rgb, float) / 255, 0, 1)
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ (matrix / matrix.sum(1, keepdims=True)).T
    x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _point(place: np.ndarray) -> tuple[float, float]:
    return float(place[0]), float(place[1])


def _span(frames: np.ndarray) -> str:
    first, last = frames.min(), frames.max()
    return f"frame {first}" if first == last else f"frames {first} to {last}"
