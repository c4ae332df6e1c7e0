"""Whether videos show their sentences, and what a plan loses: the score on captions never trained on."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ...attention.plan import Plan
from ..fidelity import object_boxes, psnr, ssim
from ..generate import generate
from ..plans import all_block_plan, fitting, model_shape, resolve_plan, transformers_of
from ..settings import model_settings
from .judge import check
from .scenes import held_out_scenes

ATTRIBUTES = ("count", "colour", "shape", "size", "motion", "background")
OTHER_SEED = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Item:
    """One video of the evaluation: everything that decides its pixels but the weights and the plan."""

    caption: str
    seed: int
    steps: int
    guidance: float
    frames: int
    height: int
    width: int


def evaluate(
    pipe: Any,
    plan: Plan | str | Path | None = None,
    *,
    captions: int = 400,
    steps: int = 16,
    guidance: float | None = None,
    frames: int = 33,
    height: int = 128,
    width: int = 128,
    dense_by: Literal["stock", "own"] = "stock",
    floors: int = 8,
    cache: Path,
    report: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Score a pipeline of the embedded model on held-out captions with fixed seeds, stock and under a plan.

    Videos are kept in `cache` by a hash of all that decides them, so an interrupted evaluation goes on where it
    stopped and dense results serve every plan.

    Args:
        pipe: the loaded pipeline, nothing attached.
        plan: a plan, its path, or "auto"; None scores the stock pipeline alone.
        captions: how many; the held-out captions repeat with other seeds.
        steps, guidance, frames, height, width: of every video; guidance is the model's own by default.
        dense_by: who runs the dense videos: stock attention, or "own", our kernel with all blocks: some 50 dB from it,
            and on a CPU twice as fast. The floors hold for stock.
        floors: how many captions also run with the all-block plan and with another seed, to place PSNR and SSIM.
        cache: folder of finished videos.
        report: called with stage, done, total.

    Returns:
        Shares with Wilson 95 % intervals: `dense` and `sparse` (all attributes, and each), `lost` (of the captions that
        dense gets right, those the plan gets wrong); `fidelity` against dense and its `floors`: median and 10th
        percentile of PSNR (dB) and SSIM over whole frames and over the object's box; `density` of the plan's runs.

    Raises:
        ValueError: for a plan of another model, or fewer than one caption.
    """
    if captions < 1:
        raise ValueError(f"captions must be at least 1, got {captions}")
    if guidance is None:
        own = model_settings(pipe).guidance
        guidance = 1.0 if own is None else own
    scenes = [str(scene) for scene in held_out_scenes()]
    items = [
        Item(
            caption=scenes[i % len(scenes)],
            seed=i,
            steps=steps,
            guidance=guidance,
            frames=frames,
            height=height,
            width=width,
        )
        for i in range(captions)
    ]
    studio = _Studio(pipe, cache)
    shape = model_shape(next(iter(transformers_of(pipe).values())))
    everything = all_block_plan(shape)
    dense = None if dense_by == "stock" else everything
    stock = [studio.video(item, dense) for item in _told(items, "dense", report)]
    result: dict[str, Any] = {"captions": captions, "steps": steps, "guidance": guidance, "dtype": studio.dtype}
    result["dense_by"] = dense_by
    judged = [check(video, item.caption) for item, (video, _) in zip(items, stock, strict=True)]
    result["dense"] = _score(judged)
    if plan is None:
        return result
    source, plan = resolve_plan(plan, shape)
    fitting(plan, pipe)
    sparse = [studio.video(item, plan) for item in _told(items, "plan", report)]
    judged_sparse = [check(video, item.caption) for item, (video, _) in zip(items, sparse, strict=True)]
    kept = [after.right for before, after in zip(judged, judged_sparse, strict=True) if before.right]
    lost = wilson(len(kept) - sum(kept), len(kept))
    result |= {"plan": plan.name or source, "sparse": _score(judged_sparse), "lost": lost}
    result["density"] = float(np.mean([figures["density"] for _, figures in sparse]))
    result["fidelity"] = _fidelity([video for video, _ in stock], [video for video, _ in sparse])
    few = _told(items[:floors], "floors", report)
    pairs = [(studio.video(item, everything)[0], studio.video(_reseeded(item), None)[0]) for item in few]
    if pairs:
        reference = [studio.video(item, None)[0] for item in items[:floors]]
        result["floors"] = {
            "all_blocks": _fidelity(reference, [one for one, _ in pairs]),
            "other_seed": _fidelity(reference, [two for _, two in pairs]),
        }
    return result


class _Studio:
    """Makes videos, or takes them from the cache."""

    def __init__(self, pipe: Any, cache: Path):
        self.pipe, self.cache = pipe, cache
        self.dtype = str(pipe.transformer.dtype).removeprefix("torch.")
        digest = hashlib.sha256()
        for module in (pipe.text_encoder, pipe.transformer, pipe.vae):
            for name, tensor in module.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.weights = digest.hexdigest()
        cache.mkdir(parents=True, exist_ok=True)

    def video(self, item: Item, plan: Plan | None) -> tuple[np.ndarray, dict[str, float]]:
        """Frames uint8 [frames, height, width, 3], and the run's density."""
        facts = [self.weights, self.dtype, torch.__version__, asdict(item), plan.to_json() if plan else None]
        path = self.cache / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]}.npz"
        if path.exists():
            with np.load(path) as kept:
                return kept["video"], {"density": float(kept["density"])}
        made = generate(self.pipe, item.caption, plan=plan, negative="", **_settings(item))
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez_compressed(file, video=made.frames, density=made.density)
        os.replace(part, path)
        return made.frames, {"density": made.density}


def _told(items: Sequence[Item], stage: str, report: Callable[[str, int, int], None]) -> Any:
    for done, item in enumerate(items):
        yield item
        report(stage, done + 1, len(items))


def _settings(item: Item) -> dict[str, Any]:
    return {name: value for name, value in asdict(item).items() if name != "caption"}


def _reseeded(item: Item) -> Item:
    return Item(**{**asdict(item), "seed": item.seed + OTHER_SEED})


def _score(results: Sequence[Any]) -> dict[str, Any]:
    score = {"all": wilson(sum(result.right for result in results), len(results))}
    for attribute in ATTRIBUTES:
        known = [getattr(result, attribute) for result in results if getattr(result, attribute) is not None]
        score[attribute] = wilson(sum(known), len(known))
    faults = [bool(result.verdict.faults) for result in results]
    return score | {"without_faults": wilson(len(faults) - sum(faults), len(faults))}


def _fidelity(reference: Sequence[np.ndarray], videos: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
    figures: dict[str, list[float]] = {"psnr": [], "psnr_object": [], "ssim": [], "ssim_object": []}
    for wanted, got in zip(reference, videos, strict=True):
        boxes = object_boxes(wanted)
        figures["psnr"].append(psnr(wanted, got))
        figures["ssim"].append(ssim(wanted, got))
        figures["psnr_object"].append(psnr(wanted, got, boxes))
        figures["ssim_object"].append(ssim(wanted, got, boxes))
    return {
        name: {"median": float(np.median(values)), "p10": float(np.quantile(values, 0.1))}
        for name, values in figures.items()
    }


def wilson(count: int, total: int) -> dict[str, float]:
    """A share and its Wilson 95 % interval: share, low, high, count, of."""
    from scipy.stats import binomtest

    if not total:
        return {"share": 0.0, "low": 0.0, "high": 1.0, "count": 0, "of": 0}
    interval = binomtest(count, total).proportion_ci(method="wilson")
    return {
        "share": count / total,
        "low": float(interval.low),
        "high": float(interval.high),
        "count": count,
        "of": total,
    }
