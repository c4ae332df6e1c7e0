"""A plan as something to look at: a square for each layer and head, and a table of what became of each layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape

from ...attention.expect import head_densities, mean_density
from ...attention.plan import Plan
from ...attention.tell import STOCK, in_words, layout, sizes
from ...search.heatmap import COLOURS, GREY, percent

_LINE = re.compile(r"(?:(\w+) )?layer (\d+) \(([^)]*)\): (.*)")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One head of one layer. density: of its list, to expect."""

    family: str
    detail: str
    density: float


def cells(plan: Plan) -> list[list[Cell]]:
    """What each head of each layer does: [layers][heads]."""
    densities = head_densities(plan)
    found = []
    for number, layer in enumerate(plan.layers):
        if layer.dense is not None:
            found.append([Cell(family=STOCK, detail=layer.dense, density=1.0)] * plan.heads)
            continue
        said = {
            head: (entry.selector.name, f"{in_words(entry)}; {layout(group)}")
            for group in layer.groups
            for entry in group.entries
            for head in entry.heads
        }
        found.append(
            [
                Cell(family=said[head][0], detail=said[head][1], density=densities[number][head])
                for head in range(plan.heads)
            ]
        )
    return found


def heat(plan: Plan, found: list[list[Cell]], chosen: tuple[int, int] | None) -> str:
    """The plan as a table of buttons, layers down and heads across, coloured by family, the stronger the denser."""
    head = "".join(f"<th scope='col'>{i}</th>" for i in range(plan.heads))
    rows = []
    for layer, row in enumerate(found):
        squares = "".join(_square(layer, i, cell, chosen == (layer, i)) for i, cell in enumerate(row))
        rows.append(f"<tr><th scope='row'>{layer}</th>{squares}</tr>")
    families = dict.fromkeys(cell.family for row in found for cell in row)
    legend = "".join(
        f"<span><i style='background:{COLOURS.get(name, GREY)}'></i>{_called(name)}</span>" for name in families
    )
    return (
        "<div class='zg-heat'><table aria-label='Layers down, heads across'>"
        f"<tr><th scope='col'>layer / head</th>{head}</tr>{''.join(rows)}</table></div>"
        f"<div class='zg-legend'>{legend}<span>the stronger, the denser; a number is its density in %</span></div>"
    )


def _square(layer: int, head: int, cell: Cell, pressed: bool) -> str:
    # Most lists are sparse: without the root they would all be near white.
    strength = 0.2 + 0.8 * min(cell.density, 1.0) ** 0.5
    label = f"layer {layer}, head {head}: {_called(cell.family)}, density {cell.density:.0%}"
    if cell.family == STOCK:
        colour, ink = GREY, "#1e293b"
    else:
        colour = f"color-mix(in srgb, {COLOURS[cell.family]} {strength:.0%}, var(--background-fill-primary))"
        # White on a pale square could not be read.
        ink = "#fff" if strength > 0.7 else "var(--body-text-color)"
    return (
        f"<td><button type='button' data-act='head' data-layer='{layer}' data-head='{head}' title='{escape(label)}'"
        f" aria-label='{escape(label)}' aria-pressed='{'true' if pressed else 'false'}'"
        f" style='background:{colour};color:{ink}'>{percent(cell.density)}</button></td>"
    )


def _called(family: str) -> str:
    return "stock attention" if family == STOCK else family


def head_text(cell: Cell, layer: int, head: int) -> str:
    """One head in words."""
    return (
        f"<table class='zg-table'><caption>Layer {layer}, head {head}</caption>"
        f"<tr><th scope='row'>Family</th><td>{_called(cell.family)}</td></tr>"
        f"<tr><th scope='row'>List density</th><td>{cell.density:.1%}</td></tr>"
        f"<tr><th scope='row'>How</th><td>{escape(cell.detail)}</td></tr></table>"
    )


def plan_text(plan: Plan, found: list[list[Cell]]) -> str:
    """The plan as a whole, with the figures that its file holds."""
    rows = [
        ("Name", plan.name or "unnamed"),
        ("For", f"{plan.model_class}, {len(plan.layers)} layers, {plan.heads} heads"),
    ]
    if plan.note:
        rows.append(("Note", plan.note))
    rows.append(("Made for", f"{sizes(plan.grid)} latent patches"))
    if plan.expert:
        rows.append(("Expert", f"{plan.expert} alone; the other transformer keeps stock attention"))
    density = mean_density([[cell.density for cell in row] for row in found])
    rows.append(("Density", f"{density:.1%} of its lists, to expect where it was made; dense steps not counted"))
    for title, figures in (("Predicted", plan.predicted), ("Measured", plan.measured)):
        if figures:
            rows.append((title, ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())))
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
