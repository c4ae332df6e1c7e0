"""Block masses against their definition, and against what attention itself weighs."""

import math

import pytest
import torch

from ziggurat.kernels.attend import attend
from ziggurat.kernels.blocklist import identity_rows
from ziggurat.kernels.cases import Case, build
from ziggurat.kernels.listops import all_blocks, to_dense
from ziggurat.kernels.mass import block_mass

CASES = [
    Case(lists="all"),
    Case(lists="all", tokens=1, keys=17),
    Case(lists="all", tokens=211, head_dim=48, layout="shuffled"),
    Case(lists="all", tokens=150, keys=333, layout="gaps", factors=(1, 16)),
    Case(lists="all", tokens=190, layout="strided", masked_keys=0.3, spread=4.0),
    Case(lists="all", tokens=129, block=64, tile=128, head_dim=128),
]


def solve(case, dtype, **options):
    problem = build(case, dtype)
    pyramid = problem.pyramid()
    lists = all_blocks(problem.blocks.query_rows, case.block)
    _, lse = attend(problem.query, pyramid, lists, backend="reference", **options)
    return problem, pyramid, lse, lists


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_definition(case):
    problem, pyramid, lse, lists = solve(case, torch.float64)
    mass = block_mass(problem.query, pyramid, lse, lists.query_rows, backend="reference")
    live = (lists.query_rows >= 0).sum(-1)[None].expand(mass.shape[:3])
    assert torch.allclose(mass.sum(-1), live.double())
    # The mass of a block, by leaving everything else out of a list.
    block = mass.shape[-1] // 2
    read = to_dense(lists, pyramid)[..., : pyramid.offsets[1]].unflatten(-1, (-1, case.block))
    assert bool(read.all())
    keys = torch.arange(pyramid.offsets[1]) // case.block == block
    only = torch.where(keys & (pyramid.log_weight[..., : pyramid.offsets[1]] > -math.inf), 0.0, -math.inf)
    rows = pyramid.key_rows.clamp(min=0).long()
    key = problem.key.gather(2, rows[None, :, :, None].expand(*problem.key.shape[:2], -1, case.head_dim))
    logits = case.head_dim**-0.5 * problem.query @ key.mT + only[:, :, None] + torch.where(keys, 0, -math.inf)
    share = (logits - lse[..., None]).exp().sum(-1)
    for head in range(case.heads):
        tokens = lists.query_rows[min(head, lists.query_rows.shape[0] - 1)]
        for tile in range(tokens.shape[0]):
            chosen = tokens[tile][tokens[tile] >= 0].long()
            assert torch.allclose(share[:, head, chosen].sum(-1), mass[:, head, tile, block])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_agrees(case, dtype, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr("ziggurat.kernels.native_build.lacking", lambda *_: "not wanted here")
    problem, pyramid, lse, lists = solve(case, dtype)
    exact = build(case, dtype)
    oracle_pyramid = exact.pyramid(exact.key.double(), exact.value.double())
    oracle = block_mass(exact.query.double(), oracle_pyramid, lse.double(), lists.query_rows, backend="reference")
    mass = block_mass(problem.query, pyramid, lse, lists.query_rows)
    assert mass.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    relative = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-2}[dtype]
    assert torch.allclose(mass.double(), oracle, rtol=relative, atol=relative * 1e-2)


def test_large_logits_keep_their_share_in_bfloat16():
    """Logits of a hundred: their rounding alone would be worth a factor of two."""
    torch.manual_seed(0)
    query = torch.full((1, 1, 64, 64), 3.55).bfloat16()
    key = query + 0.2 * torch.randn(1, 1, 64, 64).bfloat16()
    from ziggurat.kernels.pyramid import build_pyramid

    rows = identity_rows(64, 32)
    wide = build_pyramid(key.double(), key.double(), block=16)
    _, lse = attend(query.double(), wide, all_blocks(rows, 16), backend="reference")
    assert float(lse.mean()) > 100
    exact = block_mass(query.double(), wide, lse, rows, backend="reference")
    mass = block_mass(query, build_pyramid(key, key, block=16), lse.float(), rows)
    assert torch.allclose(mass.double(), exact, rtol=0.03)


def test_queries_that_read_nothing_count_for_nothing():
    problem, pyramid, lse, lists = solve(CASES[0], torch.float32)
    lse[:, :, ::2] = -math.inf
    for backend in ("torch", "reference"):
        mass = block_mass(problem.query, pyramid, lse, lists.query_rows, backend=backend)
        live = (lists.query_rows >= 0) & (lists.query_rows % 2 == 1)
        assert torch.allclose(mass.sum(-1), live.sum(-1)[None].float().expand(mass.shape[:3]), rtol=1e-4)


def test_a_long_sequence_goes_in_parts(monkeypatch):
    """Heads that do not fit the table together follow one another."""
    monkeypatch.setattr("ziggurat.kernels.tables.TABLE_BYTES", 1)
    problem, pyramid, lse, lists = solve(CASES[0], torch.float32)
    one, two = (block_mass(problem.query, pyramid, lse, lists.query_rows, backend=b) for b in ("torch", "reference"))
    assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_any_scale(scale):
    problem = build(CASES[2], torch.float32)
    pyramid, rows = problem.pyramid(), problem.blocks.query_rows
    _, lse = attend(problem.query, pyramid, all_blocks(rows, 16), scale=scale, backend="reference")
    one, two = (block_mass(problem.query, pyramid, lse, rows, scale=scale, backend=b) for b in ("torch", "reference"))
    assert torch.allclose(one, two, rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_refused():
    problem, pyramid, lse, lists = solve(CASES[0], torch.float32)
    with pytest.raises(ValueError, match="lse must have"):
        block_mass(problem.query, pyramid, lse[:, :, :-1], lists.query_rows)
    with pytest.raises(ValueError, match="query_rows must be"):
        block_mass(problem.query, pyramid, lse, lists.query_rows[0])
    with pytest.raises(ValueError, match="dtype and device"):
        block_mass(problem.query.double(), pyramid, lse, lists.query_rows)
    with pytest.raises(ValueError, match="backend must be one of"):
        block_mass(problem.query, pyramid, lse, lists.query_rows, backend="cuda")
