"""A plan as something to look at: a square for each layer and head, and a table of what became of each layer."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from html import escape
from typing import Any

import torch

from ...attention.grid import TokenGrid
from ...attention.plan import HeadGroup, HeadPlan, Plan
from ...attention.rest import pool_rest
from ...attention.rows import lay_out
from ...attention.select import DynamicSelector
from ...kernels.pyramid import build_pyramid

COLOURS = {
    "dense": "#64748b",
    "window": "#0f766e",
    "stripe": "#4f46e5",
    "skip": "#b45309",
    "topk": "#be185d",
    "precise": "#7e22ce",
    "loglinear": "#1d4ed8",
    "pyramid": "#15803d",
}
_LINE = re.compile(r"(?:(\w+) )?layer (\d+) \(([^)]*)\): (.*)")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One head of one layer. density: of its list; None where that depends on what the head is given."""

    family: str
    detail: str
    density: float | None
    group: HeadGroup | None = None
    entry: HeadPlan | None = None


def cells(plan: Plan) -> list[list[Cell]]:
    """What each head of each layer does: [layers][heads]."""
    found = []
    for layer in plan.layers:
        if layer.dense is not None:
            found.append([Cell(family="dense", detail=layer.dense, density=1.0)] * plan.heads)
            continue
        row: dict[int, Cell] = {}
        for group in layer.groups:
            for entry in group.entries:
                # Frozen models of pydantic can be hashed, which their types do not tell.
                key: Any = (group, entry, plan.grid)
                cell = Cell(
                    family=entry.selector.name,
                    detail=_detail(group, entry),
                    density=_density(*key),
                    group=group,
                    entry=entry,
                )
                row |= dict.fromkeys(entry.heads, cell)
        found.append([row[head] for head in range(plan.heads)])
    return found


def _detail(group: HeadGroup, entry: HeadPlan) -> str:
    given = entry.selector.model_dump(exclude_defaults=True, exclude={"name"}, mode="json")
    settings = ", ".join(f"{name} {value}" for name, value in given.items())
    rest = f"the rest {'read pooled' if entry.pooled else 'dropped'}" if entry.selector.name != "dense" else ""
    order = group.order.model_dump(mode="json")
    parts = [settings, rest, f"{order} order", f"tile {group.tile}, block {group.block}"]
    if entry.correction != "none":
        parts.append(f"correction {entry.correction}")
    return "; ".join(part for part in parts if part)


@functools.lru_cache(maxsize=512)
def _density(group: HeadGroup, entry: HeadPlan, grid: tuple[int, int, int]) -> float | None:
    if isinstance(entry.selector, DynamicSelector):
        return None
    layout = lay_out(TokenGrid.video(*grid), group.order, tile=group.tile, block=group.block)
    factors = group.levels(layout.blocks * layout.block)
    blocks = entry.selector.select(None, None, layout, None)
    if entry.pooled:
        blocks = pool_rest(blocks, layout, factors=factors)
    # Only the number of rows matters here, not what they hold.
    empty = torch.zeros(1, 1, layout.grid.tokens, 1)
    return blocks.density(build_pyramid(empty, empty, layout.key_rows, block=group.block, factors=factors))


def heat(plan: Plan, found: list[list[Cell]], chosen: tuple[int, int] | None) -> str:
    """The plan as a table of buttons, layers down and heads across, coloured by family, the stronger the denser."""
    head = "".join(f"<th scope='col'>{i}</th>" for i in range(plan.heads))
    rows = []
    for layer, row in enumerate(found):
        squares = "".join(_square(layer, i, cell, chosen == (layer, i)) for i, cell in enumerate(row))
        rows.append(f"<tr><th scope='row'>{layer}</th>{squares}</tr>")
    families = dict.fromkeys(cell.family for row in found for cell in row)
    legend = "".join(f"<span><i style='background:{COLOURS[name]}'></i>{name}</span>" for name in families)
    return (
        "<div class='zg-heat'><table aria-label='Layers down, heads across'>"
        f"<tr><th scope='col'>layer / head</th>{head}</tr>{''.join(rows)}</table></div>"
        f"<div class='zg-legend'>{legend}<span>the stronger, the denser; a number is its density in %</span></div>"
    )


def _square(layer: int, head: int, cell: Cell, pressed: bool) -> str:
    strength = 0.55 if cell.density is None else 0.35 + 0.65 * min(cell.density, 1.0) ** 0.5
    face = "&middot;" if cell.density is None else f"{100 * cell.density:.0f}"
    label = f"layer {layer}, head {head}: {cell.family}, " + (
        "density depends on the content" if cell.density is None else f"density {cell.density:.0%}"
    )
    colour = f"color-mix(in srgb, {COLOURS[cell.family]} {strength:.0%}, var(--background-fill-primary))"
    # White on a pale square could not be read.
    ink = "#fff" if strength > 0.7 else "var(--body-text-color)"
    return (
        f"<td><button type='button' data-act='head' data-layer='{layer}' data-head='{head}' title='{escape(label)}'"
        f" aria-label='{escape(label)}' aria-pressed='{'true' if pressed else 'false'}'"
        f" style='background:{colour};color:{ink}'>{face}</button></td>"
    )


def head_text(cell: Cell, layer: int, head: int) -> str:
    """One head in words."""
    density = "depends on the content" if cell.density is None else f"{cell.density:.1%}"
    return (
        f"<table class='zg-table'><caption>Layer {layer}, head {head}</caption>"
        f"<tr><th scope='row'>Family</th><td>{cell.family}</td></tr>"
        f"<tr><th scope='row'>List density</th><td>{density}</td></tr>"
        f"<tr><th scope='row'>How</th><td>{escape(cell.detail)}</td></tr></table>"
    )


def plan_text(plan: Plan) -> str:
    """The plan as a whole, with the figures that its file holds."""
    rows = [
        ("Name", plan.name or "unnamed"),
        ("For", f"{plan.model_class}, {len(plan.layers)} layers, {plan.heads} heads"),
    ]
    if plan.note:
        rows.append(("Note", plan.note))
    rows.append(("Made for", f"{'x'.join(map(str, plan.grid))} latent patches"))
    for title, figures in (("Predicted", plan.predicted), ("Measured", plan.measured)):
        if figures:
            rows.append((title, ", ".join(f"{name} {value:.4g}" for name, value in figures.items())))
    body = "".join(f"<tr><th scope='row'>{name}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table class='zg-table'><caption>The plan</caption>{body}</table>"


def summary_table(summary: str, of: str) -> str:
    """`Handle.summary()` as a table: a row for each layer, dense ones with their reason."""
    first, *lines = summary.splitlines() or [""]
    rows, notes = [], [first.partition(": ")[2] or first]
    for line in lines:
        if found := _LINE.match(line):
            part, layer, path, said = found.groups()
            name = f"{part} {layer}" if part else layer
            rows.append(
                f"<tr><th scope='row'>{name}</th><td><code>{escape(path)}</code></td><td>{escape(said)}</td></tr>"
            )
        else:
            notes.append(line)
    return (
        f"<table class='zg-table'><caption>{escape(of)}: {escape('; '.join(notes))}</caption>"
        f"<tr><th scope='col'>Layer</th><th scope='col'>Module</th><th scope='col'>What became of it</th></tr>"
        f"{''.join(rows)}</table>"
    )


def unrun_table(plan: Plan, found: list[list[Cell]]) -> str:
    """The layers of a plan that has not run here: what each is to do, dense ones with their reason."""
    rows = []
    for layer, row in enumerate(found):
        families = ", ".join(dict.fromkeys(cell.family for cell in row))
        reason = plan.layers[layer].dense
        said = f"dense: {reason}" if reason is not None else families
        rows.append(f"<tr><th scope='row'>{layer}</th><td>{escape(said)}</td></tr>")
    return (
        "<table class='zg-table'><caption>The layers (this plan has not run here yet)</caption>"
        f"<tr><th scope='col'>Layer</th><th scope='col'>What it is to do</th></tr>{''.join(rows)}</table>"
    )
