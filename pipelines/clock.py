"""Which run and which denoising step is it: told by the scheduler's timesteps, never by counting calls."""

from __future__ import annotations

import copy
import functools
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch


class _WrappedMethod:
    def __init__(self, method: Callable[..., Any], around: Callable[..., Any]):
        self.method, self._around = method, around
        # Others inspect the signature, diffusers' retrieve_timesteps among them.
        functools.update_wrapper(self, method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self.method, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _WrappedMethod:
        # A dozen of diffusers' pipelines copy their scheduler: a copy must call its own method.
        return _WrappedMethod(copy.deepcopy(self.method, memo), self._around)


def wrap_method(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Have `owner.name(...)` call `around(method, ...)`, for this one instance; returns what takes the wrapper off.

    The wrapper stands in the instance's `__dict__`; nothing that is returned keeps the instance alive.
    """
    shadowed = name in owner.__dict__
    owner.__dict__[name] = _WrappedMethod(getattr(owner, name), around)
    owner_reference, wrapper_reference = weakref.ref(owner), weakref.ref(owner.__dict__[name])

    def remove() -> None:
        owner, wrapper = owner_reference(), wrapper_reference()
        # Someone who wrapped the method after us keeps their own.
        if owner is None or wrapper is None or owner.__dict__.get(name) is not wrapper:
            return
        if shadowed:
            owner.__dict__[name] = wrapper.method
        else:
            del owner.__dict__[name]

    return remove


def _nothing() -> None:
    pass


class RunClock:
    """The run and step of one pipeline, shared by all of its transformers.

    `run` counts runs from 1. A run begins with the first forward after the scheduler's `set_timesteps`; also, for
    those who drive a transformer by other means, when a given step index or the noise level jumps back to an earlier
    one. `finished` is called where a run has ended, as far as that can be told: when the pipeline frees its hooks,
    which it does after an interrupted run too, and before the scheduler begins the next. `num_train_timesteps` is the
    scheduler's, 1000 where it has none to tell.
    """

    def __init__(self, pipe: Any, finished: Callable[[], None] | None = None):
        self._pipe = weakref.ref(pipe)
        self._finished = finished or _nothing
        self._unwrap_pipe: Callable[[], None] = _nothing
        if callable(getattr(pipe, "maybe_free_model_hooks", None)):
            self._unwrap_pipe = wrap_method(pipe, "maybe_free_model_hooks", self._freed)
        self._scheduler: weakref.ref[Any] | None = None
        self._unwrap: Callable[[], None] = _nothing
        self._pending = True
        self._timesteps: list[float] = []
        self._edm = False
        self.num_train_timesteps = 1000
        self.run = 0
        self.step = -1
        self.timestep = math.inf
        self.follow()

    def is_of(self, pipe: Any) -> bool:
        return self._pipe() is pipe

    def noise_level(self, told: float) -> float:
        """A model's noise level within 0 ... 1; EDM schedulers (arXiv 2206.00364) tell log(sigma) / 4 instead."""
        if self._edm:
            return 1 / (1 + math.exp(-4 * told))
        return min(max(told, 0.0), 1.0)

    @property
    def noise_levels(self) -> tuple[float, ...]:
        """The noise levels of the run's steps, as the scheduler announced them."""
        return tuple(self.noise_level(t if self._edm else t / self.num_train_timesteps) for t in self._timesteps)

    def follow(self) -> None:
        """Watch the scheduler that the pipeline has now: users swap it."""
        pipe = self._pipe()
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is None or (self._scheduler is not None and self._scheduler() is scheduler):
            return
        self._leave_scheduler()
        self._scheduler = weakref.ref(scheduler)
        # Asked once: diffusers answers for what an object lacks by a long way round.
        config = getattr(scheduler, "config", None)
        self.num_train_timesteps = int(getattr(config, "num_train_timesteps", None) or 1000)
        self._edm = hasattr(scheduler, "precondition_noise")
        if callable(getattr(scheduler, "set_timesteps", None)):
            self._unwrap = wrap_method(scheduler, "set_timesteps", self._announce)
        self._read(scheduler)
        self._pending = True

    def release(self) -> None:
        """Give pipeline and scheduler their own methods back."""
        self._unwrap_pipe()
        self._unwrap_pipe = _nothing
        self._leave_scheduler()

    def _leave_scheduler(self) -> None:
        self._unwrap()
        self._unwrap, self._scheduler = _nothing, None

    def _freed(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._finished()
        return method(*args, **kwargs)

    def tick(self, timestep: float, step_index: int | None) -> int:
        """The step of a forward at `timestep`, or at `step_index` where the pipeline tells it."""
        self.follow()
        earlier = timestep > self.timestep if step_index is None else step_index < self.step
        if self._pending or earlier:
            self.run += 1
            self.step, self.timestep = -1, math.inf
            self._pending = False
        if step_index is not None:
            self.step = step_index
        elif timestep != self.timestep:
            self.step = self._position(timestep)
        self.timestep = timestep
        return self.step

    def _position(self, timestep: float) -> int:
        # A model in half precision sees its timestep rounded, and some pipelines rescale it: then changes are counted.
        for position in range(max(self.step + 1, 0), len(self._timesteps)):
            if math.isclose(self._timesteps[position], timestep, rel_tol=1e-4, abs_tol=1e-4):
                return position
        return self.step + 1

    def _announce(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        scheduler = self._scheduler() if self._scheduler else None
        if scheduler is getattr(method, "__self__", None):
            self._read(scheduler)
        self._pending = True
        self._finished()
        return result

    def _read(self, scheduler: Any) -> None:
        # A fresh scheduler lists every training timestep; those are nobody's steps.
        told = getattr(scheduler, "num_inference_steps", None) is not None
        timesteps = getattr(scheduler, "timesteps", None) if told else None
        self._timesteps = [] if timesteps is None else torch.as_tensor(timesteps).float().tolist()
