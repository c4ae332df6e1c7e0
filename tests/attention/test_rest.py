"""Invariant 3: with the rest pooled, the weights that each query tile reads add up to N, and text is read exactly."""

import pytest
import torch

from ziggurat.attention.dense import Dense
from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.levels import read_levels
from ziggurat.attention.order import TokenOrder
from ziggurat.attention.rest import pool_rest
from ziggurat.attention.rows import Layout, lay_out
from ziggurat.attention.select import Selector
from ziggurat.attention.skip import Skip
from ziggurat.attention.stripe import Box, Stripe
from ziggurat.attention.window import Window
from ziggurat.kernels.blocklist import ALL
from ziggurat.kernels.listops import from_dense, to_dense
from ziggurat.kernels.pyramid import KVPyramid, build_pyramid

GRIDS = {
    "video": TokenGrid.video(5, 6, 7),
    "one token": TokenGrid.video(1, 1, 1),
    "prime": TokenGrid.video(1, 1, 101),
    "text": TokenGrid.video(3, 7, 9, text_before=5, text_after=13),
    "two videos": TokenGrid.joined([("visual", (2, 5, 5)), ("text", (3,)), ("visual", (1, 5, 9))]),
}
SELECTORS = {
    "window": Window(frames=1, height=3, width=3),
    "stripe": Stripe(boxes=(Box(frames=(0, 1)),)),
    "skip": Skip(),
    "dense": Dense(),
}


def laid_out(grid: TokenGrid, selector: Selector, block: int) -> Layout:
    order = TokenOrder(name="temporal")
    keys = [selector.key_order(s.grid, order) if s.kind == "visual" else None for s in grid.segments]
    return lay_out(grid, order, tile=2 * block, block=block, key_orders=keys)


def pyramid_of(layout: Layout, factor: int, key_log_weight: torch.Tensor | None = None) -> KVPyramid:
    kv = torch.randn(1, 1, layout.grid.tokens, 4, dtype=torch.float64)
    return build_pyramid(
        kv, kv, layout.key_rows, block=layout.block, factors=(1, factor), key_log_weight=key_log_weight
    )


@pytest.mark.parametrize(("block", "factor"), [(4, 4), (16, 4), (16, 16), (8, 2)], ids=str)
@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("where", GRIDS)
def test_every_token_is_read_exactly_once(where: str, name: str, block: int, factor: int):
    layout = laid_out(GRIDS[where], SELECTORS[name], block)
    fine = SELECTORS[name].select(None, None, layout, None)
    blocks = pool_rest(fine, layout, factors=(1, factor))
    pyramid = pyramid_of(layout, factor)
    blocks.validate(pyramid, layout.grid.tokens)
    read = to_dense(blocks, pyramid)
    weight = (read * pyramid.log_weight.exp()).sum(-1)
    assert torch.allclose(weight, torch.full_like(weight, layout.grid.tokens), atol=0, rtol=1e-6)

    # By tokens: each level-1 row stands for `factor` level-0 rows, and no token is met twice.
    level0 = pyramid.offsets[1]
    met = read[0, 0, :, :level0].int()
    coarse = read[0, 0, :, level0:].repeat_interleave(factor, -1)[:, :level0].int()
    live = layout.key_rows[0] >= 0
    assert bool(((met + coarse)[:, live] == 1).all())
    text = live & layout.exact_blocks.repeat_interleave(layout.block)
    assert bool((met[:, text] == 1).all())
    # What the selector chose is still read exactly.
    chosen = (read_levels(fine, layout, (1, factor))[0, 0] == 0).repeat_interleave(layout.block, -1)
    assert bool((met >= chosen.int()).all())


def test_masked_keys_are_left_out_of_the_weights():
    layout = laid_out(GRIDS["text"], SELECTORS["window"], 8)
    blocks = pool_rest(SELECTORS["window"].select(None, None, layout, None), layout, factors=(1, 8))
    hidden = torch.zeros(1, 1, layout.grid.tokens)
    hidden[..., ::3] = -torch.inf
    pyramid = pyramid_of(layout, 8, hidden)
    weight = (to_dense(blocks, pyramid) * pyramid.log_weight.exp()).sum(-1)
    assert torch.allclose(weight, torch.full_like(weight, float((hidden == 0).sum())))


def test_costs_a_coarse_level_at_most():
    layout = lay_out(TokenGrid.video(9, 16, 16), TokenOrder(name="temporal"), tile=64, block=16)
    fine = Window(height=3, width=3).select(None, None, layout, None)
    blocks = pool_rest(fine, layout, factors=(1, 16))
    coarse = -(-layout.blocks // 16)
    assert bool(((blocks.count - fine.count) <= coarse).all())
    assert not (blocks.count == ALL).any()


def test_lists_per_head_and_batch():
    layout = laid_out(GRIDS["video"], SELECTORS["window"], 8)
    reads = torch.rand(2, 3, layout.tiles, layout.blocks) < 0.3
    blocks = pool_rest(from_dense(reads, layout.query_rows, 8), layout, factors=(1, 8))
    pyramid = pyramid_of(layout, 8)
    read = to_dense(blocks, pyramid)
    assert read.shape[:2] == (2, 3)
    level0 = read[..., : pyramid.offsets[1]].unflatten(-1, (-1, 8)).all(-1)
    assert torch.equal(level0, reads)
    weight = (read * pyramid.log_weight.exp()).sum(-1)
    assert torch.allclose(weight, torch.full_like(weight, layout.grid.tokens))


def test_refused():
    layout = laid_out(GRIDS["video"], SELECTORS["window"], 8)
    fine = SELECTORS["window"].select(None, None, layout, None)
    for factors in ((1,), (1, 3), (1, 16)):
        with pytest.raises(ValueError, match="factors must hold a divisor of block 8"):
            pool_rest(fine, layout, factors=factors)
    pooled = pool_rest(fine, layout, factors=(1, 4))
    with pytest.raises(ValueError, match="blocks must be of the levels"):
        pool_rest(pooled, layout, factors=(1, 8))


def test_a_list_without_a_rest_stays_as_it_is():
    layout = laid_out(GRIDS["text"], SELECTORS["window"], 8)
    pooled = pool_rest(SELECTORS["window"].select(None, None, layout, None), layout, factors=(1, 4))
    again = pool_rest(pooled, layout, factors=(1, 4))
    for name in ("start", "count", "pool", "masked_count", "row_masks"):
        assert torch.equal(getattr(again, name), getattr(pooled, name))
