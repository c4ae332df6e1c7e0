"""index.html: a batch's videos and images on one page, with links that hold wherever the folder goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from ..media import whole
from .manifest import SHEET
from .rows import BadRow

_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --text: #1b1b1b; --soft: #5c5c5c; --page: #fafafa; --card: #fff; --line: #ddd; --bad: #a3210f }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #ececec; --soft: #a5a5a5; --page: #141414; --card: #1e1e1e; --line: #383838; --bad: #ff8f7a }}
}}
body {{ margin: 1.5rem; font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--page) }}
main {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)) }}
figure {{ margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px; overflow: hidden;
  content-visibility: auto; contain-intrinsic-size: auto 18rem }}
video, img {{ display: block; width: 100%; height: auto; background: #000 }}
figcaption {{ padding: .6rem .7rem; overflow-wrap: anywhere }}
small, small a {{ color: var(--soft) }}
.bad {{ color: var(--bad) }}
</style>
<h1>{title}</h1>
"""


def write_sheet(folder: Path, entries: Iterable[Mapping[str, Any]], bad: Iterable[BadRow]) -> Path:
    """Write the page, whole or not at all; every item done in the folder, then what failed and why."""
    ordered = sorted(entries, key=lambda entry: (entry.get("lines") or [0], entry.get("seed") or 0, entry["name"]))
    done = [entry for entry in ordered if entry["status"] == "done"]
    wrong = [f"{_asked(entry)}: {entry.get('error')}" for entry in ordered if entry["status"] == "failed"]
    wrong += map(str, bad)
    page = [_HEAD.format(title=escape(f"{folder.resolve().name}: {len(done)} made"))]
    if wrong:
        page += [f'<h2>{len(wrong)} failed</h2>\n<ul class="bad">\n']
        page += [f"<li>{escape(line)}</li>\n" for line in wrong]
        page += ["</ul>\n"]
    page += ["<main>\n", *map(_figure, done), "</main>\n</html>\n"]
    path = folder / SHEET
    with whole(path) as part:
        part.write_text("".join(page), encoding="utf-8")
    return path


def _asked(entry: Mapping[str, Any]) -> str:
    return f"“{entry.get('prompt')}”, seed {entry.get('seed')}"


def _figure(entry: Mapping[str, Any]) -> str:
    name, prompt = escape(entry["name"]), escape(str(entry.get("prompt")))
    if entry["name"].endswith(".mp4"):
        shown = f'<video src="{name}" controls loop muted playsinline preload="metadata"></video>'
    else:
        shown = f'<a href="{name}"><img src="{name}" alt="{prompt}" loading="lazy"></a>'
    sizes = "x".join(str(entry[side]) for side in ("frames", "height", "width") if entry.get(side))
    told = [f"seed {entry.get('seed')}", sizes]
    if entry.get("seconds"):
        told.append(f"{entry['seconds']:.1f} s")
    if entry.get("density", 1) < 1:
        told.append(f"density {entry['density']:.0%}")
    facts = escape(" · ".join(filter(None, told)))
    return (
        f"<figure>{shown}<figcaption>{prompt}<br>"
        f'<small>{facts} · <a href="{name}.json">record</a></small></figcaption></figure>\n'
    )
