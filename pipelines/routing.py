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
from ..attention.plan import Plan
from ..attention.run import PlanRun
from .calls import Call
from .clock import RunClock, wrap_method
from .hook import SLOT_ATTRIBUTE, Gates, clear_slot
from .masks import key_log_weight, with_exact_text
from .modules import attention_modules
from .row import Measure, ModelRow
from .ulysses import Share, deal, interleaved, share_of


@dataclass(kw_only=True)
class StepRecord:
    """One denoising step of the latest run, as one transformer saw it."""

    step: int
    timestep: float
    noise_level: float
    branches: list[str] = field(default_factory=list)
    sparse_calls: int = 0
    dense_calls: int = 0
    lists_built: int = 0
    attention_seconds: float = 0.0
    seconds: float = 0.0


@functools.cache
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


class TransformerRun:
    """The state of one transformer under a plan; the router of its gates."""

    def __init__(
        self, transformer: nn.Module, row: ModelRow, plan: Plan, plan_run: PlanRun, clock: RunClock, *, timing: bool
    ):
        self.row, self.plan_run, self.clock, self.timing = row, plan_run, clock, timing
        self._whole_plan = plan
        self._share = share_of(getattr(transformer, "_parallel_config", None))
        config: Any = transformer.config
        self.config: dict[str, Any] = dict(config)
        modules = attention_modules(transformer)
        self.paths = row.layers(modules)
        plan_run.name_layers(self.paths)
        kinds = [row.tokens_of(path) for path in self.paths]
        # Most classes have one kind of sequence; each is measured once a forward.
        self._kinds = list(dict.fromkeys(kinds))
        self._kind_of = [self._kinds.index(kind) for kind in kinds]
        # Calls of each layer that no plan could take, by the reason.
        self._stock = [Counter[str]() for _ in self.paths]
        self._planned_rows = self._stock_rows = 0
        self.steps: list[StepRecord] = []
        self._run = 0
        self._context: dict[str, Any] | None = None
        self._texts: dict[tuple[Any, ...], str] = {}
        self._measures: list[Measure] = []
        self._grids: dict[tuple[Measure, int], TokenGrid | str] = {}
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
        context = self._context or {}
        self.clock.follow()
        self._gates.follow()
        train = self.clock.num_train_timesteps
        noise_level = self.clock.noise_level(self.row.noise_level(arguments[self.row.timestep], train))
        timestep = noise_level * train
        step = self.clock.tick(timestep, context.get("step_index"))
        if self._run != self.clock.run:
            self._begin()
        if not self.steps or self.steps[-1].step != step or self.steps[-1].timestep != timestep:
            self.steps.append(StepRecord(step=step, timestep=timestep, noise_level=noise_level))
            self._nth_call = 0
        self._branch = context.get("name") or self._branch_of(arguments.get(self.row.text))
        self.steps[-1].branches.append(self._branch)
        self._nth_call += 1
        self._measures = [kind.measure(self.config, arguments) for kind in self._kinds]
        self._entered = self._now()

    def _begin(self) -> None:
        self._run = self.clock.run
        self.plan_run.begin(self.clock.noise_levels or None)
        self.steps.clear()
        self._texts.clear()
        self._planned_rows = self._stock_rows = 0
        for reasons in self._stock:
            reasons.clear()

    def _branch_of(self, text: Any) -> str:
        if isinstance(text, list | tuple) and text:
            text = text[0]
        if not isinstance(text, Tensor):
            return "text 0"
        # Pipelines without cache_context hand the same text over at each step; one that recasts it is told by order.
        return self._texts.setdefault((text.data_ptr(), tuple(text.shape)), f"text {self._nth_call}")

    def _leave(self, _transformer: nn.Module, _arguments: Any, output: Any) -> None:
        clear_slot()
        if output is None:
            # The forward raised: a run that ends here leaves no list behind.
            self.plan_run.end()
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

    def _grid(self, index: int, tokens: int) -> TokenGrid | str:
        key = (self._measures[self._kind_of[index]], tokens)
        if key not in self._grids:
            grid = key[0].token_grid(tokens)
            if self._share is not None and isinstance(grid, TokenGrid):
                grid = interleaved(grid, self._share.world)
            self._grids[key] = grid
        return self._grids[key]

    def deal(self, index: int, heads: int, share: Share) -> list[int]:
        if share != self._share:
            raise ValueError("context parallelism was changed after attach: detach, and attach again")
        return deal(self._whole_plan.layers[index], heads, share.world)

    def _planned(self, index: int, call: Call) -> Tensor | str | None:
        """The plan's output for this call, None where the plan wants it dense, or why no plan can take it."""
        if not self.steps:
            return "called outside the transformer's forward"
        if call.share != self._share:
            return "its processor knows nothing of the context parallelism that is on"
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
        grid = self._grid(index, call.query.shape[2])
        if isinstance(grid, str):
            return grid
        weight = None
        if call.mask is not None:
            query = grid.visual[0].runs[0][0] if self.row.mask == "shared" else None
            weight = key_log_weight(call.mask, call.key.shape[2], query=query)
            if weight is None:
                return f"the mask {list(call.mask.shape)} is not a key mask"
        now = self.steps[-1]
        built = self.plan_run.lists.built
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
        now.lists_built += self.plan_run.lists.built - built
        self._planned_rows += _rows(call)
        if out is not None and call.mask is not None and call.mask.shape[-2] == call.query.shape[2]:
            return with_exact_text(out, call, grid)
        return out

    @property
    def visual_grids(self) -> list[tuple[int, int, int]]:
        """Frames, height and width in latent patches of the visual segments that the latest run had."""
        found = [self._grids[key] for key in self._grids if key[0] in self._measures]
        return [segment.grid for grid in found if isinstance(grid, TokenGrid) for segment in grid.visual]

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

    def describe_memory(self) -> str:
        """What the latest run kept from step to step, at its most; "" if nothing."""
        reuse = self.plan_run.reuse
        parts = [f"{name} {size / 2**20:.1f} MiB" for name, size in reuse.peak.items()]
        if reuse.unkept:
            parts.append(f"{reuse.unkept} times over {reuse.max_bytes / 2**20:.0f} MiB a branch and rebuilt, not kept")
        return f"kept between steps: {', '.join(parts)}" if parts else ""

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
