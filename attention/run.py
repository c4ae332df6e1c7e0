"""A plan at work: the clock, lists and counters of one pipeline's runs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..kernels.pyramid import build_pyramid
from .call import GroupCall
from .dense import Dense
from .grid import TokenGrid
from .lists import ListCache
from .plan import HeadGroup, HeadPlan, Plan
from .reuse import MAX_CACHE_BYTES, Reuse
from .schedule import Schedule
from .tell import in_steps

EVERYTHING = -1
"""Stands for the group of all heads that read everything, where static lists are kept."""


@dataclass(frozen=True, kw_only=True)
class LayerStatus:
    """What one layer did in the current run.

    state: "sparse" (some call ran sparse), "dense" or "not called". reason: why it, or some of its calls, ran dense.
    calls, dense_calls: counted. density: rows touched / all rows over its calls; list_density: over the sparse ones.
    """

    layer: int
    state: str
    reason: str
    calls: int
    dense_calls: int
    density: float
    list_density: float


@dataclass
class _Tally:
    """Counts of one layer; rows are weighed by the queries that might read them."""

    calls: int = 0
    rows: float = 0.0
    sparse_rows: float = 0.0
    touched: float = 0.0
    dense: dict[str, int] = field(default_factory=dict)  # calls by reason

    @property
    def density(self) -> float:
        return (self.touched + self.rows - self.sparse_rows) / self.rows if self.rows else 1.0

    @property
    def list_density(self) -> float:
        return self.touched / self.sparse_rows if self.sparse_rows else 1.0


class PlanRun:
    """Runs a plan's layers; static lists are built once per (entry, grid) and shared by layers, steps and runs.

    backend, compute_dtype: see `kernels.attend.attend`. check_finite: look for NaN and inf in every call and raise
    ValueError naming layer and step. max_cache_bytes: most memory that a guidance branch's dynamic lists, lse and
    corrections may take; what does not fit is built anew at each step. An instance belongs to one pipeline and one
    thread.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        backend: str = "auto",
        compute_dtype: torch.dtype | None = None,
        check_finite: bool = False,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        self.plan = plan
        self.backend = backend
        self.compute_dtype = compute_dtype
        self.check_finite = check_finite
        self.lists = ListCache()
        self.reuse = Reuse(self.lists, max_cache_bytes)
        numbers: dict[HeadGroup, int] = {}
        everything = HeadPlan(heads=tuple(range(plan.heads)), selector=Dense())
        self._everything = HeadGroup(entries=(everything,))
        self._numbers = [[numbers.setdefault(group, len(numbers)) for group in layer.groups] for layer in plan.layers]
        self._dense_layers = self._scheduled_dense(None)
        self.begin()

    def name_layers(self, names: Sequence[str]) -> None:
        """Tell the layers' names, in order, for schedules that keep some dense by name.

        Raises ValueError where a schedule's pattern matches none.
        """
        self._dense_layers = self._scheduled_dense(names)

    def _scheduled_dense(self, names: Sequence[str] | None) -> list[bool]:
        schedule, count = self.plan.schedule, len(self.plan.layers)
        dense = [i < schedule.dense_first_layers or i >= count - schedule.dense_last_layers for i in range(count)]
        for pattern in schedule.dense_layers if names is not None else ():
            found = [index for index, name in enumerate(names or ()) if fnmatchcase(name, pattern)]
            if not found:
                raise ValueError(f"dense_layers must name layers such as {(names or ('none',))[0]!r}, got {pattern!r}")
            for index in found:
                dense[index] = True
        return dense

    def begin(self, noise_levels: Sequence[float] | None = None) -> None:
        """Start a run: counters and dynamic lists are cleared, static lists kept.

        noise_levels: of the run's steps, if known; `describe_steps` then says what each will do.
        """
        self.noise_levels = None if noise_levels is None else tuple(noise_levels)
        self._tallies = [_Tally() for _ in self.plan.layers]
        self.reuse.begin()

    def end(self) -> None:
        """Free the run's dynamic lists and corrections; the figures stay readable."""
        self.reuse.end()

    def describe_steps(self) -> str:
        """What each step of the run does, by the plan's schedules; "" before `begin` was told the noise levels."""
        return "" if self.noise_levels is None else in_steps(self.plan, self.noise_levels)

    def schedule(self, layer: int) -> Schedule:
        """The schedule of one layer: its own or the plan's."""
        return self.plan.layers[layer].schedule or self.plan.schedule

    def attend_layer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        noise_level: float,
        step: int,
        branch: Hashable = None,
        grid: TokenGrid | None,
        key_log_weight: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor | None:
        """Self-attention of one layer by the plan, or None where the host is to run it dense.

        query, key, value: [B, H, N, D], all heads, N = grid.tokens. layer: index into the plan's layers.
        noise_level: timestep / training timesteps, 0 ... 1. step: of the run, from 0; only `dense_first_steps` and
        messages use it. branch: which guidance branch calls; branches have dynamic lists of their own.
        grid: None = unknown, which runs dense. key_log_weight: [B|1, H|1, N], -inf masks a key.
        Returns [B, H, N, D] in query's dtype. Differentiable in query, key and value.

        Raises ValueError for shapes that are not the plan's, and with `check_finite` for NaN or inf.
        """
        self._check(query, key, value, layer, grid)
        if self.check_finite:
            # What a mask hides may hold anything.
            seen = {"query": query} if key_log_weight is not None else {"query": query, "key": key, "value": value}
            _check_finite(layer, step, **seen)
        reason = self.dense_reason(layer, noise_level, step)
        if reason is None and grid is None:
            reason = "the token grid is unknown"
        if reason is not None:
            return self.ran_dense(layer, _rows(query), reason)
        assert grid is not None

        schedule = self.schedule(layer)
        final = not schedule.refreshes_after(noise_level)
        outputs, sparse, density = [], 0.0, 0.0
        groups, numbers = self.plan.layers[layer].groups, self._numbers[layer]
        lends = False
        if exact := schedule.is_dense(noise_level, step):
            lends = self.plan.layers[layer].needs_lse and not schedule.is_over(noise_level)
            groups, numbers = (self._everything,), [EVERYTHING]
        for index, group in enumerate(groups):
            queries, keys, values = (_pick_heads(tensor, group.heads) for tensor in (query, key, value))
            log_weight = key_log_weight
            if log_weight is not None and log_weight.shape[1] > 1:
                log_weight = _pick_heads(log_weight, group.heads)
            prepared = self.lists.prepare(numbers[index], group, grid, query.device)
            pyramid = build_pyramid(
                keys,
                values,
                prepared.key_rows,
                block=group.block,
                factors=prepared.factors,
                key_log_weight=log_weight,
                memo=prepared.memo,
            )
            call = GroupCall(
                place=(layer, index),
                branch=branch,
                shared=schedule.share_branches,
                noise_level=noise_level,
                epoch=schedule.epoch(noise_level),
                final=final,
                lends=lends,
                group=group,
                prepared=prepared,
                query=queries,
                pyramid=pyramid,
                scale=scale,
                backend=self.backend,
                compute_dtype=self.compute_dtype,
            )
            out, ran, touched = self.reuse.attend(call)
            outputs.append(out)
            sparse += ran * len(group.heads) / self.plan.heads
            density += touched * len(group.heads) / self.plan.heads
        if final and not exact:
            self.reuse.reclaim(branch, layer)
        out = _in_head_order(outputs, [head for group in groups for head in group.heads])
        if self.check_finite:
            _check_finite(layer, step, output=out)
        rows = _rows(query)
        if exact:
            self.ran_dense(layer, rows, "the schedule says dense, by our kernel")
            return out
        tally = self._count(layer, rows)
        tally.sparse_rows += sparse * rows
        tally.touched += density * rows
        return out

    def dense_reason(self, layer: int, noise_level: float, step: int) -> str | None:
        """Why the host runs a layer dense at this step, whatever its call holds; None where this run computes it."""
        if (reason := self.plan.layers[layer].dense) is not None:
            return reason
        if self._dense_layers[layer]:
            return "the schedule keeps this layer dense"
        own = self.schedule(layer)
        return "the schedule says dense" if own.dense_by is None and own.is_dense(noise_level, step) else None

    def ran_dense(self, layer: int, rows: float, reason: str) -> None:
        """Count a call of `rows` (batch x heads x queries x keys) that runs dense, by the host or by our own kernel."""
        tally = self._count(layer, rows)
        tally.dense[reason] = tally.dense.get(reason, 0) + 1

    def density(self) -> float:
        """Rows touched / all rows over every call of the run so far, dense ones included; 1 before the first."""
        return self._total().density

    def list_density(self) -> float:
        """The same over the calls that ran sparse; 1 before the first."""
        return self._total().list_density

    def status(self) -> list[LayerStatus]:
        """One entry per layer, saying why whatever ran dense did."""
        entries = []
        for layer, (tally, plan) in enumerate(zip(self._tallies, self.plan.layers, strict=True)):
            dense_calls = sum(tally.dense.values())
            reason = "; ".join(f"{text} ({count} calls)" for text, count in tally.dense.items())
            entries.append(
                LayerStatus(
                    layer=layer,
                    state="not called" if not tally.calls else "dense" if dense_calls == tally.calls else "sparse",
                    reason=reason or plan.dense or "",
                    calls=tally.calls,
                    dense_calls=dense_calls,
                    density=tally.density,
                    list_density=tally.list_density,
                )
            )
        return entries

    def _total(self) -> _Tally:
        total = _Tally()
        for tally in self._tallies:
            total.rows += tally.rows
            total.touched += tally.touched
            total.sparse_rows += tally.sparse_rows
        return total

    def _count(self, layer: int, rows: float) -> _Tally:
        tally = self._tallies[layer]
        tally.calls += 1
        tally.rows += rows
        return tally

    def _check(self, query: Tensor, key: Tensor, value: Tensor, layer: int, grid: TokenGrid | None) -> None:
        plan = self.plan
        if not 0 <= layer < len(plan.layers):
            raise ValueError(f"layer must lie in 0 ... {len(plan.layers) - 1}, the plan's layers, got {layer}")
        if query.ndim != 4 or key.shape != query.shape or value.shape != query.shape:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
            raise ValueError(
                f"query, key and value must share one shape [batch, heads, tokens, head_dim], got {shapes}"
            )
        _, heads, tokens, head_dim = query.shape
        if (heads, head_dim) != (plan.heads, plan.head_dim):
            raise ValueError(
                f"query must have the plan's {plan.heads} heads of {plan.head_dim}, got {heads} of {head_dim}"
            )
        if grid is not None and tokens != grid.tokens:
            raise ValueError(f"query must have the grid's {grid.tokens} tokens ({grid}), got {tokens}")


def _check_finite(layer: int, step: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        # One pass and one number: a sum of finite activations does not overflow float32.
        if not bool(torch.isfinite(tensor.detach().sum(dtype=torch.float32))):
            raise ValueError(
                f"{name} of layer {layer} holds NaN or inf at step {step}: the latents broke down, "
                "try another dtype (float32 or bfloat16) or check the model's weights"
            )


def _rows(query: Tensor) -> float:
    batch, heads, tokens, _ = query.shape
    return float(batch * heads * tokens * tokens)


def _pick_heads(tensor: Tensor, heads: Sequence[int]) -> Tensor:
    """tensor[:, heads], without a copy where the heads are a run."""
    if list(heads) == list(range(heads[0], heads[0] + len(heads))):
        return tensor[:, heads[0] : heads[0] + len(heads)]
    return tensor.index_select(1, torch.tensor(heads, device=tensor.device))


def _in_head_order(outputs: Sequence[Tensor], heads: Sequence[int]) -> Tensor:
    if list(heads) == list(range(len(heads))):
        return outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), 1)
    order = torch.tensor(heads, device=outputs[0].device).argsort()
    return torch.cat(list(outputs), 1).index_select(1, order)
