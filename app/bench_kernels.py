"""`ziggurat bench kernels`: our attention beside what else there is, on this machine."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .console import Debug, progress_bars

MORE = "May be repeated."
WIDTH = 140
SHAPES = ((8192, 128), (8192, 64), (4352, 32))
HEADINGS = ("dtype", "heads", "tokens", "head_dim", "block", "density", "backend", "ms", "SDPA ms", "Flex ms")
RATIOS = ("speed-up", "x density", "error", "MiB")


def kernels(
    dtype: Annotated[list[str] | None, typer.Option(help=MORE, show_default="float32, bfloat16")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help=MORE, show_default="8192; 4352 at head_dim 32")] = None,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    head_dim: Annotated[list[int] | None, typer.Option(help=MORE, show_default="128, 64, 32")] = None,
    tile: Annotated[int, typer.Option(min=1, help="Queries that share a list.")] = 128,
    block: Annotated[int, typer.Option(min=1, help="Keys in a block.")] = 64,
    density: Annotated[list[float] | None, typer.Option(help=MORE, show_default="0.125, 1")] = None,
    backend: Annotated[str, typer.Option(help="auto, torch, triton, flex or reference.")] = "auto",
    backward: Annotated[bool, typer.Option("--backward", help="Forward and backward together.")] = False,
    uneven: Annotated[bool, typer.Option("--uneven", help="Tiles read half to one and a half of the density.")] = False,
    flex: Annotated[bool, typer.Option("--flex", help="Time compiled FlexAttention too (half a minute more).")] = False,
    runs: Annotated[int, typer.Option(min=1, help="Paired runs; medians are told.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Last line of output: the rows as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Time block-sparse attention beside SDPA in the same run, after checking it against float64.

    Example: ziggurat bench kernels --dtype bfloat16 --tokens 8192 --head-dim 64 --density 0.125
    """
    from ..kernels import bench
    from ..pipelines.record import surroundings

    if tokens or head_dim:
        shapes = tuple((n, d) for n in tokens or (8192,) for d in head_dim or (128, 64, 32))
    else:
        shapes = SHAPES
    base = bench.Setting(
        dtype="float32",
        tokens=0,
        head_dim=0,
        heads=heads,
        tile=tile,
        block=block,
        backend=backend,
        backward=backward,
        uneven=uneven,
    )
    every = list(bench.settings(tuple(dtype or ("float32", "bfloat16")), shapes, tuple(density or (0.125, 1.0)), base))
    rows: list[dict[str, Any]] = []
    with progress_bars({"rows": "kernels"}) as report:
        for setting in every:
            rows.append(bench.measure(setting, runs=runs, flex=flex))
            report("rows", len(rows), len(every))
    _show(rows)
    if as_json:
        print(json.dumps({**surroundings(), "rows": rows}))


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADINGS, *RATIOS, caption="x density: 1 = time in proportion to the rows read, against dense SDPA")
    for row in rows:
        seconds = (row[name] for name in ("seconds", "sdpa_seconds", "flex_seconds"))
        table.add_row(
            *(str(row[name]) for name in ("dtype", "heads", "tokens", "head_dim", "block")),
            f"{row['density']:.1%}",
            row["backend"],
            *("" if each is None else f"{1000 * each:.1f}" for each in seconds),
            f"{row['speedup']:.2f}",
            f"{row['speedup_x_density']:.2f}",
            f"{row['max_error']:.1e}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        )
    # Eighty columns, which a pipe is taken to have, would cut every figure short.
    console = Console()
    Console(width=console.width if console.is_terminal else WIDTH).print(table)
