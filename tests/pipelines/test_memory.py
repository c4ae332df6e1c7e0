"""Freed memory stays with the process: what takes it again finds its pages there."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ziggurat.pipelines import load, loading

COUNT = """
import json, resource, sys
import torch
from ziggurat.pipelines.memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def used():
    for _ in range(3):
        parts = [torch.ones(10_000_000) for _ in range(3)]
        del parts

for _ in range(4):
    used()
before = faults()
used()
print(json.dumps([kept, faults() - before]))
"""


def counted(how: str, **environment: str) -> tuple[bool | None, int]:
    """What the call returned, and how many pages nine tensors of 40 MB found missing after as many before."""
    # Whatever malloc is told where the tests run is not what they are about.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, how],
        env={**own, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, missing = json.loads(done.stdout)
    return kept, missing


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_what_is_freed_is_taken_again():
    pages = 9 * 40_000_000 // os.sysconf("SC_PAGE_SIZE")
    _, missing = counted("leave")
    assert missing > pages / 2
    kept, missing = counted("keep")
    assert kept
    assert missing < pages / 50
    # Whoever has set malloc in the environment keeps what is set.
    assert counted("keep", MALLOC_TOP_PAD_="131072")[0] is False


def test_loading_to_a_cpu_keeps_it(wan_folder: Path, monkeypatch: pytest.MonkeyPatch):
    kept: list[bool] = []
    monkeypatch.setattr(loading, "keep_freed_memory", lambda: kept.append(True))
    load(wan_folder, device="cpu")
    assert kept == [True]
    load(wan_folder, device="meta")
    assert kept == [True]
