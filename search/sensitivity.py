"""How much a relative error of one layer's attention moves the model's prediction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..attention.plan import Plan
from ..attention.run import PlanRun
from ..pipelines.clock import RunClock
from ..pipelines.models import row_of
from ..pipelines.plans import model_shape
from ..pipelines.routing import TransformerRun

EPSILON = 0.05
"""Relative size of the perturbation: far above rounding in bfloat16, small enough to act in proportion."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """The arguments of one forward of a transformer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def kept_forwards(transformer: nn.Module, wanted: Callable[[], Collection[int]], step: Callable[[], int]) -> Any:
    """Within it, the first forward at each wanted step is kept, in the list that it gives."""
    found: list[Forward] = []
    seen: set[int] = set()

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        now = step()
        if now in wanted() and now not in seen:
            seen.add(now)
            found.append(Forward(args=args, kwargs=dict(kwargs)))

    hook = transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


class _Perturbed(PlanRun):
    """Dense attention, with noise of a given relative size on one layer's output."""

    layer: int | None = None

    def attend_layer(self, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor | None:
        layer = call["layer"]
        if layer != self.layer:
            return super().attend_layer(query, key, value, **call)
        mask = call.get("key_log_weight")
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if mask is None else mask[:, :, None].to(query.dtype),
            scale=call.get("scale"),
        )
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(layer)).to(out)
        # Each head's own size, so that all of them are off by the same share.
        sizes = [tensor.float().square().sum((2, 3), keepdim=True).sqrt() for tensor in (out, noise)]
        return out + noise * (EPSILON * sizes[0] / sizes[1].clamp(min=1e-12)).to(out.dtype)


def sensitivities(
    pipe: Any,
    transformer: nn.Module,
    forwards: Sequence[Forward],
    passes: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """For each layer ‖change of the prediction‖ / ‖prediction‖, per unit of relative error of its attention's output.

    Each forward is run as it is, and once for every layer; the root mean square over forwards counts. As many of the
    forwards are taken as `passes` allow. Of a model with too many layers even for one, those measured are spread from
    the first to the last, and the others take what lies between their neighbours' logarithms.
    """
    shape = model_shape(transformer)
    count = min(shape.layers, max(passes - 1, 2))
    measured = np.unique(np.linspace(0, shape.layers - 1, count).round().astype(int)).tolist()
    forwards = forwards[: max(1, passes // (len(measured) + 1))]
    run = _Perturbed(Plan.dense(grid=(1, 1, 1), **asdict(shape)))
    clock = RunClock(pipe)
    hooks = TransformerRun(transformer, row_of(transformer), run.plan, run, clock, timing=False)
    squares = dict.fromkeys(measured, 0.0)
    total = len(forwards) * (len(measured) + 1)
    try:
        for number, forward in enumerate(forwards):
            base: Tensor | None = None
            for place, layer in enumerate((None, *measured)):
                run.layer = layer
                with torch.no_grad():
                    other = _prediction(transformer(*forward.args, **forward.kwargs)).float()
                if base is None or layer is None:
                    base = other
                else:
                    squares[layer] += float(((other - base).norm() / base.norm() / EPSILON) ** 2)
                report(number * (len(measured) + 1) + place + 1, total)
    finally:
        hooks.remove()
        clock.release()
    moved = [max((square / len(forwards)) ** 0.5, 1e-12) for square in squares.values()]
    return np.exp(np.interp(np.arange(shape.layers), measured, np.log(moved))).tolist()


def _prediction(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple | list) else output.sample
    return found[0] if isinstance(found, list) else found
