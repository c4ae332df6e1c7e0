"""A VAE's convolutions on a CPU, all by oneDNN: PyTorch gives it only some."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def through_onednn(vae: nn.Module) -> None:
    """Let `vae`, in place, run its 3-D convolutions on a CPU by oneDNN, in float32 if the chip has nothing narrower.

    Of a single video with few channels PyTorch gives float32 convolutions to a loop of its own, which takes 3 to 15
    times as long; and without instructions for bfloat16 or float16 all of those, which take 40 times as long. Results
    differ by rounding alone.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for module in vae.modules():
        if isinstance(module, nn.Conv3d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            # Subclasses pad in ways of their own first, then come here.
            module._conv_forward = MethodType(_forward, module)


def _forward(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    ours = x.device.type == "cpu" and x.dtype != torch.float64 and x.dim() == 5
    # Autocast would choose the dtype, and a compiler the kernel.
    if not ours or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return nn.Conv3d._conv_forward(module, x, weight, bias)
    dtype = x.dtype if _has(x.dtype) else torch.float32
    bias = None if bias is None else bias.to(dtype)
    sizes = (module.padding, module.stride, module.dilation, module.groups)
    return torch.mkldnn_convolution(x.to(dtype), weight.to(dtype), bias, *sizes).to(x.dtype)


def _has(dtype: torch.dtype) -> bool:
    """Does oneDNN compute in `dtype` on this chip?"""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_fp16_supported()
