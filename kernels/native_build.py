"""The CPU kernels in C++ (`native*.cpp`, for AVX2 or AVX-512): compiled at their first use, once a machine."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from .chip import has_amx, has_avx2, has_avx512, has_bfloat16

FOLDER = Path(__file__).parent
UNITS = ("native.cpp", "native_grad.cpp", "native_mass.cpp", "native_pool.cpp")
HEADERS = ("native.h", "native_vector.h")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-mfma")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")


def lacking(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why products in `dtype` do not go to the C++ kernels here, in a few words; None if they do."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return f"they are for float32 and bfloat16 on CPUs, not for {dtype} on {device.type}"
    if dtype == torch.bfloat16 and has_amx():
        return "PyTorch's fused kernel is faster with AMX"
    if not has_avx2():
        return "this chip lacks AVX2"
    if dtype == torch.bfloat16 and not has_bfloat16():
        return "this chip lacks bfloat16 products"
    built = _built()
    return built if isinstance(built, str) else None


def library() -> ctypes.CDLL:
    """The compiled kernels. Raises RuntimeError, saying why, if there are none."""
    built = _built()
    if isinstance(built, str):
        raise RuntimeError(f"the C++ kernels are missing: {built}")
    return built


@functools.cache
def _built() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        return "there is no C++ compiler: install g++ or clang++, or name one in CXX"
    command = [*compiler.split(), *FLAGS, *_instructions()]
    sources = b"".join((FOLDER / name).read_bytes() for name in (*HEADERS, *UNITS))
    name = hashlib.sha256(sources + " ".join(command).encode()).hexdigest()[:20]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ziggurat"
    path = folder / f"native-{name}.so"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as work:
                _compile(command, Path(work)).replace(path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {(error.stderr.strip() or str(error)).splitlines()[0]}"
    except OSError as error:
        return f"they could not be built in {folder}: {error}"


def _instructions() -> tuple[str, ...]:
    """What this chip has of the instructions that the sources know."""
    if not has_avx512():
        return ("-mavx2",)
    return (*AVX512, "-mavx512bf16") if torch.cpu._is_avx512_bf16_supported() else AVX512


def _compile(command: list[str], work: Path) -> Path:
    """Compile and link in `work`. Linked without OpenMP, the library takes the one that PyTorch has loaded, with its
    threads: a second one's would spin beside them."""
    target = work / "native.so"
    jobs = [
        subprocess.Popen([*command, "-fopenmp", "-c", str(FOLDER / unit), "-o", str(work / unit) + ".o"],
                         stderr=subprocess.PIPE, text=True)
        for unit in UNITS
    ]  # fmt: skip
    for job, (_, told) in [(job, job.communicate()) for job in jobs]:
        if job.returncode:
            raise subprocess.CalledProcessError(job.returncode, job.args, stderr=told)
    objects = [str(work / unit) + ".o" for unit in UNITS]
    subprocess.run([*command, "-shared", *objects, "-o", str(target)], check=True, capture_output=True, text=True)
    return target
