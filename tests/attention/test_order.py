"""Every order is a permutation of any grid, and puts next to each other what it says it does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ziggurat.attention.order import TokenOrder, coordinates

TEXTS = ("raster", "temporal", "tile(4,4,4)", "tile(1,8,3)", "morton", "hilbert", "strided(2)", "strided(3)")
size = st.integers(1, 13)


def order(text: str) -> TokenOrder:
    return TokenOrder.model_validate(text)


@settings(max_examples=25, deadline=None)
@given(frames=size, height=size, width=size)
@pytest.mark.parametrize("text", TEXTS)
def test_permutation(text: str, frames: int, height: int, width: int):
    indices = order(text).indices((frames, height, width))
    assert indices.dtype == torch.int64
    assert sorted(indices.tolist()) == list(range(frames * height * width))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 97), (31, 1, 1), (2, 128, 1)], ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_extreme_shapes(text: str, shape: tuple[int, int, int]):
    assert sorted(order(text).indices(shape).tolist()) == list(range(shape[0] * shape[1] * shape[2]))


def walk(text: str, shape: tuple[int, int, int]) -> torch.Tensor:
    """[tokens, 3]: the coordinates met in this order."""
    return torch.stack(coordinates(shape), 1)[order(text).indices(shape)]


@pytest.mark.parametrize("side", [2, 4, 8])
def test_hilbert_steps_to_a_neighbour_each_time(side: int):
    path = walk("hilbert", (side, side, side))
    assert bool(((path[1:] - path[:-1]).abs().sum(1) == 1).all())


def test_temporal_holds_the_frames_of_a_place_together():
    path = walk("temporal", (3, 2, 2))
    assert path[:4].tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0], [0, 0, 1]]


def test_tiles_are_boxes_and_cut_ones_come_last():
    path = walk("tile(2,2,3)", (3, 5, 7))
    whole = path[: 2 * 4 * 6].view(-1, 12, 3)
    assert bool((whole.amax(1) - whole.amin(1) == torch.tensor([1, 1, 2])).all())
    assert bool(((path[2 * 4 * 6 :] >= torch.tensor([2, 4, 6])).any(1)).all())


def test_strided_holds_equal_residues_together():
    path = walk("strided(2)", (3, 4, 6)).view(4, -1, 3)
    residues = path[..., 1:] % 2
    assert bool((residues == residues[:, :1]).all())


def test_morton_halves_the_cube_eight_times():
    path = walk("morton", (4, 4, 4)).view(8, 8, 3)
    assert bool((path.amax(1) - path.amin(1) == 1).all())


def test_explicit():
    explicit = TokenOrder(name="explicit", permutation=(2, 0, 1))
    assert explicit.indices((1, 1, 3)).tolist() == [2, 0, 1]
    assert TokenOrder.model_validate(explicit.model_dump()) == explicit
    with pytest.raises(ValueError, match="permutation must hold 4 tokens"):
        explicit.indices((1, 2, 2))
    with pytest.raises(ValidationError, match="permutation must hold each of 0"):
        TokenOrder(name="explicit", permutation=(0, 0, 1))


@pytest.mark.parametrize("text", TEXTS)
def test_text_form_survives(text: str):
    assert order(text).model_dump() == text == str(order(text))


@pytest.mark.parametrize("text", ["spiral", "tile", "tile(4,4)", "tile(0,1,1)", "raster(2)", "strided(x)", "explicit"])
def test_refused(text: str):
    with pytest.raises(ValidationError):
        order(text)
