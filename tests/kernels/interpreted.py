"""Runs the Triton backend in Triton's interpreter, and prints how far it is from `reference`, one JSON line a case.

python interpreted.py <part> <parts>, in a process of its own: what is interpreted can't be compiled as well.
python interpreted.py compile: whether torch.compile takes it whole.
python interpreted.py far: whether tensors whose offsets pass 2³¹ give the same bits as near ones.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import dataclasses
import json
import math
import sys
import tempfile
import traceback
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from ziggurat.kernels.attend import attend
from ziggurat.kernels.case_pairs import pairwise_cases
from ziggurat.kernels.cases import Case, Problem, build
from ziggurat.kernels.gpu_targets import Launch, fit, smaller
from ziggurat.kernels.listops import all_blocks
from ziggurat.kernels.mass import block_mass
from ziggurat.kernels.pyramid import KVPyramid
from ziggurat.kernels.triton_backend import launch, ops

LARGE = Case(lists="sparse", tokens=4429, head_dim=64, block=64, tile=128, batch=1, heads=1, factors=(1, 16))
# Launches made smaller, down to the smallest, as on chips with too little shared memory.
TIGHT = Case(lists="masked", tokens=70, head_dim=16, block=64, tile=128, batch=1, heads=1, factors=(1, 4))
TIMES_SMALLER = (3, 4, 5, 7)
JOBS: list[tuple[Case, str, int]] = [
    (LARGE, "float32", 0),
    *((case, dtype, 0) for case, dtype in pairwise_cases()),
    *((TIGHT, "float16", times) for times in TIMES_SMALLER),
]


def mend_the_interpreter() -> None:
    """Two faults: it takes bfloat16's bits for integers, and rounds towards zero; and calls are slow for no reason."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(data, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return (np.ascontiguousarray(data).astype(np.uint32) << 16).view(np.float32)
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.array(data)).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, rounding)

    def create_dot(self, a, b, d, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, d, *rest)

    interpreter._convert_float = convert_float
    setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)  # noqa: B010
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(function):
        modules = tuple(id(function.__globals__.get(name)) for name in ("tl", "core"))
        if modules not in patched:
            patched.add(modules)
            return patch(function)
        return None

    def launch_anew(self, *given, **named):
        patched.clear()
        return launch(self, *given, **named)

    # A kernel's functions are patched anew at each of their calls, though the first patch holds until the kernel ends.
    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew


def gradients(problem: Problem, weight: torch.Tensor, dtype: torch.dtype, backend: str, nudge: float = 0.0) -> list:
    """Output, lse and the gradients of query, key and value, of inputs moved by `nudge` times their size."""
    tensors = [
        (tensor.to(dtype) * (1 + nudge * torch.randn(tensor.shape, dtype=dtype))).requires_grad_()
        for tensor in (problem.query, problem.key, problem.value)
    ]
    # The pyramid is pooled in the precision that the problem has.
    pyramid = problem.pyramid(*tensors[1:])
    out, lse = attend(tensors[0], pyramid, problem.blocks, backend=backend)
    return [out.detach(), lse, *torch.autograd.grad(out, tensors, weight.to(dtype))]


def measure(case: Case, dtype: torch.dtype, times: int = 0) -> dict:
    """Distances to the reference in float64, beside those that inputs nudged by one rounding move it."""
    torch.manual_seed(0)
    problem = build(case, dtype)
    if problem.key_log_weight is not None:
        # Rows of weight -inf are unread: what stands there must reach nothing.
        hidden = (problem.key_log_weight == -math.inf)[..., None]
        problem.key.masked_fill_(hidden, math.nan)
        problem.value.masked_fill_(hidden, math.nan)
    weight = torch.randn(problem.query.shape, dtype=torch.float64).to(dtype)
    exact = gradients(problem, weight, torch.float64, "reference")
    unit = torch.finfo(dtype).eps
    nudged = gradients(problem, weight, torch.float64, "reference", unit)
    got = gradients(problem, weight, dtype, "triton")
    again = gradients(problem, weight, dtype, "triton") if case.tokens == 63 else got
    live = exact[1] > -math.inf
    result = {
        "case": f"{case}, launches {times} times smaller" if times else str(case),
        "dtype": str(dtype),
        "unit": unit,
        "lse": float(exact[1][live].abs().amax()) if bool(live.any()) else 0.0,
        "empty": torch.equal(got[1] == -math.inf, ~live) and bool((got[0][~live] == 0).all()),
        "finite": all(bool(tensor.isfinite().all()) for tensor in (got[0], *got[2:])),
        "repeats": all(torch.equal(a, b) for a, b in zip(got, again, strict=True)),
        "dtypes": [str(tensor.dtype) for tensor in got],
    }
    for name, a, b, c in zip(("out", "lse", "query", "key", "value"), got, exact, nudged, strict=True):
        if name == "lse":
            a, b, c = (tensor[live] for tensor in (a, b, c))
        result[f"{name} error"], result[f"{name} moved"] = (float((x.double() - b).norm()) for x in (a, c))
        result[f"{name} norm"] = float(b.norm())
    return {**result, **masses(problem, 7 if case is LARGE else 1)}


def masses(problem: Problem, step: int) -> dict:
    """`block_mass` of each step-th tile, the last among them, with the lse of all of level 0, against the reference."""
    pyramid = problem.pyramid()
    rows = problem.blocks.query_rows[:, (problem.blocks.tiles - 1) % step :: step]
    wide = KVPyramid(
        **{name: getattr(pyramid, name).double() for name in ("key", "value", "pooled_key", "pooled_value")},
        **{name: getattr(pyramid, name) for name in ("key_rows", "log_weight", "offsets", "factors", "block")},
    )
    _, lse = attend(problem.query.double(), wide, all_blocks(rows, pyramid.block), backend="reference")
    exact = block_mass(problem.query.double(), wide, lse, rows, backend="reference")
    got = block_mass(problem.query, pyramid, lse.float(), rows, backend="triton")
    live = (rows >= 0)[None] & (lse > -math.inf).any()
    return {
        "mass shape": list(got.shape) == list(exact.shape) and got.dtype == torch.float32,
        "mass error": float((got - exact).abs().amax()),
        "mass total error": float((got.sum(-1) - exact.sum(-1)).abs().amax()),
        "mass queries": int(live.sum(-1).max()),
    }


def compiled() -> dict:
    """The backend under torch.compile(fullgraph=True), with a list that has been checked and one that has not."""
    case = Case(lists="masked", tokens=63, head_dim=16, tile=64, block=32, factors=(1, 4), batch=1, heads=2)
    problem = build(case, torch.float32)
    pyramid = problem.pyramid()

    def run(query: Any, key: Any, value: Any, blocks: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attend(query, dataclasses.replace(pyramid, key=key, value=value), blocks, backend="triton")
        return out * 2, lse

    tensors: list[Any] = []
    same, lse = [], torch.empty(0)
    for fresh in (True, False):
        torch.compiler.reset()
        blocks = build(case, torch.float32).blocks
        if not fresh:
            blocks.validate(pyramid, case.tokens)
        tensors = [t.clone().requires_grad_() for t in (problem.query, problem.key, problem.value)]
        results = []
        functions: list[Any] = [torch.compile(run, fullgraph=True, backend="aot_eager"), run]
        for function in functions:
            out, lse = function(*tensors, blocks)
            results.append([out, lse.clone(), *torch.autograd.grad(out.square().sum(), tensors)])
        same.append(all(torch.equal(a, b) for a, b in zip(*results, strict=True)))
    arguments = (
        *(*tensors, pyramid.pooled_key, pyramid.pooled_value, pyramid.key_rows, pyramid.log_weight),
        *([getattr(problem.blocks, name) for name in ops.LIST], [], 32, 0.25, torch.float32),
    )
    torch.library.opcheck(ops.attend_op, arguments)
    lse = torch.zeros(problem.query.shape[:3])
    plain = (problem.query, problem.key, pyramid.key_rows, pyramid.log_weight, lse, problem.blocks.query_rows)
    torch.library.opcheck(ops.block_mass_op, (*plain, 32, 0.25))
    out, _ = run(tensors[0], tensors[1], tensors[2], problem.blocks)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors[:1], create_graph=True)
    try:
        torch.autograd.grad(grad.sum(), tensors[0])
        refused = False
    except RuntimeError:
        refused = True
    # A list that reaches past the pyramid is refused where a graph could not look at it.
    wrong = dataclasses.replace(problem.blocks, pool=problem.blocks.pool + 1000)
    torch.compiler.reset()
    try:
        whole: Any = torch.compile(run, fullgraph=True, backend="aot_eager")
        whole(*tensors, wrong)
        checked = False
    except ValueError:
        checked = True
    return {"same": same, "lse has no gradient": not lse.requires_grad, "refused": refused, "checked": checked}


def far(tensor: torch.Tensor, folder: str) -> torch.Tensor:
    """The tensor, its tokens spread so far apart that their offsets pass 2³¹, in a file that is all holes."""
    batch, heads, tokens, _ = tensor.shape
    step = 1 + (1 << 31) // (tokens - 1)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        whole = torch.from_file(
            file.name, shared=True, size=(batch * heads * tokens + 1) * step, dtype=tensor.dtype
        ).as_strided(tensor.shape, (heads * tokens * step, tokens * step, step, 1))
    whole.copy_(tensor)
    return whole


def reached_far() -> dict:
    """The backend over tensors whose offsets pass 2³¹, within a head and between heads."""
    case = Case(lists="masked", tokens=63, head_dim=16, tile=64, block=16, factors=(1, 4), batch=2, heads=2)
    problem = build(case, torch.float16)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        near = [problem.query, problem.key, problem.value, torch.randn(problem.query.shape).half()]
        for tensors in (near, [far(tensor, folder) for tensor in near]):
            leaves = [tensor.requires_grad_() for tensor in tensors[:3]]
            # Pooled from the near tensors, which the gradient does not pass through.
            pyramid = dataclasses.replace(
                problem.pyramid(*(t.detach() for t in near[1:3])), key=leaves[1], value=leaves[2]
            )
            out, lse = attend(leaves[0], pyramid, problem.blocks, backend="triton")
            mass = block_mass(leaves[0], pyramid, lse, problem.blocks.query_rows, backend="triton")
            results.append([out, lse, mass, *torch.autograd.grad(out, leaves, tensors[3])])
            last = sum((size - 1) * stride for size, stride in zip(tensors[0].shape, tensors[0].stride(), strict=True))
    return {"same": [torch.equal(a, b) for a, b in zip(*results, strict=True)], "last offset": last}


def fit_after(times: int) -> Any:
    """`gpu_targets.fit`, but for a chip that so many launches have not fitted on."""

    def smaller_fit(kernel: str, found: Launch, tile: int, block: int) -> Launch:
        found = fit(kernel, found, tile, block)
        for _ in range(times):
            found = smaller(kernel, found, block) or found
        return found

    return smaller_fit


if __name__ == "__main__":
    mend_the_interpreter()
    torch.set_num_threads(1)
    if sys.argv[1] in ("compile", "far"):
        print(json.dumps(compiled() if sys.argv[1] == "compile" else reached_far()))
        sys.exit()
    part, parts = int(sys.argv[1]), int(sys.argv[2])
    for number, (case, dtype, times) in enumerate(JOBS):
        if number % parts != part:
            continue
        launch.fit = fit_after(times)
        launch._fitted.clear()
        try:
            found = measure(case, getattr(torch, dtype), times)
        except Exception:
            found = {"case": str(case), "dtype": dtype, "failed": traceback.format_exc()}
        print(json.dumps({"number": number, **found}), flush=True)
