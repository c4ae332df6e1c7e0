"""One video to be made: what was asked for, filled up with the model's defaults and checked before any work."""

from __future__ import annotations

import inspect
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from .plans import Grid
from .settings import ModelSettings
from .sizes import SizeRule, check_memory, size_rule

MOST_TOKENS = 512
_NAMES = {
    "frames": "num_frames",
    "height": "height",
    "width": "width",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "negative": "negative_prompt",
}
_OURS = ("prompt", "generator", "output_type", "return_dict", "self")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides a video but the model and the plan; `generate` takes these names.

    None: left to the pipeline. image: a path, or anything the pipeline takes. arguments: more of the pipeline's own.
    """

    prompt: str
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    negative: str | None = None
    image: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("prompt is empty: say in a sentence what the video is to show")
        for name in ("frames", "height", "width", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in 0 ... 2**63 - 1, got {self.seed}")
        if isinstance(self.image, str | Path) and not Path(self.image).is_file():
            raise ValueError(f"image {self.image} does not exist or is no file")

    def settings(self) -> dict[str, Any]:
        """What the sidecar keeps, by the names that `generate` takes."""
        values = {name: getattr(self, name) for name in (*_NAMES, "seed")}
        image = str(self.image) if isinstance(self.image, str | Path) else None
        return {**values, "image": image, "arguments": dict(self.arguments)}


def complete(
    pipe: Any, asked: Request, settings: ModelSettings, *, compare: bool, device: Any = None
) -> tuple[Request, Grid | None]:
    """The request with every default filled in, and its grid in latent patches where the sizes are known.

    device: whose memory it has to fit, for a pipeline without weights that is to run there; None is the pipeline's own.
    Raises ValueError for what this pipeline can't take.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    _check_arguments(pipe, asked)
    values: dict[str, Any] = {}
    for name, theirs in _NAMES.items():
        value = getattr(asked, name)
        if value is None and theirs in parameters:
            value = getattr(settings, name, None)
            usual = parameters[theirs].default
            if value is None and usual is not inspect.Parameter.empty:
                value = usual
        elif value is not None and theirs not in parameters and (name, value) != ("frames", 1):
            raise ValueError(f"{type(pipe).__name__} takes no {theirs}: leave {name} out")
        values[name] = value
    values["seed"] = secrets.randbelow(2**31) if asked.seed is None else asked.seed
    request = Request(prompt=asked.prompt, image=asked.image, arguments=dict(asked.arguments), **values)
    check_lengths(pipe, request)
    return request, _check_size(size_rule(pipe), pipe, request, compare, device)


def call_arguments(pipe: Any, request: Request) -> dict[str, Any]:
    """The request as arguments of the pipeline's call; a generator for the seed and the callbacks are the caller's."""
    parameters = inspect.signature(pipe.__call__).parameters
    arguments = {theirs: getattr(request, name) for name, theirs in _NAMES.items() if theirs in parameters}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if request.image is not None:
        arguments["image"] = _read_image(request.image)
    return {"prompt": request.prompt, **arguments, **request.arguments}


def _check_size(rule: SizeRule, pipe: Any, request: Request, compare: bool, device: Any) -> Grid | None:
    frames = request.frames or 1
    if request.height is None or request.width is None:
        rule.check(request.frames, request.height, request.width)
        return None
    check_memory(pipe, rule, frames, request.height, request.width, compare=compare, device=device)
    rule.check(request.frames, request.height, request.width)
    return rule.grid(frames, request.height, request.width)


def _check_arguments(pipe: Any, request: Request) -> None:
    parameters = inspect.signature(pipe.__call__).parameters
    ours = {theirs: name for name, theirs in _NAMES.items()} | {"image": "image"}
    for name in request.arguments:
        if name in ours:
            raise ValueError(f"{name} can't be set twice: give it as {ours[name]}")
        if name in _OURS or name.startswith("callback"):
            raise ValueError(f"{name} can't be set: Ziggurat gives it to the pipeline itself")
        if name not in parameters:
            free = [
                name
                for name in parameters
                if name not in ours and name not in _OURS and not name.startswith("callback")
            ]
            raise ValueError(f"{type(pipe).__name__} has no argument {name!r}; it takes {', '.join(free)}")
    if request.image is not None and "image" not in parameters:
        raise ValueError(f"{type(pipe).__name__} takes no image: leave it out, or load a model that starts from one")


def check_lengths(pipe: Any, request: Request) -> None:
    """Raise ValueError for a prompt, or its negative, of more tokens than the model reads."""
    limit = request.arguments.get("max_sequence_length", MOST_TOKENS)
    for name in ("prompt", "negative"):
        _check_length(pipe, name, getattr(request, name), limit)


def _check_length(pipe: Any, name: str, text: str | None, limit: int) -> None:
    # CLIP reads 77 tokens beside the encoder that reads the whole prompt.
    found = (getattr(pipe, f"tokenizer{suffix}", None) for suffix in ("", "_2", "_3"))
    tokenizer: Any = next((one for one in found if one is not None and "CLIP" not in type(one).__name__), None)
    if tokenizer is None or not text:
        return
    tokens = len(tokenizer(text, verbose=False).input_ids)
    if tokens > limit:
        raise ValueError(f"{name} has {tokens} tokens, but the model reads {limit}: shorten it")


def _read_image(image: Any) -> Any:
    if not isinstance(image, str | Path):
        return image
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {image} can't be read: {error}") from error


def warn_of_unknown_words(settings: ModelSettings, pipe: Any, prompt: str, warn: Callable[[str], None]) -> None:
    """Name the words that an embedded model has never seen, and show what it knows."""
    shipped = Path(str(files("ziggurat.assets"))) / "shapes"
    if settings.captions != "shapes" and getattr(pipe, "name_or_path", None) != str(shipped):
        return
    from .shapes.scenes import GRAMMAR, unknown_words

    words = unknown_words(prompt)
    if words:
        named = ", ".join(repr(word) for word in words)
        warn(f"this model has never seen the word{'s' * (len(words) > 1)} {named}; it knows {GRAMMAR}")
