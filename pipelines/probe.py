"""Where a transformer's visual tokens stand, found by feeding it NaN: for classes without a row, and for testing rows.

Attention is replaced by an operation that mixes no tokens, so what one voxel of the latents touches stays that voxel's
row through all layers, and the rows of queries and keys that turn NaN tell where it stands.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call
from .hook import Gates, clear_slot
from .modules import attention_modules
from .ulysses import Share


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """One attention call: rows that hold NaN, bool [B, N], and whether it had a mask."""

    path: str
    query: Tensor
    key: Tensor
    mask: tuple[int, ...] | None


class _Unmixed:
    """A router that answers each call without attention."""

    def __init__(self, paths: list[str]):
        self.paths = paths
        self.seen: list[Sighting] = []

    def dense(self, index: int, query: Tensor, stock: Callable[[], Tensor], *, token_dim: int) -> None:
        return None

    def route(self, index: int, call: Call, stock: Callable[[], Tensor], *, token_dim: int) -> Tensor:
        query, key, value = call.query, call.key, call.value
        mask = None if call.mask is None else tuple(call.mask.shape)
        rows = [tensor.isnan().any(-1).any(1) for tensor in (query, key)]
        self.seen.append(Sighting(path=self.paths[index], query=rows[0], key=rows[1], mask=mask))
        out = value if query.shape == value.shape else query.new_zeros((*query.shape[:-1], value.shape[-1]))
        return out.transpose(1, 2) if token_dim == 1 else out

    def deal(self, index: int, heads: int, share: Share) -> list[int]:
        return list(range(heads))


def sightings(transformer: nn.Module, arguments: Mapping[str, Any]) -> list[Sighting]:
    """The attention calls of one forward, without any attention, in the order they came."""
    modules = attention_modules(transformer)
    router = _Unmixed(list(modules))
    gates = Gates(router, modules.values())
    try:
        with torch.no_grad():
            transformer(**arguments)
    finally:
        gates.remove()
        clear_slot()
    return router.seen


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the attention of one kind of path is: `{}` in `paths` stands for a block's number.

    order: ("text", 7), ("visual", 72) and so on, "visual" being rows that the latents reach; () where queries and keys
    are not one sequence that holds any. grid: extents along the dimensions of the latents that tell rows apart, in
    their order. folded: how many sequences each batch item is cut into. raster: the rows are in the order of the grid.
    """

    paths: str
    order: tuple[tuple[str, int], ...]
    grid: tuple[int, ...]
    folded: int
    raster: bool
    mask: tuple[int, ...] | None

    @property
    def visual(self) -> bool:
        """Self-attention among visual rows, with or without others."""
        return any(name == "visual" for name, _ in self.order)


@dataclass(frozen=True, kw_only=True)
class Probed:
    """The attention of a transformer; axes: what each dimension of its latents is, of B, C, F, H, W, N.

    noise: the unit of the timestep, as in `ModelRow`, if the forward was a run's first.
    """

    model: str
    latents: str
    axes: str
    timestep: str
    noise: str
    names: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def row(self) -> str:
        """The row to add to the table, as Python; a comment where a person has to look."""
        found = [finding for finding in self.findings if finding.visual]
        if not found:
            return f"# {self.model} has no visual softmax self-attention that diffusers' attention modules show"
        first = max(found, key=lambda finding: sum(count for _, count in finding.order))
        order = tuple(name for name, _ in first.order)
        dense = "|".join(re.escape(one.paths).replace(r"\{\}", r"\d+") for one in self.findings if not one.visual)
        video = "F" in self.axes or "num_frames" in self.names
        parts = [f'model="{self.model}"', f'kind="{"video" if video else "image"}"']
        named = ", ".join(f'"{name}"' for name in order)
        tokens = f"visual={self._visual()}" + (f", order=({named})" if len(order) > 1 else "")
        parts.append(f"tokens=Tokens({tokens})")
        if dense:
            parts.append(f'dense=r"{dense}"')
        if self.timestep not in ("timestep", ""):
            parts.append(f'timestep="{self.timestep}"')
        if self.noise != "training steps":
            parts.append(f'noise="{self.noise}"')
        lines = [f"ModelRow({', '.join(parts)})"]
        if "encoder_hidden_states" not in self.names:
            lines.append("# no encoder_hidden_states: name the argument that holds the text in `text`")
        lines += [
            f"# {one.paths}: {one.order}, another sequence: give it in `elsewhere`"
            for one in found
            if tuple(name for name, _ in one.order) != order or one.folded > 1
        ]
        lines += [f"# {one.paths}: tokens are not in raster order" for one in found if not one.raster]
        lines += [
            f"# {one.paths} has a mask {list(one.mask)}: only key masks, and those of mask='shared', are honoured"
            for one in found
            if one.mask and one.mask[-2] > 1
        ]
        return "\n".join(lines)

    def _visual(self) -> str:
        if "N" not in self.axes:
            name = "" if self.latents == "hidden_states" else f', "{self.latents}"'
            return f'latents("{self.axes}"{name})'
        known = {"img_shapes": "image_shapes", "img_ids": "ids()", "num_frames": "sizes()"}
        return next((call for name, call in known.items() if name in self.names), "...")


def probe(transformer: nn.Module, arguments: Mapping[str, Any], *, latents: str | None = None) -> Probed:
    """Where the tokens of a transformer stand, told by forwards with NaN in parts of its latents.

    arguments: of a forward, by name. latents: the name of the tensor to poison, by default the first of them all.
    Raises ValueError where there is no such tensor, or the transformer has no attention module of diffusers.
    """
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()]
    name = latents or next(iter(tensors), "")
    if name not in tensors:
        raise ValueError(f"latents must name a floating-point tensor among the arguments ({', '.join(tensors)})")
    if not attention_modules(transformer):
        raise ValueError(f"{type(transformer).__name__} has no attention module of diffusers: nothing can be probed")
    given: Tensor = arguments[name]

    def seen(marked: Tensor) -> list[Sighting]:
        return sightings(transformer, {**arguments, name: given.masked_fill(marked, float("nan"))})

    whole = seen(torch.ones((), dtype=torch.bool))
    # For each call, dimension and bit of an index: which rows feel the slices that have the bit, and which the others.
    felt: list[list[list[tuple[Tensor, Tensor]]]] = [[] for _ in whole]
    for dim in range(1, given.ndim):
        index = torch.arange(given.shape[dim]).view(-1, *[1] * (given.ndim - dim - 1))
        bits = [(seen(index >> bit & 1 == 1), seen(index >> bit & 1 == 0)) for bit in range(_bits(given.shape[dim]))]
        for call, ranges in enumerate(felt):
            ranges.append([(ones[call].query, zeros[call].query) for ones, zeros in bits])
    axes, findings = "", {}
    for sighting, ranges in zip(whole, felt, strict=True):
        finding, letters = _find(sighting, ranges, given.shape)
        axes = max(axes, letters, key=len)
        findings.setdefault((finding.paths, finding.order), finding)
    return Probed(
        model=type(transformer).__name__,
        latents=name,
        axes=axes,
        **_noise(arguments),
        names=tuple(arguments),
        findings=tuple(findings.values()),
    )


def _noise(arguments: Mapping[str, Any]) -> dict[str, str]:
    """The name of the timestep among the arguments of a run's first forward, and its unit: the noise is full then."""
    name = next((name for name in ("timestep", "timesteps", "t") if arguments.get(name) is not None), "")
    value = float(torch.as_tensor(arguments.get(name, 1000)).float().max())
    return {"timestep": name, "noise": "training steps" if value > 1 else "fraction" if value > 0.5 else "1 - fraction"}


def _bits(size: int) -> int:
    return max(size - 1, 0).bit_length()


def _find(sighting: Sighting, ranges: list[list[tuple[Tensor, Tensor]]], shape: torch.Size) -> tuple[Finding, str]:
    paths = re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", sighting.path)
    one = sighting.query.shape == sighting.key.shape and bool((sighting.query & sighting.key).any())
    if not one:
        return Finding(paths=paths, order=(), grid=(), folded=1, raster=True, mask=sighting.mask), ""
    visual = sighting.query[0]
    order = tuple(("visual" if on else "text", len(list(run))) for on, run in groupby(visual.tolist()))
    columns, letters = [], "B"
    for bits in ranges:
        place = torch.zeros(int(visual.sum()), dtype=torch.long)
        for bit, (ones, zeros) in enumerate(bits):
            # A bit that both halves are felt through lies within a patch, or the dimension holds channels.
            place += (ones[0, visual] & ~zeros[0, visual]).long() << bit
        columns.append(place)
        letters += "C" if len(bits) and int(place.max()) == 0 else "?"
    placing = [column for column in columns if int(column.max()) > 0]
    grid = tuple(len(column.unique()) for column in placing)
    rows = torch.stack(placing, 1).tolist() if placing else []
    names = {1: "N", 2: "HW", 3: "FHW"}.get(letters.count("?"), "?" * letters.count("?"))
    for letter in names:
        letters = letters.replace("?", letter, 1)
    folded = sighting.query.shape[0] // shape[0]
    raster = rows == sorted(rows) and math.prod(grid) == len(rows)
    return Finding(paths=paths, order=order, grid=grid, folded=folded, raster=raster, mask=sighting.mask), letters


class _Caught(BaseException):
    """Carries the arguments of a transformer's first forward out of its pipeline."""


def probe_folder(folder: str | Path) -> list[Probed]:
    """Probe the transformers of a pipeline in a folder, with the arguments that the pipeline itself gives them.

    Raises ValueError for a folder that holds no pipeline, or one whose pipeline needs more than a sentence and a
    picture to reach its transformer.
    """
    from .loading import load
    from .plans import transformers_of

    pipe: Any = load(folder, dtype="fp32", device="cpu")
    name, transformer = next(iter(transformers_of(pipe).items()))
    arguments = _first_arguments(pipe, name, transformer)
    # Experts are of one class, and told once.
    return list(dict.fromkeys(probe(module, arguments) for module in transformers_of(pipe).values()))


def _first_arguments(pipe: Any, name: str, transformer: nn.Module) -> dict[str, Any]:
    from PIL import Image

    from .sizes import size_rule

    caught: dict[str, Any] = {}

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        caught.update({**dict(zip(names, args, strict=False)), **kwargs})
        raise _Caught

    rule = size_rule(pipe)
    usual = {
        "prompt": "a",
        "height": 4 * rule.height_step,
        "width": 6 * rule.width_step,
        "num_frames": 2 * rule.frame_step + rule.frame_rest,
        "num_inference_steps": 2,
        "output_type": "latent",
        "image": Image.new("RGB", (6 * rule.width_step, 4 * rule.height_step)),
    }
    parameters = inspect.signature(pipe.__call__).parameters
    if "image" in parameters and parameters["image"].default is not inspect.Parameter.empty:
        del usual["image"]
    hook = transformer.register_forward_pre_hook(catch, with_kwargs=True)
    shown = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**shown, "disable": True})
    try:
        pipe(**{argument: value for argument, value in usual.items() if argument in parameters})
    except _Caught:
        return caught
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{type(pipe).__name__} did not reach its {name} with a sentence alone ({error}):"
            " call ziggurat.pipelines.probe.probe with the arguments of a forward"
        ) from error
    finally:
        hook.remove()
        pipe.set_progress_bar_config(**shown)
    raise ValueError(f"{type(pipe).__name__} ended without calling its {name}: nothing can be probed")
