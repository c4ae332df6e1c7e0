"""How each Triton kernel is cut for a GPU: a plain table, which the compiled binaries are checked for."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


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


# (kernel, widest head_dim, widest block): tile, rows, warps, stages. The first line that covers both counts.
Table = dict[tuple[str, int, int], tuple[int, int, int, int]]
# What makes m64 and wider products: warp groups' registers on Hopper, tensor memory on Blackwell.
_WIDE: Table = {
    ("forward", 128, 1024): (128, 64, 8, 3),
    ("forward", 256, 1024): (64, 32, 8, 2),
    ("grad_query", 64, 1024): (128, 64, 8, 2),
    ("grad_query", 128, 1024): (128, 64, 8, 2),
    ("grad_query", 256, 1024): (64, 32, 8, 2),
    ("grad_rows", 64, 1024): (64, 64, 4, 2),
    ("grad_rows", 128, 16): (64, 64, 4, 2),
    ("grad_rows", 128, 1024): (128, 32, 8, 2),
    ("grad_rows", 256, 1024): (32, 32, 8, 1),
    ("mass", 128, 1024): (128, 64, 8, 3),
    ("mass", 256, 1024): (64, 64, 8, 2),
}
_BLACKWELL: Table = {("grad_query", 64, 16): (64, 64, 4, 2), **_WIDE}
# Products of m16n8k16 hold output and scores in registers: half the rows a step, so that nothing spills.
_NARROW: Table = {
    ("forward", 64, 1024): (128, 64, 8, 3),
    # What is padded to 128 has masks to hold as well.
    ("forward", 127, 1024): (128, 32, 8, 2),
    ("forward", 128, 1024): (128, 32, 8, 3),
    ("forward", 256, 1024): (64, 32, 8, 2),
    ("grad_query", 64, 1024): (128, 64, 8, 2),
    ("grad_query", 128, 1024): (128, 32, 8, 2),
    ("grad_query", 256, 1024): (64, 32, 8, 1),
    ("grad_rows", 128, 16): (64, 64, 4, 2),
    ("grad_rows", 64, 1024): (32, 64, 4, 2),
    ("grad_rows", 128, 1024): (64, 64, 8, 2),
    ("grad_rows", 256, 1024): (32, 32, 8, 1),
    ("mass", 128, 1024): (128, 64, 8, 3),
    ("mass", 256, 1024): (64, 64, 8, 2),
}
# Four waves of 64 threads have 512 registers each, eight have 256; and there are 64 KiB of shared memory.
_AMD: Table = {
    ("forward", 128, 1024): (128, 32, 4, 2),
    ("forward", 256, 1024): (64, 32, 4, 1),
    ("grad_query", 64, 1024): (128, 32, 4, 2),
    ("grad_query", 128, 1024): (64, 32, 4, 2),
    ("grad_query", 256, 1024): (32, 32, 4, 1),
    ("grad_rows", 64, 1024): (64, 64, 4, 1),
    ("grad_rows", 128, 16): (64, 64, 4, 1),
    ("grad_rows", 128, 1024): (32, 64, 4, 1),
    ("grad_rows", 256, 1024): (32, 32, 4, 1),
    ("mass", 128, 1024): (128, 64, 8, 2),
    ("mass", 256, 1024): (64, 64, 8, 1),
}
# float32 is made of three products of tf32, whose parts take registers of their own. At head_dim 256, and in grad_rows
# on Hopper and Blackwell from 128 on, even the smallest cut spills.
_FLOAT32: Table = {
    ("forward", 64, 1024): (64, 32, 8, 2),
    ("forward", 128, 1024): (32, 16, 4, 2),
    ("forward", 256, 1024): (16, 16, 2, 1),
    ("grad_query", 64, 1024): (32, 16, 4, 2),
    ("grad_query", 256, 1024): (16, 16, 4, 1),
    ("grad_rows", 64, 1024): (32, 16, 4, 1),
    ("grad_rows", 256, 1024): (16, 16, 4, 1),
    ("mass", 128, 1024): (32, 64, 8, 1),
    ("mass", 256, 1024): (16, 16, 4, 1),
}
_AMD_FLOAT32: Table = {
    ("forward", 64, 1024): (128, 32, 4, 1),
    ("forward", 256, 1024): (64, 32, 4, 1),
    ("grad_query", 64, 1024): (64, 32, 4, 1),
    ("grad_query", 128, 1024): (32, 32, 4, 1),
    ("grad_query", 256, 1024): (16, 16, 4, 1),
    ("grad_rows", 64, 1024): (32, 64, 4, 1),
    ("grad_rows", 256, 1024): (32, 32, 4, 1),
    ("mass", 128, 1024): (64, 64, 8, 1),
    ("mass", 256, 1024): (32, 64, 4, 1),
}
TABLES: dict[str, Table] = {
    "cuda:80": _NARROW,
    "cuda:89": _NARROW,
    "cuda:90": _WIDE,
    "cuda:100": _BLACKWELL,
    "cuda:120": _NARROW,
    "hip:gfx942": _AMD,
}


TARGETS = tuple(TABLES)


def config(target: str, head_dim: int, block: int, *, wide: bool = False) -> Config:
    """The launches for a target ("cuda:90", "hip:gfx942", …) at a head_dim and block, before `fit`.

    wide: for float32 instead of 16 bits. A CUDA target that is not in the table takes the nearest older one, another
    of AMD's the only one.
    """
    table = TABLES[known(target)]
    if wide:
        table = _AMD_FLOAT32 if table is _AMD else _FLOAT32
    found: dict[str, Launch] = {}
    for (kernel, widest, rows), (tile, step, warps, stages) in table.items():
        if head_dim <= widest and block <= rows:
            found.setdefault(kernel, Launch(tile=tile, rows=step, warps=warps, stages=stages))
    if len(found) < len(KERNELS):
        raise ValueError(f"head_dim must be at most 256 and block at most 1024, got {head_dim} and {block}")
    return Config(**found)


def known(target: str) -> str:
    """The target of the table that a device's own stands for."""
    backend, _, arch = target.partition(":")
    if backend != "cuda":
        return "hip:gfx942"
    older = [name for name in TABLES if name.startswith("cuda:") and int(name[5:]) <= int(arch)]
    return older[-1] if older else "cuda:80"


def options(target: str, launch: Launch) -> dict[str, int]:
    """A launch's options for Triton's compiler."""
    given = {"num_warps": launch.warps, "num_stages": launch.stages}
    if target.startswith("hip") and launch.tile < 128:
        # Four waves stand below one another: 32 high, they would make the products of 64 rows twice.
        given["matrix_instr_nonkdim"] = 16
    return given


def upright(target: str, rows: int) -> bool:
    """Whether grad_rows makes its products with the key rows as the first side, the height of the MMAs.

    It does where they may be 16 high; where they are 64 high, queries and head_dim are the first side.
    """
    table = TABLES[known(target)]
    return table is _NARROW or (table is _AMD and rows >= 64)


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
