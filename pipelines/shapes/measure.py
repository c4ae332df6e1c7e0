"""What is seen in a video, before any word is put to it: objects cut out of the background and followed over frames.

Lengths are in units of the frame's shorter side and positions are (x, y) from its top left corner, as in `render.py`.
Frames are counted from 0. Colours are sRGB in 0…255.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from .render import CIRCUMRADIUS, HALF_SIDE, _circle, _square, _triangle
from .scenes import COLOURS, SHAPES

# Area of each shape at nominal radius 1.
AREA = {"circle": math.pi, "square": 4 * HALF_SIDE**2, "triangle": 3 * math.sqrt(3) * (CIRCUMRADIUS / 2) ** 2}
# The palest object of the grammar stands 106 from its background (green on gray). A third of that shows ghosts; on a
# restless background an object has to stand out from what is usual there, up to half of the palest one's contrast.
CONTRAST, UNREST, MOST_CONTRAST = 32.0, 3.5, 53.0
SMOOTHING = 0.006
# A quarter of the smallest object of the grammar.
LEAST_AREA = 0.006
# Erosion that parts two objects joined by blur (their gap is at a corner) and leaves the smallest triangle whole.
NECK = 0.03
# Half side of the window that a template is compared in: the largest triangle's reach and a margin.
WINDOW = CIRCUMRADIUS * 0.22 + 0.05


@dataclass(frozen=True, eq=False)
class Seen:
    """One object in one frame."""

    frame: int
    centre: np.ndarray  # [2]
    area: float
    colour: np.ndarray  # [3], of the object's core
    spread: float  # how far the colours within the core stray from it, as a root mean square
    cover: np.ndarray  # [height, width] of the frame, 1 inside and 0 outside


@dataclass(frozen=True, eq=False)
class Path:
    """One object over the frames it was seen in, [n] of them in rising order."""

    frames: np.ndarray  # [n]
    centre: np.ndarray  # [n, 2]
    area: np.ndarray  # [n]
    colour: np.ndarray  # [n, 3]
    spread: np.ndarray  # [n]
    fit: np.ndarray  # [n, shapes], overlap with each shape of the same area at the same place, 0…1


def as_frames(video: np.ndarray | torch.Tensor) -> np.ndarray:
    """A video as float32 [frames, height, width, 3] in 0…255.

    Args:
        video: [frames, height, width, 3], uint8 in 0…255 or any float in 0…1.
    """
    if isinstance(video, torch.Tensor):
        video = (video.float() if video.is_floating_point() else video).detach().cpu().numpy()
    array = np.asarray(video)
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(f"video must be [frames, height, width, 3], got {list(array.shape)}")
    if array.dtype == np.uint8:
        return array.astype(np.float32)
    if array.dtype.kind != "f":
        raise ValueError(f"video must be uint8 or float, got {array.dtype}")
    if not (array.min() >= -0.01 and array.max() <= 1.01):
        raise ValueError(f"video of floats must lie in 0…1, got {array.min():.3g}…{array.max():.3g}")
    return array.astype(np.float32) * 255


def watch(frames: np.ndarray) -> tuple[np.ndarray, list[Path]]:
    """The background's colour in each frame, [frames, 3], and every object's path, longest first.

    Args:
        frames: float32 [frames, height, width, 3] in 0…255.
    """
    count, height, width, _ = frames.shape
    unit = min(height, width)
    sigma = max(SMOOTHING * unit, 0.5)
    smooth = ndimage.gaussian_filter(frames, (0, sigma, sigma, 0), truncate=2.5)
    background = np.median(smooth[:, ::2, ::2].reshape(count, -1, 3), axis=1)
    offset = smooth - background[:, None, None]
    apart = np.sqrt(np.einsum("fyxc,fyxc->fyx", offset, offset))
    far = apart > np.clip(UNREST * np.median(apart[:, ::2, ::2]), CONTRAST, MOST_CONTRAST)
    seen = [_look(frame, offset[frame], background[frame], far[frame], unit) for frame in range(count)]
    return background, sorted((_path(chain, unit) for chain in _follow(seen)), key=lambda path: -len(path.frames))


def _look(frame: int, offset: np.ndarray, background: np.ndarray, far: np.ndarray, unit: int) -> list[Seen]:
    labels, _ = ndimage.label(far, np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
    # Soft edges reach past the contrast that finds an object: each part takes them in, up to the next part.
    edge = max(round(0.02 * unit), 1)
    owner, parts = np.zeros(far.shape, int), []
    for index, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        box = (
            slice(max(rows.start - edge, 0), rows.stop + edge),
            slice(max(columns.start - edge, 0), columns.stop + edge),
        )
        mask = labels[box] == index
        if mask.sum() < LEAST_AREA * unit**2:
            continue
        for depth in _split(mask, offset[box], background, unit):
            if (depth > 0).sum() >= LEAST_AREA * unit**2:
                parts.append((box, depth))
                owner[box][depth > 0] = len(parts)
    found = []
    for number, (box, depth) in enumerate(parts, 1):
        own = ndimage.binary_dilation(depth > 0, np.ones((3, 3)), iterations=edge)
        own &= (owner[box] == number) | (owner[box] == 0)
        found.append(_seen(frame, offset, background, box, depth, own))
    return [seen for seen in found if seen.area > LEAST_AREA]


def _split(mask: np.ndarray, offset: np.ndarray, background: np.ndarray, unit: int) -> list[np.ndarray]:
    """The objects in one connected region, parted at necks and between colours that touch, each as its depth."""
    # Edge pixels lie between background and object, so only the direction away from the background tells a colour.
    rays = np.array(list(COLOURS.values()), np.float32) - background
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    nearest = np.where(mask, (offset @ rays.T.astype(np.float32)).argmax(-1), -1)
    regions = [nearest == i for i in range(len(COLOURS))]
    depths = [_depth(region) for region in regions if region.sum() >= LEAST_AREA * unit**2]
    depths = [depth for depth in depths if depth.max() > 1.3 * NECK * unit] if len(depths) > 1 else []
    whole = _depth(mask)
    seeds, count = np.zeros(mask.shape, int), 0
    for depth in depths if len(depths) > 1 else [whole]:
        cores, found = ndimage.label(depth > NECK * unit)  # pyright: ignore[reportGeneralTypeIssues]
        for core in range(1, found + 1):
            if depth[cores == core].max() > 1.3 * NECK * unit:
                count += 1
                seeds[cores == core] = count
    if count < 2:
        return [whole]
    index = np.asarray(ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True))
    nearest = seeds[tuple(index)]
    return [_depth(mask & (nearest == seed)) for seed in range(1, count + 1)]


def _depth(mask: np.ndarray) -> np.ndarray:
    """How far inside each pixel is. The frame's border is an edge, so that an object cut by it has a core as well."""
    return np.asarray(ndimage.distance_transform_edt(np.pad(mask, 1)))[1:-1, 1:-1]


def _seen(
    frame: int,
    offset: np.ndarray,
    background: np.ndarray,
    box: tuple[slice, slice],
    depth: np.ndarray,
    own: np.ndarray,
) -> Seen:
    # On small frames smoothing reaches three pixels in: the colour is then that of the very middle.
    core = offset[box][depth >= min(max(0.5 * depth.max(), 3.0), depth.max())]
    colour = np.median(core, axis=0)
    # How much of the object's colour is in each pixel: the renderer's anti-aliasing, undone.
    share = (offset[box] @ colour) / max(float(colour @ colour), 1.0) * own
    area = max(float(share.sum()), 1e-6)
    height, width = offset.shape[:2]
    x, y = np.arange(width)[box[1]] + 0.5, np.arange(height)[box[0]] + 0.5
    unit = min(height, width)
    centre = np.array([(share.sum(0) * x).sum(), (share.sum(1) * y).sum()]) / area / unit
    spread = float(np.sqrt(np.square(core - colour).sum(1).mean()))
    cover = np.zeros((height, width), np.float32)
    cover[box] = share.clip(0, 1)
    return Seen(frame, centre, area / unit**2, colour + background, spread, cover)


def _follow(seen: list[list[Seen]]) -> list[list[Seen]]:
    """Sightings chained over frames: nearest in place and colour to where each object was seen last."""
    chains: list[list[Seen]] = []
    for here in seen:
        cost = np.zeros((len(chains), len(here)))
        for i, chain in enumerate(chains):
            for j, one in enumerate(here):
                apart = np.linalg.norm(one.centre - chain[-1].centre)
                cost[i, j] = apart + np.linalg.norm(one.colour - chain[-1].colour) / 400
        rows, columns = linear_sum_assignment(cost)
        for i, j in zip(rows, columns, strict=True):
            chains[i].append(here[j])
        chains += [[one] for j, one in enumerate(here) if j not in columns]
    return chains


def _path(chain: list[Seen], unit: int) -> Path:
    centre, area = np.stack([one.centre for one in chain]), np.array([one.area for one in chain])
    return Path(
        frames=np.array([one.frame for one in chain]),
        centre=centre,
        area=area,
        colour=np.stack([one.colour for one in chain]),
        spread=np.array([one.spread for one in chain]),
        fit=_fit(np.stack([one.cover for one in chain]), centre, area, unit),
    )


def _fit(cover: np.ndarray, centre: np.ndarray, area: np.ndarray, unit: int) -> np.ndarray:
    """Intersection over union of `cover` [n, height, width] with each shape: [n, shapes], edges as soft as measured."""
    reach = math.ceil(WINDOW * unit)
    corner = np.floor(centre * unit).astype(int)  # column, row of the window's middle
    padded = np.pad(cover, ((0, 0), (reach, reach), (reach, reach)))
    inside = np.pad(np.ones(cover.shape[1:], np.float32), reach)
    size = 2 * reach + 1
    windows, weights = [], []
    for n, (column, row) in enumerate(corner.clip(0, (cover.shape[2] - 1, cover.shape[1] - 1))):
        windows.append(padded[n, row : row + size, column : column + size])
        weights.append(inside[row : row + size, column : column + size])
    window, weight = torch.from_numpy(np.stack(windows)).float(), torch.from_numpy(np.stack(weights))
    # Outlines of one area have lengths of 3.5 (circle) to 4.6 (triangle) times its root.
    edge = ((cover > 0.1) & (cover < 0.9)).sum((1, 2)) / (0.8 * 4 * np.sqrt(area) * unit)
    softness = max(float(np.median(edge)), 1.0)
    steps = torch.arange(-reach, reach + 1) + 0.5
    middle = torch.from_numpy(corner - centre * unit).float()
    dx = (steps + middle[:, 0, None])[:, None, :] / unit
    dy = (steps + middle[:, 1, None])[:, :, None] / unit
    outside = torch.from_numpy(cover.sum((1, 2))).float() - window.sum((1, 2))
    scores = []
    for shape, outline in zip(SHAPES, (_circle, _square, _triangle), strict=True):
        radius = torch.from_numpy(np.sqrt(area / AREA[shape])).float().view(-1, 1, 1)
        template = (0.5 - outline(dx, dy, radius) * unit / softness).clamp(0, 1) * weight
        union = torch.maximum(window, template).sum((1, 2)) + outside
        scores.append(torch.minimum(window, template).sum((1, 2)) / union)
    return torch.stack(scores, 1).numpy()
