"""What the targets' chips have, from their makers' data sheets and programming guides: limits and rates.

Shared memory and warps of NVIDIA's are those of CCCL's `cuda::arch_traits`, exp2's per clock those of the CUDA C++
Programming Guide's table of arithmetic throughput; each chip's `source` is for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    """One chip of a target. A processor is an SM, or a compute unit on AMD.

    shared_block, shared: bytes of shared memory that a block may take, and that a processor has for all of its blocks
        (each block takes `shared_reserved` more). registers: 32-bit ones of a processor. warps: that it holds at most.
    tensor_columns: of tensor memory (0 = none). processors: on the chip. clock: Hz, at which `flops` is given.
    flops: bfloat16 with float32 sums, dense. bandwidth: bytes/s of memory.
    exps, lanes: exp2 and float32 instructions a processor issues per clock. l2: bytes per clock and processor from L2;
        64 is the width of a processor's port, and more than all of them get at once.
    source: the document that has these. dense: share of `flops` that the target's dense FlashAttention reaches.
    dense_source: where that is from.
    """

    name: str
    shared_block: int
    shared: int
    shared_reserved: int
    registers: int
    warps: int
    tensor_columns: int
    processors: int
    clock: float
    flops: float
    bandwidth: float
    exps: int
    lanes: int
    l2: int
    source: str
    dense: float
    dense_source: str

    @property
    def flops_per_clock(self) -> float:
        """bfloat16 operations per clock of one processor."""
        return self.flops / self.processors / self.clock


KIB = 1024
DEVICES = {
    "cuda:80": Device(
        name="A100 SXM",
        **{"shared_block": 163 * KIB, "shared": 164 * KIB, "shared_reserved": KIB},
        **{"registers": 65536, "warps": 64, "tensor_columns": 0},
        **{"processors": 108, "clock": 1.41e9, "flops": 312e12, "bandwidth": 2.039e12},
        **{"exps": 16, "lanes": 64, "l2": 47},
        source="NVIDIA A100 Tensor Core GPU Architecture (whitepaper); A100 80GB data sheet for memory",
        dense=0.73,
        dense_source="FlashAttention-2, arXiv 2307.08691",
    ),
    "cuda:89": Device(
        name="RTX 4090",
        **{"shared_block": 99 * KIB, "shared": 100 * KIB, "shared_reserved": KIB},
        **{"registers": 65536, "warps": 48, "tensor_columns": 0},
        **{"processors": 128, "clock": 2.52e9, "flops": 165.2e12, "bandwidth": 1.008e12},
        **{"exps": 16, "lanes": 128, "l2": 64},
        source="NVIDIA Ada GPU Architecture (whitepaper)",
        dense=0.89,
        dense_source="assumed: as on RTX 5090, whose products stand to its other rates alike",
    ),
    "cuda:90": Device(
        name="H100 SXM",
        **{"shared_block": 227 * KIB, "shared": 228 * KIB, "shared_reserved": KIB},
        **{"registers": 65536, "warps": 64, "tensor_columns": 0},
        **{"processors": 132, "clock": 1.83e9, "flops": 989.4e12, "bandwidth": 3.352e12},
        **{"exps": 16, "lanes": 128, "l2": 39},
        source="NVIDIA H100 Tensor Core GPU Architecture (whitepaper); L2: PMC10448217, table 3",
        dense=0.7,
        dense_source="FlashAttention-3 beside the stripe kernel of arXiv 2609.37001",
    ),
    "cuda:100": Device(
        name="B200",
        **{"shared_block": 227 * KIB, "shared": 228 * KIB, "shared_reserved": KIB},
        **{"registers": 65536, "warps": 64, "tensor_columns": 512},
        **{"processors": 148, "clock": 1.85e9, "flops": 2250e12, "bandwidth": 8.0e12},
        **{"exps": 16, "lanes": 128, "l2": 64},
        source="NVIDIA Blackwell Architecture Technical Brief; processors and clock from reports",
        dense=0.71,
        dense_source="FlashAttention-4 (Together AI, Colfax Research, 2026)",
    ),
    "cuda:120": Device(
        name="RTX 5090",
        **{"shared_block": 99 * KIB, "shared": 100 * KIB, "shared_reserved": KIB},
        **{"registers": 65536, "warps": 48, "tensor_columns": 0},
        **{"processors": 170, "clock": 2.407e9, "flops": 209.5e12, "bandwidth": 1.792e12},
        **{"exps": 16, "lanes": 128, "l2": 64},
        source="NVIDIA RTX Blackwell GPU Architecture (whitepaper)",
        dense=0.89,
        dense_source="FlashAttention-2 through SDPA, gau-nernst, Speed-of-Light Flash Attention for 5090; cuDNN 97%",
    ),
    "hip:gfx942": Device(
        name="MI300X",
        **{"shared_block": 64 * KIB, "shared": 64 * KIB, "shared_reserved": 0},
        **{"registers": 4 * 512 * 64, "warps": 32, "tensor_columns": 0},
        **{"processors": 304, "clock": 2.1e9, "flops": 1307.4e12, "bandwidth": 5.3e12},
        **{"exps": 16, "lanes": 64, "l2": 64},
        source="AMD Instinct MI300X data sheet; ROCm, AMD GPU specifications; exp2: a quarter of the lanes, assumed",
        dense=0.5,
        dense_source="assumed",
    ),
}


def occupancy(target: str, *, warps: int, registers: int, shared: int, tensor_columns: int = 0) -> int:
    """Blocks that one processor holds at a time, by registers per thread, shared bytes, warps and tensor memory."""
    device = DEVICES[target]
    if target.startswith("hip"):
        # Each of four SIMDs has 512 registers a lane, given out in eights, and holds eight waves.
        waves = 4 * min(8, 512 // (-(-registers // 8) * 8))
        return min(waves // warps, device.shared // max(1, shared))
    # A warp's registers are given out in units of 256.
    held = -(-registers * 32 // 256) * 256 * warps
    limits = [device.registers // held, device.warps // warps, device.shared // (shared + device.shared_reserved)]
    if tensor_columns:
        limits.append(device.tensor_columns // tensor_columns)
    return min(limits)
