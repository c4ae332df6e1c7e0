"""How often the judge is right: true clips, worn clips, wrong captions, and clips tampered with, at full size.

python benchmarks/judge.py [--clips 300] [--vae FOLDER] [--out benchmarks/judge.json]
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from scipy import ndimage

from ziggurat.pipelines.convolutions import through_onednn
from ziggurat.pipelines.record import surroundings
from ziggurat.pipelines.shapes.judge import check, compare, judge
from ziggurat.pipelines.shapes.render import Track, place, render
from ziggurat.pipelines.shapes.scenes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, Scene, Thing, single_scenes

Size = tuple[int, int, int]  # frames, height, width
WORDS = {"size": SIZES, "colour": tuple(COLOURS), "shape": SHAPES, "motion": MOTIONS}
WRONGS = (*WORDS, "background", "count")


def draw(random: Random, objects: int = 1, moving: bool = False) -> Scene:
    """Any scene of the grammar; of two objects at most one is large, as two leave `place` hardly any room."""
    while True:
        scenes = random.choices(single_scenes(), k=objects)
        scene = Scene(tuple(one.things[0] for one in scenes), scenes[0].background)
        if len({thing.colour for thing in scene.things}) < objects:
            continue
        if sum(thing.size == "large" for thing in scene.things) > 1:
            continue
        if not moving or any(thing.motion != "staying still" for thing in scene.things):
            return scene


def film(scene: Scene, tracks: tuple[Track, ...], size: Size) -> np.ndarray:
    """A true clip: uint8 [frames, height, width, 3]."""
    return _pixels(render([scene], [tracks], *size)[0].permute(1, 2, 3, 0) / 2 + 0.5)


def clip(scene: Scene, random: Random, size: Size) -> np.ndarray:
    return film(scene, place(scene, random, size[2] / size[1]), size)


def worn(video: np.ndarray, random: Random) -> np.ndarray:
    """Blurred, tinted and noisy: as much as leaves a viewer in no doubt."""
    rng = np.random.default_rng(random.getrandbits(32))
    sigma = random.uniform(0.004, 0.012) * min(video.shape[1:3])
    soft = ndimage.gaussian_filter(video / 255.0, (0, sigma, sigma, 0)) * rng.uniform(0.95, 1.05, 3)
    return _pixels(torch.from_numpy(soft + rng.normal(0, random.uniform(0.01, 0.05), video.shape)))


def wrong(scene: Scene, attribute: str, random: Random) -> Scene:
    """`scene` with exactly one attribute changed."""
    if attribute == "background":
        return replace(scene, background=random.choice([b for b in BACKGROUNDS if b != scene.background]))
    if attribute == "count":
        more = (scene.things[0], random.choice(single_scenes()).things[0])
        return replace(scene, things=more if len(scene.things) == 1 else scene.things[:1])
    i = random.randrange(len(scene.things))
    others = [word for word in WORDS[attribute] if word != getattr(scene.things[i], attribute)]
    return _with(scene, i, replace(scene.things[i], **{attribute: random.choice(others)}))


# Each takes a scene and gives a clip that no caption's scene would make.


def frozen(scene: Scene, random: Random, size: Size) -> np.ndarray:
    return np.repeat(clip(scene, random, size)[random.randrange(size[0])][None], size[0], 0)


def vanishing(scene: Scene, random: Random, size: Size) -> np.ndarray:
    tracks, gone = place(scene, random, size[2] / size[1]), random.randrange(len(scene.things))
    rest = film(
        replace(scene, things=scene.things[:gone] + scene.things[gone + 1 :]), tracks[:gone] + tracks[gone + 1 :], size
    )
    length = random.randint(2, size[0] // 3)
    first = random.randint(0, size[0] - length)
    return _cut(film(scene, tracks, size), rest, first, first + length)


def teleporting(scene: Scene, random: Random, size: Size) -> np.ndarray:
    at = random.randint(size[0] // 5, size[0] * 4 // 5)
    while True:
        one, two = (place(scene, random, size[2] / size[1]) for _ in range(2))
        if _apart(one[0], two[0], at / (size[0] - 1)) > 0.15:
            return _cut(film(scene, one, size), film(scene, two, size), at, size[0])


def recolouring(scene: Scene, random: Random, size: Size) -> np.ndarray:
    """To another colour: at once for some frames, or for every other clip gradually over its length."""
    tracks = place(scene, random, size[2] / size[1])
    i = random.randrange(len(scene.things))
    colour = random.choice([colour for colour in COLOURS if colour != scene.things[i].colour])
    before, after = (
        film(scene, tracks, size),
        film(_with(scene, i, replace(scene.things[i], colour=colour)), tracks, size),
    )
    if random.random() < 0.5:
        return _blend(before, after, np.linspace(0, 1, size[0]))
    first = random.randint(0, size[0] - size[0] // 5)
    return _cut(before, after, first, random.randint(first + size[0] // 5, size[0]) if first else size[0] // 2)


def doubled(scene: Scene, random: Random, size: Size, strength: float = 1.0) -> np.ndarray:
    """A second copy of an object, throughout or for at least a fifth of the frames."""
    tracks, i = place(scene, random, size[2] / size[1]), random.randrange(len(scene.things))
    while True:
        (copy,) = place(Scene((scene.things[i],), scene.background), random, size[2] / size[1])
        if min(_apart(copy, tracks[i], time) for time in np.linspace(0, 1, 5)) > 1.3 * copy.radius:
            break
    true = film(scene, tracks, size)
    more = film(replace(scene, things=(*scene.things, scene.things[i])), (*tracks, copy), size)
    first = random.choice((0, random.randint(0, size[0] * 4 // 5)))
    return _cut(true, _blend(true, more, np.full(size[0], strength)), first, size[0])


def ghostly(scene: Scene, random: Random, size: Size) -> np.ndarray:
    """A faint second copy."""
    return doubled(scene, random, size, strength=0.4)


def stalling(scene: Scene, random: Random, size: Size) -> np.ndarray:
    """Twice the speed up to the middle, then rest."""
    return clip(scene, random, size)[np.minimum(np.arange(size[0]) * 2, size[0] - 1)]


def swaying(scene: Scene, random: Random, size: Size) -> np.ndarray:
    """To and fro by 0.1 across and along."""
    video, phase = clip(scene, random, size), random.uniform(0, 2 * math.pi)
    swing = 0.1 * min(size[1:]) * np.sin(np.linspace(0, 4 * math.pi, size[0]) + phase)
    return np.stack([np.roll(frame, (round(s), round(s)), (0, 1)) for frame, s in zip(video, swing, strict=True)])


def growing(scene: Scene, random: Random, size: Size) -> np.ndarray:
    """From two thirds of its radius to all of it."""
    tracks = place(scene, random, size[2] / size[1])
    frames = []
    for share in np.linspace(0, 1, size[0]):
        now = [tuple(a * (1 - share) + b * share for a, b in zip(t.start, t.end, strict=True)) for t in tracks]
        scaled = [Track((x, y), (x, y), t.radius * (2 + share) / 3) for (x, y), t in zip(now, tracks, strict=True)]
        frames.append(film(scene, tuple(scaled), (1, *size[1:])))
    return np.concatenate(frames)


def morphing(scene: Scene, random: Random, size: Size) -> np.ndarray:
    """From one shape to another."""
    tracks, i = place(scene, random, size[2] / size[1]), random.randrange(len(scene.things))
    shape = random.choice([shape for shape in SHAPES if shape != scene.things[i].shape])
    other = _with(scene, i, replace(scene.things[i], shape=shape))
    return _blend(film(scene, tracks, size), film(other, tracks, size), np.linspace(0, 1, size[0]))


def squashed(scene: Scene, random: Random, size: Size) -> np.ndarray:
    """One and a half times as wide as high, or the other way, about the same place."""
    video = clip(scene, random, size)
    zoom = np.array(random.choice(((1.25, 1.25 / 1.5), (1.25 / 1.5, 1.25))))
    frames = []
    for frame in video:
        middle = np.argwhere(np.abs(frame.astype(int) - frame[0, 0]).sum(-1) > 60).mean(0)
        matrix = np.append(zoom, 1.0)
        offset = np.append(middle * (1 - zoom), 0.0)
        frames.append(ndimage.affine_transform(frame, matrix, offset, order=1, mode="nearest"))  # pyright: ignore[reportArgumentType]
    return np.stack(frames)


Tamper = Callable[[Scene, Random, Size], np.ndarray]
TAMPERS: dict[str, Tamper] = {t.__name__: t for t in (frozen, vanishing, teleporting, recolouring, doubled)}
# Beyond what is promised: ways in which a small model fails.
ODDITIES: dict[str, Tamper] = {t.__name__: t for t in (ghostly, stalling, swaying, growing, morphing, squashed)}


def tampered_share(tamper: Tamper, clips: int, objects: int, random: Random, size: Size) -> float:
    """The share of tampered clips that is rejected with the caption of the clip they were made from."""
    rejected = 0
    for _ in range(clips):
        scene = draw(random, objects, moving=tamper in (frozen, stalling))
        rejected += not check(tamper(scene, random, size), scene).right
    return rejected / clips


def true_shares(
    clips: int, objects: int, random: Random, size: Size, change: Callable[[np.ndarray], np.ndarray] | None = None
) -> dict[str, float]:
    """The share of true clips that pass, and for each attribute the share that is rejected when it alone is wrong."""
    passed, rejected = 0, dict.fromkeys(WRONGS if size[0] > 1 else [w for w in WRONGS if w != "motion"], 0)
    for _ in range(clips):
        scene = draw(random, objects)
        video = clip(scene, random, size)
        verdict = judge(change(video) if change else video)
        passed += compare(verdict, scene).right
        for attribute in rejected:
            rejected[attribute] += not compare(verdict, wrong(scene, attribute, random)).right
    return {"passed": passed / clips} | {f"wrong {name} rejected": n / clips for name, n in rejected.items()}


def round_trip(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Through the VAE in `folder` and back, by the mean of the latents. Frames must count 4k + 1."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(folder).eval()
    through_onednn(vae)

    @torch.no_grad()
    def change(video: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        (latents,) = vae.encode(pixels, return_dict=False)
        (back,) = vae.decode(latents.mode(), return_dict=False)
        return _pixels(back[0].permute(1, 2, 3, 0) / 2 + 0.5)

    return change


def _pixels(video: torch.Tensor) -> np.ndarray:
    return (video.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def _with(scene: Scene, i: int, thing: Thing) -> Scene:
    return replace(scene, things=(*scene.things[:i], thing, *scene.things[i + 1 :]))


def _cut(video: np.ndarray, other: np.ndarray, first: int, end: int) -> np.ndarray:
    return np.concatenate([video[:first], other[first:end], video[end:]])


def _blend(video: np.ndarray, other: np.ndarray, share: np.ndarray) -> np.ndarray:
    share = share.reshape(-1, 1, 1, 1)
    return (video * (1 - share) + other * share).round().astype(np.uint8)


def _apart(one: Track, two: Track, time: float) -> float:
    at = [np.array(t.start) * (1 - time) + np.array(t.end) * time for t in (one, two)]
    return float(np.linalg.norm(at[0] - at[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clips, full, result = arguments.clips, (33, 128, 128), {}

    def note(name: str, shares: dict[str, float] | float) -> None:
        result[name] = shares
        print(name, shares, flush=True)

    for objects in (1, 2):
        note(f"true, {objects} objects", true_shares(clips, objects, Random(objects), full))
        wear = Random(10 + objects)
        shares = true_shares(clips, objects, Random(20 + objects), full, lambda video, wear=wear: worn(video, wear))
        note(f"noise and blur, {objects} objects", shares)
        for name, tamper in (TAMPERS | (ODDITIES if objects == 1 else {})).items():
            note(f"{name}, {objects} objects, rejected", tampered_share(tamper, clips, objects, Random(30), full))
        if arguments.vae:
            change = round_trip(arguments.vae)
            note(f"through the VAE, {objects} objects", true_shares(clips, objects, Random(40), full, change))
    for size in ((1, 128, 128), (5, 32, 32), (17, 64, 64), (9, 96, 160)):
        note(f"true, 1 object, {'x'.join(map(str, size))}", true_shares(clips, 1, Random(50), size))
    video = clip(draw(Random(0), 2), Random(0), full)
    began = time.process_time()
    for _ in range(10):
        judge(video)
    report = {
        "clips_each": clips,
        "size": full,
        "shares": result,
        "processor_seconds_per_clip": round((time.process_time() - began) / 10, 3),
        **surroundings(),
    }
    arguments.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
