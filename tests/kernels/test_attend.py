"""`attend` in its backends over the table of cases, held to a float64 oracle."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from ziggurat.kernels import gather, native_build
from ziggurat.kernels.attend import attend
from ziggurat.kernels.backends import choose
from ziggurat.kernels.blocklist import BlockList, identity_rows
from ziggurat.kernels.cases import Case, Problem, build
from ziggurat.kernels.listops import all_blocks, from_dense, to_dense
from ziggurat.kernels.pyramid import build_pyramid
from ziggurat.kernels.rows import gather_rows

LISTS = ["all", "none", "single", "random", "shared", "per_batch", "some_all", "masked", "unread", "joined"]
CASES = [
    *(Case(lists=name) for name in LISTS),
    *(Case(lists="random", tokens=tokens) for tokens in (1, 15, 64, 1000, 1009)),
    *(Case(lists="masked", tokens=1009, head_dim=head_dim, block=64, tile=128) for head_dim in (16, 48, 64)),
    *(Case(lists=name, layout="shuffled", keys=77) for name in ("all", "random", "masked")),
    *(Case(lists=name, layout="gaps", keys=301) for name in ("all", "random", "some_all")),
    *(Case(lists=name, layout="strided") for name in ("all", "random")),
    *(Case(lists=name, masked_keys=0.5) for name in ("all", "random", "masked")),
    Case(lists="all", masked_keys=1.0),
    Case(lists="random", masked_keys=1.0),
    *(Case(lists="one_level", tokens=tokens, factors=(1, 2, 4, 8)) for tokens in (200, 1009)),
    Case(lists="one_level", factors=(1, 16), layout="gaps", masked_keys=0.3),
    Case(lists="overlapping", factors=(1, 16, 256), tokens=1009),
    *(Case(lists=name, spread=40.0, factors=(1, 4)) for name in ("all", "random", "masked", "one_level")),
    Case(lists="random", block=128, tile=64, tokens=1000, keys=15),
    *(Case(lists="masked", tokens=301, head_dim=head_dim, heads=2, batch=1) for head_dim in (96, 128, 256)),
    *(Case(lists="random", tokens=n, block=64, tile=128, batch=1, heads=1, head_dim=32) for n in (4352, 4429)),
]

# Blocks and heads that do not fill units of 16, tiles of more than 128 queries, masks in the middle of a word.
NATIVE_CASES = [
    *CASES,
    *(Case(lists="masked", tokens=301, block=block, tile=tile) for block, tile in ((24, 7), (8, 300), (40, 129))),
    *(Case(lists="all", tokens=130, head_dim=head_dim, spread=40.0) for head_dim in (8, 40)),
    *(Case(lists="masked", tokens=130, head_dim=head_dim) for head_dim in (8, 40)),
]


def plain(problem: Problem, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention by matrix products and softmax in `dtype`: the error that a precision cannot avoid."""
    pyramid, rows = problem.pyramid(), problem.blocks.query_rows
    live = pyramid.log_weight > -math.inf
    level = pyramid.offsets[1]
    key, value = (
        torch.cat([gather_rows(tokens, pyramid.key_rows, live[..., :level]), pooled], 2).to(dtype)
        for tokens, pooled in ((pyramid.key, pyramid.pooled_key), (pyramid.value, pyramid.pooled_value))
    )
    query = gather_rows(problem.query, rows.flatten(1)).to(dtype)
    read = (to_dense(problem.blocks, pyramid) & live[:, :, None]).repeat_interleave(rows.shape[2], 2)
    scores = (query @ key.mT) * query.shape[-1] ** -0.5 + pyramid.log_weight[:, :, None].to(dtype)
    scores = scores.masked_fill(~read, -math.inf)
    out = scores.softmax(-1).masked_fill(~read, 0) @ value
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lse = scores.to(wide).logsumexp(-1, keepdim=True)
    tokens = problem.query.shape[2]
    index = torch.where(rows < 0, tokens, rows).long().flatten(1)[None, :, :, None]
    results = []
    for packed, fill in ((out, 0.0), (lse, -math.inf)):
        target = packed.new_full((*packed.shape[:2], tokens + 1, packed.shape[3]), fill)
        results.append(target.scatter(2, index.expand(*target.shape[:2], -1, packed.shape[3]), packed)[:, :, :tokens])
    return results[0], results[1][..., 0]


def exact(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference in float64, on the pyramid that the low precision built."""
    pyramid = problem.pyramid()
    fields = {name: getattr(pyramid, name).double() for name in ("key", "value", "pooled_key", "pooled_value")}
    pyramid = type(pyramid)(
        **fields,
        **{name: getattr(pyramid, name) for name in ("key_rows", "log_weight", "offsets", "factors", "block")},
    )
    return attend(problem.query.double(), pyramid, problem.blocks, backend="reference")


def furthest(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest absolute difference; equal infinities differ by nothing."""
    difference = torch.where(got.double() == wanted.double(), 0, got.double() - wanted.double())
    return float(difference.abs().amax()) if difference.numel() else 0.0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batched_products_are_as_exact_as_bfloat16(case, monkeypatch):
    """What chips without AMX and compiler run; with AMX the next test takes the fused kernel."""
    monkeypatch.setattr(native_build, "lacking", lambda dtype, device: "left out")
    monkeypatch.setattr(gather, "has_amx", lambda: False)
    monkeypatch.setattr(gather, "has_bfloat16", lambda: True)
    held_to_oracle(case, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_is_as_exact_as_its_precision(case, dtype, monkeypatch):
    monkeypatch.setattr(native_build, "lacking", lambda dtype, device: "left out")
    monkeypatch.setattr(gather, "has_amx", lambda: True)
    monkeypatch.setattr(gather, "has_bfloat16", lambda: True)
    held_to_oracle(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", NATIVE_CASES, ids=str)
def test_the_cpp_kernel_is_as_exact_as_its_precision(case, dtype, monkeypatch):
    monkeypatch.setattr(native_build, "has_amx", lambda: False)
    if lacking := native_build.lacking(dtype, torch.device("cpu")):
        pytest.skip(lacking)
    held_to_oracle(case, dtype)


def held_to_oracle(case, dtype):
    problem = build(case, dtype)
    out, lse = attend(problem.query, problem.pyramid(), problem.blocks, backend="torch")
    wanted, wanted_lse = exact(problem)
    low, low_lse = plain(problem, dtype)
    unit = torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(lse == -math.inf, wanted_lse == -math.inf)
    assert bool((out[lse == -math.inf] == 0).all())
    # Besides, roundings in the largest output or lse: one in bfloat16; in float64 the oracle's own are as many.
    roundings = 1 if dtype == torch.bfloat16 else 16
    assert furthest(out, wanted) <= 2 * furthest(low, wanted) + roundings * unit * float(wanted.abs().amax())
    largest = float(wanted_lse[wanted_lse > -math.inf].abs().amax()) if bool((wanted_lse > -math.inf).any()) else 0.0
    # In bfloat16 logits, exponentials and 16 partial sums are rounded to 8 bits: half a unit each at worst.
    assert furthest(lse, wanted_lse) <= 2 * furthest(low_lse, wanted_lse) + unit + (
        torch.finfo(lse.dtype).eps * 16 * largest
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_in_float32_agrees_with_float64(case):
    problem = build(case, torch.float32)
    out, lse = attend(problem.query, problem.pyramid(), problem.blocks, backend="reference")
    wanted, wanted_lse = exact(problem)
    torch.testing.assert_close(out.double(), wanted, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("tokens", [1, 15, 64, 1009])
@pytest.mark.parametrize("head_dim", [16, 48])
def test_all_blocks_is_sdpa(backend, tokens, head_dim):
    query, key, value = (torch.randn(2, 2, tokens, head_dim, dtype=torch.float64) for _ in range(3))
    pyramid = build_pyramid(key, value, block=32)
    listed = from_dense(
        torch.ones(1, 1, len(pyramid.blocks_at(0)), pyramid.blocks, dtype=torch.bool), identity_rows(tokens, 32), 32
    )
    wanted = scaled_dot_product_attention(query, key, value)
    for blocks in (all_blocks(identity_rows(tokens, 64), 32), listed):
        out, _ = attend(query, pyramid, blocks, backend=backend)
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


def test_sparse_list_is_sdpa_with_its_mask():
    problem = build(Case(lists="random", tokens=203), torch.float64)
    pyramid = problem.pyramid()
    mask = to_dense(problem.blocks, pyramid).repeat_interleave(32, 2)[:, :, :203, :203]
    wanted = scaled_dot_product_attention(problem.query, problem.key, problem.value, attn_mask=mask)
    wanted = torch.where(mask.any(-1, keepdim=True), wanted, 0)
    for backend in ("torch", "reference"):
        out, _ = attend(problem.query, pyramid, problem.blocks, backend=backend)
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equal_rows_give_the_same_at_every_level(backend):
    block, tokens = 16, 203
    key, value = (
        torch.randn(1, 2, 13, 16, dtype=torch.float64).repeat_interleave(block, 2)[:, :, :tokens] for _ in range(2)
    )
    query = torch.randn(1, 2, tokens, 16, dtype=torch.float64)
    pyramid = build_pyramid(key, value, block=block, factors=(1, 2, 8, 16))
    rows = identity_rows(tokens, 32)
    wanted = attend(query, pyramid, all_blocks(rows, block), backend=backend)
    for level in range(pyramid.levels):
        mask = torch.zeros(1, 1, rows.shape[1], pyramid.blocks, dtype=torch.bool)
        mask[..., list(pyramid.blocks_at(level))] = True
        got = attend(query, pyramid, from_dense(mask, rows, block), backend=backend)
        # The log-weights are float32.
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c.lists == "one_level" and not c.masked_keys], ids=str)
def test_one_level_weighs_every_token_once(case):
    problem = build(case, torch.float32)
    pyramid = problem.pyramid()
    weight = torch.where(to_dense(problem.blocks, pyramid), pyramid.log_weight.double().exp()[:, :, None], 0).sum(-1)
    torch.testing.assert_close(weight, torch.full_like(weight, case.tokens), rtol=1e-6, atol=0)
    # Constant logits make that total the softmax's sum.
    _, lse = attend(torch.zeros_like(problem.query), pyramid, problem.blocks)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(case.tokens)))


def test_all_blocks_follows_any_permutation():
    problem = build(Case(lists="all", tokens=203), torch.float64)
    order = torch.randperm(203)
    out, lse = attend(problem.query, problem.pyramid(), problem.blocks)
    moved, moved_lse = attend(
        problem.query[:, :, order],
        problem.pyramid(problem.key[:, :, order], problem.value[:, :, order]),
        problem.blocks,
    )
    torch.testing.assert_close(moved, out[:, :, order])
    torch.testing.assert_close(moved_lse, lse[:, :, order])


def test_sparse_list_follows_renamed_blocks():
    block, tokens = 16, 208
    problem = build(Case(lists="random", tokens=tokens), torch.float64)
    moved_to = torch.randperm(tokens // block)
    source = moved_to.argsort()[:, None] * block + torch.stack([torch.randperm(block) for _ in moved_to])
    order = source.flatten()
    out, lse = attend(problem.query, problem.pyramid(), problem.blocks)
    dense = to_dense(problem.blocks, problem.pyramid()).unflatten(3, (-1, block)).any(-1)
    renamed = from_dense(dense[..., moved_to.argsort()], problem.blocks.query_rows, block)
    got = attend(problem.query, problem.pyramid(problem.key[:, :, order], problem.value[:, :, order]), renamed)
    torch.testing.assert_close(got, (out, lse))


def test_row_maps_equal_moving_the_tokens():
    problem = build(Case(lists="random", layout="shuffled", heads=1, tokens=203), torch.float64)
    rows = problem.blocks.query_rows.flatten()
    keys = problem.pyramid().key_rows.flatten()
    query_order, key_order = rows[rows >= 0].long(), keys[keys >= 0].long()
    blocks = problem.blocks
    still = BlockList(
        **{name: getattr(blocks, name) for name in ("start", "count", "pool", "masked_count", "mask_start")},
        row_masks=blocks.row_masks,
        query_rows=identity_rows(203, 32),
        block=16,
    )
    out, _ = attend(problem.query, problem.pyramid(), blocks)
    moved = build_pyramid(problem.key[:, :, key_order], problem.value[:, :, key_order], block=16)
    wanted, _ = attend(problem.query[:, :, query_order], moved, still)
    torch.testing.assert_close(out[:, :, query_order], wanted)


def test_tokens_in_no_tile_get_nothing():
    problem = build(Case(lists="all", tokens=64), torch.float32)
    rows = torch.tensor([[[3, -1, 7, 60], [-1, -1, -1, -1]]], dtype=torch.int32)
    for backend in ("torch", "reference"):
        out, lse = attend(problem.query, problem.pyramid(), all_blocks(rows, 16), backend=backend)
        held = torch.zeros(64, dtype=torch.bool)
        held[[3, 7, 60]] = True
        assert bool((out[:, :, ~held] == 0).all())
        assert bool((lse[:, :, ~held] == -math.inf).all())
        wanted = scaled_dot_product_attention(problem.query, problem.key, problem.value)
        torch.testing.assert_close(out[:, :, held], wanted[:, :, held])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_twice(dtype):
    problem = build(Case(lists="masked", tokens=1009, factors=(1, 4)), dtype)
    first = attend(problem.query, problem.pyramid(), problem.blocks)
    again = attend(problem.query, problem.pyramid(), build(problem.case, dtype).blocks)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_compute_dtype_and_float16():
    problem = build(Case(lists="random", tokens=1009), torch.float32)
    wanted, _ = attend(problem.query, problem.pyramid(), problem.blocks)
    rounded, lse = attend(problem.query, problem.pyramid(), problem.blocks, compute_dtype=torch.bfloat16)
    assert rounded.dtype == lse.dtype == torch.float32
    # A chip without bfloat16 products computes in float32 all the same.
    assert (1e-4 if gather.products_in(torch.bfloat16) == torch.bfloat16 else 0) <= furthest(rounded, wanted) < 0.05
    half = build(problem.case, torch.float16)
    out, _ = attend(half.query, half.pyramid(), half.blocks)
    assert out.dtype == torch.float16
    assert furthest(out, exact(half)[0]) < 2e-3


def test_refusals_name_the_argument():
    problem = build(Case(lists="random"), torch.float32)
    query, pyramid, blocks = problem.query, problem.pyramid(), problem.blocks
    for arguments, words in (
        ({"backend": "flash"}, "backend must be one of auto, torch, triton, flex, reference"),
        ({"query": query[0]}, "query must be"),
        ({"query": query[:, :1]}, "query must agree"),
        ({"query": query.double()}, "dtype"),
        ({"query": query[:, :, :100]}, "query_rows must lie"),
        ({"compute_dtype": torch.int8}, "compute_dtype"),
        ({"pyramid": build_pyramid(problem.key, problem.value, block=32)}, "block"),
        ({"blocks": build(Case(lists="random", heads=2), torch.float32).blocks}, "heads"),
    ):
        given = {"query": query, "pyramid": pyramid, "blocks": blocks, **arguments}
        with pytest.raises(ValueError, match=words):
            attend(given.pop("query"), given.pop("pyramid"), given.pop("blocks"), **given)


def test_a_missing_package_says_what_to_install(monkeypatch):
    problem = build(Case(lists="random"), torch.float32)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(ImportError, match=r"needs the package triton, which is missing: pip install 'ziggurat\[gpu\]'"):
        attend(problem.query, problem.pyramid(), problem.blocks, backend="triton")
    assert choose(torch.device("cuda")) == (
        "torch",
        "this is a GPU, but the package triton is missing: pip install 'ziggurat[gpu]'",
    )
    assert choose(torch.device("cpu"))[0] == "torch"


def test_bfloat16_is_computed_in_what_the_chip_does_fastest(monkeypatch):
    assert gather.products_in(torch.float16) == torch.float32
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(gather, "has_bfloat16", lambda has=has: has)
        assert gather.products_in(torch.bfloat16) == dtype
        held_to_oracle(Case(lists="masked"), torch.bfloat16)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 90),
    keys=st.integers(1, 90),
    block=st.sampled_from((3, 8, 16)),
    tile=st.sampled_from((1, 5, 16, 32)),
    lists=st.sampled_from(("random", "masked", "some_all", "per_batch", "joined")),
    layout=st.sampled_from(("plain", "shuffled", "gaps", "strided")),
    masked_keys=st.sampled_from((0.0, 0.5)),
    seed=st.integers(0, 2**20),
)
def test_any_list_agrees_with_the_reference(seed, **fields):
    problem = build(Case(head_dim=8, factors=(1, 3), **fields), torch.float64, seed)
    pyramid = problem.pyramid()
    wanted = attend(problem.query, pyramid, problem.blocks, backend="reference")
    for got, one in zip(attend(problem.query, pyramid, problem.blocks), wanted, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-10, atol=1e-10)
