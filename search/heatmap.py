"""What a plan's heads do, and what one of them reads: the two pictures that everything shows, and how they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..attention.expect import head_densities
from ..attention.plan import Plan
from ..attention.tell import STOCK, families
from ..pipelines.media import whole

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = {
    "dense": "#475569",
    "window": "#0f766e",
    "stripe": "#4f46e5",
    "skip": "#b45309",
    "topk": "#be185d",
    "precise": "#7e22ce",
    "loglinear": "#0284c7",
    "pyramid": "#4d7c0f",
}
"""Of the selectors' families, everywhere."""
GREY, HATCH, INK = "#e5e7eb", "#9ca3af", "#1e293b"
MOST_NUMBERS = 480
"""Squares of a heatmap that still have room for a number."""
DOTS = 130
EVEN = (-2.5, 2.0)
"""Ends of an attention map's colours: log10 of the mass of a block over its even share."""


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG, whole or not at all."""
    with whole(path) as part:
        figure.savefig(part, format="png", dpi=DOTS)
    return path


def heatmap(plan: Plan, densities: Sequence[Sequence[float]] | None = None) -> Figure:
    """Layers down, heads across: each head's family as a hue, the paler the lower its list density.

    densities: of each [layer][head], 1 = every block; by default what is expected on the plan's own grid. Layers that
    are left to the host's attention are grey and hatched. Squares hold the density in percent while there is room.
    Raises ValueError for densities of another size.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    names = families(plan)
    density = np.array(head_densities(plan) if densities is None else densities, dtype=float)
    rows, columns = len(plan.layers), plan.heads
    if density.shape != (rows, columns):
        raise ValueError(f"densities must be [{rows} layers][{columns} heads], got {list(density.shape)}")
    # Most lists are sparse: without the root they would all be near white.
    strength = 0.2 + 0.8 * np.sqrt(density.clip(0, 1))
    base = np.array([[to_rgb(COLOURS.get(name, GREY)) for name in row] for row in names])
    stock = np.array([row[0] == STOCK for row in names])
    picture = np.where(stock[:, None, None], base, 1 - strength[..., None] * (1 - base))

    side = min(0.5, 11 / columns, 14 / rows)
    figure = Figure(figsize=(max(4.8, side * columns + 1.2), max(2.4, side * rows + 1.6)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(picture, aspect="equal", interpolation="nearest")
    for row in np.flatnonzero(stock):
        axes.add_patch(
            Rectangle((-0.5, row - 0.5), columns, 1, facecolor="none", edgecolor=HATCH, hatch="////", linewidth=0)
        )
    roomy = density.size <= MOST_NUMBERS
    axes.set(xlabel="head", ylabel="layer", xticks=ticks(columns), yticks=ticks(rows))
    axes.set_xticks(np.arange(1, columns) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, rows) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2 if roomy else 0.4)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if roomy:
        for (row, column), share in np.ndenumerate(density):
            if not stock[row]:
                ink = "white" if strength[row, column] > 0.62 else INK
                axes.text(
                    *(column, row, percent(share)), ha="center", va="center", fontsize=min(7.5, 16 * side), color=ink
                )
    count = {name: sum(row.count(name) for row in names) for name in (*COLOURS, STOCK)}
    patches = [
        Patch(facecolor=GREY, edgecolor=HATCH, hatch="////", linewidth=0, label=f"stock attention ({number})")
        if name == STOCK
        else Patch(color=COLOURS[name], label=f"{name} ({number})")
        for name, number in count.items()
        if number
    ]
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=min(len(patches), max(2, int(figure.get_figwidth() / 1.5))),
        frameon=False,
        fontsize=8,
    )
    title = "family (heads); the stronger, the denser" + ("; list density in %" if roomy else "")
    figure.suptitle(title, fontsize=8.5, x=0.02, ha="left")
    return figure


def attention_map(mass: Tensor, reads: Tensor, title: str = "") -> Figure:
    """One head's attention on a log scale with what its list reads outlined, and beside it that alone in colour.

    mass: softmax mass [query tiles, key blocks]. reads: bool of that shape.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    if mass.shape != reads.shape or mass.dim() != 2:
        raise ValueError(f"mass and reads must share one shape of two axes, got {[*mass.shape]} and {[*reads.shape]}")
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    masses, kept = mass.detach().float().cpu().numpy(), reads.detach().cpu().numpy().astype(bool)
    share = masses / masses.sum(1, keepdims=True).clip(min=1e-30) * masses.shape[1]
    level = np.log10(share.clip(min=10 ** EVEN[0]))
    shown = left.imshow(level, cmap="magma", vmin=EVEN[0], vmax=EVEN[1], aspect="auto", interpolation="nearest")
    left.add_collection(LineCollection(_outline(kept), colors="#5eead4", linewidths=0.7, capstyle="projecting"))
    colour = shown.to_rgba(level)[..., :3]
    # Bars of grey keep a hint of what was left out without competing with what was not.
    pale = 0.8 + 0.15 * colour.mean(-1, keepdims=True)
    right.imshow(np.where(kept[..., None], colour, pale), aspect="auto", interpolation="nearest")
    of_mass = float((share * kept).sum() / max(share.sum(), 1e-30))
    left.set_title("what the head looks at; outlined: what its list reads", fontsize=9, loc="left")
    right.set_title(f"read: {kept.mean():.0%} of the blocks, {of_mass:.0%} of the mass", fontsize=9, loc="left")
    left.set(xlabel="key blocks", ylabel="query tiles")
    right.set(xlabel="key blocks")
    bar = figure.colorbar(shown, ax=(left, right), shrink=0.9, pad=0.01, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["1/100", "1/10", "1", "10", "100"])
    bar.set_label("times an even share")
    if title:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def _outline(kept: np.ndarray) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The edges between squares that are read and others, in an image's coordinates, straight runs in one piece."""
    found = []
    for flipped, squares in ((False, kept), (True, kept.T)):
        edges = np.pad(squares, ((1, 1), (0, 0)))
        edges = edges[1:] != edges[:-1]
        for row, line in enumerate(edges):
            turns = np.flatnonzero(np.diff(np.pad(line.astype(np.int8), 1)))
            for start, end in zip(turns[::2], turns[1::2], strict=True):
                pieces = ((start - 0.5, row - 0.5), (end - 0.5, row - 0.5))
                found.append(tuple(piece[::-1] for piece in pieces) if flipped else pieces)
    return found


def plain_log(axis: Axis) -> None:
    """Name a log axis's ticks in plain numbers, "0.6", with as many of the minor ones as there is room for."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    for formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        formatter(Plain(minor_thresholds=(2, 0.5)))


def percent(share: float) -> str:
    """In at most three signs: "0.4", "7", "100"."""
    return f"{100 * share:.1f}".lstrip() if 0 < share < 0.00995 else f"{100 * share:.0f}"


def ticks(count: int) -> Sequence[int]:
    """At most twenty of them."""
    return range(0, count, max(1, -(-count // 20)))
