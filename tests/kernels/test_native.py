"""The C++ kernels: when they are taken, what is said when they are not, and that a call's cut changes nothing."""

from dataclasses import replace

import pytest
import torch

from ziggurat.kernels import gather, native_build, selftest, tables
from ziggurat.kernels.attend import attend
from ziggurat.kernels.cases import Case, build
from ziggurat.kernels.listops import all_blocks
from ziggurat.kernels.mass import block_mass

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "chip", "words"),
    [
        (torch.float32, {"avx2", "bf16"}, None),
        (torch.bfloat16, {"avx2", "bf16"}, None),
        (torch.float32, {"avx2", "bf16", "amx"}, None),
        (torch.bfloat16, {"avx2", "bf16", "amx"}, "AMX"),
        (torch.float32, {"avx2"}, None),
        (torch.bfloat16, {"avx2"}, "bfloat16 products"),
        (torch.float32, set(), "AVX2"),
        (torch.float64, {"avx2", "bf16"}, "float64"),
    ],
)
def test_the_chip_decides(dtype, chip, words, monkeypatch):
    monkeypatch.setattr(native_build, "has_amx", lambda: "amx" in chip)
    monkeypatch.setattr(native_build, "has_bfloat16", lambda: "bf16" in chip)
    monkeypatch.setattr(native_build, "has_avx2", lambda: "avx2" in chip)
    monkeypatch.setattr(native_build, "_built", lambda: None)
    told = native_build.lacking(dtype, CPU)
    assert told is None if words is None else words in told
    query = torch.zeros(1, 1, 1, 256)
    assert gather.in_cpp(query, dtype) == (words is None)
    assert not gather.in_cpp(torch.zeros(1, 1, 1, 257), dtype)
    assert not gather.in_cpp(query.double(), dtype)


def test_without_a_compiler_it_says_so_and_computes_all_the_same(monkeypatch):
    problem = build(Case(lists="masked", factors=(1, 4)), torch.float32)
    wanted = attend(problem.query, problem.pyramid(), problem.blocks)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    built = native_build._built.__wrapped__()
    assert built == "there is no C++ compiler: install g++ or clang++, or name one in CXX"
    monkeypatch.setattr(native_build, "_built", lambda: built)
    monkeypatch.setattr(native_build, "has_avx2", lambda: True)
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        native_build.library()
    assert built in selftest.describe(CPU)["why"]
    for got, exact in zip(attend(problem.query, problem.pyramid(), problem.blocks), wanted, strict=True):
        torch.testing.assert_close(got, exact)


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    assert native_build._built.__wrapped__().startswith("false failed")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in str(native_build._built.__wrapped__())
    assert not list((tmp_path / "ziggurat").iterdir())


@pytest.mark.parametrize(
    "case",
    [Case(lists="masked", factors=(1, 4)), Case(lists="per_batch", tokens=203, head_dim=40, tile=40, spread=40.0)],
    ids=str,
)
def test_registers_half_as_wide_compute_the_same(case, monkeypatch):
    if lacking := native_build.lacking(torch.float32, CPU):
        pytest.skip(lacking)
    if not native_build.has_avx512():
        pytest.skip("they are the only ones here, which every other test holds to the reference")
    problem = build(case, torch.float32)
    grad = torch.randn(problem.query.shape)

    def run():
        tensors = [t.clone().requires_grad_() for t in (problem.query, problem.key, problem.value)]
        out, lse = attend(tensors[0], problem.pyramid(*tensors[1:]), problem.blocks, backend="torch")
        pooled = problem.pyramid().pooled_key
        mass = block_mass(problem.query, problem.pyramid(), lse, problem.blocks.query_rows)
        return out.detach(), lse, pooled, mass, *torch.autograd.grad(out, tensors, grad)

    wanted = run()
    monkeypatch.setattr(native_build, "has_avx512", lambda: False)
    assert "-mavx2" in native_build._instructions()
    built = native_build._built.__wrapped__()
    monkeypatch.setattr(native_build, "_built", lambda: built)
    for got, exact in zip(run(), wanted, strict=True):
        # Sums over lanes are of another order; what is left of gradients may be small beside what was summed.
        largest = max([1.0, *exact[exact.isfinite()].abs().tolist()])
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_one_by_one_are_the_heads_together(dtype, monkeypatch):
    if lacking := native_build.lacking(dtype, CPU):
        pytest.skip(lacking)
    problem = build(Case(lists="per_batch", factors=(1, 4), layout="shuffled"), dtype)
    grad = torch.randn(problem.query.shape).to(dtype)

    def run():
        tensors = [t.clone().requires_grad_() for t in (problem.query, problem.key, problem.value)]
        out, lse = attend(tensors[0], problem.pyramid(*tensors[1:]), problem.blocks, backend="torch")
        return out.detach(), lse, *torch.autograd.grad(out, tensors, grad)

    together = run()
    assert all(torch.equal(one, other) for one, other in zip(together, run(), strict=True))
    monkeypatch.setattr(tables, "TABLE_BYTES", 1)
    apart = run()
    assert all(torch.equal(one, other) for one, other in zip(apart[:3], together[:3], strict=True))
    # A head's tiles are summed in as many parts as keep every thread busy.
    for one, other in zip(apart[3:], together[3:], strict=True):
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_threads_change_no_output(monkeypatch):
    if lacking := native_build.lacking(torch.float32, CPU):
        pytest.skip(lacking)
    problem = build(Case(lists="masked", tokens=301, tile=40), torch.float32)
    wanted = attend(problem.query, problem.pyramid(), problem.blocks)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    for got, exact in zip(attend(problem.query, problem.pyramid(), problem.blocks), wanted, strict=True):
        assert torch.equal(got, exact)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_layouts_serve_every_list(dtype, apart, monkeypatch):
    if lacking := native_build.lacking(dtype, CPU):
        pytest.skip(lacking)
    if apart:
        monkeypatch.setattr(tables, "TABLE_BYTES", 1)
    problem = build(Case(lists="per_batch", factors=(1, 4), layout="shuffled", head_dim=48), dtype)
    everything = all_blocks(problem.blocks.query_rows, problem.blocks.block)
    kept = problem.pyramid().keep_layouts()
    assert kept.layouts == {}

    def same(blocks, scale, fresh):
        got = attend(problem.query, kept, blocks, scale=scale, backend="torch")
        wanted = attend(problem.query, fresh, blocks, scale=scale, backend="torch")
        assert kept.layouts is not None
        assert len(kept.layouts) == (problem.query.shape[0] * problem.query.shape[1] if apart else 1)
        return all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))

    assert same(problem.blocks, None, problem.pyramid())
    assert same(everything, None, problem.pyramid())
    assert same(problem.blocks, 0.3, problem.pyramid())
    # What was laid out is read, not the rows.
    before = problem.pyramid(problem.key.clone())
    kept.key.zero_()
    assert same(problem.blocks, None, before)
    assert not same(problem.blocks, None, problem.pyramid())
    # The pyramid of other rows keeps nothing of these.
    assert replace(kept, log_weight=kept.log_weight).layouts is None
