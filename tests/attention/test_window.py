"""Windows against their definition, token by token; densities against those that the design quotes."""

import time

import pytest
import torch
from pydantic import ValidationError

from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.levels import level0_reads
from ziggurat.attention.order import TokenOrder, coordinates
from ziggurat.attention.rows import Layout, lay_out
from ziggurat.attention.window import Window, diagonal, multi_diagonal

ORDERS = ("raster", "temporal", "tile(2,2,3)", "morton", "hilbert", "strided(2)")


def axis_reads(query: int, key: int, extent: int, size: int | str, step: int, border: str) -> bool:
    """The definition, for one axis and one pair."""
    if query % step != key % step:
        return False
    cells = [cell for cell in range(extent) if cell % step == query % step]
    if size == "100%":
        return True
    wide = size if isinstance(size, int) else max(1, round(float(size[:-1]) / 100 * len(cells)))
    first = cells.index(query) - wide // 2
    if border == "shift":
        first = max(0, min(first, len(cells) - wide))
    return cells.index(key) in range(first, first + wide)


def expected(window: Window, layout: Layout) -> torch.Tensor:
    """bool [T, K] of a grid with a single video, from all pairs of tokens."""
    shape = layout.grid.visual[0].grid
    pairs = torch.ones(layout.grid.tokens, layout.grid.tokens, dtype=torch.bool)
    sizes = (window.frames, window.height, window.width)
    for at, extent, size, step in zip(coordinates(shape), shape, sizes, window.dilation, strict=True):
        table = torch.tensor(
            [[axis_reads(q, k, extent, size, step, window.border) for k in range(extent)] for q in range(extent)]
        )
        pairs &= table[at][:, at]
    result = torch.zeros(layout.tiles, layout.blocks, dtype=torch.bool)
    for tile, queries in enumerate(layout.query_rows[0]):
        for block, keys in enumerate(layout.key_rows.view(-1, layout.block)):
            live = pairs[queries[queries >= 0].long()][:, keys[keys >= 0].long()]
            result[tile, block] = live.any()
    return result


WINDOWS = {
    "5x3x3": Window(frames=5, height=3, width=3),
    "even": Window(frames=2, height=4, width=2),
    "all frames": Window(height=1, width=3),
    "shifted": Window(frames=3, height=3, width=3, border="shift"),
    "shares": Window(frames="40%", height="50%", width="12.5%"),
    "shares shifted": Window(frames="40%", height="50%", width="12.5%", border="shift"),
    "larger than the grid": Window(frames=50, height=50, width=50, border="shift"),
    "dilated": Window(frames=1, height=2, width=3, dilation=(1, 2, 3)),
    "dilated shifted": Window(frames="50%", height="60%", width=2, dilation=(2, 3, 2), border="shift"),
    "itself": Window(frames=1, height=1, width=1),
}


@pytest.mark.parametrize("shape", [(5, 4, 7), (1, 7, 5), (3, 1, 11), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("text", ORDERS)
@pytest.mark.parametrize("name", WINDOWS)
def test_against_definition(name: str, text: str, shape: tuple[int, int, int]):
    layout = lay_out(TokenGrid.video(*shape), TokenOrder.model_validate(text), tile=6, block=4)
    reads = level0_reads(WINDOWS[name].select(None, None, layout, None), layout.blocks)
    assert torch.equal(reads, expected(WINDOWS[name], layout))


def test_more_than_64_tiles():
    window = WINDOWS["5x3x3"]
    layout = lay_out(TokenGrid.video(7, 6, 7), TokenOrder(name="morton"), tile=2, block=3)
    reads = level0_reads(window.select(None, None, layout, None), layout.blocks)
    assert layout.tiles > 128
    assert torch.equal(reads, expected(window, layout))


def test_shifted_windows_read_equally_many_keys():
    for axis in Window(frames=3, height="40%", width=4, border="shift").reach((7, 10, 9)):
        assert len(set(axis.sum(1).tolist())) == 1


def test_text_and_other_segments_are_read_and_read_all():
    grid = TokenGrid.joined([("text", (9,)), ("visual", (2, 4, 4)), ("reference", (5,)), ("visual", (1, 4, 4))])
    layout = lay_out(grid, TokenOrder(), tile=8, block=4)
    reads = level0_reads(Window(frames=1, height=1, width=1).select(None, None, layout, None), layout.blocks)
    for tile, tile_segment in enumerate(layout.tile_segment.tolist()):
        for block, block_segment in enumerate(layout.block_segment.tolist()):
            if tile_segment != block_segment or tile_segment in (0, 2):
                assert reads[tile, block]
    assert not reads.all()


def density(order: TokenOrder, window: Window, tile: int) -> tuple[float, float]:
    """List density and seconds at 21 x 45 x 80 with 64-row blocks."""
    layout = lay_out(TokenGrid.video(21, 45, 80), order, tile=tile, block=64)
    begin = time.perf_counter()
    blocks = window.select(None, None, layout, None)
    return level0_reads(blocks, layout.blocks).float().mean().item(), time.perf_counter() - begin


def test_density_of_multi_diagonals_follows_the_order():
    temporal, window = multi_diagonal(5, 5)
    figures = {
        text: density(TokenOrder.model_validate(text), window, tile=128)
        for text in ("raster", "tile(4,4,4)", str(temporal))
    }
    assert figures["raster"][0] == pytest.approx(0.142, abs=0.0005)
    assert figures["tile(4,4,4)"][0] == pytest.approx(0.054, abs=0.0005)
    assert figures["temporal"][0] == pytest.approx(0.019, abs=0.0005)
    assert max(seconds for _, seconds in figures.values()) < 4


def test_density_of_dilated_windows_follows_the_order():
    window = Window(dilation=(1, 2, 2))
    assert density(TokenOrder(name="strided", sizes=(2,)), window, tile=128)[0] == pytest.approx(0.25, abs=0.005)
    assert density(TokenOrder(), window, tile=128)[0] > 0.99


def test_diagonal_is_frames_near_the_query():
    order, window = diagonal()
    layout = lay_out(TokenGrid.video(6, 4, 4), order, tile=16, block=16)
    assert torch.equal(level0_reads(window.select(None, None, layout, None), 6), torch.eye(6, dtype=torch.bool))


@pytest.mark.parametrize(
    "bad", [{"frames": 0}, {"frames": "120%"}, {"height": 2.5}, {"width": "5"}, {"size": 3}], ids=str
)
def test_refused(bad: dict):
    with pytest.raises(ValidationError):
        Window(**bad)
