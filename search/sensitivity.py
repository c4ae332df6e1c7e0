"""How much a relative error of one layer's attention moves the model's predictions, and with them the video."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
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
    """The arguments of one forward of a transformer, and the denoising step that it was made at."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    step: int = 0


@contextmanager
def kept_forwards(transformer: nn.Module, wanted: Callable[[], Collection[int]], step: Callable[[], int]) -> Any:
    """Within it, the first forward at each wanted step is kept, in the list that it gives."""
    found: list[Forward] = []
    seen: set[int] = set()

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        now = step()
        if now in wanted() and now not in seen:
            seen.add(now)
            found.append(Forward(args=args, kwargs=dict(kwargs), step=now))

    hook = transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def step_shares(noise_levels: Sequence[float], sparse: Sequence[int], measured: Sequence[int]) -> dict[int, float]:
    """How much an error of the prediction at each measured step weighs in the finished video: shares that add up to 1.

    A step at noise level s moves the latents by the fall of s, but what goes wrong early grows while the video takes
    shape, about as its signal 1 - s does. Layers of `shapes` perturbed in a stretch of steps of a whole run moved the
    finished latents by 0.5 to 0.9 times the change of the predictions there times the growth of log(1 - s), whether
    early or late. So that growth is a step's weight, and every sparse step gives its own to the nearest measured one.
    """
    signal = [max(1 - level, 1e-3) for level in (*noise_levels, 0.0)]
    weights = dict.fromkeys(measured, 0.0)
    for step in sparse:
        nearest = min(measured, key=lambda one: (abs(one - step), one))
        weights[nearest] += float(np.log(signal[step + 1] / signal[step]))
    total = sum(weights.values()) or 1.0
    return {step: weight / total for step, weight in weights.items()}


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
    shares: Mapping[int, float],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """For each layer ‖change of the prediction‖ / ‖prediction‖, per unit of relative error of its attention's output.

    Each forward is run as it is, and once for every layer; the mean over forwards counts, each weighed by its step's
    share: see `step_shares`. As many of the forwards are taken as `passes` allow, spread over all, with the shares of
    those beside them. Of a model with too many layers even for one, those measured are spread from the first to the
    last, and the others take what lies between their neighbours' logarithms.
    """
    shape = model_shape(transformer)
    count = min(shape.layers, max(passes - 1, 2))
    measured = np.unique(np.linspace(0, shape.layers - 1, count).round().astype(int)).tolist()
    most = min(len(forwards), max(1, passes // (len(measured) + 1)))
    # Each stands for a stretch of them, from its middle.
    stretches = [list(stretch) for stretch in np.array_split(np.arange(len(forwards)), most)]
    weights = [sum(shares[forwards[number].step] for number in stretch) for stretch in stretches]
    forwards = [forwards[stretch[len(stretch) // 2]] for stretch in stretches]
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
                    moved[layer] += change * weights[number] / sum(weights)
                report(number * (len(measured) + 1) + place + 1, total)
    finally:
        hooks.remove()
        clock.release()
    logarithms = np.log([max(change, 1e-12) for change in moved.values()])
    return np.exp(np.interp(np.arange(shape.layers), measured, logarithms)).tolist()


def _prediction(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple | list) else output.sample
    return found[0] if isinstance(found, list) else found
