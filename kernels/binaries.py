"""The committed table of the compiled kernels: what each binary uses on each target, held by the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .gpu_devices import DEVICES

TABLE = Path(__file__).with_name("binaries.json")
KEYS = ("kernel", "target", "head_dim", "block")
# The tensor instructions that each target's own kernels have to use.
INSTRUCTION = {
    "cuda:80": "mma_sync",
    "cuda:89": "mma_sync",
    "cuda:90": "wgmma",
    "cuda:100": "tcgen05",
    "cuda:120": "mma_sync",
    "hip:gfx942": "mfma",
}
NO_MORE = ("registers", "stack", "spills", "local", "shared", "work")
NO_LESS = ("occupancy", "async_share")


def table() -> list[dict[str, Any]]:
    """The rows of the committed table; `triton_backend.binaries.row` says what stands in them."""
    return json.loads(TABLE.read_text())["rows"]


def write_table(rows: list[dict[str, Any]], triton: str) -> None:
    """Write the table, one row a line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    fresh = TABLE.with_suffix(".tmp")
    fresh.write_text(f'{{"triton": {json.dumps(triton)}, "rows": [\n{lines}\n]}}\n')
    fresh.replace(TABLE)


def faults(row: dict[str, Any]) -> list[str]:
    """What a binary must not do on any target, whatever the table says."""
    target = row["target"]
    found = [f"{row[name]} {name}" for name in ("stack", "spills", "local") if row[name]]
    if row["shared"] > DEVICES[target].shared_block:
        found.append(f"{row['shared']} bytes of shared memory, of {DEVICES[target].shared_block}")
    if row["occupancy"] < 1:
        found.append("no block fits a processor")
    if not row[INSTRUCTION[target]]:
        found.append(f"no {INSTRUCTION[target]} in the inner loop")
    if row["work"] != 1:
        found.append(f"{row['work']} times the products that are needed")
    if target.startswith("cuda") and row["async_share"] < 1:
        found.append(f"only {row['async_share']:.0%} of the rows come by 16-byte asynchronous copies")
    return found


def worse(row: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """In what a binary is worse than its row of the committed table."""
    more = [name for name in NO_MORE if row[name] > before[name]]
    less = [name for name in NO_LESS if row[name] < before[name]]
    return [f"{name} {before[name]} → {row[name]}" for name in (*more, *less)]
