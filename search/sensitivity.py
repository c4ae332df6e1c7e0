"""How much a relative error of one layer's attention moves the model's predictions, and with them the video."""

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
from ..attention.schedule import log_signal
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


def middle_steps(noise_levels: Sequence[float], sparse: Sequence[int], count: int) -> list[int]:
    """So many of the sparse steps that stand, evenly, for what errors do to the video.

    A step at noise level s moves the latents by the fall of s, but what goes wrong early grows while the video takes
    shape, about as its signal 1 - s does. Layers of `shapes` perturbed in a stretch of steps of a whole run moved the
    finished latents by 0.5 to 0.9 times the change of the predictions there times the growth of log(1 - s), whether
    early or late. So the way that log(1 - s) goes is cut into equal parts, and the steps in their middles are taken;
    where two fall together, the next.
    """
    if not sparse:
        return []
    signal = [log_signal(level) for level in (*noise_levels, 0.0)]
    way = np.cumsum([0.0, *(max(signal[step + 1] - signal[step], 1e-9) for step in sparse)])
    count = min(count, len(sparse))
    places = np.searchsorted(way, (np.arange(count) + 0.5) / count * way[-1]) - 1
    # Each at least one behind the last, and no further than leaves room for the others.
    apart = np.maximum.accumulate(places - np.arange(count)).clip(max=len(sparse) - count) + np.arange(count)
    return [sparse[place] for place in apart.tolist()]


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


def forwards_within(passes: int, layers: int) -> int:
    """Of how many forwards sensitivities can be measured: each takes a pass as it is, and one for every layer."""
    return max(1, passes // (layers + 1))


def sensitivities(
    pipe: Any,
    transformer: nn.Module,
    forwards: Sequence[Forward],
    passes: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """For each layer ‖change of the prediction‖ / ‖prediction‖, per unit of relative error of its attention's output.

    Each forward is run as it is, and once for every layer; the mean over forwards counts. Of a model with more layers
    than `passes` allow, those measured are spread from the first to the last, and the others take what lies between
    their neighbours' logarithms.
    """
    shape = model_shape(transformer)
    count = min(shape.layers, max(passes // len(forwards) - 1, 2))
    measured = np.unique(np.linspace(0, shape.layers - 1, count).round().astype(int)).tolist()
    run = _Perturbed(Plan.dense(grid=(1, 1, 1), **asdict(shape)))
    clock = RunClock(pipe)
    hooks = TransformerRun(transformer, row_of(transformer), run.plan, run, clock, timing=False)
    moved = dict.fromkeys(measured, 0.0)
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
                    change = float((other - base).norm() / base.norm() / EPSILON)
                    moved[layer] += change / len(forwards)
                report(number * (len(measured) + 1) + place + 1, total)
    finally:
        hooks.remove()
        clock.release()
    logarithms = np.log([max(change, 1e-12) for change in moved.values()])
    return np.exp(np.interp(np.arange(shape.layers), measured, logarithms)).tolist()


def _prediction(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple | list) else output.sample
    return found[0] if isinstance(found, list) else found
