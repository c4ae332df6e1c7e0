"""The record of a video: everything needed to make it again, and what it cost."""

from __future__ import annotations

import hashlib
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..kernels.chip import instructions
from .generate import Generation

PACKAGES = ("ziggurat", "torch", "diffusers", "transformers")


def figures(made: Generation) -> dict[str, Any]:
    """What a run cost, by name; what was not measured is left out."""
    found = {
        "seconds": made.seconds,
        "steps": made.request.steps,
        "tokens": made.tokens,
        "density": made.density,
        "list_density": made.list_density,
        "attention_share": made.attention_share,
        "dense_seconds": made.dense_seconds,
        "psnr": made.psnr,
        "ssim": made.ssim,
        "ended_at": made.ended_at,
    }
    return {name: _rounded(value) for name, value in found.items() if value is not None}


def _rounded(value: Any) -> Any:
    """Five digits tell more than a clock does. JSON has no NaN."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def record_of(made: Generation) -> dict[str, Any]:
    """The record as it stands beside the video.

    `generate(record["model"], record["prompt"], plan=record["plan"]["path"] or "none", **record["settings"])` makes it
    again.
    """
    path = str(made.plan_path.resolve()) if made.plan_path else None
    plan = {"name": made.plan_name, "path": path, "sha256": None}
    if made.plan is not None:
        plan["sha256"] = hashlib.sha256(made.plan.to_json().encode()).hexdigest()
    settings = made.request.settings()
    # Tensors and the like, given from Python, have no place in a JSON file; that they were given is told.
    settings["arguments"] = {name: _plain(value) for name, value in settings["arguments"].items()}
    return {
        "prompt": made.request.prompt,
        "negative": made.request.negative,
        "seed": made.request.seed,
        "model": made.model,
        "pipeline": made.pipeline,
        "plan": plan,
        "settings": settings,
        "schedule": made.schedule,
        "fps": made.fps,
        "dtype": made.dtype,
        "device": made.device,
        "figures": figures(made),
        **surroundings(made.device),
    }


def surroundings(device: str = "cpu") -> dict[str, Any]:
    """The versions and the machine that a figure comes from."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            # Two that are both "AMD EPYC" may differ by a factor.
            "instructions": instructions(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        },
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | int) else f"<{type(value).__name__}>"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
