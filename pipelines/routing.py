"""What runs between a transformer's gates and a plan: step, branch and grid of each forward, and what became of it."""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.grid import TokenGrid
from ..attention.run import PlanRun
from .clock import RunClock, wrap_method
from .hook import SLOT_ATTRIBUTE, Call, Gates, attention_modules, clear_slot
from .models import ModelRow, Shape


@dataclass(kw_only=True)
class StepRecord:
    """One denoising step of the latest run, as one transformer saw it."""

    step: int
    timestep: float
    noise_level: float
    branches: list[str] = field(default_factory=list)
    sparse_calls: int = 0
    dense_calls: int = 0
    attention_seconds: float = 0.0
    seconds: float = 0.0


@functools.cache
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def key_log_weight(mask: Tensor, tokens: int) -> Tensor | None:
    """A mask over keys alone, [B|1, H|1, 1, N] (bool, or added to logits), as [B|1, H|1, N] float32; else None."""
    if mask.ndim != 4 or mask.shape[2] != 1 or mask.shape[3] != tokens:
        return None
    mask = mask[:, :, 0]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
    return mask.float()


class TransformerRun:
    """The state of one transformer under a plan; the router of its gates."""

    def __init__(self, transformer: nn.Module, row: ModelRow, plan_run: PlanRun, clock: RunClock, *, timing: bool):
        self.row, self.plan_run, self.clock, self.timing = row, plan_run, clock, timing
        config: Any = transformer.config
        self.config: dict[str, Any] = dict(config)
        modules = attention_modules(transformer)
        self.paths = row.layers(modules)
        # Calls of each layer that no plan could take, by the reason.
        self._stock = [Counter[str]() for _ in self.paths]
        self._planned_rows = self._stock_rows = 0
        self.steps: list[StepRecord] = []
        self._run = 0
        self._context: dict[str, Any] | None = None
        self._texts: dict[tuple[Any, ...], str] = {}
        self._shapes: tuple[Shape, ...] | None = None
        self._grids: dict[tuple[Any, ...], TokenGrid | None] = {}
        self._branch = ""
        self._nth_call = 0
        self._suspects: list[tuple[int, Tensor]] = []
        self._entered = 0.0
        self._gates = Gates(self, [modules[path] for path in self.paths])
        disable: Any = torch.compiler.disable
        self._hooks = [
            transformer.register_forward_pre_hook(disable(self._enter), with_kwargs=True),
            transformer.register_forward_hook(disable(self._leave), always_call=True),
        ]
        self._unwrap = None
        if callable(getattr(transformer, "cache_context", None)):
            self._unwrap = wrap_method(transformer, "cache_context", self._cache_context)

    def remove(self) -> None:
        """Take hooks, gates and wrappers off; the records stay readable."""
        clear_slot()
        for hook in self._hooks:
            hook.remove()
        self._gates.remove()
        if self._unwrap is not None:
            self._unwrap()

    @contextmanager
    def _cache_context(self, method: Callable[..., Any], name: str, *args: Any, **kwargs: Any):
        before = self._context
        self._context = {"name": name, **kwargs}
        try:
            with method(name, *args, **kwargs) as value:
                yield value
        finally:
            self._context = before
            clear_slot()

    def _enter(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        clear_slot()
        self._suspects.clear()
        arguments = {**dict(zip(_parameters(type(transformer)), args, strict=False)), **kwargs}
        # Wan 2.2 TI2V sends one timestep per token, with zeros for the frame that is given.
        timestep = float(torch.as_tensor(arguments[self.row.timestep]).max())
        context = self._context or {}
        self.clock.follow()
        self._gates.follow()
        train = self.clock.num_train_timesteps
        noise_level = self.row.noise_level(timestep, train)
        step = self.clock.tick(noise_level * train, context.get("step_index"))
        if self._run != self.clock.run:
            self._begin()
        if not self.steps or self.steps[-1].step != step or self.steps[-1].timestep != timestep:
            self.steps.append(StepRecord(step=step, timestep=timestep, noise_level=noise_level))
            self._nth_call = 0
        self._branch = context.get("name") or self._branch_of(arguments.get(self.row.text))
        self.steps[-1].branches.append(self._branch)
        self._nth_call += 1
        self._shapes = self.row.shapes(self.config, arguments)
        self._entered = self._now()

    def _begin(self) -> None:
        self._run = self.clock.run
        train = self.clock.num_train_timesteps
        self.plan_run.begin([t / train for t in self.clock.timesteps] or None)
        self.steps.clear()
        self._texts.clear()
        self._planned_rows = self._stock_rows = 0
        for reasons in self._stock:
            reasons.clear()

    def _branch_of(self, text: Any) -> str:
        if not isinstance(text, Tensor):
            return "text 0"
        # Pipelines without cache_context hand the same text over at each step; one that recasts it is told by order.
        return self._texts.setdefault((text.data_ptr(), tuple(text.shape)), f"text {self._nth_call}")

    def _leave(self, _transformer: nn.Module, _arguments: Any, _output: Any) -> None:
        clear_slot()
        if self.steps:
            self.steps[-1].seconds += self._now() - self._entered
        # One read for the whole forward: reading a flag per layer would stall an accelerator per layer.
        suspects, self._suspects = self._suspects, []
        for index, total in suspects:
            self._check_finite(index, total)

    def _check_finite(self, index: int, total: Tensor) -> None:
        if not math.isfinite(total.item()) and self.steps:
            raise ValueError(
                f"layer {index} ({self.paths[index]}) was given NaN or infinity at step {self.steps[-1].step}"
                f" (timestep {self.steps[-1].timestep:g}): check the latents and the prompt's embedding, or use a"
                " dtype with a wider range"
            )

    def _grid(self, tokens: int) -> TokenGrid | None:
        key = (self._shapes, tokens)
        if key not in self._grids:
            self._grids[key] = None if self._shapes is None else self.row.token_grid(self._shapes, tokens)
        return self._grids[key]

    def _planned(self, index: int, call: Call) -> Tensor | str | None:
        """The plan's output for this call, None where the plan wants it dense, or why no plan can take it."""
        if not self.steps:
            return "called outside the transformer's forward"
        if call.unusual:
            return f"{call.unusual} given, which only the chosen attention backend understands"
        if call.causal:
            return "causal attention"
        if call.dropout:
            return "attention with dropout"
        if call.grouped or call.key.shape[1] != call.query.shape[1]:
            return "grouped-query attention"
        if call.key.shape[2] != call.query.shape[2]:
            return f"not self-attention ({call.query.shape[2]} queries, {call.key.shape[2]} keys)"
        grid = self._grid(call.query.shape[2])
        if grid is None:
            return f"grid unknown: {call.query.shape[2]} tokens do not follow from the forward's arguments"
        weight = None
        if call.mask is not None:
            weight = key_log_weight(call.mask, call.key.shape[2])
            if weight is None:
                return f"the mask {list(call.mask.shape)} is not a key mask"
        now = self.steps[-1]
        out = self.plan_run.attend_layer(
            call.query,
            call.key,
            call.value,
            layer=index,
            noise_level=now.noise_level,
            step=now.step,
            branch=self._branch,
            grid=grid,
            key_log_weight=weight,
            scale=call.scale,
        )
        self._planned_rows += _rows(call)
        return out

    def in_run(self, number: int) -> bool:
        """Whether this transformer has taken part in that run of the clock."""
        return number > 0 and self._run == number

    @property
    def rows(self) -> float:
        """Rows that dense attention would have touched in the visual self-attention calls of the run."""
        return self._planned_rows + self._stock_rows

    @property
    def rows_touched(self) -> float:
        return self.plan_run.density() * self._planned_rows + self._stock_rows

    def describe(self, index: int) -> str:
        """What became of a layer in the latest run: sparse, dense, or why not."""
        status = self.plan_run.status()[index]
        parts = []
        if status.state == "sparse":
            parts.append(f"sparse, {status.calls - status.dense_calls} calls at list density {status.list_density:.1%}")
        if status.dense_calls:
            parts.append(f"dense, {status.reason}")
        parts += [f"dense, {reason} ({count} calls)" for reason, count in self._stock[index].items()]
        if not parts:
            absent = (
                "not called (skipped by a cache, or its processor is out of reach)" if self.steps else "not called yet"
            )
            parts.append(absent + (f"; dense, {status.reason}" if status.reason else ""))
        return f"({self.paths[index]}): {'; '.join(parts)}"

    def route(self, index: int, call: Call, stock: Callable[[], Tensor], *, token_dim: int) -> Tensor:
        started = self._now()
        total = call.query.detach().sum(dtype=torch.float32)
        if total.device.type == "cpu":
            self._check_finite(index, total)
        else:
            self._suspects.append((index, total))
        outcome = self._planned(index, call)
        if isinstance(outcome, str):
            self._stock[index][outcome] += 1
            if call.query.shape[2] == call.key.shape[2]:
                self._stock_rows += _rows(call)
        sparse = isinstance(outcome, Tensor)
        out = outcome if isinstance(outcome, Tensor) else stock()
        if sparse and token_dim == 1:
            out = out.transpose(1, 2)
        if self.steps:
            now = self.steps[-1]
            now.sparse_calls += sparse
            now.dense_calls += not sparse
            now.attention_seconds += self._now() - started
        return out

    def _now(self) -> float:
        if not self.timing:
            return 0.0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def _rows(call: Call) -> int:
    return call.query.shape[0] * call.query.shape[1] * call.query.shape[2] * call.key.shape[2]


def attached(transformer: nn.Module) -> bool:
    """Whether a plan runs this transformer already."""
    return any(SLOT_ATTRIBUTE in module.__dict__ for module in transformer.modules())
