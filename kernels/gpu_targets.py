"""How each Triton kernel is cut for a GPU: a plain table, which the compiled binaries are checked for."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

TARGETS = ("cuda:80", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How one kernel is cut.

    tile: query rows per program (per step in grad_rows). rows: key rows per step (per program in grad_rows).
    warps: of 32 threads, 64 on AMD. stages: depth of the software pipeline over the steps.
    """

    tile: int
    rows: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class Config:
    """One launch for each kernel: the output, the queries' gradient, the rows' gradients, the block masses."""

    forward: Launch
    grad_query: Launch
    grad_rows: Launch
    mass: Launch


KERNELS = tuple(field.name for field in fields(Config))


def config(target: str, head_dim: int, block: int) -> Config:
    """The launches for a target ("cuda:90", "hip:gfx942", …) at a head_dim and block, before fitting to a list's tile.

    A target that is not in the table takes the nearest older one of its kind.
    """
    wide = padded(head_dim)
    if wide <= 128:
        forward = Launch(tile=128, rows=64, warps=8, stages=3)
        grad_query = Launch(tile=128, rows=64, warps=8, stages=2)
        grad_rows = Launch(tile=64, rows=64, warps=8, stages=2)
        mass = Launch(tile=128, rows=64, warps=8, stages=3)
    else:
        forward = Launch(tile=64, rows=32, warps=8, stages=2)
        grad_query = Launch(tile=64, rows=32, warps=8, stages=1)
        grad_rows = Launch(tile=32, rows=32, warps=8, stages=1)
        mass = Launch(tile=64, rows=64, warps=8, stages=2)
    return Config(forward=forward, grad_query=grad_query, grad_rows=grad_rows, mass=mass)


def padded(size: int) -> int:
    """The next power of two, at least 16: what a tile of `size` takes in a kernel."""
    return max(16, 1 << (size - 1).bit_length())


def fit(kernel: str, launch: Launch, tile: int, block: int) -> Launch:
    """A launch narrowed to a list's tile and, where a program holds one block, to its block."""
    if kernel == "grad_rows":
        return replace(launch, rows=min(launch.rows, padded(block)))
    if kernel == "mass":
        return replace(launch, tile=min(launch.tile, padded(tile)), rows=max(launch.rows, padded(block)))
    return replace(launch, tile=min(launch.tile, padded(tile)))


def smaller(kernel: str, launch: Launch, block: int) -> Launch | None:
    """The next launch that takes less shared memory: fewer stages, then fewer rows, then a smaller tile."""
    if launch.stages > 1:
        return replace(launch, stages=launch.stages - 1)
    if launch.rows > (padded(block) if kernel == "mass" else 16):
        return replace(launch, rows=launch.rows // 2)
    return replace(launch, tile=launch.tile // 2) if launch.tile > 16 else None
