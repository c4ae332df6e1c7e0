"""`ziggurat kernels`: what the compiled GPU kernels use."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .console import Debug

COLUMNS = (
    *("kernel", "target", "tile", "block", "group", "head_dim", "warps", "stages", "registers", "stack", "shared"),
    *("occupancy", "wgmma", "tcgen05", "mma_sync", "mfma", "async_copies", "wide_loads"),
)


def kernels(
    as_json: Annotated[bool, typer.Option("--json", help="Last line of output: the table as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show what the GPU kernels' binaries use on each target: the table that the tests hold them to.

    Example: ziggurat kernels --json
    """
    from rich.console import Console
    from rich.table import Table

    from ..kernels.binaries import table

    rows = table()
    shown = Table(title="bfloat16, lists of 128 queries a tile; the counts are of the mask-free loop")
    for name in COLUMNS:
        shown.add_column(name, justify="left" if name in ("kernel", "target") else "right", overflow="fold")
    for row in rows:
        shown.add_row(*(str(row[name]) for name in COLUMNS))
    console = Console()
    console.print(shown) if console.is_terminal else Console(width=200).print(shown)
    if as_json:
        print(json.dumps({"rows": rows}))
