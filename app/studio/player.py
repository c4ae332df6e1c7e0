"""A player's HTML: one video, or two in step. `pages/player.js` moves it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def player(items: Sequence[tuple[str, str]], fps: float, alt: str = "") -> str:
    """One or two videos or pictures, given as (address, label), with one set of controls and downloads."""
    if not items:
        return ""
    still = items[0][0].partition("?")[0].endswith(".png")
    screens = "".join(_screen(address, label, alt, still) for address, label in items)
    links = "".join(
        f"<a class='zg-link' href='{escape(address, quote=True)}' download>Download{which}</a>"
        for (address, label), which in zip(items, _which(items), strict=True)
    )
    controls = "" if still else _CONTROLS
    return (
        f"<div class='zg-player' data-fps='{fps:g}'><div class='zg-screens zg-{len(items)}'>{screens}</div>"
        f"{controls}<div class='zg-links'>{links}</div></div>"
    )


def _which(items: Sequence[tuple[str, str]]) -> list[str]:
    return [f" {escape(label.partition(' · ')[0])}" if len(items) > 1 else "" for _, label in items]


def _screen(address: str, label: str, alt: str, still: bool) -> str:
    source, about = escape(address, quote=True), escape(f"{label}: {alt}", quote=True)
    if still:
        picture = f"<img src='{source}' alt='{about}'>"
    else:
        picture = f"<video src='{source}' aria-label='{about}' muted playsinline preload='auto'></video>"
    return f"<figure>{picture}<figcaption>{escape(label)}</figcaption></figure>"


_CONTROLS = """<div class='zg-controls' role='group' aria-label='Player'>
<button type='button' data-act='play' aria-label='Play'>▶</button>
<button type='button' data-act='back' aria-label='One frame back'>&lsaquo;</button>
<button type='button' data-act='on' aria-label='One frame on'>&rsaquo;</button>
<input type='range' min='0' max='1000' value='0' aria-label='Position'>
<span class='zg-time'></span>
<select aria-label='Speed'><option value='0.25'>¼&times;</option><option value='0.5'>½&times;</option>
<option value='1' selected>1&times;</option><option value='2'>2&times;</option></select></div>"""
