"""Queries, keys and values of real runs, taken through the hook that plans use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention.grid import TokenGrid
from ..attention.plan import Plan
from ..attention.run import PlanRun
from ..pipelines.clock import RunClock
from ..pipelines.models import row_of
from ..pipelines.plans import model_shape, transformers_of
from ..pipelines.routing import TransformerRun, attached


class Seen(Exception):
    """What a run was made for is seen: the rest of it would be for nothing."""


def until_seen(pipe: Any, run: Callable[[], Any]) -> None:
    """Run a pipeline, or a model of it, until hooks have `Seen` enough: offloaded models are freed as at its end."""
    try:
        run()
    except Seen:
        if free := getattr(pipe, "maybe_free_model_hooks", None):
            free()


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One attention call: query, key, value [B, H, N, D], and where it was made."""

    source: str
    query: Tensor
    key: Tensor
    value: Tensor
    grid: TokenGrid
    layer: int = 0
    step: int = 0
    noise_level: float = 0.0
    branch: str = ""
    prompt: str = ""

    def to(self, device: torch.device | str) -> Sample:
        """The sample with its tensors on a device."""
        query, key, value = (tensor.detach().to(device) for tensor in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)


class _Recorder(PlanRun):
    """A dense plan that keeps what it is given on the way."""

    def __init__(self, plan: Plan, layers: Collection[int], steps: Collection[int]):
        super().__init__(plan)
        self.wanted_layers, self.wanted_steps = layers, steps
        self.prompt = ""
        self.samples: list[Sample] = []

    def attend_layer(self, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor | None:
        grid = call["grid"]
        if call["layer"] in self.wanted_layers and call["step"] in self.wanted_steps and grid is not None:
            kept = [tensor.detach().to("cpu", copy=True).contiguous() for tensor in (query, key, value)]
            self.samples.append(
                Sample(
                    source="captured",
                    query=kept[0],
                    key=kept[1],
                    value=kept[2],
                    grid=grid,
                    layer=call["layer"],
                    step=call["step"],
                    noise_level=call["noise_level"],
                    branch=str(call["branch"]),
                    prompt=self.prompt,
                )
            )
        return super().attend_layer(query, key, value, **call)


def capture(
    pipe: Any,
    prompts: Sequence[str],
    *,
    layers: Collection[int],
    steps: Collection[int],
    seed: int = 0,
    **arguments: Any,
) -> list[Sample]:
    """Run a pipeline dense and keep the attention calls of some layers and denoising steps, of each guidance branch.

    arguments: of the pipeline's call, such as num_frames, height, width, num_inference_steps and guidance_scale.
    Raises ValueError for a pipeline that has a plan attached already, for layers that it does not have, and where
    nothing was kept.
    """
    runs: list[TransformerRun] = []
    recorders: list[_Recorder] = []
    for name, transformer in transformers_of(pipe).items():
        shape = model_shape(transformer)
        if attached(transformer):
            raise ValueError(f"pipe already has a plan on its {name}: detach that handle first")
        if wrong := [layer for layer in layers if not 0 <= layer < shape.layers]:
            raise ValueError(f"layers must lie in 0 ... {shape.layers - 1}, got {wrong}")
        recorders.append(_Recorder(Plan.dense(grid=(1, 1, 1), **asdict(shape)), layers, steps))
    clock = RunClock(pipe)
    try:
        for transformer, recorder in zip(transformers_of(pipe).values(), recorders, strict=True):
            runs.append(TransformerRun(transformer, row_of(transformer), recorder.plan, recorder, clock, timing=False))
        for prompt in prompts:
            for recorder in recorders:
                recorder.prompt = prompt
            generator = torch.Generator("cpu").manual_seed(seed)
            pipe(prompt=prompt, generator=generator, output_type="latent", **arguments)
    finally:
        for run in runs:
            run.remove()
        clock.release()
    samples = [sample for recorder in recorders for sample in recorder.samples]
    if not samples:
        raise ValueError(f"nothing was captured: no call of layers {sorted(layers)} at steps {sorted(steps)}")
    return samples
