"""Pictures of the fidelity bench: error against density, and against measured time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .fidelity import Row
from .heatmap import plain_log, save


def draw(rows: Sequence[Row], path: Path, *, order: str | None = None) -> Path:
    """Write a PNG: a line of two panels per source, one curve per selector, in its best order unless one is named.

    The best order is the one of least error, chosen anew at every density.
    """
    from matplotlib.figure import Figure

    sources = list(dict.fromkeys(row.source for row in rows))
    selectors = list(dict.fromkeys(row.selector for row in rows))
    figure = Figure(figsize=(13, 4.2 * len(sources)), layout="constrained")
    panels = figure.subplots(len(sources), 2, squeeze=False)
    styles = {name: (f"C{i % 10}", "-" if i < 10 else "--") for i, name in enumerate(selectors)}
    for (left, right), source in zip(panels, sources, strict=True):
        for name in selectors:
            own = [r for r in rows if (r.source, r.selector) == (source, name) and order in (None, r.order)]
            points = sorted(_least(own), key=lambda row: row.list_density)
            if not points:
                continue
            colour, line = styles[name]
            look = {"color": colour, "linestyle": line, "marker": "o", "markersize": 3, "label": name}
            error = [row.relative_error for row in points]
            left.plot([100 * row.list_density for row in points], error, **look)
            right.plot([1000 * row.attend_seconds for row in points], error, **look)
        left.set(title=f"{source}: error against density", xlabel="list density, %", ylabel="relative error")
        right.set(title=f"{source}: error against time", xlabel="attention of one layer, ms")
        for panel in (left, right):
            panel.set(xscale="log", yscale="log")
            plain_log(panel.xaxis)
            plain_log(panel.yaxis)
            panel.grid(visible=True, which="both", alpha=0.2)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    return save(figure, path)


def _least(rows: Sequence[Row]) -> list[Row]:
    """Of rows of about one density the one of least error."""
    best: dict[int, Row] = {}
    for row in rows:
        place = round(100 * row.list_density)
        if place not in best or row.relative_error < best[place].relative_error:
            best[place] = row
    return list(best.values())
