"""Stripes and skips: every query reads the chosen columns, or none."""

import pytest
import torch
from pydantic import ValidationError

from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.levels import level0_reads
from ziggurat.attention.order import TokenOrder
from ziggurat.attention.rows import lay_out
from ziggurat.attention.skip import Skip
from ziggurat.attention.stripe import Box, Stripe

SHAPE = (5, 4, 6)
STRIPES = {
    "first frame": (Stripe(boxes=(Box(frames=(0, 1)),)), lambda f, h, w: f == 0),
    "centre": (
        Stripe(boxes=(Box(height=("25%", "75%"), width=(2, 4)),)),
        lambda f, h, w: (h >= 1) & (h < 3) & (w >= 2) & (w < 4),
    ),
    "every other row, and the last frame": (
        Stripe(boxes=(Box(every=(1, 2, 1)), Box(frames=(4, "100%")))),
        lambda f, h, w: (h % 2 == 0) | (f == 4),
    ),
    "beyond the grid": (Stripe(boxes=(Box(frames=(9, 12)),)), lambda f, h, w: f == 4),
}


@pytest.mark.parametrize("text", ["raster", "temporal", "tile(2,2,2)"])
@pytest.mark.parametrize("name", STRIPES)
def test_columns_stand_in_the_first_blocks(name: str, text: str):
    stripe, rule = STRIPES[name]
    order = TokenOrder.model_validate(text)
    grid = TokenGrid.video(*SHAPE, text_after=3)
    layout = lay_out(grid, order, tile=16, block=8, key_orders=[stripe.key_order(SHAPE, order), None])
    axes = torch.meshgrid(*(torch.arange(size) for size in SHAPE), indexing="ij")
    chosen = set(rule(*axes).flatten().nonzero()[:, 0].tolist())
    reads = level0_reads(stripe.select(None, None, layout, None), layout.blocks)
    key_rows = layout.key_rows.view(-1, 8)
    for tile in range(layout.tiles - 1):
        tokens = set(key_rows[reads[tile]].flatten().tolist()) - {-1}
        assert chosen | {120, 121, 122} <= tokens
        assert len(tokens) < len(chosen) + 3 + 8
    assert reads[-1].all()
    assert sorted(layout.key_rows[layout.key_rows >= 0].tolist()) == list(range(grid.tokens))


def test_columns_keep_the_order_among_themselves():
    stripe = STRIPES["first frame"][0]
    order = TokenOrder(name="temporal")
    keys = stripe.key_order(SHAPE, order)
    assert keys[:24].tolist() == list(range(24))
    rest = [token for token in order.indices(SHAPE).tolist() if token >= 24]
    assert keys[24:].tolist() == rest


def test_skip_reads_nothing_but_text_queries_read_all():
    layout = lay_out(TokenGrid.video(2, 4, 4, text_after=3), TokenOrder(), tile=8, block=4)
    reads = level0_reads(Skip().select(None, None, layout, None), layout.blocks)
    assert not reads[:-1].any()
    assert reads[-1].all()


def test_refused():
    with pytest.raises(ValidationError):
        Stripe(boxes=())
    with pytest.raises(ValidationError):
        Box(frames=(-1, 2))
