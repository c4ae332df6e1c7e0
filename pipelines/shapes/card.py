"""The embedded model's card: how it was trained, and what it scores."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .scenes import GRAMMAR, held_out_scenes

SCORE = "## Score"

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# shapes

A miniature of Wan: `WanPipeline.from_pretrained` loads it with no code of ours, and it makes videos of moving shapes.

    {grammar}

It was trained by `ziggurat train shapes` on clips rendered on the fly, {begun}, in these stages:

{recipe}

{held_out} of the 540 single-object captions were never shown to it.
"""


def card(recipe: Sequence[str], start: Path | None) -> str:
    """The card of a newly trained model. recipe: a line for each stage; start: the checkpoint it went on from."""
    before = recipe_of(start) if start is not None else []
    begun = "from nothing" if before or start is None else f"going on from {start.name}, whose card tells no stages"
    lines = "\n".join(f"- {line}" for line in [*before, *recipe])
    return CARD.format(recipe=lines, begun=begun, grammar=GRAMMAR, held_out=len(held_out_scenes()))


def write_score(model: Path, result: dict[str, Any]) -> None:
    """Put what `evaluate` found into the card in folder `model`, in place of an older score."""
    path = model / "README.md"
    text = path.read_text() if path.exists() else ""
    part = path.with_suffix(".part")
    part.write_text(f"{text.partition(SCORE)[0].rstrip()}\n\n{SCORE}\n\n{_score(result)}\n")
    os.replace(part, path)


def _score(result: dict[str, Any]) -> str:
    dense = "dense by our own kernel" if result.get("dense_by") == "own" else "dense"
    lines = [
        f"{result['captions']} held-out captions, {result['steps']} steps, guidance {result['guidance']:g}, "
        f"{result['dtype']}, {dense}; shares of videos that are right, with Wilson 95 % intervals.",
        "",
        "| right in | share | interval |",
        "|---|---|---|",
    ]
    for name, share in result["dense"].items():
        named = {"all": "all attributes", "without_faults": "no fault in motion or form"}.get(name, name)
        lines.append(f"| {named} | {share['share']:.1%} | {share['low']:.1%} to {share['high']:.1%} |")
    return "\n".join(lines)


def recipe_of(start: Path) -> list[str]:
    """The stages that a checkpoint's own card tells."""
    path = start / "README.md"
    told = path.read_text().partition(SCORE)[0] if path.exists() else ""
    return [line.removeprefix("- ") for line in told.splitlines() if line.startswith("- ")]
