"""A transformer class costs one row: CogVideoX, unlike Wan, joins text and video and calls SDPA by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

from ziggurat.attention.grid import TokenGrid
from ziggurat.pipelines import attach, models
from ziggurat.pipelines.models import MODELS, ModelRow, latent_patches

HEADS, TEXT = 2, 8

ATTENTION: Any = attention_processor


class Pipe:
    scheduler = None

    def __init__(self, transformer: torch.nn.Module):
        self.transformer = transformer


def frames_first(config, arguments):
    frames, _, height, width = arguments["hidden_states"].shape[1:]
    return ((frames, height // config["patch_size"], width // config["patch_size"]),)


@pytest.fixture
def joint(monkeypatch):
    row = ModelRow(model="CogVideoXTransformer3DModel", order=("text", "visual"), shapes=frames_first)
    monkeypatch.setattr(models, "MODELS", {**MODELS, row.model: row})
    torch.manual_seed(0)
    return Pipe(
        CogVideoXTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=16,
            num_layers=2,
            sample_width=12,
            sample_height=8,
            sample_frames=17,
            temporal_compression_ratio=4,
            max_text_seq_length=TEXT,
        ).eval()
    )


def forward(pipe: Pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 5, 4, 8, 12, generator=generator)
    text = torch.randn(2, TEXT, 16, generator=generator)
    with torch.no_grad():
        return pipe.transformer(latents, text, torch.tensor([500, 500])).sample


@pytest.mark.parametrize("kind", ["dense_plan", "sparse_plan"])
def test_joint_attention_by_one_row(joint, kind, request):
    plan = request.getfixturevalue(kind)(model_class="CogVideoXTransformer3DModel", heads=HEADS)
    stock, functional = forward(joint), ATTENTION.F
    with attach(joint, plan) as handle:
        found = forward(joint)
        grids = list(handle._runs["transformer"]._grids.values())
    with attach(joint, plan, backend="reference"):
        torch.testing.assert_close(forward(joint), found, rtol=0, atol=1e-5)
    assert grids == [TokenGrid.video(5, 4, 6, text_before=TEXT)]
    assert ATTENTION.F is functional
    assert torch.equal(forward(joint), stock)
    assert torch.allclose(found, stock, rtol=0, atol=1e-5) == (kind == "dense_plan")
    assert handle.steps[0].branches == ["text 0"]


def test_grid_that_does_not_fit_is_unknown():
    row = MODELS["WanTransformer3DModel"]
    latents = torch.zeros(1, 4, 5, 8, 12)
    shapes = latent_patches({"patch_size": (1, 2, 2)}, {"hidden_states": latents})
    assert shapes is not None
    assert shapes == ((5, 4, 6),)
    assert row.token_grid(shapes, 120) == TokenGrid.video(5, 4, 6)
    assert row.token_grid(shapes, 121) is None
    assert row.token_grid(shapes, 119) is None
    assert row.token_grid(((0, 4, 6),), 0) is None
    assert latent_patches({"patch_size": (1, 2, 2)}, {"hidden_states": torch.zeros(1, 120, 4)}) is None


def test_wan_cross_attention_is_no_layer():
    row = MODELS["WanTransformer3DModel"]
    assert row.layers(["blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1"]) == ["blocks.0.attn1", "blocks.1.attn1"]
    assert row.noise_level(250.0, 1000) == 0.25
