"""What a model is without its weights in memory: a fingerprint of its files, and a pipeline that can be asked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..loading import find_model, load

EDGE = 1 << 20
_TOLD = {".json", ".txt", ".model", ".jinja"}
_OURS = "ziggurat.json"


def fingerprint(model: str | Path) -> str:
    """What tells one model from another: hex SHA-256 of its components' files, for a Hub id of its commit.

    Of each safetensors file that is the size and the first and last MiB: a change of weights shows there, and the files
    are not read whole. Other files of the components, such as configurations and vocabularies, are.
    Raises ValueError for a model that does not exist.
    """
    folder = find_model(str(model))
    if folder is None:
        return _digest({"hub": str(model), "commit": _commit(str(model))})
    index = folder / "model_index.json"
    found: dict[str, Any] = {index.name: hashlib.sha256(index.read_bytes()).hexdigest()}
    for part in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"):
        for path in sorted(part.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.suffix == ".safetensors":
                found[name] = _edges(path)
            elif path.suffix in _TOLD and path.name != _OURS and path.is_file():
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return _digest(found)


def _edges(path: Path) -> list[Any]:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(EDGE))
        file.seek(max(size - EDGE, 0))
        digest.update(file.read(EDGE))
    return [size, digest.hexdigest()]


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def canonical(value: Any) -> str:
    """One text for one value, whatever the order of its keys and the version of Python.

    Raises ValueError for what JSON does not hold.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"a batch's settings must be plain JSON values: {error}") from None


def _commit(model: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        # Offline too: the cache keeps which commit a branch stood at.
        return Path(hf_hub_download(model, "model_index.json")).parent.name
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {model!r} is neither a local folder nor on this disk nor given by the Hub"
            f" ({type(error).__name__}): check the name and the connection"
        ) from error


def weightless(model: str | Path) -> Any:
    """The model's pipeline without weights: it knows its defaults, sizes and tokenizer, but can't run.

    Transformers and VAEs stand on the meta device, text encoders are left out; so a batch is planned in seconds, and
    one that is done needs no model at all. Raises ValueError for a model that does not exist, OSError where
    the Hub does not answer.
    """
    import diffusers
    import torch
    import transformers
    from accelerate import init_empty_weights
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    model = str(model)
    source = str(find_model(model) or model)
    homes = {"diffusers": diffusers, "transformers": transformers}
    parts: dict[str, Any] = {}
    index: Any = DiffusionPipeline.load_config(source)
    for name, part in index.items():
        if name.startswith("_") or not isinstance(part, list | tuple) or part[0] not in homes:
            continue
        kind: Any = getattr(homes[part[0]], str(part[1]), None)
        if not isinstance(kind, type):
            continue
        if issubclass(kind, ModelMixin):
            empty: Any = kind
            with init_empty_weights():
                parts[name] = empty.from_config(empty.load_config(source, subfolder=name))
        elif issubclass(kind, transformers.PreTrainedModel):
            parts[name] = None
    return load(model, dtype=torch.float32, device="meta", **parts)
