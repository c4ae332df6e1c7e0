"""Memory that CPUs' runs free and take again at every layer, kept by the process."""

from __future__ import annotations

import ctypes
import os
import platform

# Of glibc's malloc.h: how much is left free at the heap's end, and how many blocks are mapped by themselves.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_SETTINGS = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}


def keep_freed_memory() -> bool:
    """Have this process keep the memory that it frees, up to 2 GiB at its heap's end, for what it takes next.

    Otherwise glibc hands large blocks back and maps them anew, and the system clears every page of every activation:
    a fifth of a sparse step's time where an activation is tens of megabytes. Threads' own heaps hold blocks up to
    64 MB; larger ones are mapped there as before. What is already told by the environment (`MALLOC_*`,
    `GLIBC_TUNABLES`) stays. Returns whether it is done: other C libraries have nothing of the kind.
    """
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if told or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) for option, value in _SETTINGS.items())
