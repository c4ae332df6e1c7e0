"""The figures of a search as rows of text, first of them the head of the columns: what its report tells in words."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ..attention.plan import Plan
from . import figures
from .findings import CostRow, Findings, Point
from .heatmap import families

Rows = list[tuple[str, ...]]
STEADY = 0.75
"""Share of heads below which prompts were too few."""


def chosen_of(findings: Findings) -> Point:
    """The front's point that became the plan. Raises ValueError where none did."""
    if findings.chosen is None:
        raise ValueError("findings hold no chosen plan: the search did not come to its end")
    return findings.front[findings.chosen]


def densities(findings: Findings) -> list[list[float]]:
    """The mean list density of each [layer][head] under the chosen plan, as calibration measured it."""
    found = []
    for layer, picks in enumerate(chosen_of(findings).picks):
        if picks is None:
            found.append([1.0] * findings.shape.heads)
        else:
            found.append([findings.densities[layer][head][number] for head, number in enumerate(picks)])
    return found


def headline(findings: Findings) -> Rows:
    """What the plan is to cost and to gain, and what it did."""
    point, dense, stock = chosen_of(findings), *_whole_dense(findings)
    rows: Rows = [("", "predicted", "measured")]
    proof = next((one for one in findings.proofs if one.point == findings.chosen), None)
    if proof is None:
        return [
            *rows,
            ("density of the run", f"{point.density:.1%}", "not proved"),
            ("self-attention of a video", _seconds(point.seconds), ""),
            ("faster than our kernel with all blocks", f"{dense / point.seconds:.2f} times", ""),
            ("faster than stock attention", f"{stock / point.seconds:.2f} times", ""),
            ("weighted sum of relative errors", f"{point.error:.4f}", ""),
        ]
    attention = proof.own_dense_attention_seconds / proof.attention_seconds
    return [
        *rows,
        ("density of the run", f"{point.density:.1%}", f"{proof.density:.1%}"),
        ("self-attention of a video", _seconds(point.seconds), _seconds(proof.attention_seconds)),
        ("faster than our kernel with all blocks", f"{dense / point.seconds:.2f} times", f"{attention:.2f} times"),
        ("faster than stock attention", f"{stock / point.seconds:.2f} times", ""),
        ("weighted sum of relative errors", f"{point.error:.4f}", ""),
        ("PSNR and SSIM against dense", "", f"{proof.psnr:.1f} dB, {proof.ssim:.3f}"),
        ("whole video", "", _seconds(proof.seconds)),
        ("with all blocks, our kernel", "", _times(proof.own_dense_seconds, proof.seconds)),
        ("stock diffusers", "", _times(proof.stock_seconds, proof.seconds)),
    ]


def layers(findings: Findings, plan: Plan) -> Rows:
    """What each layer's heads do, how dense that is, and what it does to the video."""
    point, density, names = chosen_of(findings), densities(findings), families(plan)
    every = Counter[str]()
    rows: Rows = [("layer", "heads", "groups", "density", "error", "sensitivity")]
    for number, (layer, picks) in enumerate(zip(plan.layers, point.picks, strict=True)):
        every.update(names[number])
        error = sum(
            findings.weights[number][head] * findings.errors[number][head][one] for head, one in enumerate(picks or ())
        )
        rows.append(
            (
                str(number),
                _families(Counter(names[number])),
                str(len(layer.groups) or ""),
                f"{np.mean(density[number]):.1%}",
                f"{error:.4f}",
                f"{findings.sensitivities[number]:.3g}",
            )
        )
    every_density = float(np.mean(density))
    rows.append(("all", _families(every), "", f"{every_density:.1%}", f"{point.error:.4f}", ""))
    return rows


def best_alone(findings: Findings) -> str:
    """The plan held against the best of one candidate alone that takes no more time."""
    point = chosen_of(findings)
    affordable = [one for one in figures.singles(findings) if one[1] <= point.seconds * 1.001]
    if not affordable:
        return "No candidate used in every head alone takes so little time."
    family, seconds, error = min(affordable, key=lambda one: one[2])
    return (
        f"The best candidate used in every head alone, of no more predicted time, is {family}: "
        f"error {error:.4f} in {_seconds(seconds)}, where the plan has {point.error:.4f} in {_seconds(point.seconds)}."
    )


def proofs(findings: Findings) -> Rows:
    """Every plan of the front that was run, beside what was predicted of it."""
    rows: Rows = [
        (
            *("point of the front", "prompts", "attention", "predicted", "off by", "density", "PSNR, dB", "SSIM"),
            *("whole video", "all blocks", "stock diffusers"),
        )
    ]
    for point, proof in figures.proved(findings):
        rows.append(
            (
                f"{proof.point}{' (chosen)' if proof.point == findings.chosen else ''}",
                str(proof.prompts),
                _seconds(proof.attention_seconds),
                _seconds(point.seconds),
                f"{proof.attention_seconds / point.seconds - 1:+.0%}",
                f"{proof.density:.1%}",
                f"{proof.psnr:.1f}",
                f"{proof.ssim:.3f}",
                _seconds(proof.seconds),
                _seconds(proof.own_dense_seconds),
                _seconds(proof.stock_seconds),
            )
        )
    return rows


def residuals(findings: Findings) -> Rows:
    """How far the cost model is off what it was fitted to, by block and by what becomes of the rest."""
    kinds: dict[tuple[int, bool], list[CostRow]] = {}
    for row in findings.costs:
        kinds.setdefault((row.block, row.pooled), []).append(row)
    rows: Rows = [("block, rest", "measurements", "tokens", "median residual", "largest")]
    for (block, pooled), own in sorted(kinds.items()):
        tokens = sorted({row.tokens for row in own})
        span = str(tokens[0]) if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
        rows.append((f"{block}, {'pooled' if pooled else 'dropped'}", str(len(own)), span, *_residual(own)))
    return [*rows, ("all", str(len(findings.costs)), "", *_residual(findings.costs))]


def circumstances(findings: Findings) -> Rows:
    """What was captured, of which run, on which machine."""
    grid = "x".join(map(str, findings.grid))
    sampled = "all" if findings.sampled_rows >= findings.tokens else f"a sample of {findings.sampled_rows}"
    quantile = "the worst" if findings.quantile == 1 else f"the {findings.quantile:.0%} quantile"
    machine = ", ".join(f"{name} {value}" for name, value in findings.machine.items() if value is not None)
    return [
        ("", ""),
        ("grid", f"{grid} latent patches, {findings.tokens} tokens, {findings.dtype}"),
        ("guidance", "not told" if findings.guidance is None else f"{findings.guidance:g}"),
        ("query rows measured", f"{sampled} of {findings.tokens} at every call"),
        ("noise levels", ", ".join(f"{level:.3f}" for level in findings.noise_levels) + f" of {findings.steps} steps"),
        ("errors", f"{quantile} over prompts, noise levels and guidance branches"),
        ("calibrated on", "; ".join(findings.prompts)),
        ("proved on", "; ".join(findings.held_out) or "nothing"),
        (
            "candidates",
            f"{len(findings.candidates)} a head: {_families(Counter(c.family for c in findings.candidates))}",
        ),
        ("correction", findings.corrected or "not told"),
        ("steadiness", _steady(findings.steady)),
        ("seed", str(findings.seed)),
        ("machine", machine or "not told"),
    ]


def _steady(share: float | None) -> str:
    if share is None:
        return "not told: one prompt alone was calibrated on"
    said = f"{share:.0%} of heads keep their family whichever quarter of the prompts is left out"
    return said if share >= STEADY else f"{said}: calibrate on more prompts"


def _whole_dense(findings: Findings) -> tuple[float, float]:
    """Attention seconds of one video by our kernel with all blocks, and by stock attention."""
    calls = findings.calls * findings.shape.layers
    return findings.dense_seconds * calls, findings.stock_seconds * calls


def _residual(rows: list[CostRow]) -> tuple[str, str]:
    off = [abs(row.fitted - row.seconds) / row.seconds for row in rows]
    return f"{np.median(off):.1%}", f"{max(off):.1%}"


def _families(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.most_common())


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def _times(seconds: float, own: float) -> str:
    return f"{_seconds(seconds)}, {seconds / own:.2f} times as long"
