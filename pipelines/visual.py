"""How the visual segments of a forward follow from its arguments; rows of the table name these functions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .row import Arguments, Config, Shape, Shapes

Visual = Callable[[Config, Arguments], Shapes]

# Pipelines hand over the same position ids at each step, and reading them stalls an accelerator.
_counted = WeakTensorKeyDictionary()


def patches(config: Config) -> Shape:
    """(frames, height, width) of a patch, however the config writes it."""
    size = config.get("patch_size") or 1
    if isinstance(size, int):
        return config.get("patch_size_t") or 1, size, size
    sizes = tuple(size)
    return (config.get("patch_size_t") or 1, *sizes) if len(sizes) == 2 else sizes


def latents(axes: str = "BCFHW", name: str = "hidden_states") -> Visual:
    """One segment: a tensor whose dimensions are `axes`, cut into the config's patches; no F is one frame."""

    def visual(config: Config, arguments: Arguments) -> Shapes:
        shape = getattr(arguments.get(name), "shape", ())
        if len(shape) != len(axes):
            return f"grid unknown: {name} is {list(shape)}, not {axes}"
        size = dict(zip(axes, shape, strict=True))
        f, h, w = patches(config)
        return ((size.get("F", f) // f, size["H"] // h, size["W"] // w),)

    return visual


def sizes(frames: str = "num_frames", height: str = "height", width: str = "width") -> Visual:
    """One segment: its sizes in patches are arguments of the forward."""

    def visual(_config: Config, arguments: Arguments) -> Shapes:
        found: list[Any] = [arguments.get(name) for name in (frames, height, width)]
        if any(size is None for size in found):
            return f"grid unknown: {frames}, {height} and {width} are not given"
        return ((int(found[0]), int(found[1]), int(found[2])),)

    return visual


def ids(name: str = "img_ids", *, behind_text: bool = False) -> Visual:
    """A segment for each image of a packed sequence: position ids [(B,) N, ...] tell image, row and column.

    behind_text: the ids begin with those of text; the rows of `hidden_states` are the last.
    """

    def visual(_config: Config, arguments: Arguments) -> Shapes:
        found = arguments.get(name)
        if not isinstance(found, Tensor):
            return f"grid unknown: {name} is not given"
        known = _counted.get(found)
        if known is None or known[0] != found._version:
            places = found[..., -arguments["hidden_states"].shape[1] :, :] if behind_text else found
            known = _counted[found] = (found._version, _count(places, name))
        return known[1]

    return visual


def joined(*parts: Visual, optional: tuple[str, ...] = ()) -> Visual:
    """The segments of several functions, one after the other; those whose argument is absent are left out.

    optional: for each part the argument that it needs, "" for none.
    """

    def visual(config: Config, arguments: Arguments) -> Shapes:
        found: tuple[Shape, ...] = ()
        for part, name in zip(parts, optional, strict=True):
            if name and arguments.get(name) is None:
                continue
            shapes = part(config, arguments)
            if isinstance(shapes, str):
                return shapes
            found += shapes
        return found

    return visual


def with_pictures(visual: Visual, name: str) -> Visual:
    """`visual`, and behind it a segment for each picture [B, C, H, W] of a list that may be absent."""

    def joint(config: Config, arguments: Arguments) -> Shapes:
        found = visual(config, arguments)
        if isinstance(found, str):
            return found
        _, h, w = patches(config)
        pictures: list[Tensor] = arguments.get(name) or []
        return found + tuple((1, one.shape[2] // h, one.shape[3] // w) for one in pictures)

    return joint


def stacked(config: Config, arguments: Arguments) -> Shapes:
    """A segment for each item of latents [B, items, C, F, H, W]."""
    shape = getattr(arguments.get("hidden_states"), "shape", ())
    if len(shape) != 6:
        return f"grid unknown: hidden_states is {list(shape)}, not BNCFHW"
    f, h, w = patches(config)
    return ((shape[3] // f, shape[4] // h, shape[5] // w),) * shape[1]


def _count(found: Tensor, name: str) -> Shapes:
    if found.ndim == 3:
        if found.shape[0] > 1 and not bool((found == found[:1]).all()):
            return f"batch items have different {name}"
        found = found[0]
    shapes: list[Shape] = []
    for _, run in groupby(found[:, :3].tolist(), key=lambda row: row[0]):
        places = [(row, column) for _, row, column in run]
        height, width = len({row for row, _ in places}), len({column for _, column in places})
        if height * width != len(places) or places != sorted(places):
            return f"grid unknown: {name} are no image in raster order"
        shapes.append((1, height, width))
    return tuple(shapes)


def image_shapes(config: Config, arguments: Arguments) -> Shapes:
    """A segment for each (frames, height, width) in `img_shapes`, a list of them for each batch item."""
    found = arguments.get("img_shapes")
    if not found:
        return "grid unknown: img_shapes is not given"
    items = [item if isinstance(item[0], list | tuple) else [item] for item in found]
    if any(list(map(tuple, item)) != list(map(tuple, items[0])) for item in items):
        return "batch items have different img_shapes"
    shapes: list[Shape] = [(int(f), int(h), int(w)) for f, h, w in items[0]]
    return tuple(shapes)


def only_if(condition: Callable[[Arguments], str], visual: Visual) -> Visual:
    """`visual`, unless `condition` says in words why not."""

    def guarded(config: Config, arguments: Arguments) -> Shapes:
        return condition(arguments) or visual(config, arguments)

    return guarded


def same_lengths(mask: str) -> Callable[[Arguments], str]:
    """For classes that pack each item's valid text before its image: lengths have to be the same over the batch."""

    def condition(arguments: Arguments) -> str:
        found: Any = arguments.get(mask)
        if not isinstance(found, Tensor) or found.shape[0] == 1:
            return ""
        lengths = found.bool().sum(1)
        same = bool((lengths == lengths[0]).all())
        return "" if same else "batch items have different token positions (their texts differ in length)"

    return condition


def given(name: str, reason: str) -> Callable[[Arguments], str]:
    """Not where the argument `name` is given."""
    return lambda arguments: "" if arguments.get(name) is None else reason


def spatial(visual: Visual) -> Visual:
    """Each frame by itself, as a sequence of a folded batch."""

    def folded(config: Config, arguments: Arguments) -> Shapes:
        shapes = visual(config, arguments)
        return shapes if isinstance(shapes, str) else ((1, *shapes[0][1:]),)

    return folded


def temporal(visual: Visual) -> Visual:
    """Each place of the picture by itself, over the frames, as a sequence of a folded batch."""

    def folded(config: Config, arguments: Arguments) -> Shapes:
        shapes = visual(config, arguments)
        return shapes if isinstance(shapes, str) else ((shapes[0][0], 1, 1),)

    return folded


def list_of_images(name: str) -> Visual:
    """One segment: a list, over the batch, of images [C, F, H, W]; patch sizes are the config's first, or arguments."""

    def visual(config: Config, arguments: Arguments) -> Shapes:
        found = arguments.get(name)
        if not isinstance(found, list | tuple) or not all(isinstance(one, Tensor) for one in found):
            return f"grid unknown: {name} is no list of images"
        if any(one.shape != found[0].shape for one in found):
            return "batch items have images of different sizes"
        side = arguments.get("patch_size") or config["all_patch_size"][0]
        depth = arguments.get("f_patch_size") or config["all_f_patch_size"][0]
        _, f, h, w = found[0].shape
        return ((f // depth, h // side, w // side),)

    return visual
