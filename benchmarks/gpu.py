"""The GPU benchmark, for whoever has one: `python benchmarks/gpu.py [out.json]`.

It first checks the case table, forward and gradients, against the float64 reference, then times `attend` beside SDPA,
FlexAttention and xformers (where they are), and prints what the model of docs/gpu.md predicts beside each measurement.

`python benchmarks/gpu.py --model` needs no GPU: it prints that page's tables, and writes them into it with --write.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ziggurat.kernels import bench, flex, gpu_model, gpu_targets
from ziggurat.kernels.attend import attend
from ziggurat.kernels.backends import load_triton
from ziggurat.kernels.binaries import table
from ziggurat.kernels.case_pairs import pairwise_cases
from ziggurat.kernels.cases import Case, build
from ziggurat.kernels.gpu_devices import DEVICES
from ziggurat.kernels.listops import all_blocks
from ziggurat.kernels.mass import block_mass
from ziggurat.kernels.pyramid import build_pyramid
from ziggurat.pipelines.record import surroundings

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
SHAPES = ((75_600, 128), (32_760, 128), (17_550, 64), (4_429, 64))
DENSITIES = (0.01, 0.03, 0.125, 0.5, 1.0)
BLOCKS = (16, 64)
HEADS = 8
RUNS = 11


def check(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Relative errors of output, block masses and gradients on the device, against the float64 reference on the CPU."""
    problem = build(case, dtype)
    results = []
    for place, kind, backend in ((torch.device("cpu"), torch.float64, "reference"), (device, dtype, "triton")):
        tensors = [t.to(place, kind).requires_grad_() for t in (problem.query, problem.key, problem.value)]
        pyramid = build_pyramid(
            tensors[1],
            tensors[2],
            problem.key_rows if problem.key_rows is None else problem.key_rows.to(place),
            block=case.block,
            factors=case.factors,
            key_log_weight=problem.key_log_weight
            if problem.key_log_weight is None
            else problem.key_log_weight.to(place),
        )
        blocks = problem.blocks.to(place)
        out, _ = attend(tensors[0], pyramid, blocks, backend=backend)
        with torch.no_grad():
            _, lse = attend(tensors[0], pyramid, all_blocks(blocks.query_rows, case.block), backend=backend)
            mass = block_mass(tensors[0], pyramid, lse, blocks.query_rows, backend=backend)
        results.append([out, mass, *torch.autograd.grad(out.square().sum(), tensors)])
    errors = [
        float((got.detach().cpu() - exact.detach()).norm() / (exact.detach().norm() + 1e-3))
        for exact, got in zip(*results, strict=True)
    ]
    # Sharp softmaxes (spread 40) turn a rounding of a logit into forty in a share.
    limit = 64 * torch.finfo(dtype).eps * (case.spread if case.spread > 1 else 1)
    return {"case": str(case), "dtype": str(dtype), "errors": errors, "passed": max(errors) <= limit}


def clock(function: Callable[[], Any]) -> float:
    """The median seconds of a call on the GPU, after warming up."""
    for _ in range(3):
        function()
    seconds = []
    for _ in range(RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def measure(setting: bench.Setting, device: torch.device, target: str) -> dict[str, Any]:
    """One row: seconds of ours, forward and backward, and of the others, with the share of peak and the prediction."""
    inputs = bench.build(setting)
    blocks = inputs.blocks.to(device)
    query, key, value, grad = (t.to(device) for t in (inputs.query, inputs.key, inputs.value, inputs.grad))
    pyramid = build_pyramid(key, value, block=setting.block)
    found: dict[str, Any] = {**dataclasses.asdict(setting), "density": inputs.blocks.density(inputs.pyramid)}
    with torch.no_grad():
        found["forward"] = clock(lambda: attend(query, pyramid, blocks, backend="triton"))
        found["sdpa"] = clock(lambda: scaled_dot_product_attention(query, key, value))
        if setting.density < 1:
            found["flex"] = clock(flex.compiled(query, pyramid, blocks))
        if importlib.util.find_spec("xformers"):
            from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

            dense = [t.transpose(1, 2).contiguous() for t in (query, key, value)]
            found["xformers"] = clock(lambda: memory_efficient_attention(*dense))
    tensors = [t.clone().requires_grad_() for t in (query, key, value)]

    def both() -> None:
        out, _ = attend(tensors[0], build_pyramid(*tensors[1:], block=setting.block), blocks, backend="triton")
        torch.autograd.grad(out, tensors, grad)

    found["forward_backward"] = clock(both)
    work = 4 * HEADS * setting.tokens**2 * setting.head_dim * found["density"]
    chip = DEVICES[target]
    found["share"] = work / found["forward"] / chip.flops
    row = next(
        r
        for r in table()
        if (r["kernel"], r["target"], r["head_dim"], r["block"]) == ("forward", target, setting.head_dim, setting.block)
    )
    said = gpu_model.predict(target, row, density=found["density"], tokens=setting.tokens)
    found["model"] = {"chip": chip.name, "at most": said.share, "likely": said.likely, "bound": said.bound}
    return found


def main(out: Path) -> None:
    """Check, time, print, write."""
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; python benchmarks/gpu.py --model prints what is known without one")
    device = torch.device("cuda", torch.cuda.current_device())
    load_triton()
    from ziggurat.kernels.triton_backend.launch import target_of

    target = gpu_targets.known(target_of(device.index or 0))
    checks = [check(case, getattr(torch, dtype), device) for case, dtype in pairwise_cases()]
    wrong = [found for found in checks if not found["passed"]]
    print(f"{len(checks)} cases checked, {len(wrong)} wrong")
    for found in wrong:
        print(f"  {found['case']} {found['dtype']}: {found['errors']}")
    rows: list[dict[str, Any]] = []
    if not wrong:
        for tokens, head_dim in SHAPES:
            for density in DENSITIES:
                for block in BLOCKS:
                    setting = bench.Setting(
                        dtype="bfloat16", tokens=tokens, head_dim=head_dim, heads=HEADS, block=block, density=density
                    )
                    rows.append(found := measure(setting, device, target))
                    print(
                        f"{tokens} x {head_dim}, block {block}, {found['density']:.1%}: "
                        f"{1e3 * found['forward']:.2f} ms, {found['share']:.0%} of peak "
                        f"(model: at most {found['model']['at most']:.0%}, likely {found['model']['likely']:.0%}), "
                        f"SDPA {1e3 * found['sdpa']:.2f} ms"
                    )
    fresh = out.with_suffix(".tmp")
    fresh.write_text(json.dumps({"checks": checks, "rows": rows, **surroundings(str(device))}, indent=1))
    fresh.replace(out)
    if wrong:
        raise SystemExit(1)


def model(write: bool) -> None:
    """Print the page's tables; write them into it, after its last heading, if asked."""
    tables = gpu_model.page(table())
    print(tables)
    if write:
        before = PAGE.read_text().partition("## What it gives\n")[0]
        fresh = PAGE.with_suffix(".tmp")
        fresh.write_text(f"{before}## What it gives\n\n{tables}\n")
        fresh.replace(PAGE)


if __name__ == "__main__":
    if "--model" in sys.argv:
        model("--write" in sys.argv)
    else:
        main(Path(next(iter(sys.argv[1:]), "gpu.json")))
