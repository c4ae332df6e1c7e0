"""The selectors that the fidelity bench holds against each other, each fitted to a given list density."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..attention.loglinear import LogLinear
from ..attention.precise import Precise
from ..attention.pyramid import Pyramid
from ..attention.rest import Rest
from ..attention.rows import Layout
from ..attention.select import Selector
from ..attention.topk import TopK
from ..attention.window import Window


@dataclass(frozen=True)
class Contender:
    """A way to make lists by the share of the blocks that it may spend.

    make: the selector for a share, before a pooled rest; None where the share is too small for any.
    level0: its lists read nothing but level 0. fitted: their density is no plain function of the share.
    """

    name: str
    make: Callable[[float, Layout], Selector | None]
    rest: Rest = "drop"
    level0: bool = False
    fitted: bool = False


def _loglinear(coverage: str, levels: int | None) -> Callable[[float, Layout], Selector | None]:
    def make(share: float, layout: Layout) -> Selector | None:
        keep = max(1, round(share * layout.blocks))
        return LogLinear(keep=keep, levels=levels, coverage=coverage)  # type: ignore[arg-type]

    return make


def _pyramid(*, all_read: bool) -> Callable[[float, Layout], Selector | None]:
    """The published mix 10 : 5 : 0 : 20 (arXiv 2512.04025), scaled; or with level 8 for all that is left of it."""

    def make(share: float, layout: Layout) -> Selector | None:
        full = min(share, 1.0)
        half = min(share / 2, 1 - full)
        left = 1 - full - half
        return Pyramid(quotas=(full, half, 0.0, left if all_read else min(2 * share, left)))

    return make


def _window(share: float, layout: Layout) -> Selector | None:
    percent = f"{100 * share ** (1 / 3):.4f}%"
    return Window(frames=percent, height=percent, width=percent, border="shift")


CONTENDERS = (
    Contender("topk", lambda share, _: TopK(density=share), level0=True),
    Contender("topk, pooled rest", lambda share, _: TopK(density=share), "pooled"),
    Contender("topk by error, pooled rest", lambda share, _: TopK(density=share, by="error"), "pooled"),
    Contender("precise", lambda share, _: Precise(density=share), level0=True),
    Contender("precise, pooled rest", lambda share, _: Precise(density=share), "pooled"),
    Contender("precise by error, pooled rest", lambda share, _: Precise(density=share, by="error"), "pooled"),
    Contender("loglinear", _loglinear("partition", None), fitted=True),
    Contender("loglinear, one level", _loglinear("partition", 1), fitted=True),
    Contender("loglinear overlap", _loglinear("overlap", None), fitted=True),
    Contender("pyramid", _pyramid(all_read=False), fitted=True),
    Contender("pyramid, pooled rest", _pyramid(all_read=False), "pooled", fitted=True),
    Contender("pyramid, nothing left out", _pyramid(all_read=True), fitted=True),
    Contender("window", _window, level0=True, fitted=True),
    Contender("window, pooled rest", _window, "pooled", fitted=True),
)
