"""When a plan measures anew, and what it adds in between: `python benchmarks/schedules.py [folder] [out.json]`.

The shipped plan's lists under other schedules and with residuals that stay as they were measured, at 16 steps: how
near the videos come to dense attention (our own kernel with all blocks) and whether they are still right, on captions
that an earlier plan lost. `follow` is why a residual follows half of its trend: how far a layer's output, less what the
mean of each 1x4x4 patches of keys makes of it, is from what is foretold of it by each share of the trend, at the steps
between those that measure. Every video is kept in `folder` (runs/schedules) and is not made again.
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

from ziggurat.attention.plan import Correction, Plan
from ziggurat.attention.schedule import log_signal
from ziggurat.pipelines import load
from ziggurat.pipelines.fidelity import psnr
from ziggurat.pipelines.generate import generate
from ziggurat.pipelines.plans import all_block_plan, model_shape, resolve_plan
from ziggurat.pipelines.record import surroundings
from ziggurat.pipelines.shapes.judge import check
from ziggurat.pipelines.shapes.scenes import held_out_scenes
from ziggurat.search.run import CORRECTED

STEPS = 16
SEEDS = (66, 78, 148, 198)
SHIPPED = CORRECTED.refresh_at
WAYS: tuple[tuple[Correction, tuple[float, ...]], ...] = (
    # At these levels and at the first step: 0 to 3, 7 and 13.
    ("trend", SHIPPED),
    ("residual", SHIPPED),
    # The same number of exact steps, evenly: 0, 3, 6, 9, 12 and 15.
    ("trend", (0.955, 0.885, 0.775, 0.565, 0.03)),
    # The third of the early ones a step later; without the last; one more, at step 5.
    ("trend", (0.99, 0.975, 0.94, 0.86, 0.45)),
    ("trend", (0.99, 0.975, 0.957, 0.86)),
    ("trend", (0.99, 0.975, 0.957, 0.915, 0.86, 0.45)),
)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def main(folder: Path, out: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pipe: Any = load("shapes", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    shape = model_shape(pipe.transformer)
    _, plan = resolve_plan("auto", shape)
    dense = {seed: video(pipe, all_block_plan(shape), seed, folder / f"dense-{seed}")[0] for seed in SEEDS}
    rows = []
    for correction, levels in WAYS:
        name = f"{correction}-{'-'.join(map(str, levels))}"
        tried = with_way(plan, correction, levels)
        made = {seed: video(pipe, tried, seed, folder / f"{name}-{seed}") for seed in SEEDS}
        near = {seed: round(psnr(dense[seed], frames), 2) for seed, (frames, _) in made.items()}
        right = [seed for seed, (frames, _) in made.items() if check(frames, caption(seed)).right]
        density = statistics.mean(each for _, each in made.values())
        rows.append({"correction": correction, "refresh_at": levels, "density": density, "psnr": near, "right": right})
        print(f"{name}: density {density:.3f}, {statistics.mean(near.values()):.2f} dB, right {right}", flush=True)
    said = {"steps": STEPS, "seeds": SEEDS, "ways": rows, "follow": follow(pipe, SEEDS[0]), **surroundings("cpu")}
    fresh = out.with_suffix(".tmp")
    fresh.write_text(json.dumps(said, indent=1) + "\n")
    fresh.replace(out)


def caption(seed: int) -> str:
    scenes = held_out_scenes()
    return str(scenes[seed % len(scenes)])


def with_way(plan: Plan, correction: Correction, levels: tuple[float, ...]) -> Plan:
    """The plan's lists, measured anew at these noise levels."""
    layers = []
    for layer in plan.layers:
        groups = []
        for group in layer.groups:
            entries = tuple(entry.model_copy(update={"correction": correction}) for entry in group.entries)
            groups.append(group.model_copy(update={"entries": entries}))
        layers.append(layer.model_copy(update={"groups": tuple(groups)}))
    schedule = plan.schedule.model_copy(update={"refresh_at": levels})
    return plan.model_copy(update={"layers": tuple(layers), "schedule": schedule})


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


def follow(pipe: Any, seed: int) -> dict[str, dict[str, list[float]]]:
    """Of each layer and share of the trend, the mean error over heads and branches at every step between exact ones."""
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
    levels = [float(timestep) / pipe.scheduler.config.num_train_timesteps for timestep in pipe.scheduler.timesteps]
    clock = [log_signal(level) for level in levels]
    actions = CORRECTED.steps(levels)
    exact = [step for step, action in enumerate(actions) if action != "reuse"]
    found: dict[str, dict[str, list[float]]] = {}
    for layer in range(layers):
        for share in SHARES:
            errors = []
            for step in range(exact[1] + 1, STEPS):
                if step in exact:
                    continue
                first, last = [one for one in exact if one < step][-2:]
                passed = share * (clock[step] - clock[last]) / (clock[last] - clock[first])
                each = []
                for call in range(calls):
                    now, new, old = ((s * calls + call) * layers + layer for s in (step, last, first))
                    foretold = left[new].float() + passed * (left[new].float() - left[old].float())
                    each.append((left[now].float() - foretold).flatten(2).norm(dim=-1) / norms[now])
                errors.append(round(torch.stack(each).mean().item(), 3))
            found.setdefault(f"layer {layer}", {})[f"share {share}"] = errors
    return found


def patch_means(rows: Tensor) -> Tensor:
    """[B, H, N, D] of 17 x 16 x 16 patches as the means of 1 x 4 x 4."""
    return rows.unflatten(2, (17, 4, 4, 4, 4)).mean((4, 6)).flatten(2, 4)


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(Path(given.get(1, "runs/schedules")), Path(given.get(2, "benchmarks/schedules.json")))
