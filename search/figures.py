"""The pictures of plans and searches, each a matplotlib Figure: what heads do, what they read, what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from ..attention.expect import expected_density
from ..attention.plan import Plan
from .findings import Findings

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
"""Of the selectors' families, everywhere."""
MOST_NUMBERS = 480
"""Squares of a heatmap that still have room for a number."""


def heatmap(plan: Plan, grid: tuple[int, int, int] | None = None) -> Figure:
    """Layers down, heads across: each head's family as a colour, the paler the lower its list density.

    grid: where the density is told, by default the plan's own. Squares hold the density in percent while there is room.
    """
    families = np.full((len(plan.layers), plan.heads), "dense", dtype=object)
    density = np.ones(families.shape)
    for number, layer in enumerate(plan.layers):
        for group in layer.groups:
            for entry in group.entries:
                families[number, list(entry.heads)] = entry.selector.name
                density[number, list(entry.heads)] = expected_density(group, entry, grid or plan.grid)
    strength = 0.22 + 0.78 * np.sqrt(density.clip(0, 1))
    base = np.array([[to_rgb(COLOURS[name]) for name in row] for row in families])
    picture = 1 - strength[..., None] * (1 - base)
    rows, columns = density.shape
    side = min(0.5, 11 / columns, 14 / rows)
    figure = Figure(figsize=(max(4.8, side * columns + 1.2), max(2.2, side * rows + 1.5)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(picture, aspect="equal", interpolation="nearest")
    axes.set(xlabel="head", ylabel="layer", xticks=_ticks(columns), yticks=_ticks(rows))
    axes.set_xticks(np.arange(1, columns) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, rows) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2 if density.size <= MOST_NUMBERS else 0.4)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if density.size <= MOST_NUMBERS:
        for (row, column), share in np.ndenumerate(density):
            ink = "white" if strength[row, column] > 0.62 else "#1e293b"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5, color=ink)
    used = [name for name in COLOURS if (families == name).any()]
    counts = {name: int((families == name).sum()) for name in used}
    figure.legend(
        handles=[Patch(color=COLOURS[name], label=f"{name} ({counts[name]})") for name in used],
        loc="outside lower center",
        ncols=min(len(used), max(2, int(figure.get_figwidth() / 1.4))),
        frameon=False,
        fontsize=8,
    )
    axes.set_title("family; list density in %", fontsize=9, loc="left")
    return figure


def attention_map(mass: Tensor, reads: Tensor, title: str = "") -> Figure:
    """One head's attention, and beside it what its list reads of it; the rest is pale.

    mass: softmax mass [query tiles, key blocks]. reads: bool of that shape.
    """
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    share = mass.numpy() / mass.numpy().sum(1, keepdims=True).clip(min=1e-30) * mass.shape[1]
    level = np.log10(share.clip(min=1e-3))
    shown = left.imshow(level, cmap="magma", vmin=-2.5, vmax=2, aspect="auto", interpolation="nearest")
    colour = shown.to_rgba(level)[..., :3]
    kept = reads.numpy()
    right.imshow(
        np.where(kept[..., None], colour, 0.82 + 0.13 * colour.mean(-1, keepdims=True)),
        aspect="auto",
        interpolation="nearest",
    )
    of_mass = float((share * kept).sum() / share.sum())
    left.set(title="what the head looks at", xlabel="key blocks", ylabel="query tiles")
    right.set(title=f"read: {kept.mean():.0%} of blocks, {of_mass:.0%} of the mass", xlabel="key blocks")
    bar = figure.colorbar(shown, ax=(left, right), shrink=0.85, pad=0.01, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["1/100", "1/10", "1", "10", "100"])
    bar.set_label("times an even share")
    if title:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def front(found: Findings) -> Figure:
    """Predicted attention seconds against error: the front, the chosen plan, and each candidate in all heads alone."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for family, seconds, error in singles(found):
        axes.scatter(seconds, error, s=16, color=COLOURS[family], alpha=0.55, linewidths=0)
    times, errors = [one.seconds for one in found.front], [one.error for one in found.front]
    axes.plot(times, errors, color="#0f172a", marker="o", markersize=4, linewidth=1.4, label="the front")
    if found.chosen is not None:
        point = found.front[found.chosen]
        axes.scatter([point.seconds], [point.error], s=130, facecolors="none", edgecolors="#dc2626", linewidths=2)
        axes.annotate(
            "chosen", (point.seconds, point.error), xytext=(9, 9), textcoords="offset points", color="#dc2626"
        )
    used = dict.fromkeys(family for family, _, _ in singles(found))
    handles = [
        *axes.get_legend_handles_labels()[0],
        *(Patch(color=COLOURS[name], label=f"{name} in every head") for name in used),
    ]
    for seconds, name in (
        (found.dense_seconds, "all blocks, our kernel"),
        (found.stock_seconds, "stock attention"),
    ):
        at = seconds * found.calls * found.shape.layers
        axes.axvline(at, color="#94a3b8", linestyle=":" if "our" in name else "--", linewidth=1)
        axes.text(at, 0.99, f" {name}", transform=axes.get_xaxis_transform(), rotation=90, va="top", fontsize=7)
    axes.set(xlabel="self-attention of one video, predicted seconds", ylabel="weighted sum of relative errors")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.2)
    axes.legend(handles=handles, fontsize=7.5, frameon=False)
    return figure


def singles(found: Findings) -> list[tuple[str, float, float]]:
    """Each candidate used in every layer and head alone: family, predicted attention seconds of a video, error."""
    sparse = found.calls - found.dense_calls
    layers, heads = found.shape.layers, found.shape.heads
    constant = found.dense_calls * found.stock_seconds * layers + found.launch_seconds * sparse * layers
    errors, weights = np.array(found.errors), np.array(found.weights)
    return [
        (
            candidate.family,
            constant + layers * heads * sparse * found.seconds[number],
            float((errors[:, :, number] * weights).sum()),
        )
        for number, candidate in enumerate(found.candidates)
    ]


def predicted(found: Findings) -> Figure | None:
    """Predicted against measured attention seconds of the plans that were run; None where none was."""
    pairs = [(found.front[proof.point].seconds, proof.attention_seconds) for proof in found.proofs]
    if not pairs:
        return None
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axes = figure.add_subplot()
    most = 1.15 * max(max(pair) for pair in pairs)
    axes.plot([0, most], [0, most], color="#94a3b8", linewidth=1)
    axes.fill_between([0, most], [0, 0.85 * most], [0, 1.15 * most], color="#94a3b8", alpha=0.18, label="within 15 %")
    axes.scatter(*zip(*pairs, strict=True), color="#0f766e", zorder=3)
    for proof, (x, y) in zip(found.proofs, pairs, strict=True):
        label = f"{'chosen, ' if proof.point == found.chosen else ''}{y / x - 1:+.0%}"
        axes.annotate(label, (x, y), xytext=(6, -10), textcoords="offset points", fontsize=8)
    axes.set(xlabel="predicted, s", ylabel="measured, s", xlim=(0, most), ylim=(0, most))
    axes.set_title("self-attention of one video", fontsize=9, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def costs(found: Findings) -> Figure | None:
    """How well the cost model fits what it was fitted to; None where it was fitted to nothing."""
    if not found.costs:
        return None
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for pooled, colour in ((False, "#1d4ed8"), (True, "#b45309")):
        own = [row for row in found.costs if row.pooled is pooled]
        x, y = [1000 * row.fitted for row in own], [1000 * row.seconds for row in own]
        axes.scatter(x, y, s=18, color=colour, alpha=0.8, label="rest pooled" if pooled else "rest dropped")
    both = [1000 * value for row in found.costs for value in (row.fitted, row.seconds) if value > 0]
    span = [min(both, default=1) / 1.3, max(both, default=1) * 1.3]
    axes.plot(span, span, color="#94a3b8", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="fitted, ms a call", ylabel="measured, ms a call")
    axes.set_title(f"cost model: median residual {residual(found):.1%}", fontsize=9, loc="left")
    axes.legend(fontsize=8, frameon=False)
    return figure


def residual(found: Findings) -> float:
    """Median of |fitted - measured| ÷ measured over the cost model's measurements."""
    return float(np.median([abs(row.fitted - row.seconds) / row.seconds for row in found.costs]))


def frames(videos: dict[str, tuple[np.ndarray, np.ndarray]], count: int = 6) -> Figure | None:
    """Frames of each prompt's dense video above those of the plan's; None where there is no video.

    videos: prompt: uint8 [frames, height, width, 3], dense and under the plan.
    """
    if not videos:
        return None
    picked = [
        (name, kind, video[np.linspace(0, len(video) - 1, min(count, len(video))).round().astype(int)])
        for name, pair in videos.items()
        for kind, video in zip(("dense", "plan"), pair, strict=True)
    ]
    _, _, first = picked[0]
    tall = 1.5 * first.shape[1] / first.shape[2]
    figure = Figure(figsize=(1.5 * len(first) + 0.6, (tall + 0.22) * len(picked)), layout="constrained")
    grid: Any = figure.subplots(len(picked), 1, squeeze=False)
    for axes, (name, kind, shots) in zip(grid[:, 0], picked, strict=True):
        gap = np.full((*shots.shape[1:2], max(2, shots.shape[2] // 40), 3), 255, np.uint8)
        strip = [part for shot in shots for part in (shot, gap)][:-1]
        axes.imshow(np.concatenate(strip, 1), interpolation="nearest")
        axes.set(xticks=[], yticks=[], ylabel=kind)
        if kind == "dense":
            axes.set_title(name, fontsize=9, loc="left")
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def layers(found: Findings) -> Figure:
    """How much each layer's relative error moves the prediction."""
    figure = Figure(figsize=(7.2, 2.4), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(found.sensitivities)), found.sensitivities, color="#475569")
    axes.set(xlabel="layer", ylabel="prediction moves by,\nper unit of error", xticks=_ticks(len(found.sensitivities)))
    axes.grid(visible=True, axis="y", alpha=0.2)
    return figure


def _ticks(count: int) -> Sequence[int]:
    return range(0, count, max(1, -(-count // 20)))
