"""What a token should know of the scene around it: a second thing to learn, which teaches outlines much sooner.

What tells a circle from a square is a few pixels at its corners, and adds next to nothing to the error of a velocity.
So in training a layer in the middle of the transformer is also asked for the geometry that its tokens lie in, as
representation alignment (REPA, arXiv 2410.06940) asks for the features of a trained encoder: a renderer knows them
exactly. Nothing of it remains in the model.
"""

import torch
from torch import Tensor

from .data import Clips
from .render import distance_to
from .scenes import SHAPES

FEATURES = 16
TOKEN = 8  # pixels along a side of a token; its latents are half as large
REACH = 2.0  # radii from an object's centre over which the tokens around are asked about it


def describe(clips: Clips) -> Tensor:
    """What there is to know at each token: float32 [B, FEATURES, latent frames, height / 8, width / 8].

    Of the nearest object: the distance to its outline at a token's four latents, squashed; where its centre is, the
    angle to it twice and three times over (a square's and a triangle's corners), its radius, shape and motion, all of
    them fading out over `REACH`. Time is that of a latent's own frames: the first is alone, the others are pairs.
    """
    return torch.stack([_one(clips, index) for index in range(len(clips.scenes))])


def _one(clips: Clips, index: int) -> Tensor:
    frames, height, width = clips.pixels.shape[2:]
    top, left = clips.corners[index]
    first_pair = torch.arange(1, (frames + 1) // 2) * 2 - 0.5
    time = torch.cat([torch.zeros(1), first_pair])[:, None] / max(frames - 1, 1)
    latent = TOKEN // 2
    y = (torch.arange(height // latent) * latent + latent / 2 + top)[None, :, None] / clips.unit
    x = (torch.arange(width // latent) * latent + latent / 2 + left)[None, None] / clips.unit
    nearest: Tensor | None = None
    best = torch.zeros(())
    for thing, track in zip(clips.scenes[index].things, clips.tracks[index], strict=True):
        centre = torch.tensor(track.start) * (1 - time) + torch.tensor(track.end) * time
        dx, dy = torch.broadcast_tensors(x - centre[:, 0, None, None], y - centre[:, 1, None, None])
        distance = distance_to(thing.shape, dx, dy, track.radius)
        outline = torch.tanh(distance * clips.unit / TOKEN)
        fine = torch.stack([outline[:, a::2, b::2] for a in (0, 1) for b in (0, 1)])
        across, along = ((d[:, ::2, ::2] + d[:, 1::2, 1::2]) / (2 * track.radius) for d in (dx, dy))
        near = torch.exp(-(across.square() + along.square()) / REACH**2)
        angle = torch.atan2(along, across)
        facts = [across, along, *(f(k * angle) for k in (2, 3) for f in (torch.cos, torch.sin))]
        facts += [torch.full_like(near, value) for value in _words(thing.shape, track.radius)]
        facts += [torch.full_like(near, (b - a) / 0.4) for a, b in zip(track.start, track.end, strict=True)]
        here, reached = torch.cat([fine, torch.stack(facts) * near]), distance[:, ::2, ::2]
        nearest = here if nearest is None else torch.where(reached < best, here, nearest)
        best = reached if best.ndim == 0 else torch.minimum(best, reached)
    assert nearest is not None
    return nearest


def _words(shape: str, radius: float) -> list[float]:
    return [5 * radius, *(2.0 * (shape == other) for other in SHAPES)]
