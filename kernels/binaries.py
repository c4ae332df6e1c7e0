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
# How rows come in, 16 bytes a thread: by asynchronous copies to shared memory where there are any. gfx942's go no
# wider than 4 bytes, so that rows come there by loads to registers.
COPIES = {target: "wide_loads" if target == "hip:gfx942" else "async_copies" for target in INSTRUCTION}
NO_MORE = ("registers", "stack", "spills", "local", "shared", "work")
NO_LESS = ("occupancy", "wide_share")


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
    if row["wide_share"] != 1:
        found.append(f"{row['wide_share']:.0%} of the rows come by 16-byte {COPIES[target].replace('_', ' ')}")
    return found


def worse(row: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """In what a binary is worse than its row of the committed table."""
    more = [name for name in NO_MORE if row[name] > before[name]]
    less = [name for name in NO_LESS if row[name] < before[name]]
    return [f"{name} {before[name]} → {row[name]}" for name in (*more, *less)]
