"""Grids say where tokens stand, and layouts never mix two segments in one tile or block."""

import pytest
import torch

from ziggurat.attention.grid import Segment, TokenGrid
from ziggurat.attention.order import TokenOrder
from ziggurat.attention.rows import lay_out

GRIDS = {
    "video": TokenGrid.video(3, 4, 5),
    "one token": TokenGrid.video(1, 1, 1),
    "prime": TokenGrid.video(1, 1, 31),
    "text behind": TokenGrid.video(2, 3, 5, text_after=7),
    "text around": TokenGrid.video(2, 3, 5, text_before=4, text_after=9),
    "two images": TokenGrid.joined(
        [("text", (5,)), ("visual", (1, 4, 6)), ("reference", (11,)), ("visual", (1, 3, 3))]
    ),
    "ulysses": TokenGrid(
        (
            Segment(kind="text", shape=(6,), runs=((0, 3), (13, 16))),
            Segment(kind="visual", shape=(1, 4, 5), runs=((3, 13), (16, 26))),
        )
    ),
}


@pytest.mark.parametrize("name", GRIDS)
def test_every_token_stands_in_one_tile_and_one_block_of_its_segment(name: str):
    grid = GRIDS[name]
    layout = lay_out(grid, TokenOrder(name="temporal"), tile=8, block=4)
    segment_of = torch.empty(grid.tokens, dtype=torch.int64)
    for index, segment in enumerate(grid.segments):
        segment_of[segment.positions()] = index
    for rows, owners in (
        (layout.query_rows[0], layout.tile_segment),
        (layout.key_rows.view(-1, 4), layout.block_segment),
    ):
        live = rows >= 0
        assert sorted(rows[live].tolist()) == list(range(grid.tokens))
        assert bool((segment_of[rows.clamp(min=0).long()] == owners[:, None])[live].all())
        assert bool(live.any(1).all())


def test_segments_must_hold_every_position_once():
    with pytest.raises(ValueError, match="no segment hold position 5"):
        TokenGrid((Segment.text(5), Segment.visual(1, 2, 2, start=6)))
    with pytest.raises(ValueError, match="two segments hold position 4"):
        TokenGrid((Segment.text(5), Segment.visual(1, 2, 2, start=4)))
    with pytest.raises(ValueError, match="must hold 4 tokens"):
        Segment(kind="visual", shape=(1, 2, 2), runs=((0, 3),))
    with pytest.raises(ValueError, match="kind must be one of"):
        Segment(kind="audio", shape=(3,), runs=((0, 3),))  # type: ignore[arg-type]


def test_grids_are_keys():
    assert len({TokenGrid.video(3, 4, 5), TokenGrid.video(3, 4, 5), TokenGrid.video(3, 5, 4)}) == 2
    assert str(GRIDS["text behind"]) == "2x3x5 + 7 text"
