"""Compiles the Triton kernels for every target, and prints what the binaries use, one JSON line a kernel.

python compiled.py <part> <parts>, in a process of its own without TRITON_INTERPRET; no GPU is needed. With --write
it compiles all of them and writes the committed table. With `launched` it compiles what the host launches, with `wide`
some in float32, and prints what they spill.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ziggurat.kernels.binaries import write_table
from ziggurat.kernels.cases import Case, build
from ziggurat.kernels.gpu_targets import KERNELS, TARGETS
from ziggurat.kernels.transpose import transpose
from ziggurat.kernels.triton_backend import host, launch
from ziggurat.kernels.triton_backend.binaries import BLOCKS, HEAD_DIMS, gpu_target, row, spilled


class NoGpu:
    """Triton's driver of a GPU that is not there: enough for a launch to be compiled, not run."""

    def __init__(self, target: str) -> None:
        self.name, self.target = target, gpu_target(target)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device.
        return TARGETS.index(self.name)

    def get_current_stream(self, device: int) -> int:
        return 0


def launched(target: str, case: Case) -> list[str]:
    """The kernels that `attend`, its backward and `block_mass` launch on a case, compiled with what the host gives."""
    driver: Any = NoGpu(target)
    triton.runtime.driver.set_active(driver)
    names = []

    def compile_only(self, grid):
        def launch(*given, **named):
            names.append(self.fn.__name__)
            return self.warmup(*given, grid=grid, **named)

        return launch

    JITFunction.__getitem__ = compile_only
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


if __name__ == "__main__":
    if sys.argv[1] == "launched":
        small = Case(lists="all", tokens=1, head_dim=16, block=16, tile=16, batch=1, heads=1)
        other = Case(lists="masked", tokens=130, head_dim=80, block=32, tile=48, factors=(1, 4), layout="gaps")
        print(json.dumps([launched("cuda:90", small), launched("hip:gfx942", small), launched("cuda:80", other)]))
        sys.exit()
    if sys.argv[1] == "wide":
        wide = [("forward", t, 128, 16) for t in ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")]
        wide += [("grad_query", "cuda:80", 128, 16), ("grad_rows", "cuda:80", 128, 16), ("mass", "cuda:90", 128, 64)]
        print(json.dumps([spilled(*job, "fp32") for job in wide]))
        sys.exit()
    jobs = [(k, t, d, b) for t in TARGETS for k in KERNELS for d in HEAD_DIMS for b in BLOCKS]
    if sys.argv[1] == "--write":
        write_table([row(*job) for job in jobs], triton.__version__)
    else:
        part, parts = int(sys.argv[1]), int(sys.argv[2])
        for job in jobs[part::parts]:
            print(json.dumps(row(*job)), flush=True)
