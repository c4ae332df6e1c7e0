"""What this machine has for attention, and whether it computes rightly here."""

from __future__ import annotations

import time
from typing import Any

import torch

from . import native_build
from .attend import attend
from .backends import NAMES, choose, has_triton
from .cases import Case, build
from .chip import has_bfloat16
from .pyramid import build_pyramid


def devices() -> list[torch.device]:
    """The CPU and every GPU that PyTorch sees."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def describe(device: torch.device) -> dict[str, Any]:
    """A device: its name, whether it has bfloat16 instructions, which backend `auto` takes there, and why."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, bf16 = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB", properties.major >= 8
    else:
        name, bf16 = torch.backends.cpu.get_cpu_capability(), has_bfloat16()
    backend, why = choose(device)
    if device.type == "cpu":
        why += "".join(f"; {_cpp(dtype, device)}" for dtype in (torch.float32, torch.bfloat16))
    return {"device": str(device), "name": name, "bf16": bf16, "auto": backend, "why": why}


def _cpp(dtype: torch.dtype, device: torch.device) -> str:
    name, lacking = str(dtype).removeprefix("torch."), native_build.lacking(dtype, device)
    return f"{name} by C++ kernels" if lacking is None else f"{name} by PyTorch's kernels, since {lacking}"


def backends() -> dict[str, str]:
    """Each backend, and what it lacks here; "" if nothing."""
    lacking: dict[str, str] = dict.fromkeys(NAMES, "")
    if not has_triton():
        lacking["triton"] = "the package triton is not installed: pip install 'ziggurat[gpu]'"
    elif not torch.cuda.is_available():
        lacking["triton"] = "there is no GPU"
    return lacking


def self_test(device: torch.device) -> dict[str, Any]:
    """A small ragged sparse problem on the device by `auto`, forward and backward, against the float64 reference.

    error: the largest of the relative errors of output and gradients. passed: whether that is float32's.
    """
    begin = time.perf_counter()
    problem = build(Case(lists="masked", tokens=203, head_dim=64, factors=(1, 4), batch=1, heads=2), torch.float32)
    results = []
    for dtype, place, backend in ((torch.float64, "cpu", "reference"), (torch.float32, device, "auto")):
        tensors = [t.to(place, dtype).requires_grad_() for t in (problem.query, problem.key, problem.value)]
        pyramid = build_pyramid(tensors[1], tensors[2], block=problem.case.block, factors=problem.case.factors)
        out, _ = attend(tensors[0], pyramid, problem.blocks.to(torch.device(place)), backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    errors = [float((b.detach().cpu() - a.detach()).norm() / a.detach().norm()) for a, b in zip(*results, strict=True)]
    # Products of float32 by three of tf32 are off by 1e-6, by one, where PyTorch is set to it, by 1e-3.
    limit = 1e-5 if torch.get_float32_matmul_precision() == "highest" else 1e-2
    passed = max(errors) <= limit
    return {"device": str(device), "error": max(errors), "passed": passed, "seconds": time.perf_counter() - begin}
