"""A video while it emerges: the finished latents guessed from two steps, and decoded small."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .sizes import spatial_scale

SMALL = 256


def finished_estimate(scheduler: Any, before: Tensor, after: Tensor, step: int) -> Tensor | None:
    """The latents that a straight line through two steps reaches where no noise is left.

    before, after: latents at noise levels `sigmas[step - 1]` and `sigmas[step]`. Flow matching moves along such lines;
    None for schedulers that do not, whose noise levels go beyond 1.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or step >= len(sigmas) or before.shape != after.shape or float(max(sigmas)) > 1.001:
        return None
    high, low = float(sigmas[step - 1]), float(sigmas[step])
    if high <= low:
        return None
    return after.float() - low * (after.float() - before.float()) / (low - high)


@torch.no_grad()
def preview_frames(pipe: Any, latents: Tensor) -> np.ndarray | None:
    """Latents decoded at half of their size (a quarter beyond 256 pixels), uint8 [frames, height, width, 3].

    They are averaged over space first, so that it costs a quarter or less of decoding the video. None for pipelines
    whose latents are packed into a sequence, or that decode with anything but a VAE of three colours.
    """
    vae = getattr(pipe, "vae", None)
    if vae is None or latents.ndim not in (4, 5) or not hasattr(vae, "decode"):
        return None
    small = latents[:1].float()
    factor = 2 if max(small.shape[-2:]) * spatial_scale(pipe) <= SMALL else 4
    if factor <= min(small.shape[-2:]):
        small = functional.avg_pool2d(small.flatten(0, -4), factor).reshape(
            *small.shape[:-2], small.shape[-2] // factor, small.shape[-1] // factor
        )
    images = vae.decode(_raw(vae.config, small).to(vae.dtype), return_dict=False)[0][0]
    if images.shape[0] != 3:
        return None
    frames = images if images.ndim == 4 else images[:, None]
    shown = (frames.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).cpu().numpy()
    return (shown * 255).round().astype(np.uint8)


def _raw(config: Any, latents: Tensor) -> Tensor:
    """Latents as the VAE wrote them, before the pipeline scaled them."""
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and deviation is not None:
        shape = (1, -1, *(1,) * (latents.ndim - 2))
        return latents * latents.new_tensor(deviation).view(shape) + latents.new_tensor(mean).view(shape)
    return latents / (config.get("scaling_factor") or 1.0) + (config.get("shift_factor") or 0.0)
