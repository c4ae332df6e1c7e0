"""What no plan can take stays stock and says why; what a key mask hides is never felt."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from ziggurat.pipelines import attach
from ziggurat.pipelines.plans import model_shape

# Type checkers see nothing of what diffusers imports late.
library: Any = diffusers
JOINT: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
TEXT = 7


def lengths(*valid: int) -> torch.Tensor:
    return (torch.arange(TEXT) < torch.tensor(valid)[:, None]).long()


def lumina() -> tuple[str, dict[str, Any], dict[str, Any]]:
    config = {
        "sample_size": 16,
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "axes_dim_rope": (4, 6, 6),
        "axes_lens": (32, 32, 32),
        "cap_feat_dim": 16,
    }
    return (
        "Lumina2Transformer2DModel",
        config,
        {
            "hidden_states": torch.randn(2, 4, 12, 18),
            "encoder_hidden_states": torch.randn(2, TEXT, 16),
            "encoder_attention_mask": lengths(5, 4).bool(),
            "timestep": torch.tensor([0.5, 0.5]),
        },
    )


def flux() -> tuple[str, dict[str, Any], dict[str, Any]]:
    config = {
        **JOINT,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 6, 6),
    }
    shuffled = torch.cartesian_prod(torch.arange(1), torch.arange(6), torch.arange(9)).float().flip(0)
    return (
        "FluxTransformer2DModel",
        config,
        {
            "hidden_states": torch.randn(1, 54, 4),
            "encoder_hidden_states": torch.randn(1, TEXT, 16),
            "pooled_projections": torch.randn(1, 8),
            "timestep": torch.tensor([0.5]),
            "img_ids": shuffled,
            "txt_ids": torch.zeros(TEXT, 3),
        },
    )


def skyreels() -> tuple[str, dict[str, Any], dict[str, Any]]:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
        "num_frame_per_block": 2,
    }
    return (
        "SkyReelsV2Transformer3DModel",
        config,
        {
            "hidden_states": torch.randn(1, 4, 4, 8, 12),
            "encoder_hidden_states": torch.randn(1, TEXT, 16),
            "timestep": torch.tensor([500]),
        },
    )


@pytest.mark.parametrize(
    ("case", "reason", "layer"),
    [
        (lumina, "batch items have different token positions", 1),
        (flux, "img_ids are no image in raster order", 0),
        (skyreels, "is not a key mask", 0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_stays_stock_and_says_why(case, reason, layer, build, forward, bare_pipe, sparse_plan):
    torch.manual_seed(0)
    model, config, arguments = case()
    transformer = build(model, config)
    stock = forward(transformer, arguments)
    plan = sparse_plan(**(vars(model_shape(transformer)) | {"grid": (1, 6, 9)}))
    with attach(bare_pipe(transformer), plan) as handle:
        out = forward(transformer, arguments)
        lines = [line for line in handle.summary().splitlines() if " layer " in f" {line}"]
    assert reason in lines[layer], handle.summary()
    assert all("sparse" in line or reason in line for line in lines[1:])
    if layer == 0:
        assert torch.equal(out, stock)
        assert handle.density == 1


def qwen() -> tuple[str, dict[str, Any], dict[str, Any]]:
    config = {"in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 16, **JOINT}
    return (
        "QwenImageTransformer2DModel",
        {**config, "axes_dims_rope": (4, 6, 6)},
        {
            "hidden_states": torch.randn(2, 54, 16),
            "encoder_hidden_states": torch.randn(2, TEXT, 16),
            "encoder_hidden_states_mask": lengths(5, 4),
            "timestep": torch.tensor([0.5, 0.5]),
            "img_shapes": [[(1, 6, 9)]] * 2,
        },
    )


def chroma() -> tuple[str, dict[str, Any], dict[str, Any]]:
    _, config, arguments = flux()
    config = {**config, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    del config["pooled_projection_dim"], arguments["pooled_projections"]
    arguments["img_ids"] = arguments["img_ids"].flip(0)
    arguments["attention_mask"] = torch.cat([lengths(5), torch.ones(1, 54)], 1).bool()
    return "ChromaTransformer2DModel", config, arguments


@pytest.mark.parametrize("case", [qwen, chroma], ids=lambda case: case.__name__)
def test_padding_of_the_text_is_never_felt(case, build, forward, bare_pipe, sparse_plan):
    torch.manual_seed(0)
    model, config, arguments = case()
    transformer = build(model, config)
    text = arguments["encoder_hidden_states"]
    padded, valid = text.clone(), text.clone()
    padded[:, 5:] += 100
    valid[:, :3] += 1
    plan = sparse_plan(rest="pooled", **(vars(model_shape(transformer)) | {"grid": (1, 6, 9)}))
    with attach(bare_pipe(transformer), plan) as handle:
        out, other, changed = (
            forward(transformer, {**arguments, "encoder_hidden_states": one}) for one in (text, padded, valid)
        )
        assert handle.list_density < 1
    torch.testing.assert_close(other, out, rtol=0, atol=1e-5)
    assert not torch.allclose(changed, out, rtol=0, atol=1e-4)
