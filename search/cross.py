"""Whether our own kernel runs a model's cross-attention faster than the attention chosen in diffusers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..pipelines.cross import CrossRun, cross_modules
from ..pipelines.models import row_of
from .sensitivity import Forward

RUNS = 3
PATIENCE = 30.0
"""Seconds after which one forward of each has to do."""
WORTH = 0.98
"""Share of a forward's time that it has to come down to: less is noise."""


def cross_by(transformer: nn.Module, forwards: Sequence[Forward]) -> Literal["own"] | None:
    """Who a plan is to let run cross-attention, by the median time of whole forwards, one of each in turn.

    None where there is no such attention, and where our kernel makes no forward faster.
    """
    row = row_of(transformer)
    if not forwards or not cross_modules(transformer, row):
        return None
    stock, own, calls = [], [], 0
    spent = _seconds(transformer, forwards[0])
    while len(own) < RUNS and (not own or spent < PATIENCE):
        stock.append(_seconds(transformer, forwards[0]))
        run = CrossRun(transformer, row)
        try:
            own.append(_seconds(transformer, forwards[0]))
        finally:
            run.remove()
        calls += run.calls
        spent += stock[-1] + own[-1]
    return "own" if calls and statistics.median(own) < WORTH * statistics.median(stock) else None


def _seconds(transformer: Any, forward: Forward) -> float:
    device = next(transformer.parameters()).device
    started = time.perf_counter()
    with torch.no_grad():
        transformer(*forward.args, **forward.kwargs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
