"""Whether videos show their sentences, and what a plan loses: the score on captions never trained on."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ...attention.plan import Plan
from ..fidelity import object_boxes, psnr, ssim
from ..generate import generate
from ..plans import all_block_plan, fitting, model_shape, resolve_plan, transformers_of
from ..settings import model_settings
from . import judge, measure
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
    first: int = 0,
    steps: int = 16,
    guidance: float | None = None,
    frames: int = 33,
    height: int = 128,
    width: int = 128,
    dense_by: Literal["stock", "own"] = "stock",
    floors: int = 8,
    cache: Path,
    figures: Path | None = None,
    report: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Score a pipeline of the embedded model on held-out captions with fixed seeds, stock and under a plan.

    Videos are kept in `cache` by a hash of all that decides them, and what was found of each in `figures`, so an
    interrupted evaluation goes on where it stopped, dense results serve every plan, and several processes or machines
    may share the captions out: what stands in `figures` is made nowhere again.

    Args:
        pipe: the loaded pipeline, nothing attached.
        plan: a plan, its path, or "auto"; None scores the stock pipeline alone.
        captions: how many; the held-out captions repeat with other seeds.
        first: the number of the first, from 0; `captions` counts on from it.
        steps, guidance, frames, height, width: of every video; guidance is the model's own by default.
        dense_by: who runs the dense videos: stock attention, or "own", our kernel with all blocks: some 50 dB from it,
            and on a CPU twice as fast. The floors hold for stock.
        floors: how many captions also run with the all-block plan and with another seed, to place PSNR and SSIM.
        cache: folder of finished videos.
        figures: file of a line for every video found and compared, appended to; by default `figures.jsonl` in `cache`.
        report: called with stage, done, total.

    Returns:
        Shares with Wilson 95 % intervals: `dense` and `sparse` (all attributes, and each), `lost` (of the captions that
        dense gets right, those the plan gets wrong); `fidelity` against dense and its `floors`: median and 10th
        percentile of PSNR (dB) and SSIM over whole frames and over the object's box; `density` of the plan's runs.
        `wrong` and `lost_at` name captions and seeds: of those that dense gets wrong, and of those that the plan loses.

    Raises:
        ValueError: for a plan of another model, fewer than one caption, or a file of figures that is none.
    """
    if captions < 1 or first < 0:
        raise ValueError(f"captions must be at least 1 and first at least 0, got {captions} and {first}")
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
        for i in range(first, first + captions)
    ]
    studio = _Studio(pipe, cache, figures or cache / "figures.jsonl")
    shape = model_shape(next(iter(transformers_of(pipe).values())))
    everything = all_block_plan(shape)
    dense = None if dense_by == "stock" else everything
    stock = [studio.judged(item, dense) for item in _told(items, "dense", report)]
    result: dict[str, Any] = {"captions": captions, "first": first, "steps": steps, "guidance": guidance}
    result |= {"dtype": studio.dtype, "dense_by": dense_by, "dense": _score(stock)}
    result["wrong"] = [_named(item) for item, before in zip(items, stock, strict=True) if not before["right"]]
    if plan is None:
        return result
    source, plan = resolve_plan(plan, shape)
    fitting(plan, pipe)
    sparse, compared = [], []
    for item in _told(items, "plan", report):
        sparse.append(studio.judged(item, plan))
        compared.append(studio.compared((item, dense), (item, plan)))
    held = [(item, after) for item, before, after in zip(items, stock, sparse, strict=True) if before["right"]]
    lost = [_named(item) for item, after in held if not after["right"]]
    result |= {"plan": plan.name or source, "sparse": _score(sparse), "lost": wilson(len(lost), len(held))}
    result["lost_at"] = lost
    result["density"] = float(np.mean([found["density"] for found in sparse]))
    result["fidelity"] = _spread(compared)
    few = [
        (
            studio.compared((item, None), (item, everything)),
            studio.compared((item, None), (replace(item, seed=item.seed + OTHER_SEED), None)),
        )
        for item in _told(items[:floors], "floors", report)
    ]
    if few:
        result["floors"] = {
            "all_blocks": _spread([one for one, _ in few]),
            "other_seed": _spread([two for _, two in few]),
        }
    return result


class _Studio:
    """Makes videos and looks at them, or takes from the cache and the file of figures what was made and seen before."""

    def __init__(self, pipe: Any, cache: Path, figures: Path):
        self.pipe, self.cache, self.figures = pipe, cache, figures
        self.dtype = str(pipe.transformer.dtype).removeprefix("torch.")
        digest = hashlib.sha256()
        for module in (pipe.text_encoder, pipe.transformer, pipe.vae):
            for name, tensor in module.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.weights = digest.hexdigest()
        cache.mkdir(parents=True, exist_ok=True)
        self.known = _read_figures(figures)
        # A verdict is the judge's that gave it.
        sources = b"".join(Path(file).read_bytes() for file in (judge.__file__, measure.__file__))
        self.judge = hashlib.sha256(sources).hexdigest()[:32]

    def judged(self, item: Item, plan: Plan | None) -> dict[str, Any]:
        """Is the video right, in all and in each attribute; has it faults; and the run's density."""

        def look() -> dict[str, Any]:
            video, density = self.video(item, plan)
            result = check(video, item.caption)
            attributes = {name: getattr(result, name) for name in ATTRIBUTES}
            return {"right": result.right, **attributes, "faults": bool(result.verdict.faults), "density": density}

        return self._noted(item, [self.key(item, plan), self.judge], look)

    def compared(self, one: tuple[Item, Plan | None], other: tuple[Item, Plan | None]) -> dict[str, float]:
        """How near the second video comes to the first."""

        def look() -> dict[str, float]:
            wanted, got = self.video(*one)[0], self.video(*other)[0]
            boxes = object_boxes(wanted)
            found = {"psnr": psnr(wanted, got), "psnr_object": psnr(wanted, got, boxes)}
            return found | {"ssim": ssim(wanted, got), "ssim_object": ssim(wanted, got, boxes)}

        return self._noted(one[0], [self.key(*one), self.key(*other)], look)

    def _noted(self, item: Item, keys: list[str], look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if (key := " ".join(keys)) not in self.known:
            self.known[key] = look()
            line = json.dumps({"of": key, **_named(item), "found": self.known[key]}) + "\n"
            self.figures.parent.mkdir(parents=True, exist_ok=True)
            # One write of few bytes: processes that share the captions out may append to one file.
            with self.figures.open("ab", buffering=0) as file:
                file.write(line.encode())
        return self.known[key]

    def key(self, item: Item, plan: Plan | None) -> str:
        """A hash of all that decides a video's pixels, but the chip: not of what is said about a plan."""
        bare = plan and plan.model_copy(update={"name": "", "note": "", "predicted": {}, "measured": {}})
        facts = [self.weights, self.dtype, torch.__version__, asdict(item), bare.to_json() if bare else None]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def video(self, item: Item, plan: Plan | None) -> tuple[np.ndarray, float]:
        """Frames uint8 [frames, height, width, 3], and the run's density."""
        path = self.cache / f"{self.key(item, plan)}.npz"
        if path.exists():
            with np.load(path) as kept:
                return kept["video"], float(kept["density"])
        made = generate(self.pipe, item.caption, plan=plan, negative="", **_settings(item))
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez_compressed(file, video=made.frames, density=made.density)
        os.replace(part, path)
        return made.frames, made.density


def _told(items: Sequence[Item], stage: str, report: Callable[[str, int, int], None]) -> Any:
    for done, item in enumerate(items):
        yield item
        report(stage, done + 1, len(items))


def _settings(item: Item) -> dict[str, Any]:
    return {name: value for name, value in asdict(item).items() if name != "caption"}


def _named(item: Item) -> dict[str, Any]:
    return {"caption": item.caption, "seed": item.seed}


def _read_figures(path: Path) -> dict[str, dict[str, Any]]:
    """What a file of figures holds, but for lines that a process which died left unfinished."""
    text = path.read_text() if path.exists() else ""
    known = {}
    for line in text.splitlines():
        with suppress(ValueError, KeyError, TypeError):
            read = json.loads(line)
            known[read["of"]] = dict(read["found"])
    if text and not known:
        raise ValueError(f"figures {path} holds no line that evaluate wrote: give another file")
    if text and not text.endswith("\n"):
        with path.open("a") as file:
            file.write("\n")
    return known


def _score(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    score = {"all": wilson(sum(one["right"] for one in found), len(found))}
    for attribute in ATTRIBUTES:
        known = [one[attribute] for one in found if one[attribute] is not None]
        score[attribute] = wilson(sum(known), len(known))
    return score | {"without_faults": wilson(sum(not one["faults"] for one in found), len(found))}


def _spread(found: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {"median": float(np.median(values)), "p10": float(np.quantile(values, 0.1))}
        for name in found[0]
        for values in ([one[name] for one in found],)
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
