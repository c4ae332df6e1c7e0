"""Gradients of the torch backend, and what unread rows must not reach."""

import functools
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from ziggurat.kernels import fused, gather, native_build
from ziggurat.kernels.attend import attend
from ziggurat.kernels.blocklist import identity_rows
from ziggurat.kernels.cases import Case, build
from ziggurat.kernels.listops import all_blocks, from_dense
from ziggurat.kernels.pyramid import build_pyramid

small = functools.partial(Case, tokens=19, head_dim=3, block=4, tile=8, batch=1, heads=2)


@pytest.mark.parametrize(
    "case",
    [
        *(small(lists=name) for name in ("all", "none", "random", "some_all", "masked", "unread")),
        small(lists="one_level", factors=(1, 2, 4)),
        small(lists="masked", factors=(1, 4), keys=13, layout="shuffled"),
        small(lists="random", factors=(1, 2), masked_keys=0.4, layout="gaps"),
        small(lists="all", masked_keys=0.4),
        small(lists="random", spread=200.0),
    ],
    ids=str,
)
def test_gradcheck(case):
    problem = build(case, torch.float64)
    tensors = [tensor.clone().requires_grad_() for tensor in (problem.query, problem.key, problem.value)]

    def run(query, key, value):
        return attend(query, problem.pyramid(key, value), problem.blocks)[0]

    assert torch.autograd.gradcheck(run, tensors, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)


CASES = [
    *(Case(lists=name) for name in ("all", "random", "shared", "per_batch", "some_all", "masked")),
    *(Case(lists=name, tokens=1009, head_dim=48, block=64, tile=128) for name in ("all", "random")),
    Case(lists="one_level", factors=(1, 2, 4, 8), layout="gaps", masked_keys=0.3),
    Case(lists="masked", layout="strided", factors=(1, 16)),
    Case(lists="random", layout="shuffled", keys=77),
    *(Case(lists=name, spread=40.0, factors=(1, 4)) for name in ("all", "masked")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cpp", [True, False], ids=["cpp", "products"])
def test_gradients_are_as_exact_as_the_precision(case, dtype, cpp, monkeypatch):
    """Held to the reference in float64; what inputs nudged by one rounding change sets the scale.

    Five of them: logits, lse, their difference, the weights' products and the sums are each rounded; and lse, kept
    in its own dtype, is off by a rounding of its size, which every weight inherits.
    """
    if not cpp:
        monkeypatch.setattr(native_build, "lacking", lambda dtype, device: "left out")
    elif lacking := native_build.lacking(dtype, torch.device("cpu")):
        pytest.skip(lacking)
    problem = build(case, dtype)
    weight = torch.randn(problem.query.shape, dtype=torch.float64).to(dtype)

    def gradients(precision, backend, nudge=0.0):
        tensors = [
            (tensor.to(precision) * (1 + nudge * torch.randn(tensor.shape, dtype=precision))).requires_grad_()
            for tensor in (problem.query, problem.key, problem.value)
        ]
        out, _ = attend(tensors[0], problem.pyramid(*tensors[1:]), problem.blocks, backend=backend)
        return torch.autograd.grad(out, tensors, weight.to(precision))

    unit = torch.finfo(dtype).eps
    _, lse = attend(problem.query, problem.pyramid(), problem.blocks)
    size = float(lse[lse > -math.inf].abs().amax()) * torch.finfo(lse.dtype).eps
    wanted, nudged = gradients(torch.float64, "reference"), gradients(torch.float64, "reference", unit)
    for got, exact, moved in zip(gradients(dtype, "torch"), wanted, nudged, strict=True):
        assert got.dtype == dtype
        assert float((got - exact).norm()) <= 5 * float((moved - exact).norm()) + (2 * unit + size) * float(
            exact.norm()
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("lists", ["all", "some_all", "masked", "one_level"])
def test_unread_rows_reach_nothing(dtype, poison, lists):
    problem = build(Case(lists=lists, factors=(1, 4), masked_keys=0.4), dtype)
    clean = _run(problem, problem.key, problem.value)
    hidden = (problem.key_log_weight == -math.inf)[..., None]
    key, value = (torch.where(hidden, poison, tensor) for tensor in (problem.key, problem.value))
    poisoned = _run(problem, key, value)
    for got, wanted in zip(poisoned, clean, strict=True):
        assert torch.equal(got, wanted)
    for gradient in poisoned[3:]:
        assert bool((gradient.masked_select(hidden) == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_a_list_or_a_row_mask_leaves_out_reach_nothing(dtype):
    query, key, value = (torch.randn(1, 1, 64, 16).to(dtype) for _ in range(3))
    mask = torch.zeros(1, 1, 2, 4, dtype=torch.bool)
    mask[..., 1:3] = True
    rows = torch.ones(1, 1, 2, 4, 16, dtype=torch.bool)
    rows[..., 2, 5:9] = False
    blocks = from_dense(mask, identity_rows(64, 32), 16, rows)
    unread = ~(mask[0, 0, 0, :, None] & rows[0, 0, 0]).flatten()
    key[:, :, unread] = math.nan
    value[:, :, unread] = math.inf
    tensors = [tensor.requires_grad_() for tensor in (query, key, value)]
    out, lse = attend(query, build_pyramid(key, value, block=16), blocks)
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert bool(out.isfinite().all() and lse.isfinite().all())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert bool((gradients[2][:, :, ~unread] != 0).all() and (gradients[2][:, :, unread] == 0).all())


def test_padding_of_tiles_carries_no_token():
    query, key, value = (torch.randn(1, 1, 33, 16) for _ in range(3))
    query[:, :, 0] = math.nan
    rows = torch.tensor([[[5, -1, 9, -1]]], dtype=torch.int32)
    tensors = [tensor.requires_grad_() for tensor in (query, key, value)]
    out, _ = attend(query, build_pyramid(key, value, block=16), all_blocks(rows, 16))
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert bool(out.isfinite().all())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_no_graph_without_gradients():
    problem = build(Case(lists="random"), torch.float32)
    key = problem.key.clone().requires_grad_()
    with torch.no_grad():
        out, _ = attend(problem.query, problem.pyramid(key), problem.blocks)
    assert not out.requires_grad
    out, lse = attend(problem.query, problem.pyramid(key), problem.blocks)
    assert out.requires_grad
    assert not lse.requires_grad


def _run(problem, key, value):
    tensors = [tensor.clone().requires_grad_() for tensor in (problem.query, key, value)]
    out, lse = attend(tensors[0], problem.pyramid(*tensors[1:]), problem.blocks)
    gradients = torch.autograd.grad(out.sum() + (out.float() ** 2).sum(), tensors)
    return out.detach(), lse, *gradients


@pytest.mark.parametrize("case", [
    Case(lists="masked", tokens=203, factors=(1, 4)), Case(lists="some_all", layout="gaps", masked_keys=0.3),
    Case(lists="overlapping", factors=(1, 16)), Case(lists="random", layout="shuffled"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tensor_is_made_where_its_sources_are(case, dtype, monkeypatch):
    """Tensors made without saying where land on another device here, as they would beside a GPU's."""
    monkeypatch.setattr(gather, "has_amx", lambda: False)
    problem = build(case, dtype)
    results = []
    for elsewhere in (False, True):
        tensors = [t.detach().clone().requires_grad_() for t in (problem.query, problem.key, problem.value)]
        pyramid = build_pyramid(
            tensors[1],
            tensors[2],
            problem.key_rows,
            block=case.block,
            factors=case.factors,
            key_log_weight=problem.key_log_weight,
        )
        with torch.device("meta") if elsewhere else nullcontext():
            out, lse = attend(tensors[0], pyramid, replace(problem.blocks), backend="torch")
            results.append([out.detach(), lse, *torch.autograd.grad(out.square().sum(), tensors)])
    for here, there in zip(*results, strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_slices_do_what_the_fused_kernel_does(dtype, monkeypatch):
    monkeypatch.setattr(fused, "SLICE_BYTES", 1 << 14)
    query, key, value = (torch.randn(3, 1, tokens, 48).to(dtype) for tokens in (77, 101, 101))
    bias = torch.randn(3, 1, 1, 101, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    bias[0, ..., ::3], bias[1] = -math.inf, -math.inf
    for weights in (bias, None):
        wide = None if weights is None else weights.double()
        exact = fused.flash(query.double(), key.double(), value.double(), wide, 0.2)
        got, peer = fused._by_slices(query, key, value, weights, 0.2), fused.flash(query, key, value, weights, 0.2)
        for one, other, wanted in zip(got, peer, exact, strict=True):
            assert torch.equal(one == -math.inf, wanted == -math.inf)
            errors = [torch.nan_to_num(tensor.double() - wanted).abs().max() for tensor in (one, other)]
            # In float64 the oracle has roundings of its own.
            assert errors[0] <= errors[1] + (16 if dtype == torch.float64 else 1) * torch.finfo(one.dtype).eps
