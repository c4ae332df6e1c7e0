"""What a model's runs can keep of what makes up for the keys that lists leave out: a vector or two for every query."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..attention.plan import Correction
from ..attention.reuse import MAX_CACHE_BYTES
from ..pipelines.plans import ModelShape
from ..pipelines.request import Request, complete
from ..pipelines.settings import model_settings
from ..pipelines.sizes import in_bytes

MOST = MAX_CACHE_BYTES // 2
"""The other half is for lists."""


def affordable(
    pipe: Any, transformer: nn.Module, shape: ModelShape, prompt: str, settings: Mapping[str, Any]
) -> tuple[Correction, str]:
    """The correction that a run of one video can keep, "trend", "residual" or "none", and why.

    Counted are the visual tokens of all heads; text beside them is a few percent more.
    """
    _, grid = complete(pipe, Request(prompt=prompt, seed=0, **settings), model_settings(pipe), compare=False)
    if grid is None:
        return "none", "none: this pipeline does not tell its sequence's length beforehand"
    queries = math.prod(grid) * shape.layers * shape.heads
    vector = shape.head_dim * next(transformer.parameters()).element_size()
    sizes: dict[Correction, int] = {"trend": queries * (2 * vector + 2), "residual": queries * (vector + 2)}
    for kind, size in sizes.items():
        if size <= MOST:
            return kind, f"{kind}: {in_bytes(size)} a guidance branch"
    least = in_bytes(sizes["residual"])
    return "none", f"none: residuals take {least} a guidance branch, more than the {in_bytes(MOST)} for them"
