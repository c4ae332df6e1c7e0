"""What this machine's CPU can do."""

import functools

import torch


@functools.cache
def has_amx() -> bool:
    """Does this CPU multiply bfloat16 matrices in tiles?"""
    return torch.cpu._is_amx_tile_supported()


@functools.cache
def has_avx2() -> bool:
    """Does this CPU compute with eight floats at a time? All that do multiply and add at once."""
    return torch.cpu._is_avx2_supported()


@functools.cache
def has_avx512() -> bool:
    """Does this CPU compute with sixteen floats at a time?"""
    return torch.cpu._is_avx512_supported()


@functools.cache
def has_bfloat16() -> bool:
    """Does this CPU have bfloat16 products at all? Without them float32 is the faster dtype."""
    return has_amx() or torch.cpu._is_avx512_bf16_supported()


def instructions() -> str:
    """What this CPU has for vectors and matrices, such as "AVX512, bf16"."""
    more = [name for name, has in (("bf16", has_bfloat16()), ("AMX", has_amx())) if has]
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *more])
