"""Orders of a video's tokens. Which tokens are neighbours in memory decides how sparse a block list can be."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, model_serializer, model_validator
from torch import Tensor

Shape = tuple[int, int, int]
NAMES = ("raster", "temporal", "tile", "morton", "hilbert", "strided", "explicit")
Positive = Annotated[int, Field(ge=1)]


class TokenOrder(BaseModel, frozen=True, extra="forbid"):
    """A permutation of frames x height x width tokens, by name; in a plan file a string like "tile(4,4,4)".

    raster       frame by frame, row by row, as models lay out their tokens
    temporal     height, width, frame: a column's frames are neighbours
    tile(f,h,w)  boxes of f x h x w tokens; whole boxes first, so that cut ones at the border shift no block
    morton       Z-order curve
    hilbert      Hilbert curve of the enclosing cube of side 2**k
    strided(k)   rows and columns equal modulo k together (Skiparse, arXiv 2605.28691)
    explicit     `permutation` itself: the raster index of each token of the new order
    """

    name: Literal["raster", "temporal", "tile", "morton", "hilbert", "strided", "explicit"] = "raster"
    sizes: tuple[Positive, ...] = ()
    permutation: tuple[Annotated[int, Field(ge=0)], ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, data: Any) -> Any:
        if not isinstance(data, str):
            return data
        match = re.fullmatch(r"([a-z]+)(?:\(\s*([\d\s,]+?)\s*\))?", data)
        if not match or match[1] not in NAMES:
            raise ValueError(f"order must be one of {', '.join(NAMES)} with sizes in brackets, got {data[:60]!r}")
        return {"name": match[1], "sizes": match[2].split(",") if match[2] else ()}

    @model_validator(mode="after")
    def _check(self) -> TokenOrder:
        wanted = {"tile": 3, "strided": 1}.get(self.name, 0)
        if len(self.sizes) != wanted:
            raise ValueError(f"order {self.name} takes {wanted} sizes, got {len(self.sizes)}")
        if (self.permutation is None) == (self.name == "explicit"):
            raise ValueError("permutation must be given for the explicit order, and for no other")
        if self.permutation is not None and sorted(self.permutation) != list(range(len(self.permutation))):
            raise ValueError(f"permutation must hold each of 0 ... {len(self.permutation) - 1} once")
        return self

    @model_serializer
    def _to_data(self) -> Any:
        if self.permutation is not None:
            return {"name": self.name, "permutation": list(self.permutation)}
        return str(self)

    def __str__(self) -> str:
        return self.name + (f"({','.join(map(str, self.sizes))})" if self.sizes else "")

    def indices(self, shape: Shape) -> Tensor:
        """int64 [frames * height * width]: the raster index of each token in this order. Cached: do not write to it.

        Raises ValueError if an explicit permutation is for another number of tokens.
        """
        return _indices(self, shape)


def coordinates(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """int64 frame, row and column of each token, in raster order."""
    frame, row, column = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    return frame.flatten(), row.flatten(), column.flatten()


@lru_cache(maxsize=64)
def _indices(order: TokenOrder, shape: Shape) -> Tensor:
    frames, height, width = shape
    frame, row, column = coordinates(shape)
    match order.name:
        case "raster":
            return torch.arange(frames * height * width)
        case "temporal":
            return _sorted_by(row, column, frame)
        case "tile":
            tile_f, tile_h, tile_w = order.sizes
            cut = (
                (frame >= frames - frames % tile_f)
                | (row >= height - height % tile_h)
                | (column >= width - width % tile_w)
            )
            return _sorted_by(cut.long(), frame // tile_f, row // tile_h, column // tile_w, frame, row, column)
        case "strided":
            (k,) = order.sizes
            return _sorted_by(row % k, column % k, frame, row, column)
        case "morton":
            return torch.argsort(_interleave(frame, row, column, _bits(shape)), stable=True)
        case "hilbert":
            return torch.argsort(_hilbert(frame, row, column, _bits(shape)), stable=True)
        case "explicit":
            permutation = torch.tensor(order.permutation)
            if len(permutation) != len(frame):
                raise ValueError(
                    f"permutation must hold {len(frame)} tokens for a grid of {shape}, got {len(permutation)}"
                )
            return permutation


def _sorted_by(*keys: Tensor) -> Tensor:
    """Indices that sort by the first key, ties by the second, and so on."""
    index = torch.arange(len(keys[0]))
    for key in reversed(keys):
        index = index[torch.argsort(key[index], stable=True)]
    return index


def _bits(shape: Shape) -> int:
    return max(1, (max(shape) - 1).bit_length())


def _interleave(x: Tensor, y: Tensor, z: Tensor, bits: int) -> Tensor:
    code = torch.zeros_like(x)
    for bit in reversed(range(bits)):
        for axis in (x, y, z):
            code = code << 1 | (axis >> bit & 1)
    return code


def _hilbert(x: Tensor, y: Tensor, z: Tensor, bits: int) -> Tensor:
    """Position along the Hilbert curve, by Skilling's transpose form (AIP Conf. Proc. 707, 381, 2004)."""
    axes = [x.clone(), y.clone(), z.clone()]
    for bit in reversed(range(1, bits)):
        low = (1 << bit) - 1
        for i in range(3):
            swap = (axes[0] ^ axes[i]) & low
            is_set = axes[i] >> bit & 1 == 1
            first = torch.where(is_set, axes[0] ^ low, axes[0] ^ swap)
            axes[i] = torch.where(is_set, axes[i], axes[i] ^ swap) if i else first
            axes[0] = first
    for i in (1, 2):
        axes[i] = axes[i] ^ axes[i - 1]
    flip = torch.zeros_like(x)
    for bit in reversed(range(1, bits)):
        flip = torch.where(axes[2] >> bit & 1 == 1, flip ^ ((1 << bit) - 1), flip)
    return _interleave(axes[0] ^ flip, axes[1] ^ flip, axes[2] ^ flip, bits)
