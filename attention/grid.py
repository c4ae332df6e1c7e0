"""What a token sequence is made of: segments of video, text or reference tokens, and where each of them stands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["visual", "text", "reference"]
KINDS: tuple[Kind, ...] = ("visual", "text", "reference")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens of one kind.

    `shape` is (frames, height, width) in latent patches for a visual segment, whose tokens are in raster order (frame
    by frame, row by row), and (length,) for any other. `runs` are the (start, stop) ranges of the sequence that hold
    the tokens, in order: usually one, several where sequence parallelism has interleaved text and video.
    Only visual segments are ever attended to sparsely; text and reference tokens are read, and read others, exactly.
    """

    kind: Kind
    shape: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "visual" and len(self.shape) != 3:
            raise ValueError(f"shape of a visual segment must be (frames, height, width), got {self.shape}")
        if not self.shape or any(size < 1 for size in self.shape):
            raise ValueError(f"shape of a {self.kind} segment must hold positive sizes, got {self.shape}")
        if any(not 0 <= start < stop for start, stop in self.runs):
            raise ValueError(f"runs must be ranges (start, stop) with 0 <= start < stop, got {self.runs}")
        held = sum(stop - start for start, stop in self.runs)
        if held != self.tokens:
            raise ValueError(f"runs of a {self.kind} segment must hold {self.tokens} tokens {self.shape}, got {held}")

    @property
    def tokens(self) -> int:
        return prod(self.shape)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(frames, height, width) of a visual segment."""
        frames, height, width = self.shape
        return frames, height, width

    def positions(self) -> Tensor:
        """int64 [tokens]: where in the sequence each token of the segment stands."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.runs])

    @classmethod
    def visual(cls, frames: int, height: int, width: int, *, start: int = 0) -> Segment:
        return cls(kind="visual", shape=(frames, height, width), runs=((start, start + frames * height * width),))

    @classmethod
    def text(cls, length: int, *, start: int = 0) -> Segment:
        return cls(kind="text", shape=(length,), runs=((start, start + length),))


@dataclass(frozen=True)
class TokenGrid:
    """A sequence as a list of segments that together hold each of its positions exactly once. Hashable."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError("segments must hold at least one segment, got none")
        reached = 0
        for start, stop in sorted(run for segment in self.segments for run in segment.runs):
            if start != reached:
                what = "no segment" if start > reached else "two segments"
                raise ValueError(
                    f"segments must hold every position once, but {what} hold position {min(start, reached)}"
                )
            reached = stop

    @classmethod
    def video(cls, frames: int, height: int, width: int, *, text_before: int = 0, text_after: int = 0) -> TokenGrid:
        """One video of frames x height x width latent patches, with text tokens in front of it or behind it."""
        visual = Segment.visual(frames, height, width, start=text_before)
        segments: list[Segment] = [visual]
        if text_before:
            segments.insert(0, Segment.text(text_before))
        if text_after:
            segments.append(Segment.text(text_after, start=text_before + visual.tokens))
        return cls(tuple(segments))

    @classmethod
    def joined(cls, parts: Iterable[tuple[Kind, tuple[int, ...]]]) -> TokenGrid:
        """Segments given as (kind, shape), one behind the other."""
        segments: list[Segment] = []
        start = 0
        for kind, shape in parts:
            stop = start + prod(shape)
            segments.append(Segment(kind=kind, shape=shape, runs=((start, stop),)))
            start = stop
        return cls(tuple(segments))

    @cached_property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    @property
    def visual(self) -> tuple[Segment, ...]:
        return tuple(segment for segment in self.segments if segment.kind == "visual")

    def __str__(self) -> str:
        return " + ".join(
            "x".join(map(str, s.shape)) + ("" if s.kind == "visual" else f" {s.kind}") for s in self.segments
        )
