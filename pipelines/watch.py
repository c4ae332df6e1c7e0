"""What is seen of a run from outside: its steps as they end, its tokens, and the first NaN."""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .models import MODELS
from .modules import attention_modules
from .plans import TRANSFORMERS
from .preview import finished_estimate
from .row import ModelRow


@dataclass(frozen=True, kw_only=True, eq=False)
class Moment:
    """A run between two denoising steps.

    stage: "denoise", or "dense" for the run that is compared with. done, total: steps. latents: as the pipeline holds
    them. estimate: what the finished latents would be if the noise went on leaving in a straight line; None before the
    second step and for schedulers that do not work that way.
    """

    stage: str
    done: int
    total: int
    latents: Tensor
    estimate: Tensor | None


class Steering:
    """What a caller may do to a run under way; this one lets it run.

    The time that `between` takes is not counted as the run's. `layer` is called before every attention layer.
    """

    def between(self, moment: Moment) -> bool:
        """Go on? False ends the denoising here: what there is is decoded and kept. Raise to end without anything."""
        return True

    def layer(self) -> None:
        """Raise to end the run in the middle of a step."""


class Watch:
    """Watches one run of a pipeline; a context manager.

    report: called with the steps done and the steps there are. layers: also look at what every attention layer is
    given (a plan that is attached does that itself). steering: what may end the run early.
    tokens: of the visual sequence, None where the transformer's class has no row in the table.
    aside: seconds spent in `Steering.between`. ended: the denoising was ended early and what there was is kept.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        report: Callable[[int, int], None],
        layers: bool,
        stage: str = "denoise",
        steering: Steering | None = None,
    ) -> None:
        self.pipe, self.report, self.layers = pipe, report, layers
        self.stage, self.steering = stage, steering
        self.tokens: int | None = None
        self.step = 0
        self.aside = 0.0
        self.ended = False
        self._before: Tensor | None = None
        self._sums: list[tuple[int, str, Tensor]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Watch:
        for name in TRANSFORMERS:
            module = getattr(self.pipe, name, None)
            if isinstance(module, nn.Module):
                self._follow(getattr(module, "_orig_mod", module))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def arguments(self) -> dict[str, Any]:
        """What the pipeline's call is to be given for this."""
        if "callback_on_step_end" not in inspect.signature(self.pipe.__call__).parameters:
            return {}
        return {"callback_on_step_end": self._end_of_step, "callback_on_step_end_tensor_inputs": ["latents"]}

    def _follow(self, transformer: nn.Module) -> None:
        row = MODELS.get(type(transformer).__name__)
        if row is not None:
            hook = functools.partial(self._measure, row)
            self._hooks.append(transformer.register_forward_pre_hook(hook, with_kwargs=True))
        modules = attention_modules(transformer)
        if self.steering is not None:
            check = self.steering.layer
            self._hooks += [module.register_forward_pre_hook(lambda *_: check()) for module in modules.values()]
        if self.layers:
            for index, path in enumerate(row.layers(modules) if row else modules):
                hook = functools.partial(self._sum, index, path)
                self._hooks.append(modules[path].register_forward_pre_hook(hook, with_kwargs=True))

    def _measure(self, row: ModelRow, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(transformer).forward).parameters)[1:]
        config: Any = transformer.config
        shapes = row.tokens.visual(config, {**dict(zip(names, args, strict=False)), **kwargs})
        if not isinstance(shapes, str):
            self.tokens = sum(math.prod(shape) for shape in shapes)

    def _sum(self, index: int, path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor):
            # Read at the step's end: reading each would stall an accelerator at each layer.
            self._sums.append((index, path, hidden.detach().sum(dtype=torch.float32)))

    def _end_of_step(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        sums, self._sums = self._sums, []
        at = f"step {step} (timestep {float(timestep):g})"
        advice = "check the model's weights and the prompt's embedding, or use a dtype with a wider range"
        for index, path, total in sums:
            if not math.isfinite(total.item()):
                raise ValueError(f"layer {index} ({path}) was given NaN or infinity at {at}: {advice}")
        latents = tensors.get("latents")
        if isinstance(latents, Tensor) and not math.isfinite(latents.sum(dtype=torch.float32).item()):
            raise ValueError(f"the latents hold NaN or infinity behind the last layer at {at}: {advice}")
        self.step = step + 1
        total = int(getattr(pipe, "num_timesteps", 0) or self.step)
        self.report(self.step, total)
        if self.steering is None or not isinstance(latents, Tensor):
            return tensors
        before, self._before = self._before, latents.detach().clone()
        started = time.perf_counter()
        estimate = None if before is None else finished_estimate(pipe.scheduler, before, latents, self.step)
        moment = Moment(stage=self.stage, done=self.step, total=total, latents=latents, estimate=estimate)
        going = self.steering.between(moment)
        self.aside += time.perf_counter() - started
        if going or self.step == total:
            return tensors
        if not hasattr(pipe, "_interrupt"):
            raise ValueError(f"{type(pipe).__name__} can't end early and keep what there is: let it run, or stop it")
        # Diffusers' own way: the remaining steps are passed over and the latents decoded.
        pipe._interrupt = self.ended = True
        return tensors if estimate is None else {**tensors, "latents": estimate.to(latents.dtype)}
