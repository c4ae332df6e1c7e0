"""What runs between a transformer's gates and a plan: step, branch and grid of each forward, and what became of it."""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.grid import TokenGrid
from ..attention.plan import Plan
from ..attention.run import PlanRun
from .calls import Call
from .clock import RunClock, wrap_method
from .cross import CrossRun
from .figures import RunFigures, StepRecord
from .hook import SLOT_ATTRIBUTE, Gates, clear_slot
from .masks import key_log_weight, with_exact_text
from .modules import attention_modules
from .row import Measure, ModelRow
from .ulysses import Share, deal, interleaved, share_of


@functools.cache
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


class TransformerRun(RunFigures):
    """The state of one transformer under a plan; the router of its gates, and the figures of what it routed."""

    def __init__(
        self, transformer: nn.Module, row: ModelRow, plan: Plan, plan_run: PlanRun, clock: RunClock, *, timing: bool
    ):
        modules = attention_modules(transformer)
        super().__init__(plan_run, row.layers(modules))
        self.row, self.clock, self.timing = row, clock, timing
        self._whole_plan = plan
        self._share = share_of(getattr(transformer, "_parallel_config", None))
        config: Any = transformer.config
        self.config: dict[str, Any] = dict(config)
        plan_run.name_layers(self.paths)
        kinds = [row.tokens_of(path) for path in self.paths]
        # Most classes have one kind of sequence; each is measured once a forward.
        self._kinds = list(dict.fromkeys(kinds))
        self._kind_of = [self._kinds.index(kind) for kind in kinds]
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
        self.cross = CrossRun(transformer, row, backend=plan_run.backend) if plan.cross_by == "own" else None
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
        if self.cross is not None:
            self.cross.remove()
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
        if self.cross is not None:
            self.cross.follow()
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
        self.clear()
        if self.cross is not None:
            self.cross.clear()
        self._texts.clear()

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
        if reason := call.beyond_plans():
            return reason
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
        self.planned_rows += _rows(call)
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

    def dense(self, index: int, query: Tensor, stock: Callable[[], Tensor], *, token_dim: int) -> Tensor | None:
        # A run that overrides `attend_layer`, as those that capture do, is shown its dense calls too.
        shown = type(self.plan_run).attend_layer is not PlanRun.attend_layer
        if shown or not self.steps or self._share is not None:
            return None
        now = self.steps[-1]
        reason = self.plan_run.dense_reason(index, now.noise_level, now.step)
        if reason is None:
            return None
        started = self._now()
        self._look(index, query)
        rows = query.numel() // query.shape[3] * query.shape[token_dim]
        self.planned_rows += rows
        self.plan_run.ran_dense(index, rows, reason)
        out = stock()
        now.dense_calls += 1
        now.attention_seconds += self._now() - started
        return out

    def route(self, index: int, call: Call, stock: Callable[[], Tensor], *, token_dim: int) -> Tensor:
        started = self._now()
        self._look(index, call.query)
        outcome = self._planned(index, call)
        if isinstance(outcome, str):
            self.stock_calls[index][outcome] += 1
            if call.query.shape[2] == call.key.shape[2]:
                self.stock_rows += _rows(call)
        ours = isinstance(outcome, Tensor)
        out = outcome if isinstance(outcome, Tensor) else stock()
        if ours and token_dim == 1:
            out = out.transpose(1, 2)
        if self.steps:
            now = self.steps[-1]
            # Our own kernel may run steps that the schedule keeps dense.
            sparse = ours and not self.plan_run.schedule(index).is_dense(now.noise_level, now.step)
            now.sparse_calls += sparse
            now.dense_calls += not sparse
            now.attention_seconds += self._now() - started
        return out

    def _look(self, index: int, query: Tensor) -> None:
        """See that a layer is given finite numbers: now on the CPU, elsewhere when the forward ends."""
        total = (query.detach() if query.requires_grad else query).sum(dtype=torch.float32)
        if total.is_cpu:
            self._check_finite(index, total)
        else:
            self._suspects.append((index, total))

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
