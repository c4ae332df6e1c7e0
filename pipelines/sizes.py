"""Which sizes a pipeline can make, and the memory they need: said before any work is done."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .plans import TRANSFORMERS, Grid

_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
_SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")


@dataclass(frozen=True, kw_only=True)
class SizeRule:
    """The sizes of one pipeline: frames are k * `frame_step` + `frame_rest`, height and width multiples.

    `patch` is pixels (and frames) per latent patch; `longest` the patches that the model's positions reach on an axis.
    """

    frame_step: int
    frame_rest: int
    height_step: int
    width_step: int
    patch: Grid
    longest: int | None

    def grid(self, frames: int, height: int, width: int) -> Grid:
        """The video's (frames, height, width) in latent patches."""
        f, h, w = self.patch
        # Causal VAEs give the first frame a latent of its own.
        return (math.ceil(frames / f) if self.frame_rest else max(frames // f, 1)), height // h, width // w

    def check(self, frames: int | None, height: int | None, width: int | None) -> None:
        """Raise ValueError naming the nearest sizes that work."""
        _check_step("frames", frames, self.frame_step, self.frame_rest)
        _check_step("height", height, self.height_step)
        _check_step("width", width, self.width_step)
        if self.longest is None or frames is None or height is None or width is None:
            return
        grid = self.grid(frames, height, width)
        for name, patches, pixels in zip(("frames", "height", "width"), grid, self.patch, strict=True):
            if patches > self.longest:
                most = self.longest * pixels - (pixels - 1 if name == "frames" and self.frame_rest else 0)
                raise ValueError(
                    f"{name} makes {patches} latent patches, but this model knows positions up to {self.longest}:"
                    f" take at most {most}"
                )


def _check_step(name: str, size: int | None, step: int, rest: int = 0) -> None:
    if size is None or size % step == rest:
        return
    below = (size - rest) // step * step + rest
    near = " and ".join(str(one) for one in (below, below + step) if one >= 1)
    raise ValueError(
        f"{name} must be a multiple of {step}{f' plus {rest}' if rest else ''} for this model, got {size}:"
        f" the nearest that work are {near}"
    )


def _first_int(owner: Any, names: tuple[str, ...]) -> int:
    return next((value for name in names if isinstance(value := getattr(owner, name, None), int)), 1)


def spatial_scale(pipe: Any) -> int:
    """Pixels per latent, along height and width."""
    return _first_int(pipe, _SPATIAL)


def transformer_config(pipe: Any) -> Mapping[str, Any]:
    """The configuration of the pipeline's (first) transformer, empty without one."""
    found = (getattr(getattr(pipe, name, None), "config", None) for name in TRANSFORMERS)
    return next((config for config in found if config is not None), {})


def size_rule(pipe: Any) -> SizeRule:
    """The sizes that a pipeline takes, from its VAE's scale factors, its patch size, and its own check of inputs."""
    config = transformer_config(pipe)
    temporal, spatial = _first_int(pipe, _TEMPORAL), spatial_scale(pipe)
    patch = config.get("patch_size") or 1
    patch = (patch,) * 2 if isinstance(patch, int) else tuple(patch)
    if len(patch) == 2:
        patch = (config.get("patch_size_t") or 1, *patch)
    frames, height, width = temporal * patch[0], spatial * patch[1], spatial * patch[2]
    demanded = _demanded(pipe)
    usual = inspect.signature(pipe.__call__).parameters.get("num_frames")
    default = usual.default if usual and isinstance(usual.default, int) else 1
    return SizeRule(
        frame_step=temporal,
        frame_rest=default % temporal,
        height_step=math.lcm(height, demanded),
        width_step=math.lcm(width, demanded),
        patch=(frames, height, width),
        longest=config.get("rope_max_seq_len"),
    )


def _demanded(pipe: Any) -> int:
    """What the pipeline's own check wants height and width to be divisible by: it tells when given a size of 1."""
    check = getattr(pipe, "check_inputs", None)
    if check is None:
        return 1
    known = {"prompt": "a", "height": 1, "width": 1}
    arguments = {
        name: known.get(name)
        for name, parameter in inspect.signature(check).parameters.items()
        if name in known or parameter.default is inspect.Parameter.empty
    }
    try:
        check(**arguments)
    except (ValueError, TypeError) as error:
        found = re.search(r"divisible by `?(\d+)", str(error))
        return int(found[1]) if found else 1
    return 1


def memory_needed(pipe: Any, rule: SizeRule, frames: int, height: int, width: int, *, compare: bool) -> int:
    """Bytes that a run needs beside the weights, an estimate.

    Transformer: N tokens x (6 model dims + 2 feed-forward dims in its dtype + 2 model dims in float32).
    VAE: 12 layers of its base width at full size (caches and working copies), of 4 frames where it decodes in chunks
    and else of all.
    Pixels: the decoder's output twice in its dtype, float32 twice, uint8; a comparison holds 6 more float32 copies.
    """
    config = transformer_config(pipe)
    tokens = math.prod(rule.grid(frames, height, width))
    dims = (config.get("num_attention_heads") or 0) * (config.get("attention_head_dim") or 0)
    feed_forward = config.get("ffn_dim") or 4 * dims
    transformer = next((getattr(pipe, name, None) for name in TRANSFORMERS), None)
    item = getattr(getattr(transformer, "dtype", None), "itemsize", 2)
    total = tokens * (item * (6 * dims + 2 * feed_forward) + 8 * dims)
    vae = getattr(pipe, "vae", None)
    vae_item = getattr(getattr(vae, "dtype", None), "itemsize", 4)
    vae_config = getattr(vae, "config", {})
    channels = vae_config.get("base_dim") or (vae_config.get("block_out_channels") or (128,))[0]
    at_once = min(frames, 4) if hasattr(vae, "clear_cache") else frames
    total += 12 * channels * at_once * height * width * vae_item
    return total + 3 * frames * height * width * (2 * vae_item + 9 + 24 * compare)


def memory_free(device: Any) -> int:
    """Bytes free on a torch device: of the GPU, else of the machine."""
    import psutil
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_memory(
    pipe: Any, rule: SizeRule, frames: int, height: int, width: int, *, compare: bool = False, device: Any = None
) -> None:
    """Raise ValueError where a run would not fit, saying how much would; `device` None is the pipeline's own."""
    import torch

    device = device or getattr(pipe, "_execution_device", "cpu")
    # Without weights it runs elsewhere, and there it is asked again.
    if torch.device(device).type == "meta":
        return
    needed = memory_needed(pipe, rule, frames, height, width, compare=compare)
    free = memory_free(device)
    if needed <= free:
        return
    fits = int(frames * free / needed)
    advice = f"about {fits} frames would fit" if fits else "take a smaller height and width"
    raise ValueError(
        f"{frames} frames of {width}x{height} need about {in_bytes(needed)} of memory and"
        f" {in_bytes(free)} are free: {advice}"
    )


def in_bytes(number: float) -> str:
    """12,300,000 as "12.3 MB"."""
    power = min(int(math.log10(max(number, 1)) // 3), 5)
    return f"{number / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"
