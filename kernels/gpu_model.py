"""A roofline of the Triton kernels, from their binaries' figures and the chips' data sheets. No GPU's time is in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .gpu_devices import DEVICES, Device

# float32 instructions per score: scale and log-weight, maximum, shift, sum, half of a conversion.
PER_SCORE = 4.5
# Clocks until a tile's first rows arrive and after its last product: three dependent loads each way, of 600 clocks.
LATENCY = 1800
LOG_WEIGHT_AND_MAPS = 12
"""Bytes per key row beside key and value: log-weight, row map, and its share of the list."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model says of one kernel.

    share: of the chip's peak that it reaches at most. bound: what sets that. clocks: of one step, by resource.
    likely: the share, times what a published kernel reaches of its own, see `reached`. break_even: the density below
    which the likely share takes less time than the target's dense FlashAttention.
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


def predict_share(
    target: str, row: dict[str, Any], *, density: float, tokens: int = 75_600
) -> tuple[float, str, dict[str, float]]:
    """The share of peak that a forward kernel reaches at most, what bounds it, and the clocks of a step.

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
    return share, busiest if clocks[busiest] >= serial else "too few warps to overlap products with exp2", clocks


def predict(target: str, row: dict[str, Any], *, density: float = 0.125, tokens: int = 75_600) -> Prediction:
    """The forward kernel of a row of the table of binaries, at a density and length."""
    share, bound, clocks = predict_share(target, row, density=density, tokens=tokens)
    likely = share * reached(target)
    return Prediction(
        share=share,
        bound=bound,
        clocks=clocks,
        likely=likely,
        break_even=min(1.0, likely / DEVICES[target].dense),
    )


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published kernel and the share of peak that its authors, or others, measured. warps: those that compute.

    likewise: whether it is made as ours are: by Triton, without parts in assembly.
    """

    name: str
    target: str
    tile: int
    rows: int
    warps: int
    measured: float
    source: str
    blocks: int = 1
    likewise: bool = False

    @property
    def modelled(self) -> float:
        """The share that the model allows it, at head_dim 128 and full density."""
        row = {"tile": self.tile, "rows": self.rows, "head_dim": 128, "warps": self.warps, "occupancy": self.blocks}
        return predict_share(self.target, row, density=1.0)[0]


STRIPE = Published(
    **{"name": "stripe kernel, sparse", "target": "cuda:90", "tile": 128, "rows": 128, "warps": 8},
    **{"measured": 0.61, "source": "Parameterized Stripe Attention, arXiv 2609.37001"},
)
PUBLISHED = (
    STRIPE,
    Published(
        **{"name": "FlashAttention-3, dense", "target": "cuda:90", "tile": 128, "rows": 128, "warps": 8},
        **{"measured": 0.70, "source": "beside the stripe kernel, arXiv 2609.37001"},
    ),
    Published(
        **{"name": "Triton, dense", "target": "cuda:90", "tile": 128, "rows": 64, "warps": 8, "likewise": True},
        **{"measured": 0.40, "source": "FlashAttention-3, arXiv 2407.08608: 395 Tflop/s at 16k tokens"},
    ),
    Published(
        **{"name": "FlashAttention-4, dense", "target": "cuda:100", "tile": 256, "rows": 128, "warps": 8},
        **{"measured": 0.71, "source": "FlashAttention-4; computes a part of its exp2's by polynomials"},
    ),
    Published(
        **{"name": "Triton, dense", "target": "cuda:100", "tile": 128, "rows": 64, "warps": 8, "likewise": True},
        **{"measured": 0.26, "source": "FlashAttention-4: 2.7 times slower than its 71%"},
    ),
    Published(
        **{"name": "FlashAttention-2, dense", "target": "cuda:80", "tile": 128, "rows": 64, "warps": 4, "blocks": 2},
        **{"measured": 0.73, "source": "FlashAttention-2, arXiv 2307.08691"},
    ),
    Published(
        **{"name": "FlashAttention-2, dense", "target": "cuda:120", "tile": 128, "rows": 32, "warps": 4, "blocks": 2},
        **{"measured": 0.89, "source": "gau-nernst, Speed-of-Light Flash Attention for 5090"},
    ),
)


def reached(target: str) -> float:
    """What a published kernel reached of what this model allows it: clocks that fall under load, issue slots, barriers
    and uneven tiles are not in the model. One that is made as ours on the same chip, or else the sparse one."""
    likewise = [item for item in PUBLISHED if item.likewise and item.target == target]
    chosen = likewise[0] if likewise else STRIPE
    return chosen.measured / chosen.modelled


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
    for item in PUBLISHED:
        lines.append(f"| {item.name} | {item.target} | {item.modelled:.0%} | {item.measured:.0%} | {item.source} |")
    lines += [
        "",
        "| chip | bf16 Tflop/s | processors, clock | DRAM TB/s | shared memory: a block's / a processor's KiB | "
        "exp2, float32, L2 bytes per clock | from |",
        "|---|---|---|---|---|---|---|",
    ]
    for d in DEVICES.values():
        lines.append(
            f"| {d.name} | {d.flops / 1e12:g} | {d.processors}, {d.clock / 1e9:.2f} GHz | {d.bandwidth / 1e12:g} | "
            f"{d.shared_block // 1024} / {d.shared // 1024} | {d.exps}, {d.lanes}, {d.l2} | {d.source} |"
        )
    lines += ["", "| chip | share of peak taken for dense attention | from |", "|---|---|---|"]
    lines += [f"| {d.name} | {d.dense:.0%} | {d.dense_source} |" for d in DEVICES.values()]
    return "\n".join(lines)
