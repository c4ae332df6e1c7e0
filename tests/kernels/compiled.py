"""Compiles the Triton kernels for every target, and prints what the binaries use, one JSON line a kernel.

python compiled.py <part> <parts>, in a process of its own without TRITON_INTERPRET; no GPU is needed. With --write
it compiles all of them and writes the committed table. With `launched` it compiles what the host launches, with `wide`
some in float32 and of other head_dims, and prints what they spill; with `tight` it launches on a chip that has too
little shared memory; with `direct` it compiles for AMD's chips with copies from memory to shared memory.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
import sys
from types import SimpleNamespace
from typing import Any, cast

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ziggurat.kernels.binaries import write_table
from ziggurat.kernels.cases import Case, build
from ziggurat.kernels.gpu_devices import DEVICES
from ziggurat.kernels.gpu_targets import KERNELS, TARGETS, config, fit
from ziggurat.kernels.transpose import transpose
from ziggurat.kernels.triton_backend import binaries, host, launch
from ziggurat.kernels.triton_backend.binaries import BLOCKS, HEAD_DIMS, gpu_target, row, spilled


class NoGpu:
    """Triton's driver of a GPU that is not there: all of a launch but running it, which Triton itself refuses where the
    GPU's shared memory would not hold it."""

    numbers = itertools.count()

    def __init__(self, target: str, shared: int) -> None:
        # Triton keeps what it compiled, and how much memory there is, by device.
        self.number, self.target = next(self.numbers), gpu_target(target)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": shared},
            load_binary=lambda name, kernel, used, device: (0, 0, 0, 0, 1024),
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *_: None

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


def launched(target: str, case: Case, shared: int) -> list[list[Any]]:
    """What `attend`, its backward and `block_mass` launch on a case: each kernel's name and bytes of shared memory."""
    driver: Any = NoGpu(target, shared)
    triton.runtime.driver.set_active(driver)
    names = []

    def record(self, grid):
        def run(*given, **named):
            kernel = self.run(*given, grid=grid, warmup=False, **named)
            names.append([self.fn.__name__, kernel.metadata.shared])

        return run

    JITFunction.__getitem__ = record
    launch.target_of = lambda index: target
    problem = build(case, torch.bfloat16)
    pyramid, blocks = problem.pyramid(), problem.blocks
    inputs = host.Inputs(
        *(problem.query, pyramid.key, pyramid.value, pyramid.pooled_key, pyramid.pooled_value),
        *(pyramid.key_rows, pyramid.log_weight, 0.125, torch.bfloat16),
    )
    order = host.tile_order(blocks, case.batch, case.heads, len(pyramid.blocks_at(0)))
    out, lse = host.forward(inputs, blocks, order)
    delta = host.dots(out, out)
    host.grad_query(inputs, blocks, order, out, lse, delta)
    host.grad_rows(inputs, blocks, transpose(blocks, pyramid), out, lse, delta)
    host.masses(inputs, lse, blocks.query_rows, blocks.block)
    return names


def tight() -> dict[str, Any]:
    """Launches on a chip that runs the code of cuda:80 but has less shared memory, twice, and on one with next to none.

    roomy, runs: what is launched, and its shared memory, with all that cuda:80 has, and with 48 KiB. said: in debug
    output, by the first run of the two and the second. refused: what the chip with next to none says. old: what one of
    compute capability 7.5 says.
    """
    case = Case(lists="masked", tokens=130, head_dim=128, block=64, tile=128, batch=1, heads=1, factors=(1, 4))
    triton.runtime.driver.set_active(cast("Any", NoGpu("cuda:75", 64 << 10)))
    torch.cuda.device = contextlib.nullcontext
    try:
        old = launch.target_of(0)
    except ValueError as error:
        old = str(error)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    launch.log.addHandler(handler)
    launch.log.setLevel(logging.DEBUG)
    roomy = launched("cuda:80", case, DEVICES["cuda:80"].shared_block)
    launch._fitted.clear()
    said, runs = [], []
    for _ in range(2):
        runs.append(launched("cuda:80", case, 48 << 10))
        said.append(list(lines))
        lines.clear()
    launch._fitted.clear()
    refused = ""
    try:
        launched("cuda:80", case, 1 << 10)
    except ValueError as error:
        refused = str(error)
    return {"roomy": roomy, "runs": runs, "said": said, "refused": refused, "old": old}


def direct(target: str) -> list[str]:
    """The copies from memory straight to shared memory that Triton makes for a chip where it is told to."""
    with knobs.amd.scope():
        knobs.amd.use_async_copy = True
        cut = fit("forward", config(target, 128, 64).forward, 128, 64)
        text = binaries.compile_kernel("forward", target, 128, 64, cut).asm["amdgcn"]
    return sorted(set(re.findall(r"\b(?:global|buffer)_load_lds_\w+", text)))


if __name__ == "__main__":
    if sys.argv[1] == "launched":
        small = Case(lists="all", tokens=1, head_dim=16, block=16, tile=16, batch=1, heads=1)
        other = Case(lists="masked", tokens=130, head_dim=80, block=32, tile=48, factors=(1, 4), layout="gaps")
        given = (("cuda:90", small), ("hip:gfx942", small), ("cuda:80", other))
        print(json.dumps([launched(target, case, DEVICES[target].shared_block) for target, case in given]))
        sys.exit()
    if sys.argv[1] == "wide":
        wide = [("forward", t, 128, 16) for t in ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")]
        wide += [("grad_query", "cuda:80", 128, 16), ("grad_rows", "cuda:80", 128, 16)]
        wide += [("mass", t, 128, 64) for t in ("cuda:80", "cuda:90")]
        padded = [("forward", t, 80, b) for t in ("cuda:89", "cuda:120") for b in (16, 64)]
        large = [("forward", t, 256, 16) for t in ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")]
        large += [("grad_query", "cuda:80", 256, 64), ("grad_rows", "hip:gfx942", 256, 64)]
        fine = [spilled(*job, "bf16") for job in (*padded, *large)]
        print(json.dumps({"float32": [spilled(*job, "fp32") for job in wide], "bfloat16": fine}))
        sys.exit()
    if sys.argv[1] == "tight":
        print(json.dumps(tight()))
        sys.exit()
    if sys.argv[1] == "direct":
        print(json.dumps({target: direct(target) for target in ("hip:gfx942", "hip:gfx950")}))
        sys.exit()
    jobs = [(k, t, d, b) for t in TARGETS for k in KERNELS for d in HEAD_DIMS for b in BLOCKS]
    if sys.argv[1] == "--write":
        write_table([row(*job) for job in jobs], triton.__version__)
    else:
        part, parts = int(sys.argv[1]), int(sys.argv[2])
        for job in jobs[part::parts]:
            print(json.dumps(row(*job)), flush=True)
