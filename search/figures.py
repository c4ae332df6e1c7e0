"""The pictures of a search, each a matplotlib Figure: what it costs, how well that was foretold, and the frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .findings import Findings, Point, Proof
from .heatmap import COLOURS, GREY, plain_log, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Videos = dict[str, tuple[np.ndarray, np.ndarray]]
"""Prompt: uint8 [frames, height, width, 3], dense and under the plan."""
WITHIN = 0.15
"""How far a prediction may be off."""
DARK, LINE, RED, TEAL = "#0f172a", "#94a3b8", "#dc2626", "#0f766e"


def front(findings: Findings) -> Figure:
    """Predicted attention seconds against error: the front, which of it was chosen and proved, each candidate alone."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    alone = singles(findings)
    for family, seconds, error in alone:
        axes.scatter(seconds, error, s=18, color=COLOURS.get(family, GREY), alpha=0.55, linewidths=0)
    points = findings.front
    times, errors = [one.seconds for one in points], [one.error for one in points]
    axes.plot(times, errors, color=DARK, marker="o", markersize=4, linewidth=1.4, label="the front")
    proved = [points[proof.point] for proof in findings.proofs]
    if proved:
        axes.plot(
            *([one.seconds for one in proved], [one.error for one in proved]),
            **{"linestyle": "none", "marker": "D", "markersize": 7, "color": TEAL, "label": "proved"},
        )
    if findings.chosen is not None:
        chosen = points[findings.chosen]
        ring: dict[str, Any] = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgewidth": 2}
        axes.plot([chosen.seconds], [chosen.error], linestyle="none", color=RED, label="chosen", **ring)
    handles = [
        *axes.get_legend_handles_labels()[0],
        *(
            Line2D([], [], linestyle="none", marker="o", color=COLOURS.get(name, GREY), label=f"{name} in every head")
            for name in dict.fromkeys(family for family, _, _ in alone)
        ),
    ]
    for seconds, name, dashes in (
        (findings.dense_seconds, "all blocks, our kernel", ":"),
        (findings.stock_seconds, "stock attention", "--"),
    ):
        at = seconds * findings.calls * findings.shape.layers
        axes.axvline(at, color=LINE, linestyle=dashes, linewidth=1)
        axes.text(at, 0.98, f" {name}", transform=axes.get_xaxis_transform(), rotation=90, va="top", fontsize=7)
    axes.set(xlabel="self-attention of one video, predicted seconds", ylabel="weighted sum of relative errors")
    # From the worst candidate alone to the front it is two orders of magnitude; a plan of all blocks has no error.
    every = [error for error in (*errors, *(one[2] for one in alone)) if error > 0]
    if every:
        axes.set(yscale="log", ylim=(max(min(every), max(every) / 3000) / 1.5, max(every) * 1.5))
        plain_log(axes.yaxis)
    axes.set_xlim(left=0)
    axes.grid(visible=True, alpha=0.2)
    figure.legend(handles=handles, fontsize=8, frameon=False, loc="outside right upper")
    return figure


def singles(findings: Findings) -> list[tuple[str, float, float]]:
    """Each candidate used in every layer and head alone: family, predicted attention seconds of a video, error."""
    sparse = findings.calls - findings.dense_calls
    layers, heads = findings.shape.layers, findings.shape.heads
    dense = findings.dense_seconds if findings.schedule.dense_by == "own" else findings.stock_seconds
    constant = findings.dense_calls * dense * layers + findings.launch_seconds * sparse * layers
    errors, weights = np.array(findings.errors), np.array(findings.weights)
    return [
        (
            candidate.family,
            constant + layers * heads * sparse * findings.seconds[number],
            float((errors[:, :, number] * weights).sum()),
        )
        for number, candidate in enumerate(findings.candidates)
    ]


def proved(findings: Findings) -> list[tuple[Point, Proof]]:
    """The proofs, each beside what was predicted."""
    return [(findings.front[proof.point], proof) for proof in findings.proofs]


def predicted(findings: Findings) -> Figure | None:
    """Predicted against measured attention seconds of the plans that were run; None where none was."""
    from matplotlib.figure import Figure

    pairs = [(point.seconds, proof.attention_seconds) for point, proof in proved(findings)]
    if not pairs:
        return None
    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    most = 1.2 * max(max(pair) for pair in pairs)
    axes.plot([0, most], [0, most], color=LINE, linewidth=1)
    low, high = (1 - WITHIN) * most, (1 + WITHIN) * most
    axes.fill_between([0, most], [0, low], [0, high], color=LINE, alpha=0.18, label=f"within {WITHIN:.0%}", linewidth=0)
    for proof, (x, y) in zip(findings.proofs, pairs, strict=True):
        chosen = proof.point == findings.chosen
        axes.scatter(x, y, color=RED if chosen else TEAL, zorder=3)
        label = f"{'chosen, ' if chosen else ''}{y / x - 1:+.0%}"
        # The chosen one's neighbours on the front are near it: its words stand on the other side.
        side: Any = {"xytext": (-7, 5), "ha": "right"} if chosen else {"xytext": (7, -10)}
        axes.annotate(label, (x, y), textcoords="offset points", fontsize=8, **side)
    axes.set(xlabel="predicted, s", ylabel="measured, s", xlim=(0, most), ylim=(0, most))
    axes.set_title("self-attention of one video", fontsize=9, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def costs(findings: Findings) -> Figure | None:
    """How well the cost model fits what it was fitted to; None where it was fitted to nothing."""
    from matplotlib.figure import Figure

    if not findings.costs:
        return None
    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for pooled, colour in ((False, "#1d4ed8"), (True, "#b45309")):
        own = [row for row in findings.costs if row.pooled is pooled]
        x, y = [1000 * row.fitted for row in own], [1000 * row.seconds for row in own]
        label = "rest pooled" if pooled else "rest dropped"
        axes.scatter(x, y, s=18, color=colour, alpha=0.8, label=label, linewidths=0)
    both = [1000 * value for row in findings.costs for value in (row.fitted, row.seconds) if value > 0]
    span = [min(both, default=1) / 1.3, max(both, default=1) * 1.3]
    axes.plot(span, span, color=LINE, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="fitted, ms a call", ylabel="measured, ms a call")
    plain_log(axes.xaxis)
    plain_log(axes.yaxis)
    axes.set_title("the cost model and what it was fitted to", fontsize=9, loc="left")
    axes.legend(fontsize=8, frameon=False)
    return figure


def frames(videos: Videos, count: int = 6) -> Figure | None:
    """Frames of each prompt's dense video above those of the plan's; None where there is no video."""
    from matplotlib.figure import Figure

    if not videos:
        return None
    strips = [(name, kind, _strip(video, count)) for name, pair in videos.items() for kind, video in _named(pair)]
    # Placed by hand: a layout engine gives strips below a title another width.
    wide, left, title, gap = 9.0, 0.45, 0.3, 0.06
    tall = [(wide - left) * strip.shape[0] / strip.shape[1] for _, _, strip in strips]
    above = [title if kind == "dense" else gap for _, kind, _ in strips]
    height = sum(tall) + sum(above)
    figure, top = Figure(figsize=(wide, height)), height
    for (name, kind, strip), own, space in zip(strips, tall, above, strict=True):
        top -= space + own
        axes = figure.add_axes((left / wide, top / height, 1 - left / wide, own / height))
        axes.imshow(strip, interpolation="nearest", aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(kind, fontsize=9)
        if kind == "dense":
            axes.set_title(name if len(name) <= 110 else f"{name[:107]} ...", fontsize=9, loc="left")
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def _named(pair: tuple[np.ndarray, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    return [("dense", pair[0]), ("plan", pair[1])]


def _strip(video: np.ndarray, count: int) -> np.ndarray:
    """Frames spread over the video beside each other, white between them."""
    shots = video[np.linspace(0, len(video) - 1, min(count, len(video))).round().astype(int)]
    gap = np.full((shots.shape[1], max(2, shots.shape[2] // 40), 3), 255, np.uint8)
    return np.concatenate([part for shot in shots for part in (shot, gap)][:-1], 1)


def layers(findings: Findings) -> Figure:
    """How much each layer's relative error moves the prediction."""
    from matplotlib.figure import Figure

    count = len(findings.sensitivities)
    figure = Figure(figsize=(7.2, 2.4), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(count), findings.sensitivities, color="#475569", width=0.7)
    axes.set(xlabel="layer", ylabel="prediction moves by,\nper unit of error", xticks=ticks(count))
    axes.grid(visible=True, axis="y", alpha=0.2)
    return figure
