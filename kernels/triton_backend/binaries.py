"""The kernels compiled for GPUs that need not be there, and what the binaries use."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..binaries import COPIES
from ..blocklist import mask_words
from ..gpu_devices import DEVICES, occupancy
from ..gpu_targets import KERNELS, TARGETS, Launch, config, fit, options, padded, smaller, upright
from .forward import attend_tile
from .grad_keys import grad_rows_block
from .grad_query import grad_query_tile
from .launch import target_settings
from .masses import mass_tile

FUNCTIONS = {"forward": attend_tile, "grad_query": grad_query_tile, "grad_rows": grad_rows_block, "mass": mass_tile}
HEAD_DIMS, BLOCKS, TILE = (64, 128), (16, 64), 128
"""What the table covers, for lists of 128 queries a tile."""

FLOATS = {"Q", "K", "V", "PK", "PV", "OUT", "GRAD", "GRAD_QUERY", "ROW_GRAD_K", "ROW_GRAD_V", "GRAD_PK", "GRAD_PV"}
WIDE_FLOATS = {"LOG_WEIGHT", "LSE", "DELTA", "MASS"}
LONGS = {"START", "MASK_START", "ALL_START"}
# Products of a kernel that each multiply tile × rows × head_dim, and of those tables' rows that a step loads.
PRODUCTS = {"forward": 2, "grad_query": 3, "grad_rows": 4, "mass": 1}
LOADED = {"forward": 2, "grad_query": 2, "grad_rows": 2, "mass": 1}
# Row maps are loaded 16 bytes wide as well, from a base in scalar registers; rows have an address for each lane.
WIDE_COPIES = {
    "async_copies": r"cp\.async\.cg\.shared\.global[^;]*, 0x10|\bglobal_load_lds_dwordx4",
    "wide_loads": r"\bglobal_load_dwordx4 v\[[\d:]+\], v\[[\d:]+\], off",
}


def rows(targets: tuple[str, ...] = TARGETS, kernels: tuple[str, ...] = KERNELS) -> Iterator[dict[str, Any]]:
    """The table: one row for each kernel, target, head_dim and block, in the configuration that the target uses."""
    for target in targets:
        for kernel in kernels:
            for head_dim in HEAD_DIMS:
                for block in BLOCKS:
                    yield row(kernel, target, head_dim, block)


def row(kernel: str, target: str, head_dim: int, block: int) -> dict[str, Any]:
    """What one compiled kernel uses; a launch that passes the target's shared memory gives way to the next smaller.

    registers: per thread. stack: bytes of local memory per thread (AMD: of scratch), 0 unless registers spill.
    spills: AMD's spilled registers. local: instructions that touch local memory. occupancy: blocks per processor.
    wgmma, tcgen05, mma_sync, mfma: instructions in the mask-free loop. work: their products ÷ those that attention
    needs. async_copies: 16-byte asynchronous copies to shared memory in that loop, of one thread. wide_loads: AMD's
    16-byte loads of rows to registers. wide_share: the share of the rows' bytes that come by the target's own of the
    two, see `kernels.binaries.COPIES`. group: blocks per step.
    """
    launch: Launch = fit(kernel, getattr(config(target, head_dim, block), kernel), TILE, block)
    compiled = compile_kernel(kernel, target, head_dim, block, launch)
    while compiled.metadata.shared > DEVICES[target].shared_block:
        narrower = smaller(kernel, launch, block)
        if narrower is None:
            raise ValueError(f"{kernel} with head_dim {head_dim} and block {block} fits {target} in no configuration")
        launch, compiled = narrower, compile_kernel(kernel, target, head_dim, block, narrower)
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    used = _amd(compiled) if target.startswith("hip") else _nvidia(compiled)
    text = compiled.asm["amdgcn" if target.startswith("hip") else "ptx"]
    loop = main_loop(text)
    flops, counts = products(loop, text, launch.warps)
    needed = PRODUCTS[kernel] * 2 * launch.tile * launch.rows * padded(head_dim)
    copies = {name: len(re.findall(pattern, loop, re.M)) for name, pattern in WIDE_COPIES.items()}
    moved = copies[COPIES[target]] * 16 * gpu_target(target).warp_size * launch.warps
    # A step of grad_rows loads queries, of the others key rows.
    step = launch.tile if kernel == "grad_rows" else launch.rows
    return {
        **{"kernel": kernel, "target": target, "head_dim": head_dim, "block": block, "tile": launch.tile},
        **{"rows": launch.rows, "group": max(1, launch.rows // block), "warps": launch.warps, "stages": launch.stages},
        **used,
        **{"shared": compiled.metadata.shared, "tensor_columns": columns},
        "occupancy": occupancy(
            target,
            warps=launch.warps,
            registers=used["registers"],
            shared=compiled.metadata.shared,
            tensor_columns=columns,
        ),
        **counts,
        "work": round(flops / needed, 3),
        **copies,
        "wide_share": round(moved / (LOADED[kernel] * step * padded(head_dim) * 2), 3),
    }


def spilled(kernel: str, target: str, head_dim: int, block: int, dtype: str) -> int:
    """Bytes of stack, and spilled registers, of a kernel in a dtype, in the configuration that the target uses."""
    launches = config(target, head_dim, block, wide=dtype == "fp32")
    compiled = compile_kernel(
        kernel, target, head_dim, block, fit(kernel, getattr(launches, kernel), TILE, block), dtype
    )
    if compiled.metadata.shared > DEVICES[target].shared_block:
        raise ValueError(f"{kernel} with head_dim {head_dim} in {dtype} takes too much shared memory on {target}")
    used = _amd(compiled) if target.startswith("hip") else _nvidia(compiled)
    return used["stack"] + used["spills"]


def gpu_target(target: str) -> GPUTarget:
    """ "cuda:90" or "hip:gfx942" as Triton names it."""
    backend, _, arch = target.partition(":")
    return GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)


def compile_kernel(kernel: str, target: str, head_dim: int, block: int, launch: Launch, dtype: str = "bf16") -> Any:
    """The compiled kernel for lists with every feature: row masks, pooled rows, tiles of count ALL."""
    function = FUNCTIONS[kernel]
    names = list(inspect.signature(function.fn).parameters)
    wide = dtype == "fp32"
    constants: dict[str, Any] = {
        **{"TILE": launch.tile, "ROWS": launch.rows, "LIST_TILE": TILE},
        **{"BLOCK": block, "PADDED": padded(block), "WORDS": mask_words(block)},
        **{"D": head_dim, "WIDE": padded(head_dim), "UPRIGHT": upright(target, launch.rows)},
        **dict.fromkeys(("LISTED", "MASKED", "POOLED"), True),
        "PARTS": -(-block // launch.rows) if kernel == "grad_rows" else -(-TILE // launch.tile),
        "COMPUTE": {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype],
        "PRECISION": "tf32x3" if wide and target.startswith("cuda") else "ieee",
    }
    if kernel == "grad_rows":
        constants["EVERY"] = True
    fixed = {name: constants[name] for name in names if name in constants}
    signature, attributes = {}, {}
    for place, name in enumerate(names):
        if name in fixed:
            signature[name] = "constexpr"
        elif name.isupper():
            kind = dtype if name in FLOATS else "fp32" if name in WIDE_FLOATS else "i64" if name in LONGS else "i32"
            signature[name] = f"*{kind}"
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
        # Tensors and their strides come in whole 16 bytes.
        if name not in fixed and (name.isupper() or re.fullmatch(r"(q|k|v|pk|pv|g)_[bhn]", name)):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=attributes)
    with target_settings(target):
        return triton.compile(source, target=gpu_target(target), options=options(target, launch))


def loops(text: str) -> list[str]:
    """The outermost loops of PTX or AMD assembly, wherever their blocks stand: cycles of its graph of jumps."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    edges: list[tuple[int, int | str]] = []
    for line in text.splitlines():
        label = re.match(r"\s*([$.]L\w*BB\w+):", line)
        branch = re.search(r"\b(?:bra(?:\.uni)?|s_cbranch_\w+|s_branch)\s+([$.]L\w*BB\w+)", line)
        last = len(blocks) - 1
        if label:
            edges.append((last, last + 1))
            labels[label[1]] = last + 1
            blocks.append([line])
            continue
        blocks[-1].append(line)
        if branch:
            edges.append((last, branch[1]))
        if branch or re.match(r"\s*(ret;|s_endpgm)", line):
            if branch and (line.lstrip().startswith("@") or "s_cbranch" in line):
                edges.append((last, last + 1))
            blocks.append([])
    sources, ends = zip(*((a, b if isinstance(b, int) else labels[b]) for a, b in edges), strict=True)
    graph = coo_array(([1] * len(sources), (sources, ends)), shape=(len(blocks), len(blocks)))
    _, part = connected_components(graph, connection="strong")
    found: dict[int, list[str]] = {}
    for block, name in zip(blocks, part.tolist(), strict=True):
        found.setdefault(name, []).extend(block)
    again = {int(part[a]) for a, b in zip(sources, ends, strict=True) if part[a] == part[b]}
    return ["\n".join(lines) for name, lines in found.items() if name in again]


MMA = re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma")


def main_loop(text: str) -> str:
    """The last loop with products in it, which is the mask-free one."""
    found = [body for body in loops(text) if MMA.search(body)]
    if not found:
        raise ValueError("there is no loop with products in this kernel")
    return found[-1]


def products(loop: str, text: str, warps: int) -> tuple[int, dict[str, int]]:
    """Operations that a block's tensor instructions in a loop make, and how many there are of each kind."""
    flops = 0
    counts: dict[str, int] = dict.fromkeys(("wgmma", "tcgen05", "mma_sync", "mfma"), 0)
    for m, n, k in re.findall(r"\bmma\.sync\S*\.m(\d+)n(\d+)k(\d+)", loop):
        flops += 2 * int(m) * int(n) * int(k) * warps
        counts["mma_sync"] += 1
    for m, n, k in re.findall(r"wgmma\.mma_async\S*\.m(\d+)n(\d+)k(\d+)", loop):
        # Four warps make one.
        flops += 2 * int(m) * int(n) * int(k) * warps // 4
        counts["wgmma"] += 1
    for name in re.findall(r"tcgen05\.mma\S*kind::f16 \[[^]]*\], [^,]+, [^,]+, (%r\d+)", loop):
        # One thread makes it for the block; its shape stands in the descriptor: M ÷ 16 at bit 24, N ÷ 8 at bit 17.
        value = int(re.findall(rf"mov\.b32\s+{re.escape(name)}, (-?\d+);", text)[-1])
        flops += 2 * ((value >> 24 & 31) * 16) * ((value >> 17 & 63) * 8) * 16
        counts["tcgen05"] += 1
    for m, n, k in re.findall(r"v_mfma_f32_(\d+)x(\d+)x(\d+)", loop):
        flops += 2 * int(m) * int(n) * int(k) * warps
        counts["mfma"] += 1
    return flops, counts


def _nvidia(compiled: Any) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    # Triton's own compiler chooses between two ptxas; what reads the binary has to come with it.
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        said = [
            subprocess.run([tool, option, binary], capture_output=True, text=True, check=True, env=environment).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        ]
    usage = re.search(r"REG:(\d+) STACK:(\d+)", said[0])
    if usage is None or "EXIT" not in said[1]:
        raise ValueError(f"cuobjdump said nothing of registers or instructions: {said[0][:200]}")
    local = len(re.findall(r"\b(?:LDL|STL)\b", said[1]))
    return {"registers": int(usage[1]), "stack": int(usage[2]), "spills": 0, "local": local}


def _amd(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        if found is None:
            raise ValueError(f"the AMD assembly has no .{name}")
        return int(found[1])

    local = len(re.findall(r"\bscratch_(?:load|store)", text))
    return {
        "registers": figure("vgpr_count"),
        "stack": figure("private_segment_fixed_size"),
        "spills": figure("vgpr_spill_count"),
        "local": local,
    }
