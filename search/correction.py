"""Whether a model's runs can keep what makes up for the keys that lists leave out: a vector for every query."""

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
    """The correction that a run of one video can keep, "residual" or "none", and why.

    Counted are the visual tokens of all heads; text beside them is a few percent more.
    """
    _, grid = complete(pipe, Request(prompt=prompt, seed=0, **settings), model_settings(pipe), compare=False)
    if grid is None:
        return "none", "none: this pipeline does not tell its sequence's length beforehand"
    queries = math.prod(grid) * shape.layers * shape.heads
    size = queries * (shape.head_dim * next(transformer.parameters()).element_size() + 2)
    if size > MOST:
        return (
            "none",
            f"none: residuals take {in_bytes(size)} a guidance branch, more than the {in_bytes(MOST)} for them",
        )
    return "residual", f"residual: {in_bytes(size)} a guidance branch"
