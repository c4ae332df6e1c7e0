"""A roofline of the Triton kernels, from their binaries' figures and the chips' data sheets. No GPU's time is in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .gpu_devices import DEVICES, Device

# float32 instructions per score: scale and log-weight, maximum, shift, sum, half of a conversion.
PER_SCORE = 4.5
# Clocks until a tile's first rows arrive and after its last product: three dependent loads each way, of 600 clocks.
LATENCY = 1800
# What a published sparse kernel reached of what this model allows it (the last table of `page` shows it): clocks that
# fall under load, issue slots, barriers and uneven tiles are not in the model.
REACHED = 0.61
LOG_WEIGHT_AND_MAPS = 12
"""Bytes per key row beside key and value: log-weight, row map, and its share of the list."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model says of one kernel.

    share: of the chip's peak that it reaches at most. bound: what sets that. clocks: of one step, by resource.
    likely: the share, times what published kernels reach of theirs. break_even: the density below which the likely
    share takes less time than the target's dense FlashAttention.
    """

    share: float
    bound: str
    clocks: dict[str, float]
    likely: float
    break_even: float


def step_clocks(
    device: Device, *, tile: int, rows: int, head_dim: int, element: int = 2, blocks: int = 1
) -> dict[str, float]:
    """Clocks of one processor for one forward step of `blocks` blocks of threads, by what they are spent on."""
    scores = tile * rows
    bytes_read = rows * (2 * head_dim * element + LOG_WEIGHT_AND_MAPS)
    return {
        "products": blocks * 4 * scores * head_dim / device.flops_per_clock,
        "exp2": blocks * (scores + tile) / device.exps,
        "float32": blocks * (PER_SCORE * scores + tile * head_dim) / device.lanes,
        "L2": blocks * bytes_read / device.l2,
        # Neighbouring tiles read much of the same: of DRAM's traffic the L2 keeps away what two of three ask for.
        "DRAM": blocks * bytes_read / 3 / (device.bandwidth / device.processors / device.clock),
    }


def predict(target: str, row: dict[str, Any], *, density: float = 0.125, tokens: int = 75_600) -> Prediction:
    """The forward kernel of a row of the table of binaries, at a density and length.

    Each of a processor's groups of warps goes through products, exp2 and sums one after another; groups overlap. So a
    step takes the longest of: the busiest resource, and all that a group waits for in turn, shared by the groups.
    """
    device = DEVICES[target]
    blocks = row["occupancy"]
    clocks = step_clocks(device, tile=row["tile"], rows=row["rows"], head_dim=row["head_dim"], blocks=blocks)
    # Warps that run apart: four wide MMAs on Hopper and Blackwell, one elsewhere; a processor has four schedulers.
    apart = blocks * row["warps"] / 4
    serial = sum(clocks[name] for name in ("products", "exp2", "float32")) / apart
    busiest = max(clocks, key=lambda name: clocks[name])
    step = max(clocks[busiest], serial)
    steps = max(1.0, density * tokens / row["rows"])
    # What a tile spends before and after its steps, hidden only by other blocks.
    edges = LATENCY / blocks + 2 * row["tile"] * row["head_dim"] * 2 / device.l2
    share = clocks["products"] / (step + edges * blocks / steps)
    bound = busiest if clocks[busiest] >= serial else "too few warps to overlap products with exp2"
    likely = share * REACHED
    return Prediction(
        share=share, bound=bound, clocks=clocks, likely=likely, break_even=min(1.0, likely / device.dense)
    )


PUBLISHED = (
    # name, target, tile, rows, head_dim, warps that compute, share measured, source
    ("FlashAttention-3, dense", "cuda:90", 128, 128, 128, 8, 0.70, "arXiv 2609.37001"),
    ("stripe kernel", "cuda:90", 128, 128, 128, 8, 0.61, "arXiv 2609.37001"),
    ("FlashAttention-2, dense", "cuda:80", 128, 64, 128, 4, 0.73, "arXiv 2307.08691"),
)


def published() -> list[dict[str, Any]]:
    """Published kernels in the same model: what it allows them beside what was measured."""
    rows = []
    for name, target, tile, keys, head_dim, warps, measured, source in PUBLISHED:
        blocks = 2 if target == "cuda:80" else 1
        row = {"tile": tile, "rows": keys, "head_dim": head_dim, "warps": warps, "occupancy": blocks}
        found = predict(target, row, density=1.0)
        rows.append({"kernel": name, "target": target, "model": found.share, "measured": measured, "source": source})
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    """The tables of docs/gpu.md, in Markdown, from the table of binaries."""
    lines = [
        "| target | chip | head_dim | block | tile x rows | blocks per processor | clocks per step: products / exp2 / "
        "float32 / L2 | share of peak, at most | likely | bound by | beats dense below density |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["kernel"] != "forward":
            continue
        found = predict(row["target"], row)
        clocks = " / ".join(f"{found.clocks[name]:.0f}" for name in ("products", "exp2", "float32", "L2"))
        chip = DEVICES[row["target"]].name
        lines.append(
            f"| {row['target']} | {chip} | {row['head_dim']} | {row['block']} | {row['tile']} x {row['rows']} "
            f"| {row['occupancy']} | {clocks} | {found.share:.0%} | {found.likely:.0%} | {found.bound} "
            f"| {found.break_even:.0%} |"
        )
    lines += ["", "| target | head_dim | 1 % | 3 % | 12.5 % | 50 % |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["kernel"] == "forward" and row["block"] == 64:
            shares = " | ".join(f"{predict(row['target'], row, density=d).share:.0%}" for d in (0.01, 0.03, 0.125, 0.5))
            lines.append(f"| {row['target']} | {row['head_dim']} | {shares} |")
    lines += ["", "| published kernel | target | model | measured | source |", "|---|---|---|---|---|"]
    for item in published():
        lines.append(
            f"| {item['kernel']} | {item['target']} | {item['model']:.0%} | {item['measured']:.0%} | {item['source']} |"
        )
    lines += ["", "| chip | share of peak taken for dense attention | from |", "|---|---|---|"]
    lines += [f"| {d.name} | {d.dense:.0%} | {d.dense_source} |" for d in DEVICES.values()]
    return "\n".join(lines)
