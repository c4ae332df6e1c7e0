"""When each layer measures anew: `python benchmarks/layer_schedules.py [folder] [out.json]`.

The shipped plan's lists under other schedules, some of them layer by layer, at 16 steps: how near the videos come to
dense attention (our own kernel with all blocks) and whether they are still right, on captions that the plan lost under
one schedule for all layers. `age` is what the schedules follow: how far a layer's output, less what the mean of each
1x4x4 patches of keys makes of it, moves from one step to later ones. Every video is kept in `folder`
(runs/layer_schedules) and is not made again.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_wan
from torch import Tensor

from ziggurat.attention.plan import Plan
from ziggurat.attention.schedule import Schedule
from ziggurat.pipelines import load
from ziggurat.pipelines.fidelity import psnr
from ziggurat.pipelines.generate import generate
from ziggurat.pipelines.plans import all_block_plan, model_shape, resolve_plan
from ziggurat.pipelines.record import surroundings
from ziggurat.pipelines.shapes.judge import check
from ziggurat.pipelines.shapes.scenes import held_out_scenes

STEPS = 16
SEEDS = (63, 129, 148, 198)
FROM = (1, 2, 3, 4, 7, 10)
Times = tuple[float, tuple[float, ...]]
"""dense_until and refresh_at of a `Schedule`."""
WITHIN = (0.94, 0.92, 0.89, 0.86, 0.82, 0.78, 0.75)
SCHEDULES: tuple[tuple[Times, ...], ...] = (
    # Layers 0 and 1, layer 2, layers 3 to 5.
    *(((0.96, at),) * 3 for at in ((0.75,), (0.94, 0.75), (0.86, 0.75), (0.75, 0.45), WITHIN)),
    ((0.99, (0.94, 0.75)), (0.96, (0.94, 0.75)), (0.96, (0.94, 0.75))),
    ((0.99, (0.9, 0.45)), (0.98, (0.94, 0.75)), (0.96, (0.94, 0.82))),
    ((0.99, (0.955, 0.86)), (0.99, (0.955, 0.86)), (0.96, (0.94, 0.45))),
    ((0.99, (0.955, 0.86)), (0.99, (0.955, 0.86)), (0.98, (0.94, 0.86, 0.45))),
    ((0.99, (0.955, 0.86)), (0.99, (0.955, 0.86)), (0.96, (0.94, 0.82, 0.45))),
    ((0.99, (0.955, 0.86, 0.45)), (0.99, (0.955, 0.86, 0.45)), (0.96, (0.94, 0.86, 0.45))),
)


def main(folder: Path, out: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pipe: Any = load("shapes", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    shape = model_shape(pipe.transformer)
    _, plan = resolve_plan("auto", shape)
    dense = {seed: video(pipe, all_block_plan(shape), seed, folder / f"dense-{seed}")[0] for seed in SEEDS}
    rows = []
    for times in SCHEDULES:
        made = {seed: video(pipe, scheduled(plan, times), seed, folder / f"{named(times)}-{seed}") for seed in SEEDS}
        near = {seed: round(psnr(dense[seed], frames), 2) for seed, (frames, _) in made.items()}
        right = [seed for seed, (frames, _) in made.items() if check(frames, caption(seed)).right]
        density = statistics.mean(each for _, each in made.values())
        rows.append({"layers": times, "density": density, "psnr": near, "right": right})
        print(f"density {density:.3f}, {statistics.mean(near.values()):.2f} dB, right {right}: {times}", flush=True)
    said = {"steps": STEPS, "seeds": SEEDS, "schedules": rows, "age": ages(pipe, SEEDS[0]), **surroundings("cpu")}
    fresh = out.with_suffix(".tmp")
    fresh.write_text(json.dumps(said, indent=1) + "\n")
    fresh.replace(out)


def named(times: tuple[Times, ...]) -> str:
    return "_".join(f"{until}-{'-'.join(map(str, at))}" for until, at in times)


def caption(seed: int) -> str:
    scenes = held_out_scenes()
    return str(scenes[seed % len(scenes)])


def scheduled(plan: Plan, times: tuple[Times, ...]) -> Plan:
    """The plan with a schedule of its own for every layer."""
    layers = []
    for number, layer in enumerate(plan.layers):
        until, at = times[min(max(number - 1, 0), 2)]
        own = Schedule(dense_until=until, refresh_at=at, dense_by="own")
        layers.append(layer.model_copy(update={"schedule": own}))
    return plan.model_copy(update={"layers": tuple(layers)})


def video(pipe: Any, plan: Plan, seed: int, name: Path) -> tuple[np.ndarray, float]:
    """Frames and density of a run, unless they are there."""
    path = name.with_name(name.name + ".npz")
    if not path.is_file():
        made = generate(pipe, caption(seed), plan=plan, negative="", seed=seed, steps=STEPS)
        with (part := path.with_suffix(".part")).open("wb") as file:
            np.savez_compressed(file, video=made.frames, density=made.density)
        part.replace(path)
    with np.load(path) as kept:
        return kept["video"], float(kept["density"])


def ages(pipe: Any, seed: int) -> dict[str, dict[str, list[float]]]:
    """Of each layer, the mean error over heads and branches at all steps that follow one of `FROM`."""
    left: list[Tensor] = []
    norms: list[Tensor] = []
    host: Any = transformer_wan
    stock = host.dispatch_attention_fn

    def attention(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        out = stock(query, key, value, **more)
        if key.shape[1] == query.shape[1]:
            q, k, v, full = (x.transpose(1, 2) for x in (query, key, value, out))
            near = F.scaled_dot_product_attention(q, patch_means(k), patch_means(v))
            left.append((full - near).half())
            norms.append(full.flatten(2).norm(dim=-1))
        return out

    host.dispatch_attention_fn = attention
    try:
        generate(pipe, caption(seed), plan=None, negative="", seed=seed, steps=STEPS)
    finally:
        host.dispatch_attention_fn = stock
    layers = len(pipe.transformer.blocks)
    calls = len(left) // layers // STEPS
    found: dict[str, dict[str, list[float]]] = {}
    for layer in range(layers):
        for first in FROM:
            errors = []
            for step in range(first + 1, STEPS):
                pairs = [[(s * calls + call) * layers + layer for s in (first, step)] for call in range(calls)]
                each = [(left[b] - left[a]).float().flatten(2).norm(dim=-1) / norms[b] for a, b in pairs]
                errors.append(round(torch.stack(each).mean().item(), 3))
            found.setdefault(f"layer {layer}", {})[f"from step {first}"] = errors
    return found


def patch_means(rows: Tensor) -> Tensor:
    """[B, H, N, D] of 17 x 16 x 16 patches as the means of 1 x 4 x 4."""
    return rows.unflatten(2, (17, 4, 4, 4, 4)).mean((4, 6)).flatten(2, 4)


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(Path(given.get(1, "runs/layer_schedules")), Path(given.get(2, "benchmarks/layer_schedules.json")))
