"""What this machine has beside its devices: versions, memory, ffmpeg, and the optional parts of Ziggurat."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

EXTRAS = {
    "app": (("gradio",), "the app in a browser"),
    "batch": (("ray",), "batches over a Ray cluster"),
    "gpu": (("triton",), "the kernels for GPUs"),
}
"""Extras of the package: the modules that they bring, and what for."""


def versions() -> dict[str, str | None]:
    """Of Ziggurat first, then of Python and what decides a video; None for what is not installed."""
    from ..pipelines.record import surroundings

    found = surroundings()["versions"]
    return {"ziggurat": found["ziggurat"], **found}


def version_lines() -> list[str]:
    """The versions, and each device with the kernel backend that `auto` takes there."""
    from ..kernels import selftest

    lines = [f"{name:12} {number or 'missing'}" for name, number in versions().items()]
    for device in map(selftest.describe, selftest.devices()):
        lines.append(f"{device['device']:12} {device['name']}, kernel backend {device['auto']}")
    return lines


def machine() -> dict[str, Any]:
    """Memory in bytes, ffmpeg's path, and for each extra what to do to get it, "" where it is there."""
    import psutil

    from ..pipelines.media import ffmpeg

    try:
        path, lack = ffmpeg(), ""
    except ValueError as error:
        path, lack = None, str(error)
    memory = psutil.virtual_memory()
    lacking = {
        name: "" if all(map(find_spec, modules)) else f"pip install 'ziggurat[{name}]' ({purpose})"
        for name, (modules, purpose) in EXTRAS.items()
        if name != "gpu" or sys.platform == "linux"
    }
    return {
        "memory": {"total": memory.total, "free": memory.available},
        "ffmpeg": {"path": path, "lacks": lack},
        "extras": lacking,
    }


def machine_lines(found: dict[str, Any]) -> list[str]:
    """`machine` for people."""
    from ..pipelines.sizes import in_bytes

    memory, tool = found["memory"], found["ffmpeg"]
    return [
        f"memory: {in_bytes(memory['total'])}, {in_bytes(memory['free'])} free",
        f"ffmpeg: {tool['path'] or tool['lacks']}",
        *(f"extra {name}: {lack or 'installed'}" for name, lack in found["extras"].items()),
    ]
