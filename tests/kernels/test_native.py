"""The C++ kernels: when they are taken, what is said when they are not, and that a call's cut changes nothing."""

from dataclasses import replace

import pytest
import torch

from ziggurat.kernels import gather, native_build, selftest, tables
from ziggurat.kernels.attend import attend
from ziggurat.kernels.blocklist import identity_rows
from ziggurat.kernels.cases import Case, build
from ziggurat.kernels.listops import all_blocks
from ziggurat.kernels.mass import block_mass
from ziggurat.kernels.pyramid import build_pyramid, padded_range

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


@pytest.mark.parametrize("scale", [None, 30.0], ids=["", "shifted"])
@pytest.mark.parametrize("tile", [1, 2, 5, 6, 7, 16, 64, 67, 127, 128, 131, 200, 257])
def test_whatever_is_left_of_a_tile_is_computed(tile, scale):
    """Queries are taken by fours, sixes or eights, 128 at most at a time; the larger scale needs the maximum."""
    if lacking := native_build.lacking(torch.float32, CPU):
        pytest.skip(lacking)
    generator = torch.Generator().manual_seed(tile)
    query, key, value = (torch.randn(1, 2, 263, 40, generator=generator, dtype=torch.float64) for _ in range(3))
    pyramid = build_pyramid(key.float(), value.float(), padded_range(263, 16).view(1, -1), block=16)
    blocks = all_blocks(identity_rows(263, tile), 16)
    out, lse = attend(query.float(), pyramid, blocks, scale=scale, backend="torch")
    logits = query @ key.mT * (scale or 40**-0.5)
    # What rounding does to a logit of hundreds, a softmax of them shows.
    atol = 2e-6 if scale is None else 2e-3
    torch.testing.assert_close(out.double(), logits.softmax(-1) @ value, rtol=0, atol=atol)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_masses_are_infinite_or_nothing_where_an_lse_is_far_off():
    if lacking := native_build.lacking(torch.float32, CPU):
        pytest.skip(lacking)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 32, 16, generator=generator) for _ in range(2))
    pyramid = build_pyramid(key, key, padded_range(32, 16).view(1, -1), block=16)
    logits = query @ key.mT / 4
    for off, wanted in ((-200.0, torch.inf), (200.0, 0.0)):
        lse = logits.logsumexp(-1) + off
        mass = block_mass(query, pyramid, lse, identity_rows(32, 32), backend="torch")
        assert bool((mass == wanted).all())
    mass = block_mass(query, pyramid, logits.logsumexp(-1) - 85, identity_rows(32, 32), backend="torch").double()
    shares = logits.double().softmax(-1).unflatten(-1, (2, 16)).sum((-3, -1))[:, :, None]
    torch.testing.assert_close(mass, shares * torch.tensor(85.0, dtype=torch.float64).exp(), rtol=2e-5, atol=0)
