"""The table of transformer classes: where each one's visual tokens stand, and how their grid follows from a forward.

A row holds facts about a class and no code of any method; a class of diffusers costs one row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..attention.grid import TokenGrid

Shape = tuple[int, int, int]
Config = Mapping[str, Any]
Arguments = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """What has to be known of one transformer class to route its visual self-attention.

    `shapes` gives the (frames, height, width) in patches of every visual segment of one forward, from the model's
    config and the forward's arguments by name, or None where they do not tell. `order` says how visual and text rows
    follow each other in the sequence. Attention modules whose path matches `dense` (cross-attention, text refiners)
    are never routed; the rest, in module order, are the layers that a plan counts.
    """

    model: str
    shapes: Callable[[Config, Arguments], tuple[Shape, ...] | None]
    order: tuple[Literal["visual", "text"], ...] = ("visual",)
    dense: str = r"(?!)"
    heads: str = "num_attention_heads"
    head_dim: str = "attention_head_dim"
    timestep: str = "timestep"
    text: str = "encoder_hidden_states"
    noise_unit: Literal["training steps", "fraction"] = "training steps"

    def layers(self, attention_paths: Iterable[str]) -> list[str]:
        """The paths of the layers, in order, among those of all attention modules."""
        return [path for path in attention_paths if not re.fullmatch(self.dense, path)]

    def noise_level(self, timestep: float, num_train_timesteps: int) -> float:
        """The noise level that a timestep stands for: 1.0 is pure noise."""
        return timestep / num_train_timesteps if self.noise_unit == "training steps" else timestep

    def token_grid(self, shapes: tuple[Shape, ...], tokens: int) -> TokenGrid | None:
        """The grid of a sequence of `tokens`, what is not visual being text; None where the two do not fit."""
        text = tokens - sum(f * h * w for f, h, w in shapes)
        if text < 0 or (text > 0) != ("text" in self.order) or min(min(shape) for shape in shapes) < 1:
            return None
        parts: dict[str, list[tuple[Any, tuple[int, ...]]]] = {
            "visual": [("visual", shape) for shape in shapes],
            "text": [("text", (text,))],
        }
        return TokenGrid.joined(part for kind in self.order for part in parts[kind])


def latent_patches(config: Config, arguments: Arguments) -> tuple[Shape, ...] | None:
    """One visual segment: latents [B, C, F, H, W] cut into the config's `patch_size`, frame-major."""
    shape = getattr(arguments.get("hidden_states"), "shape", ())
    if len(shape) != 5:
        return None
    frames, height, width = (size // patch for size, patch in zip(shape[2:], config["patch_size"], strict=True))
    return ((frames, height, width),)


_ROWS = (ModelRow(model="WanTransformer3DModel", shapes=latent_patches, dense=r".*\.attn2"),)

MODELS: Mapping[str, ModelRow] = {row.model: row for row in _ROWS}


def row_of(transformer: Any) -> ModelRow:
    """The row of a transformer's class.

    Raises ValueError for a class without one.
    """
    name = type(transformer).__name__
    if name not in MODELS:
        raise ValueError(f"transformer is a {name}, for which no plan can run; classes with a row: {', '.join(MODELS)}")
    return MODELS[name]
