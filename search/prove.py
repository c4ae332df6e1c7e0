"""A plan held against dense on prompts that the search never saw: whole pipeline runs of the same seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..attention.plan import Plan
from ..pipelines.fidelity import psnr, ssim
from ..pipelines.generate import Generation, generate
from ..pipelines.plans import all_block_plan, model_shape, transformers_of
from .findings import Proof


@dataclass(eq=False)
class Prover:
    """Runs prompts of fixed seeds, keeping what is the same for every plan.

    settings: of each run, as `generate` takes them. expert: the transformer that plans are for, None = each of them.
    """

    pipe: Any
    prompts: Sequence[str]
    settings: dict[str, Any]
    seed: int = 0
    expert: str | None = None
    report: Callable[[int, int], None] = lambda done, total: None
    _stock: dict[str, Generation] = field(default_factory=dict)
    _own: dict[str, Generation] = field(default_factory=dict)

    def prove(self, plan: Plan, point: int) -> tuple[Proof, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """The plan's figures, medians over the prompts; and each prompt's dense video and the plan's."""
        made: dict[str, Generation] = {}
        transformers = transformers_of(self.pipe)
        shape = model_shape(transformers[self.expert or next(iter(transformers))])
        # With the plan's cross-attention: what its lists gain, and nothing else, is to be seen.
        own = all_block_plan(shape).model_copy(update={"expert": self.expert, "cross_by": plan.cross_by})
        for number, prompt in enumerate(self.prompts):
            # One after another for each prompt, so that a slow moment of the machine falls on all three.
            if prompt not in self._stock:
                self._stock[prompt] = self._run(prompt, number, None)
            if prompt not in self._own:
                self._own[prompt] = self._run(prompt, number, own)
            made[prompt] = self._run(prompt, number, plan)
            self.report(number + 1, len(self.prompts))
        stock = [self._stock[prompt] for prompt in self.prompts]
        ours, sparse = [self._own[prompt] for prompt in self.prompts], list(made.values())
        proof = Proof(
            point=point,
            prompts=len(self.prompts),
            psnr=statistics.median(psnr(a.frames, b.frames) for a, b in zip(stock, sparse, strict=True)),
            ssim=statistics.median(ssim(a.frames, b.frames) for a, b in zip(stock, sparse, strict=True)),
            density=statistics.fmean(one.density for one in sparse),
            seconds=statistics.median(one.seconds for one in sparse),
            stock_seconds=statistics.median(one.seconds for one in stock),
            own_dense_seconds=statistics.median(one.seconds for one in ours),
            attention_seconds=statistics.median(one.seconds * (one.attention_share or 0.0) for one in sparse),
            own_dense_attention_seconds=statistics.median(one.seconds * (one.attention_share or 0.0) for one in ours),
        )
        return proof, {prompt: (self._stock[prompt].frames, generation.frames) for prompt, generation in made.items()}

    def _run(self, prompt: str, number: int, plan: Plan | None) -> Generation:
        return generate(
            self.pipe, prompt, plan=plan or "none", seed=self.seed + number, warn=lambda said: None, **self.settings
        )


def cheapest(count: int, prove: Callable[[int], float], target: float) -> tuple[int, bool]:
    """Of points of falling error the first whose measured value reaches the target, found by bisection, and whether
    any does; the last one, of least error, where none does."""
    if prove(count - 1) < target:
        return count - 1, False
    low, high = -1, count - 1
    while high - low > 1:
        middle = (low + high) // 2
        if prove(middle) >= target:
            high = middle
        else:
            low = middle
    return high, True
