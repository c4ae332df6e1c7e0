"""Loading a pipeline: the embedded model, a local folder, or one of the Hub's; safetensors only, no remote code."""

from __future__ import annotations

import json
import platform
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from ..kernels.chip import has_amx, has_bfloat16
from .convolutions import through_onednn
from .memory import keep_freed_memory

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

Offload = Literal["model", "sequential", "group"]
_PICKLED = {".bin", ".pt", ".pth", ".ckpt"}
_NEVER = ("trust_remote_code", "custom_pipeline", "use_safetensors")


def embedded_models() -> list[str]:
    """The names of the models that come with the package."""
    root = Path(str(files("ziggurat.assets")))
    return sorted(index.parent.name for index in root.glob("*/model_index.json"))


def default_device() -> str:
    """Where models go when nothing else is asked."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fastest_dtype(device: str | torch.device | None = None) -> tuple[torch.dtype, str]:
    """The dtype that matrix products run fastest in on this device, and why."""
    kind = torch.device(device or "cpu").type
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bf16: this GPU has instructions for it"
        return torch.float16, "fp16: this GPU has no bf16 instructions"
    if kind == "cpu":
        if has_amx():
            return torch.bfloat16, "bf16: this CPU has AMX"
        if has_bfloat16():
            return torch.bfloat16, "bf16: this CPU has bf16 products"
        return torch.float32, f"fp32: this CPU ({platform.machine()}) has no bf16 matrix instructions"
    return torch.float32, f"fp32: nothing is known of {kind}'s bf16"


def _folder_of(model: str) -> Path | None:
    """The folder a name stands for, or None for a Hub id."""
    root = Path(str(files("ziggurat.assets"))) / model
    if model and Path(model).name == model and (root / "model_index.json").is_file():
        return root
    folder = Path(model).expanduser()
    return folder if model and folder.is_dir() else None


def _check_folder(folder: Path) -> None:
    """Refuse what diffusers would only refuse with a page of traceback, or would execute."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"model {folder} holds no model_index.json: give the folder that save_pretrained wrote")
    try:
        components = json.loads(index.read_text())
        parts = {name: part for name, part in components.items() if not name.startswith("_")}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"model {folder} has a model_index.json that is not a JSON object: {error}") from error
    for name, part in parts.items():
        library = part[0] if isinstance(part, list) and part and isinstance(part[0], str) else ""
        if library and any((place / f"{library}.py").is_file() for place in (folder, folder / name)):
            raise ValueError(f"model {folder} brings its own code ({library}.py for {name}), which is never run")
        held = [file for file in (folder / name).glob("*") if file.is_file()]
        pickled = [file.name for file in held if file.suffix in _PICKLED]
        if pickled and not any(file.suffix == ".safetensors" for file in held):
            raise ValueError(
                f"model {folder} holds {name}/{pickled[0]}, a pickle that can run code, and no safetensors:"
                " save it again with safe_serialization=True"
            )


def find_model(model: str) -> Path | None:
    """The folder a model's name stands for, None for a Hub id; nothing is asked of the Hub.

    Raises ValueError for a name that is neither, and for a folder that can't be read safely.
    """
    folder = _folder_of(model)
    if folder is not None:
        _check_folder(folder)
    elif model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(
            f"model {model!r} is neither an embedded model ({', '.join(embedded_models()) or 'none installed'}),"
            " nor a local folder, nor a Hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    return folder


def load(
    model: str | Path,
    *,
    dtype: torch.dtype | str | dict[str, torch.dtype] | None = None,
    device: str | torch.device | None = None,
    offload: Offload | None = None,
    **kwargs: Any,
) -> DiffusionPipeline:
    """A diffusers pipeline, ready to be called.

    `model` is an embedded model's name, a local folder, or a Hub id. `dtype` None or "auto" is the fastest of this
    device (`fastest_dtype` says why), else a torch dtype, its name, or a dict by component. `offload` is diffusers'
    "model", "sequential" or "group" offload to `device`, for when the weights do not fit. Other arguments go to
    `DiffusionPipeline.from_pretrained`. Of what runs on a CPU the process keeps the memory that it frees
    (`keep_freed_memory`). Raises ValueError for a model that does not exist or is not safetensors.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    model = str(model)
    refused = [name for name in _NEVER if name in kwargs]
    if refused:
        raise ValueError(
            f"{refused[0]} can't be given to load: models are read from safetensors, without their own code"
        )
    if offload is not None and offload not in get_args(Offload):
        raise ValueError(f"offload must be one of {', '.join(get_args(Offload))} or None, got {offload!r}")
    if offload is not None and torch.device(device or "cuda").type == "cpu":
        raise ValueError(
            "offload moves weights between an accelerator and memory, but device is cpu: leave offload out"
        )
    if device is None:
        device = default_device()
    folder = find_model(model)
    try:
        pipe = DiffusionPipeline.from_pretrained(
            folder or model,
            dtype=dtype_of(dtype, device),
            use_safetensors=True,
            trust_remote_code=False,
            **kwargs,
        )
    except OSError as error:
        if folder is not None:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise ValueError(f"model {folder} can't be read as safetensors: {reason}") from error
        raise ValueError(
            f"model {model!r} is not on this disk and the Hub does not give it ({type(error).__name__}): check the id"
            f" and the connection, or take an embedded model ({', '.join(embedded_models()) or 'none installed'})"
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(f"model {model!r} brings its own code, which is never run") from error
    if isinstance(vae := getattr(pipe, "vae", None), torch.nn.Module):
        through_onednn(vae)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")
    else:
        pipe.to(device)
    if offload is None and torch.device(device).type == "cpu":
        keep_freed_memory()
    return pipe


def dtype_of(
    dtype: torch.dtype | str | dict[str, torch.dtype] | None, device: str | torch.device
) -> torch.dtype | dict[str, torch.dtype]:
    """What `load` takes as dtype, as torch's: of None and "auto" the fastest of the device.

    Raises ValueError for a name that torch does not know.
    """
    if dtype is None or dtype == "auto":
        return fastest_dtype(device)[0]
    if isinstance(dtype, str):
        short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
        named = getattr(torch, short.get(dtype, dtype), None)
        if not isinstance(named, torch.dtype):
            raise ValueError(f"dtype must be auto, fp32, bf16, fp16 or a torch dtype, got {dtype!r}")
        return named
    return dtype
