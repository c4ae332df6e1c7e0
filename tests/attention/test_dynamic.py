"""What holds for every dynamic selector: valid lists, planted blocks found, ties, text, tiny inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.levels import level0_reads
from ziggurat.attention.loglinear import LogLinear
from ziggurat.attention.order import TokenOrder
from ziggurat.attention.plan import HeadGroup, HeadPlan
from ziggurat.attention.precise import Precise
from ziggurat.attention.pyramid import Pyramid
from ziggurat.attention.rest import pool_rest
from ziggurat.attention.rows import Layout, lay_out
from ziggurat.attention.select import DynamicSelector
from ziggurat.attention.selectors import SELECTORS
from ziggurat.attention.topk import TopK
from ziggurat.kernels.attend import attend
from ziggurat.kernels.blocklist import ALL, BlockList
from ziggurat.kernels.listops import all_blocks, from_dense, to_dense
from ziggurat.kernels.pyramid import KVPyramid, build_pyramid

TILE, BLOCK = 16, 8
GRIDS = {
    "video": TokenGrid.video(4, 8, 12),
    "ragged": TokenGrid.video(3, 7, 13),
    "one token": TokenGrid.video(1, 1, 1),
    "fewer than a block": TokenGrid.video(1, 1, 5),
    "text": TokenGrid.video(3, 7, 9, text_before=5, text_after=29),
    "two videos": TokenGrid.joined(
        [("visual", (2, 5, 5)), ("text", (3,)), ("reference", (30,)), ("visual", (1, 5, 9))]
    ),
}
DYNAMIC: dict[str, DynamicSelector] = {
    "topk": TopK(),
    "topk error": TopK(by="error"),
    "precise": Precise(),
    "precise error": Precise(by="error"),
    "precise mass": Precise(mass=0.9),
    "precise adaptive": Precise(heads="adaptive"),
    "loglinear": LogLinear(keep=3),
    "loglinear one level": LogLinear(keep=3, levels=1),
    "loglinear two levels": LogLinear(keep=4, levels=2),
    "loglinear overlap": LogLinear(keep=3, levels=2, coverage="overlap"),
    "pyramid": Pyramid(),
    "pyramid bounds": Pyramid(bounds=(0.9, 0.95, 0.97, 0.99)),
    "pyramid pooled": Pyramid(importance="pooled", similarity=(0.7, 0.65, 0.6)),
}


def pyramid_of(selector: DynamicSelector, key: Tensor, value: Tensor, layout: Layout) -> KVPyramid:
    group = HeadGroup(block=layout.block, entries=(HeadPlan(heads=(0,), selector=selector),))  # type: ignore[arg-type]
    factors = group.levels(layout.blocks * layout.block)
    return build_pyramid(key, value, layout.key_rows, block=layout.block, factors=factors)


def select(selector: DynamicSelector, qkv: list[Tensor], layout: Layout) -> tuple[BlockList, KVPyramid]:
    pyramid = pyramid_of(selector, qkv[1], qkv[2], layout)
    lse = attend(qkv[0], pyramid, all_blocks(layout.query_rows, layout.block))[1] if selector.needs_lse else None
    blocks = selector.select(qkv[0], qkv[1], layout, pyramid, lse=lse)
    blocks.validate(pyramid, layout.grid.tokens)
    return blocks, pyramid


def random_qkv(grid: TokenGrid, heads: int = 3, batch: int = 2, dim: int = 16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, grid.tokens, dim, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_every_dynamic_selector_is_tried_here():
    named = {name for name, kind in SELECTORS.items() if issubclass(kind, DynamicSelector)}
    assert {selector.name for selector in DYNAMIC.values()} == named  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("where", GRIDS)
@pytest.mark.parametrize("constant", [False, True], ids=["random", "constant"])
def test_lists_are_valid_and_weigh_what_they_should(where: str, name: str, constant: bool):
    grid, selector = GRIDS[where], DYNAMIC[name]
    layout = lay_out(grid, TokenOrder(name="morton"), tile=TILE, block=BLOCK)
    qkv = random_qkv(grid)
    if constant:
        qkv = [torch.ones_like(tensor) for tensor in qkv]
    blocks, pyramid = select(selector, qkv, layout)
    # No tile is empty, and text is read exactly, in both directions.
    assert bool((blocks.count != 0).all())
    fine = level0_reads(blocks, layout.blocks).view(2, 3, layout.tiles, layout.blocks)
    text = torch.tensor([grid.segments[int(i)].kind == "text" for i in layout.block_segment])
    assert bool(fine[..., text].all())
    assert bool((blocks.count[..., layout.exact_tiles] == ALL).all())

    read = to_dense(blocks, pyramid)
    weight = (read * pyramid.log_weight.exp()).sum(-1)
    everything = torch.full_like(weight, grid.tokens)
    if name == "loglinear overlap":
        assert bool((weight >= everything - 1e-3).all())
    elif selector.covers:
        torch.testing.assert_close(weight, everything)
    else:
        assert bool((weight <= everything + 1e-3).all())
        whole = pool_rest(blocks, layout, factors=pyramid.factors)
        whole.validate(pyramid, grid.tokens)
        torch.testing.assert_close((to_dense(whole, pyramid) * pyramid.log_weight.exp()).sum(-1), everything)
    if constant:
        out = attend(qkv[0], pyramid, blocks)[0]
        torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("name", DYNAMIC)
def test_finds_a_planted_map(name: str):
    """Each query tile attends to three known blocks, anywhere."""
    grid, selector = TokenGrid.video(8, 8, 12), DYNAMIC[name]
    layout = lay_out(grid, TokenOrder(name="tile", sizes=(2, 2, 2)), tile=TILE, block=BLOCK)
    heads, dim = 2, layout.blocks
    generator = torch.Generator().manual_seed(5)
    planted = torch.rand(heads, layout.tiles, layout.blocks, generator=generator).argsort(-1)[..., :3]
    query, key = torch.zeros(2, 1, heads, grid.tokens, dim, dtype=torch.float64)
    # Every block has a direction of its own, and keys of two lengths in it: a mean does not tell the whole mass.
    lengths = torch.tensor([4.0, 8.0], dtype=torch.float64).repeat(layout.blocks * BLOCK // 2)
    own = torch.eye(dim, dtype=torch.float64).repeat_interleave(BLOCK, 0)
    key[0][:, layout.key_rows[0].long()] = own * lengths[:, None]
    wanted = F.one_hot(planted, dim).sum(2).double() * 15
    query[0][:, layout.query_rows[0].flatten().long()] = wanted.repeat_interleave(TILE, 1)
    blocks, _ = select(selector, [query, key, key], layout)
    fine = level0_reads(blocks, layout.blocks).view(heads, layout.tiles, -1)
    assert float(fine.double().mean()) < 0.4
    assert bool(fine.gather(2, planted).all())


@pytest.mark.parametrize("name", ["loglinear", "loglinear two levels", "loglinear overlap"])
@pytest.mark.parametrize("where", ["ragged", "text", "fewer than a block"])
def test_covering_selectors_become_dense_where_they_may_read_everything(name: str, where: str):
    grid = GRIDS[where]
    layout = lay_out(grid, TokenOrder(), tile=TILE, block=BLOCK)
    selector = DYNAMIC[name].model_copy(update={"keep": 1000})
    blocks, _ = select(selector, random_qkv(grid), layout)
    assert bool((blocks.count == ALL).all())


@pytest.mark.parametrize(
    "selector",
    [TopK(density=1.0), Precise(density=1.0), Precise(mass=1.0), Pyramid(quotas=(1, 0, 0, 0)), LogLinear(keep=999)],
    ids=lambda s: s.name,
)
def test_at_full_budget_the_output_is_that_of_dense(selector: DynamicSelector):
    grid = GRIDS["text"]
    layout = lay_out(grid, TokenOrder(name="hilbert"), tile=TILE, block=BLOCK)
    qkv = random_qkv(grid)
    blocks, pyramid = select(selector, qkv, layout)
    exact = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
    torch.testing.assert_close(attend(qkv[0], pyramid, blocks)[0], exact)


@pytest.mark.parametrize("name", DYNAMIC)
def test_leaves_the_global_generator_alone_and_repeats_itself(name: str):
    grid = GRIDS["ragged"]
    layout = lay_out(grid, TokenOrder(), tile=TILE, block=BLOCK)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, pyramid = select(DYNAMIC[name], random_qkv(grid), layout)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, _ = select(DYNAMIC[name], random_qkv(grid), layout)
    assert torch.equal(to_dense(first, pyramid), to_dense(again, pyramid))


@pytest.mark.parametrize("name", DYNAMIC)
def test_masked_keys_matter_to_no_choice(name: str):
    """Keys of weight -inf may hold anything, NaN too."""
    grid, selector = GRIDS["text"], DYNAMIC[name]
    layout = lay_out(grid, TokenOrder(), tile=TILE, block=BLOCK)
    query, key, value = random_qkv(grid)
    hidden = torch.zeros(1, 1, grid.tokens)
    hidden[..., 20:40] = -torch.inf

    def chosen(key: Tensor) -> Tensor:
        factors = pyramid_of(selector, key, value, layout).factors
        pyramid = build_pyramid(key, value, layout.key_rows, block=BLOCK, factors=factors, key_log_weight=hidden)
        lse = attend(query, pyramid, all_blocks(layout.query_rows, BLOCK))[1]
        return to_dense(selector.select(query, key, layout, pyramid, lse=lse), pyramid)

    broken = key.clone()
    broken[:, :, 20:40] = torch.nan
    assert torch.equal(chosen(broken), chosen(key))


@pytest.mark.parametrize("name", DYNAMIC)
def test_half_precision_and_one_head_are_fine(name: str):
    grid = GRIDS["ragged"]
    layout = lay_out(grid, TokenOrder(), tile=TILE, block=BLOCK)
    qkv = [tensor.bfloat16() for tensor in random_qkv(grid, heads=1, batch=1)]
    blocks, _ = select(DYNAMIC[name], qkv, layout)
    assert blocks.start.shape == (1, 1, layout.tiles)


def test_pooled_rest_of_a_pyramid_list_is_read_at_the_block():
    layout = lay_out(GRIDS["ragged"], TokenOrder(), tile=TILE, block=16)
    qkv = random_qkv(GRIDS["ragged"])
    blocks, pyramid = select(Pyramid(quotas=(0.2, 0.1, 0.0, 0.2)), qkv, layout)
    assert pyramid.factors == (1, 2, 4, 8, 16)
    whole = pool_rest(blocks, layout, factors=pyramid.factors)
    coarse = to_dense(whole, pyramid)[..., pyramid.offsets[4] : pyramid.offsets[4] + layout.blocks]
    read = to_dense(blocks, pyramid)[..., : pyramid.offsets[4]]
    levels = [
        read[..., pyramid.offsets[i] : pyramid.offsets[i] + layout.blocks * 16 // f].unflatten(-1, (layout.blocks, -1))
        for i, f in enumerate(pyramid.factors[:4])
    ]
    assert torch.equal(coarse, ~torch.stack([level.any(-1) for level in levels]).any(0))


def test_lists_that_have_no_rest_are_refused():
    layout = lay_out(GRIDS["video"], TokenOrder(), tile=TILE, block=BLOCK)
    twice = torch.zeros(1, 1, layout.tiles, 2 * layout.blocks, dtype=torch.bool)
    twice[..., 0] = twice[..., layout.blocks] = True
    overlapping = from_dense(twice, layout.query_rows, BLOCK)
    with pytest.raises(ValueError, match="got one read at two"):
        pool_rest(overlapping, layout, factors=(1, BLOCK))
    cut = torch.zeros(1, 1, layout.tiles, layout.blocks, BLOCK, dtype=torch.bool)
    cut[..., 1:] = True
    with pytest.raises(ValueError, match="row masks that cut through one"):
        pool_rest(from_dense(cut.any(-1), layout.query_rows, BLOCK, cut), layout, factors=(1, 2))


@pytest.mark.parametrize("name", SELECTORS)
def test_candidates_are_valid_and_differ(name: str):
    found = SELECTORS[name].candidates() if name != "stripe" else ()
    assert len(set(found)) == len(found)
    assert all(selector.name == name for selector in found)  # type: ignore[attr-defined]
