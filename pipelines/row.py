"""What a row of the table of transformer classes says: where tokens stand, how the grid follows, what stays dense."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ..attention.grid import Kind, TokenGrid

Shape = tuple[int, int, int]
Config = Mapping[str, Any]
Arguments = Mapping[str, Any]
Shapes = tuple[Shape, ...] | str
"""(frames, height, width) in patches of each visual segment of one forward, or why they can't be told."""


def no_lengths(_config: Config, _arguments: Arguments) -> Mapping[str, int]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The sequence of a self-attention call.

    visual: from the model's config and the forward's arguments by name, the visual segments. order: what follows what;
    "visual" stands for all visual segments, any other name for tokens that are read exactly. lengths: of those named,
    the ones that the arguments tell; the one that is left takes the rest of the sequence.
    """

    visual: Callable[[Config, Arguments], Shapes]
    order: tuple[str, ...] = ("visual",)
    lengths: Callable[[Config, Arguments], Mapping[str, int]] = no_lengths

    def measure(self, config: Config, arguments: Arguments) -> Measure:
        shapes = self.visual(config, arguments)
        if not isinstance(shapes, str) and not all(size > 0 for shape in shapes for size in shape):
            shapes = f"grid unknown: a visual segment of {' and '.join('x'.join(map(str, one)) for one in shapes)}"
        return Measure(shapes, tuple(sorted(self.lengths(config, arguments).items())), self.order)


@dataclass(frozen=True)
class Measure:
    """What the arguments of one forward tell of a sequence. Hashable."""

    shapes: Shapes
    lengths: tuple[tuple[str, int], ...]
    order: tuple[str, ...]

    def token_grid(self, tokens: int) -> TokenGrid | str:
        """The grid of a sequence of `tokens`, or why there is none."""
        if isinstance(self.shapes, str):
            return self.shapes
        known = dict(self.lengths)
        rest = tokens - sum(f * h * w for f, h, w in self.shapes) - sum(known.values())
        unknown = [name for name in self.order if name != "visual" and name not in known]
        if rest < 0 or (rest > 0 and len(unknown) != 1):
            visual = " and ".join("x".join(map(str, shape)) for shape in self.shapes)
            return f"grid unknown: {tokens} tokens do not follow from {visual} patches"
        known.update(dict.fromkeys(unknown, rest))
        parts: list[tuple[Kind, tuple[int, ...]]] = []
        for name in self.order:
            if name == "visual":
                parts.extend(("visual", shape) for shape in self.shapes)
            elif known[name]:
                parts.append(("text" if name == "text" else "reference", (known[name],)))
        return TokenGrid.joined(parts)


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """What has to be known of one transformer class to route its visual self-attention.

    Attention modules whose path matches `dense` (cross-attention, text refiners) are never routed; the rest, in module
    order, are the layers that a plan counts. `elsewhere` gives, by patterns of paths, layers whose sequence is another.
    timestep, text: the names of those arguments. noise: how the timestep tells the noise level. mask: "key", or
    "shared" where the class makes masks [B, 1, N, N] of which the rows of visual queries are all the same key mask.
    partly: what of the class a plan does not reach, in words.
    """

    model: str
    kind: Literal["video", "image"]
    tokens: Tokens
    elsewhere: Mapping[str, Tokens] = field(default_factory=dict)
    dense: str = r"(?!)"
    timestep: str = "timestep"
    text: str = "encoder_hidden_states"
    noise: Literal["training steps", "fraction", "1 - fraction"] = "training steps"
    mask: Literal["key", "shared"] = "key"
    partly: str = ""

    def layers(self, attention_paths: Iterable[str]) -> list[str]:
        """The paths of the layers, in order, among those of all attention modules."""
        return [path for path in attention_paths if not re.fullmatch(self.dense, path)]

    def tokens_of(self, path: str) -> Tokens:
        """The sequence of the layer at `path`."""
        return next((tokens for found, tokens in self.elsewhere.items() if re.fullmatch(found, path)), self.tokens)

    def noise_level(self, timestep: Any, num_train_timesteps: int) -> float:
        """The noise level that a timestep (a number or a tensor) stands for: 1.0 is pure noise."""
        # Some pipelines send one timestep per token, with no noise for the frame that is given.
        if isinstance(timestep, Tensor) and timestep.numel() > 1:
            timestep = timestep.min() if self.noise == "1 - fraction" else timestep.max()
        value = float(timestep)
        if self.noise == "1 - fraction":
            return 1 - value
        return value / num_train_timesteps if self.noise == "training steps" else value


@dataclass(frozen=True, kw_only=True)
class Absent:
    """A class of diffusers that no plan reaches, and why."""

    model: str
    kind: Literal["video", "image", "audio", "other"]
    status: Literal["no softmax self-attention", "not reached"]
    why: str
