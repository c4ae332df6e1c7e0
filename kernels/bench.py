"""The kernel benchmark: `attend` beside dense SDPA and FlexAttention in the same run, checked before it is timed."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .attend import attend
from .backends import choose
from .blocklist import BlockList, identity_rows
from .listops import all_blocks, from_pairs
from .pyramid import KVPyramid, build_pyramid

CHECKED_TILES = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest error allowed, in units of the dtype's rounding times the oracle's largest output.
ROUNDINGS = {torch.float32: 256, torch.bfloat16: 4, torch.float16: 32}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of the table. density 1 is the list of all blocks; uneven: tiles read ½ … 1½ of the density each."""

    dtype: str
    tokens: int
    head_dim: int
    heads: int = 4
    tile: int = 128
    block: int = 64
    density: float = 0.125
    backend: str = "auto"
    backward: bool = False
    uneven: bool = False


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    pyramid: KVPyramid
    blocks: BlockList


def build(setting: Setting, seed: int = 0) -> Inputs:
    """Gaussian query, key and value and a random list, the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    shape = (1, setting.heads, setting.tokens, setting.head_dim)
    dtype = DTYPES.get(setting.dtype)
    if dtype is None:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {setting.dtype!r}")
    query, key, value, grad = (torch.randn(shape, generator=random).to(dtype) for _ in range(4))
    rows = identity_rows(setting.tokens, setting.tile)
    if setting.density >= 1:
        blocks = all_blocks(rows, setting.block)
    else:
        columns, tiles = -(-setting.tokens // setting.block), rows.shape[1]
        share = torch.ones(setting.heads, tiles)
        if setting.uneven:
            share = 0.5 + torch.rand(share.shape, generator=random)
        count = (share * setting.density * columns).round().clamp(1, columns).long()
        rank = torch.rand(setting.heads, tiles, columns, generator=random).argsort(-1).argsort(-1)
        head, tile, block = (rank < count[..., None]).nonzero().unbind(1)
        blocks = from_pairs(head * tiles + tile, block, rows, setting.block, heads=setting.heads)
    return Inputs(query, key, value, grad, build_pyramid(key, value, block=setting.block), blocks)


def measure(setting: Setting, *, runs: int = 5, flex: bool = False, seed: int = 0) -> dict[str, Any]:
    """One row: correctness first, then the median of paired runs and the memory taken.

    Returns the setting with list density, seconds, sdpa_seconds, flex_seconds (None if not asked for), speedup over
    SDPA, speedup_x_density (1 = time in proportion to the rows read), max_error against float64, peak_bytes (the most
    memory held at once beyond inputs, list and what is returned: output and lse, with backward the gradients too).

    Raises ValueError for a backend that cannot do it, RuntimeError if the result is wrong.
    """
    inputs = build(setting, seed)
    error = _check(setting, inputs)
    rivals = {"ours": _ours(setting, inputs), "sdpa": _sdpa(setting, inputs)}
    if flex:
        rivals["flex"] = _flex(setting, inputs)
    peak = _peak_bytes(rivals["ours"])
    seconds = _paired(rivals, runs)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    ratio = statistics.median(s / o for s, o in zip(seconds["sdpa"], seconds["ours"], strict=True))
    density = inputs.blocks.density(inputs.pyramid)
    return {
        **asdict(setting),
        "backend": choose(inputs.query.device)[0] if setting.backend == "auto" else setting.backend,
        "density": round(density, 5),
        "seconds": medians["ours"],
        "sdpa_seconds": medians["sdpa"],
        "flex_seconds": medians.get("flex"),
        "speedup": ratio,
        "speedup_x_density": ratio * density,
        "max_error": error,
        "peak_bytes": peak,
    }


def settings(
    dtypes: tuple[str, ...], shapes: tuple[tuple[int, int], ...], densities: tuple[float, ...], base: Setting
) -> Iterator[Setting]:
    """Every combination over a base setting; shapes are (tokens, head_dim)."""
    for dtype in dtypes:
        for tokens, head_dim in shapes:
            for density in densities:
                yield replace(base, dtype=dtype, tokens=tokens, head_dim=head_dim, density=density)


def _check(setting: Setting, inputs: Inputs) -> float:
    """Largest difference of a few tiles' outputs, and gradients where they are timed, from the float64 reference."""
    tiles = torch.linspace(0, inputs.blocks.tiles - 1, CHECKED_TILES).long().unique()
    rows = inputs.blocks.query_rows[:, tiles]
    names = ("start", "count", "masked_count", "mask_start")
    few = replace(inputs.blocks, query_rows=rows, **{name: getattr(inputs.blocks, name)[..., tiles] for name in names})
    held = rows[rows >= 0].long()
    # Only the checked tiles' outputs count, so that both lists have the same gradients.
    grad = torch.zeros_like(inputs.grad)
    grad[:, :, held] = inputs.grad[:, :, held]
    results = []
    for dtype, blocks, backend in ((torch.float64, few, "reference"), (None, inputs.blocks, setting.backend)):
        tensors = [t.to(dtype or t.dtype).detach() for t in (inputs.query, inputs.key, inputs.value)]
        for tensor in tensors:
            tensor.requires_grad_(setting.backward)
        out, _ = attend(tensors[0], build_pyramid(*tensors[1:], block=setting.block), blocks, backend=backend)
        grads = torch.autograd.grad(out, tensors, grad.to(out.dtype)) if setting.backward else ()
        results.append([out.detach()[:, :, held], *grads])
    errors = []
    for exact, got in zip(*results, strict=True):
        errors.append(error := float((got.double() - exact).abs().max()))
        allowed = ROUNDINGS[got.dtype] * torch.finfo(got.dtype).eps * float(exact.abs().max())
        if not error <= allowed:
            raise RuntimeError(f"{setting.backend} is wrong by {error:.3g} where {allowed:.3g} is rounding: {setting}")
    return max(errors)


def _ours(setting: Setting, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return attend(inputs.query, inputs.pyramid, inputs.blocks, backend=setting.backend)

    def both() -> tuple[Tensor, ...]:
        tensors = [t.detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value)]
        pyramid = build_pyramid(*tensors[1:], block=setting.block)
        out, lse = attend(tensors[0], pyramid, inputs.blocks, backend=setting.backend)
        return out, lse, *torch.autograd.grad(out, tensors, inputs.grad)

    return both if setting.backward else forward


def _sdpa(setting: Setting, inputs: Inputs) -> Callable[[], Any]:
    def forward() -> None:
        with torch.no_grad():
            scaled_dot_product_attention(inputs.query, inputs.key, inputs.value)

    def both() -> None:
        query, key, value = (t.detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value))
        scaled_dot_product_attention(query, key, value).backward(inputs.grad)

    return both if setting.backward else forward


def _flex(setting: Setting, inputs: Inputs) -> Callable[[], Any]:
    if setting.backward:
        raise ValueError("flex has no backward on a CPU: leave out --backward or --flex")
    from . import flex

    call = flex.compiled(inputs.query, inputs.pyramid, inputs.blocks)

    def forward() -> None:
        with torch.no_grad():
            call()

    return forward


def _paired(rivals: dict[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """Seconds of each rival, taken in turns so that a slow moment of the machine falls on all."""
    for rival in rivals.values():
        rival()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(runs):
        for name, rival in rivals.items():
            begin = time.perf_counter()
            rival()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def _peak_bytes(call: Callable[[], tuple[Tensor, ...]]) -> int:
    """The most memory that tensors made within a call hold at once, by the allocator's own record, beyond what it
    returns: new tensors, each in memory of its own."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        returned = call()
    held = most = 0
    events = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    memory: list[Any] = [event for event in events if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most - sum(tensor.untyped_storage().nbytes() for tensor in returned)
