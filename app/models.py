"""`ziggurat models`: which transformers a plan can run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .console import Debug, note, quiet_libraries


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Last line of output: the table as JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/models.md instead.")] = False,
    probe: Annotated[
        Path | None,
        typer.Option(help="Find where the tokens of this pipeline's transformer stand.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """The transformers of diffusers that a plan can run on, and what of them it does not reach.

    Example: ziggurat models --json
    """
    if probe is not None:
        _probe(probe, as_json)
        return
    from ..pipelines.catalogue import page, rows

    if markdown:
        print(page(), end="")
        return
    table = rows()
    width = max(len(row["class"]) for row in table)
    for row in table:
        order = f" ({row['order']})" if row["order"] else ""
        why = f": {row['why']}" if row["why"] else ""
        print(f"{row['kind']:6} {row['class']:{width}}  {row['status']}{order}{why}")
    if as_json:
        print(json.dumps({"rows": table}))


def _probe(folder: Path, as_json: bool) -> None:
    quiet_libraries()
    from ..pipelines.models import MODELS
    from ..pipelines.probe import probe_folder

    found = probe_folder(folder)
    for one in found:
        for finding in one.findings:
            tokens = ", ".join(f"{count} {name}" for name, count in finding.order) or "not visual self-attention"
            grid = f", grid {'x'.join(map(str, finding.grid))}" if finding.grid else ""
            folded = f", {finding.folded} sequences a batch item" if finding.folded > 1 else ""
            mask = f", mask {list(finding.mask)}" if finding.mask else ""
            print(f"{finding.paths:48} {tokens}{grid}{folded}{mask}")
        print(one.row)
        if one.model in MODELS:
            note(f"the table has a row for {one.model} already")
    if as_json:
        print(json.dumps({"rows": [{"class": one.model, "axes": one.axes, "row": one.row} for one in found]}))
