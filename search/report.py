"""The report of a search: PNGs, and one HTML page that holds them and the figures and needs nothing else."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..attention.plan import Plan
from ..pipelines.media import whole
from . import figures
from .findings import Findings, Proof

REPORT = "report.html"
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#0f172a;max-width:66rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin:2rem 0 .4rem}img{max-width:100%;height:auto}
table{border-collapse:collapse;margin:.6rem 0}th,td{text-align:left;padding:.2rem 1rem .2rem 0;vertical-align:top}
th{font-weight:600}td{font-variant-numeric:tabular-nums}tr+tr>*{border-top:1px solid #e2e8f0}
p.note{color:#475569;margin:.2rem 0}.pair{display:flex;flex-wrap:wrap;gap:1rem}.pair img{max-width:31rem}
"""


def write_report(
    folder: Path,
    found: Findings,
    plan: Plan,
    maps: dict[str, tuple[Tensor, Tensor]],
    videos: dict[str, tuple[np.ndarray, np.ndarray]],
) -> Path:
    """Draw a finished search into its folder: report.html and a PNG for each of its pictures.

    maps: by title, softmax mass [query tiles, key blocks] of a head and bool of that shape, what its list reads.
    videos: by prompt, uint8 [frames, height, width, 3] dense and under the plan.
    """
    drawn: dict[str, Any] = {
        "heatmap": figures.heatmap(plan),
        "front": figures.front(found),
        "predicted": figures.predicted(found),
        "costs": figures.costs(found),
        "sensitivity": figures.layers(found),
        "frames": figures.frames(videos),
    }
    drawn |= {f"map-{number}": figures.attention_map(*pair, title) for number, (title, pair) in enumerate(maps.items())}
    pictures = {name: _png(figure) for name, figure in drawn.items() if figure is not None}
    for name, data in pictures.items():
        with whole(folder / f"{name}.png") as part:
            part.write_bytes(data)
    # Of an earlier search in this folder.
    for old in folder.glob("map-*.png"):
        if old.stem not in pictures:
            old.unlink()
    with whole(folder / REPORT) as part:
        part.write_text(_page(found, plan, pictures, list(maps)), encoding="utf-8")
    return folder / REPORT


def _png(figure: Any) -> bytes:
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=130)
    return held.getvalue()


def _page(found: Findings, plan: Plan, pictures: dict[str, bytes], titles: list[str]) -> str:
    def image(name: str, alt: str) -> str:
        if name not in pictures:
            return ""
        return f"<img alt='{escape(alt, quote=True)}' src='data:image/png;base64,{_text(pictures[name])}'>"

    proof = next((one for one in found.proofs if one.point == found.chosen), None)
    maps = "".join(image(f"map-{number}", title) for number, title in enumerate(titles))
    shape = found.shape
    parts = [
        f"<h1>A plan for {escape(str(shape))}</h1>",
        f"<p class='note'>{escape(plan.name)}; {escape(plan.note)}</p>",
        _table(_headline(found, proof)),
        "<h2>What the heads do</h2>",
        image("heatmap", "layers down, heads across: family and density of each head"),
        "<h2>What they look at, and what is read of it</h2>" if maps else "",
        maps,
        "<h2>What it costs: time against error</h2>",
        image("front", "the front of time against error, and each candidate alone"),
        f"<p class='note'>{escape(_single(found))}</p>",
        "<h2>Predicted and measured</h2>",
        f"<div class='pair'>{image('predicted', 'predicted and measured seconds')}"
        f"{image('costs', 'the cost model and what it was fitted to')}</div>",
        "<h2>The same prompts and seeds, dense and under the plan</h2>" if "frames" in pictures else "",
        image("frames", "frames of each prompt, dense above, plan below"),
        "<h2>How much each layer matters</h2>",
        image("sensitivity", "how far an error of each layer moves the prediction"),
        "<h2>How it was found</h2>",
        _table(_circumstances(found)),
    ]
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{escape(plan.name)}</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _headline(found: Findings, proof: Proof | None) -> list[tuple[str, ...]]:
    assert found.chosen is not None
    point = found.front[found.chosen]
    dense = found.dense_seconds * found.calls * found.shape.layers
    rows: list[tuple[str, ...]] = [("", "predicted", "measured on prompts it never saw")]
    measured = {
        "self-attention": f"{proof.attention_seconds:.2f} s" if proof else "",
        "faster": f"{proof.own_dense_attention_seconds / proof.attention_seconds:.2f} times" if proof else "",
        "density": f"{proof.density:.1%}" if proof else "not proved",
    }
    rows += [
        ("density of the run", f"{point.density:.1%}", measured["density"]),
        ("self-attention of a video", f"{point.seconds:.2f} s", measured["self-attention"]),
        ("than our own kernel with all blocks", f"{dense / point.seconds:.2f} times faster", measured["faster"]),
        ("sum of weighted relative errors", f"{point.error:.4f}", ""),
    ]
    if proof:
        rows += [
            ("PSNR against dense", "", f"{proof.psnr:.1f} dB"),
            ("SSIM against dense", "", f"{proof.ssim:.3f}"),
            ("whole video", "", f"{proof.seconds:.1f} s"),
            ("with all blocks, our kernel", "", f"{proof.own_dense_seconds:.1f} s"),
            ("stock diffusers", "", f"{proof.stock_seconds:.1f} s"),
        ]
    return rows


def _circumstances(found: Findings) -> list[tuple[str, ...]]:
    sampled = "all of them" if found.sampled_rows >= found.tokens else f"a sample of {found.sampled_rows}"
    machine = ", ".join(f"{name} {value}" for name, value in found.machine.items() if value is not None)
    return [
        ("grid", "x".join(map(str, found.grid)) + f" latent patches, {found.tokens} tokens, {found.dtype}"),
        ("query rows measured", f"{sampled} at every call"),
        ("noise levels", ", ".join(f"{level:.3f}" for level in found.noise_levels)),
        ("errors", "the worst" if found.quantile == 1 else f"the {found.quantile:.0%} quantile"),
        ("calibrated on", "; ".join(found.prompts)),
        ("proved on", "; ".join(found.held_out) or "nothing"),
        ("candidates", f"{len(found.candidates)} a head"),
        ("cost model", f"median residual {figures.residual(found):.1%}" if found.costs else ""),
        ("seed", str(found.seed)),
        ("machine", machine),
    ]


def _single(found: Findings) -> str:
    """The front's point held against the best of one candidate alone that takes no more time."""
    assert found.chosen is not None
    point = found.front[found.chosen]
    affordable = [one for one in figures.singles(found) if one[1] <= point.seconds * 1.001]
    if not affordable:
        return "No candidate used in every head alone takes so little time."
    family, seconds, error = min(affordable, key=lambda one: one[2])
    return (
        f"The best candidate used in every head alone, of no more predicted time, is {family}: "
        f"error {error:.4f} in {seconds:.2f} s, where the plan has {point.error:.4f} in {point.seconds:.2f} s."
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    return (
        "<table>"
        + "".join(
            f"<tr><th scope='row'>{escape(head)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
            for head, *cells in rows
        )
        + "</table>"
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
