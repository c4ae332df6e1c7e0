"""The report of a search: PNGs, and one HTML page that holds them and the figures and needs nothing else."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from torch import Tensor

from ..attention.plan import Plan
from ..pipelines.media import whole
from . import figures, tables
from .findings import Findings
from .heatmap import attention_map, heatmap, save

REPORT = "report.html"
STYLE = """
:root{color-scheme:light dark;--ink:#0f172a;--soft:#475569;--page:#fff;--line:#e2e8f0}
@media(prefers-color-scheme:dark){:root{--ink:#e2e8f0;--soft:#94a3b8;--page:#0f172a;--line:#334155}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:62rem;margin:2rem auto;
padding:0 1rem;overflow-wrap:break-word}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 .3rem}
h2{font-size:1.15rem;margin:2.4rem 0 .5rem}h3{font-size:1rem;margin:1.2rem 0 .3rem}
p{margin:.3rem 0;max-width:44rem}.note{color:var(--soft)}
img{display:block;max-width:100%;height:auto;background:#fff;border-radius:.4rem;margin:.6rem 0}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:.6rem 0;font-size:.93rem}
th,td{text-align:left;padding:.25rem 1.2rem .25rem 0;vertical-align:top}th{font-weight:600}
thead th{color:var(--soft);font-weight:500}td{font-variant-numeric:tabular-nums}
tbody tr>*{border-top:1px solid var(--line)}
.pair{display:flex;flex-wrap:wrap;gap:0 1rem}.pair img{flex:0 1 28rem;min-width:min(100%,18rem)}
@media(max-width:40rem){body{margin:1rem auto}th,td{padding-right:.8rem}}
"""


def write_report(
    folder: Path,
    findings: Findings,
    plan: Plan,
    maps: dict[str, tuple[Tensor, Tensor]],
    frames: figures.Videos,
) -> Path:
    """Draw a finished search into its folder: report.html and a PNG for each of its pictures.

    maps: by title, softmax mass [query tiles, key blocks] of a head and bool of that shape, what its list reads.
    frames: by prompt, uint8 [frames, height, width, 3] dense and under the plan.
    """
    drawn = {
        "heatmap": heatmap(plan, tables.densities(findings)),
        "front": figures.front(findings),
        "predicted": figures.predicted(findings),
        "costs": figures.costs(findings),
        "sensitivity": figures.layers(findings),
        "frames": figures.frames(frames),
    }
    drawn |= {f"map-{number}": attention_map(*pair, title) for number, (title, pair) in enumerate(maps.items())}
    pictures = {name: save(figure, folder / f"{name}.png") for name, figure in drawn.items() if figure is not None}
    # Of an earlier search in this folder.
    for old in [*folder.glob("map-*.png"), *(folder / f"{name}.png" for name in drawn)]:
        if old.stem not in pictures:
            old.unlink(missing_ok=True)
    with whole(folder / REPORT) as part:
        part.write_text(_page(findings, plan, pictures, list(maps)), encoding="utf-8")
    return folder / REPORT


def _page(findings: Findings, plan: Plan, pictures: dict[str, Path], titles: list[str]) -> str:
    def image(name: str, alt: str) -> str:
        if name not in pictures:
            return ""
        data = base64.b64encode(pictures[name].read_bytes()).decode()
        return f"<img alt='{escape(alt)}' src='data:image/png;base64,{data}'>"

    maps = "".join(image(f"map-{number}", title) for number, title in enumerate(titles))
    both = image("predicted", "predicted and measured seconds of the plans that were run")
    both += image("costs", "the cost model against what it was fitted to")
    parts = [
        f"<h1>A plan for {escape(str(findings.shape))}</h1>",
        _note(". ".join(one.rstrip(".") for one in (plan.name, plan.note) if one) + "."),
        _table(tables.headline(findings)),
        "<h2>What the heads do</h2>",
        image("heatmap", "layers down, heads across: family and density of each head"),
        _table(tables.layers(findings, plan)),
        _note(
            "Density: the mean share of a list's rows, as measured while calibrating. Error: the layer's part of the "
            "plan's sum. Sensitivity: how far the final prediction moves per unit of relative error in the layer."
        ),
        "<h2>What they look at, and what is read of it</h2>" if maps else "",
        maps,
        "<h2>Time against error</h2>",
        image("front", "the front of time against error, and each candidate alone"),
        _note(tables.best_alone(findings)),
        "<h2>How much each layer matters</h2>",
        image("sensitivity", "how far an error of each layer moves the prediction"),
        "<h2>Proof, on prompts that the search never saw</h2>",
        _table(tables.proofs(findings)) if findings.proofs else _note("No plan of this search was proved."),
        f"<div class='pair'>{both}</div>",
        "<h3>What the cost model leaves over</h3>" + _table(tables.residuals(findings)) if findings.costs else "",
        "<h2>The same prompts and seeds, dense and under the plan</h2>" if "frames" in pictures else "",
        image("frames", "frames of each prompt, dense above, plan below"),
        "<h2>What was captured, and where</h2>",
        _table(tables.circumstances(findings)),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(plan.name or 'A plan')}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _note(text: str) -> str:
    return f"<p class='note'>{escape(text)}</p>"


def _table(rows: tables.Rows) -> str:
    """The first row is the columns' head, unless all of it is empty; the first cell of each row is the row's."""
    head, *body = rows
    top = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in head)
    lines = (
        f"<tr><th scope='row'>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for first, *cells in body
    )
    start = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f"<div class='wide'><table>{start}<tbody>{''.join(lines)}</tbody></table></div>"
