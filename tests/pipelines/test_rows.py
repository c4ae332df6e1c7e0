"""Rows of the table: how segments follow from arguments, and what a sequence is then taken to be."""

from __future__ import annotations

import pytest
import torch

from ziggurat.attention.grid import TokenGrid
from ziggurat.pipelines.absent import ABSENT
from ziggurat.pipelines.models import MODELS, row_of
from ziggurat.pipelines.row import Measure, Tokens
from ziggurat.pipelines.visual import ids, image_shapes, latents, patches, same_lengths, sizes

WAN = MODELS["WanTransformer3DModel"]


def position_ids(height: int, width: int, image: int = 0) -> torch.Tensor:
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    return torch.cat([torch.full((len(places), 1), image), places], 1).float()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"patch_size": (1, 2, 3)}, (1, 2, 3)),
        ({"patch_size": 2}, (1, 2, 2)),
        ({"patch_size": 2, "patch_size_t": 4}, (4, 2, 2)),
        ({"patch_size": [2, 3], "patch_size_t": None}, (1, 2, 3)),
        ({"patch_size": None}, (1, 1, 1)),
    ],
)
def test_patch_sizes_however_written(config, expected):
    assert patches(config) == expected


def test_tokens_that_do_not_follow_are_no_grid():
    measure = WAN.tokens.measure({"patch_size": (1, 2, 2)}, {"hidden_states": torch.zeros(1, 4, 5, 8, 12)})
    assert measure.shapes == ((5, 4, 6),)
    assert measure.token_grid(120) == TokenGrid.video(5, 4, 6)
    for tokens in (119, 121):
        assert "tokens do not follow from 5x4x6 patches" in str(measure.token_grid(tokens))
    for latent in (torch.zeros(1, 120, 4), torch.zeros(1, 4, 5, 1, 12)):
        assert "grid unknown" in str(WAN.tokens.measure({"patch_size": (1, 2, 2)}, {"hidden_states": latent}).shapes)


def test_what_the_arguments_do_not_tell_is_text():
    joint = Tokens(visual=latents("BFCHW"), order=("text", "visual"))
    measure = joint.measure({"patch_size": 2}, {"hidden_states": torch.zeros(1, 5, 4, 8, 12)})
    assert measure.token_grid(128) == TokenGrid.video(5, 4, 6, text_before=8)
    assert measure.token_grid(120) == TokenGrid.video(5, 4, 6), "a prompt may be empty"
    around = Measure(((2, 3, 4),), (("history", 5),), ("history", "visual", "text"))
    grid = around.token_grid(5 + 24 + 7)
    assert isinstance(grid, TokenGrid)
    assert [(part.kind, part.shape, part.runs[0][0]) for part in grid.segments] == [
        ("reference", (5,), 0),
        ("visual", (2, 3, 4), 5),
        ("text", (7,), 29),
    ]


def test_position_ids_tell_images_rows_and_columns():
    both = torch.cat([position_ids(6, 9), position_ids(4, 6, image=10)])
    visual = ids()
    assert visual({}, {"img_ids": both}) == ((1, 6, 9), (1, 4, 6))
    assert visual({}, {"img_ids": both[None].expand(2, -1, -1)}) == ((1, 6, 9), (1, 4, 6))
    batch = torch.stack([position_ids(6, 9), position_ids(9, 6)])
    assert visual({}, {"img_ids": batch}) == "batch items have different img_ids"
    assert "no image in raster order" in str(visual({}, {"img_ids": position_ids(6, 9).flip(0)}))
    assert "no image" in str(visual({}, {"img_ids": position_ids(6, 9)[1:]}))
    assert visual({}, {}) == "grid unknown: img_ids is not given"


def test_position_ids_changed_in_place_are_read_again():
    places, visual = position_ids(6, 9), ids()
    assert visual({}, {"img_ids": places}) == ((1, 6, 9),)
    places.copy_(position_ids(9, 6))
    assert visual({}, {"img_ids": places}) == ((1, 9, 6),)


def test_shapes_given_as_lists_or_numbers():
    assert image_shapes({}, {"img_shapes": [[(1, 6, 9), (1, 4, 6)]] * 2}) == ((1, 6, 9), (1, 4, 6))
    assert image_shapes({}, {"img_shapes": [(1, 6, 9)] * 2}) == ((1, 6, 9),)
    assert "batch items" in str(image_shapes({}, {"img_shapes": [[(1, 6, 9)], [(1, 9, 6)]]}))
    assert "not given" in str(image_shapes({}, {}))
    assert sizes()({}, {"num_frames": 2, "height": 3, "width": 4}) == ((2, 3, 4),)
    assert "not given" in str(sizes()({}, {"num_frames": 2, "height": 3}))


def test_segments_of_several_arguments():
    latent, picture = torch.zeros(1, 4, 12, 18), torch.zeros(1, 4, 8, 12)
    fibo = MODELS["BriaFibo2Transformer2DModel"].tokens.visual
    assert fibo({"patch_size": 2}, {"hidden_states": latent}) == ((1, 6, 9),)
    assert fibo({"patch_size": 2}, {"hidden_states": latent, "context_latents": [picture]}) == ((1, 6, 9), (1, 4, 6))
    flux = MODELS["Flux3Transformer2DModel"].tokens.visual
    places = {"img_ids": position_ids(6, 9), "image_cond_ids": position_ids(4, 6, image=10)}
    assert flux({}, places) == ((1, 6, 9), (1, 4, 6))
    assert flux({}, {"img_ids": position_ids(6, 9)}) == ((1, 6, 9),)
    joy = MODELS["JoyImageEditTransformer3DModel"].tokens.visual
    assert joy({"patch_size": [1, 2, 2]}, {"hidden_states": torch.zeros(1, 2, 4, 1, 12, 18)}) == ((1, 6, 9),) * 2


def test_history_of_framepack_stands_in_front():
    row = MODELS["HunyuanVideoFramepackTransformer3DModel"]
    arguments = {"hidden_states": torch.zeros(1, 4, 3, 8, 12)}
    assert row.tokens.lengths({"patch_size": 2, "patch_size_t": 1}, arguments) == {"history": 0}
    for name, frames in (("latents_clean", 2), ("latents_history_2x", 3)):
        arguments |= {name: torch.zeros(1, 4, frames, 8, 12), f"indices_{name}": torch.arange(frames)}
    assert row.tokens.lengths({"patch_size": 2, "patch_size_t": 1}, arguments) == {"history": 2 * 24 + 2 * 6}


def test_texts_of_different_length_before_the_image():
    condition = same_lengths("mask")
    assert condition({"mask": torch.tensor([[1, 1, 0], [1, 1, 0]])}) == ""
    assert "different token positions" in condition({"mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})


@pytest.mark.parametrize(
    ("model", "arguments", "reason"),
    [
        ("Kandinsky5Transformer3DModel", {"sparse_params": {"P": 0.9}}, "Kandinsky's own sparse attention is on"),
        (
            "HunyuanImageTransformer2DModel",
            {"hidden_states": torch.zeros(1, 4, 1, 6, 9)},
            "grid unknown: hidden_states",
        ),
        ("HiDreamImageTransformer2DModel", {"hidden_states": torch.zeros(1, 54, 16)}, "grid unknown: hidden_states"),
        ("ZImageTransformer2DModel", {"x": torch.zeros(1, 4, 1, 6, 9)}, "x is no list of images"),
        (
            "ZImageTransformer2DModel",
            {"x": [torch.zeros(4, 1, 6, 8), torch.zeros(4, 1, 8, 6)]},
            "batch items have images of different sizes",
        ),
        (
            "BriaFibo2Transformer2DModel",
            {"hidden_states": torch.zeros(2, 4, 6, 8), "encoder_attention_mask": torch.tensor([[1, 1], [1, 0]])},
            "batch items have different token positions",
        ),
    ],
)
def test_what_a_row_does_not_reach_says_why(model, arguments, reason):
    config = {"patch_size": 2, "all_patch_size": (2,), "all_f_patch_size": (1,)}
    measure = MODELS[model].tokens.measure(config, arguments)
    assert reason in str(measure.token_grid(60))


def test_which_layers_a_plan_counts():
    assert WAN.layers(["blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1"]) == ["blocks.0.attn1", "blocks.1.attn1"]
    latte = MODELS["LatteTransformer3DModel"]
    latent = {"hidden_states": torch.zeros(2, 4, 5, 8, 12)}
    shapes = [
        latte.tokens_of(path).visual({"patch_size": 2}, latent)
        for path in ("transformer_blocks.0.attn1", "temporal_transformer_blocks.0.attn1")
    ]
    assert shapes == [((1, 4, 6),), ((5, 1, 1),)]


def test_noise_levels_in_each_unit():
    assert WAN.noise_level(torch.tensor([0.0, 250.0]), 1000) == 0.25
    assert MODELS["FluxTransformer2DModel"].noise_level(torch.tensor([0.25]), 1000) == 0.25
    assert MODELS["ZImageTransformer2DModel"].noise_level(torch.tensor([0.25]), 1000) == 0.75


def test_classes_without_a_row_are_refused_saying_why():
    class SanaTransformer2DModel:
        pass

    class Unheard:
        pass

    with pytest.raises(ValueError, match=r"no softmax self-attention.*linear"):
        row_of(SanaTransformer2DModel())
    with pytest.raises(ValueError, match="Unheard, for which no plan can run: it has no row"):
        row_of(Unheard())
    assert not MODELS.keys() & ABSENT.keys()
