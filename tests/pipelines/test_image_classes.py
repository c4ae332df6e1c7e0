"""Image transformers of diffusers under a plan; each costs its row in the table and one tiny configuration here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

IMAGE, TWO = ((1, 6, 9),), ((1, 6, 9), (1, 4, 6))
TEXT = 7


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def lengths(*valid: int) -> torch.Tensor:
    """A mask [B, TEXT] of which the first tokens are valid."""
    return (torch.arange(TEXT) < torch.tensor(valid)[:, None]).long()


def position_ids(*shapes: tuple[int, int, int], columns: int = 3) -> torch.Tensor:
    """Image, row and column of each token; of packed images one after the other."""
    found = []
    for image, (_, height, width) in enumerate(shapes):
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
        first = torch.full((len(places), 1), 10.0 * image)
        found.append(torch.cat([first, places, torch.zeros(len(places), columns - 3)], 1))
    return torch.cat(found)


LATENTS, TEXTS = rand(2, 4, 12, 18), rand(2, TEXT, 16)
STEPS, FRACTIONS = torch.tensor([500, 500]), torch.tensor([0.5, 0.5])


def given(**more: Any) -> dict[str, Any]:
    return {"hidden_states": LATENTS, "encoder_hidden_states": TEXTS, "timestep": STEPS, **more}


def packed(*shapes: tuple[int, int, int], columns: int = 3, **more: Any) -> dict[str, Any]:
    places = position_ids(*shapes, columns=columns)
    return {
        "hidden_states": rand(2, len(places), 4),
        "encoder_hidden_states": TEXTS,
        "timestep": FRACTIONS,
        "img_ids": places,
        "txt_ids": torch.zeros(TEXT, columns),
        **more,
    }


FLUX: dict[str, Any] = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": [4, 6, 6],
}
CHROMA = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
QWEN: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}
SD3: dict[str, Any] = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 8,
    "pos_embed_max_size": 16,
}
PIXART: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 32,
    "sample_size": 8,
    "patch_size": 2,
    "caption_channels": 16,
    "use_additional_conditions": False,
}
DIT: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 16,
    "patch_size": 2,
    "num_embeds_ada_norm": 8,
}
HUNYUAN_DIT: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 8,
    "hidden_size": 32,
    "num_layers": 2,
    "cross_attention_dim": 16,
    "cross_attention_dim_t5": 16,
    "pooled_projection_dim": 4,
    "text_len": TEXT,
    "text_len_t5": 4,
    "learn_sigma": False,
}
HUNYUAN_IMAGE: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": (1, 1),
    "text_embed_dim": 16,
    "text_embed_2_dim": 12,
    "rope_axes_dim": (8, 8),
}
Z_IMAGE: dict[str, Any] = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": [4, 6, 6],
    "axes_lens": [256, 32, 32],
}
LUMINA2: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 8,
    "axes_dim_rope": (4, 6, 6),
    "axes_lens": (32, 32, 32),
    "cap_feat_dim": 16,
}
LUMINA_NEXT: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_kv_heads": 2,
    "multiple_of": 8,
    "cross_attention_dim": 16,
    "learn_sigma": False,
}
JOYIMAGE: dict[str, Any] = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}
AURAFLOW: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "caption_projection_dim": 32,
    "out_channels": 4,
    "pos_embed_max_size": 400,
}
COGVIEW: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "out_channels": 4,
    "text_embed_dim": 16,
    "time_embed_dim": 8,
    "condition_dim": 4,
}
HIDREAM: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "caption_channels": [16, 12],
    "text_emb_dim": 8,
    "axes_dims_rope": (4, 6, 6),
    "max_resolution": (12, 12),
    "llama_layers": (0, 1),
    "num_routed_experts": 2,
    "num_activated_experts": 1,
}
ERNIE: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_layers": 2,
    "ffn_hidden_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 1,
    "text_in_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}
KREA2: dict[str, Any] = {
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "timestep_embed_dim": 16,
    "text_hidden_dim": 16,
    "num_text_layers": 2,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 2,
    "text_intermediate_size": 16,
    "num_layerwise_text_blocks": 1,
    "num_refiner_text_blocks": 1,
    "axes_dims_rope": (4, 6, 6),
}
BRIA_FIBO_2: dict[str, Any] = {
    "in_channels": 4,
    "patch_size": 2,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "cap_feat_dim": 16,
    "injection_layer_ids": (1,),
    "perceiver_num_layers": 1,
    "min_num_gist_tokens": 4,
    "max_num_gist_tokens": 8,
    "gist_step": 2,
    "gist_min_text_len": 4,
    "gist_max_text_len": 32,
    "axes_dims": (4, 6, 6),
    "axes_lens": (64, 32, 32),
}
CROPS = {
    "original_size": torch.tensor([[96, 144]] * 2),
    "target_size": torch.tensor([[96, 144]] * 2),
    "crop_coords": torch.zeros(2, 2, dtype=torch.long),
}

Case = tuple[str, dict[str, Any], Callable[[], dict[str, Any]], dict[str, Any]]
PACKED = {"axes": "BNC"}

CASES: dict[str, Case] = {
    "flux": (
        "FluxTransformer2DModel",
        {**FLUX, "pooled_projection_dim": 8},
        lambda: packed(*IMAGE, pooled_projections=rand(2, 8)),
        PACKED,
    ),
    "flux-kontext": (
        "FluxTransformer2DModel",
        {**FLUX, "pooled_projection_dim": 8},
        lambda: packed(*TWO, pooled_projections=rand(2, 8)),
        {**PACKED, "shapes": TWO},
    ),
    "flux-2": (
        "Flux2Transformer2DModel",
        {**FLUX, "timestep_guidance_channels": 16, "axes_dims_rope": [4, 4, 4, 4]},
        lambda: packed(*TWO, columns=4, guidance=torch.ones(2)),
        {**PACKED, "shapes": TWO},
    ),
    "flux-3": (
        "Flux3Transformer2DModel",
        {**FLUX, "cond_in_channels": 4, "timestep_channels": 16, "axes_dims_rope": [4, 4, 4, 4]},
        lambda: packed(*IMAGE, columns=4),
        PACKED,
    ),
    "lumina-next": (
        "LuminaNextDiT2DModel",
        LUMINA_NEXT,
        lambda: given(
            timestep=FRACTIONS,
            encoder_mask=lengths(5, 4),
            image_rotary_emb=torch.polar(torch.ones(16, 16, 8), torch.zeros(16, 16, 8)),
            cross_attention_kwargs={},
        ),
        {},
    ),
    "joyimage": (
        "JoyImageEditTransformer3DModel",
        JOYIMAGE,
        lambda: given(hidden_states=rand(2, 2, 4, 1, 12, 18)),
        {"axes": "BNCFHW", "shapes": (*IMAGE, *IMAGE), "last_first": True},
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {**FLUX, **CHROMA},
        lambda: packed(*IMAGE, attention_mask=torch.cat([lengths(5, 4), torch.ones(2, 54)], 1).float()),
        PACKED,
    ),
    "qwen": (
        "QwenImageTransformer2DModel",
        QWEN,
        lambda: given(
            hidden_states=rand(2, 54, 16),
            timestep=FRACTIONS,
            encoder_hidden_states_mask=lengths(5, 4),
            img_shapes=[[*IMAGE]] * 2,
        ),
        PACKED,
    ),
    "qwen-edit": (
        "QwenImageTransformer2DModel",
        QWEN,
        lambda: given(
            hidden_states=rand(2, 78, 16),
            timestep=FRACTIONS,
            encoder_hidden_states_mask=lengths(5, 4),
            img_shapes=[[*TWO]] * 2,
        ),
        {**PACKED, "shapes": TWO},
    ),
    "sd3": ("SD3Transformer2DModel", SD3, lambda: given(pooled_projections=rand(2, 8)), {}),
    "sd3.5": (
        "SD3Transformer2DModel",
        {**SD3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        lambda: given(pooled_projections=rand(2, 8)),
        {},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        PIXART,
        lambda: given(
            encoder_attention_mask=lengths(5, 4), added_cond_kwargs={"resolution": None, "aspect_ratio": None}
        ),
        {},
    ),
    "dit": (
        "DiTTransformer2DModel",
        DIT,
        lambda: {"hidden_states": rand(2, 4, 16, 16), "timestep": STEPS, "class_labels": torch.tensor([1, 2])},
        {"shapes": ((1, 8, 8),)},
    ),
    "hunyuan-dit": (
        "HunyuanDiT2DModel",
        HUNYUAN_DIT,
        lambda: given(
            timestep=STEPS.float(),
            text_embedding_mask=lengths(5, 4),
            encoder_hidden_states_t5=rand(2, 4, 16),
            text_embedding_mask_t5=torch.ones(2, 4),
            image_meta_size=rand(2, 6),
            style=torch.zeros(2, dtype=torch.long),
            image_rotary_emb=[rand(54, 16), rand(54, 16)],
        ),
        {},
    ),
    "hunyuan-image": (
        "HunyuanImageTransformer2DModel",
        HUNYUAN_IMAGE,
        lambda: given(
            hidden_states=rand(2, 4, 6, 9),
            timestep=STEPS.float(),
            encoder_attention_mask=lengths(5, 4),
            encoder_hidden_states_2=rand(2, 4, 12),
            encoder_attention_mask_2=torch.ones(2, 4),
        ),
        {},
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        Z_IMAGE,
        lambda: {"x": [rand(4, 1, 12, 18), rand(4, 1, 12, 18)], "t": FRACTIONS, "cap_feats": [TEXTS[0], rand(40, 16)]},
        {"latent": "x", "axes": "LCFHW"},
    ),
    "lumina-2": (
        "Lumina2Transformer2DModel",
        LUMINA2,
        lambda: given(timestep=FRACTIONS, encoder_attention_mask=lengths(5, 5).bool()),
        {},
    ),
    "auraflow": ("AuraFlowTransformer2DModel", AURAFLOW, lambda: given(timestep=FRACTIONS), {}),
    "cogview3": (
        "CogView3PlusTransformer2DModel",
        {**COGVIEW, "pos_embed_max_size": 16, "sample_size": 16},
        lambda: given(**CROPS),
        {},
    ),
    "cogview4": (
        "CogView4Transformer2DModel",
        {**COGVIEW, "rope_axes_dim": (8, 8)},
        lambda: given(**CROPS, attention_mask=lengths(5, 4)),
        {},
    ),
    "glm-image": (
        "GlmImageTransformer2DModel",
        {**COGVIEW, "prior_vq_quantizer_codebook_size": 16},
        lambda: given(
            prior_token_id=torch.zeros(2, 54, dtype=torch.long),
            prior_token_drop=torch.zeros(2, 54, dtype=torch.bool),
            target_size=CROPS["target_size"],
            crop_coords=CROPS["crop_coords"],
        ),
        {},
    ),
    "hidream": (
        "HiDreamImageTransformer2DModel",
        HIDREAM,
        lambda: {
            "hidden_states": rand(2, 4, 16, 16),
            "timesteps": STEPS,
            "encoder_hidden_states_t5": TEXTS,
            "encoder_hidden_states_llama3": rand(2, 2, TEXT, 12),
            "pooled_embeds": rand(2, 8),
        },
        {"shapes": ((1, 8, 8),)},
    ),
    "bria": ("BriaTransformer2DModel", FLUX, lambda: packed(*IMAGE, timestep=STEPS), PACKED),
    "bria-fibo": (
        "BriaFiboTransformer2DModel",
        {**FLUX, "text_encoder_dim": 16},
        lambda: packed(*IMAGE, timestep=STEPS, text_encoder_layers=[TEXTS, TEXTS]),
        PACKED,
    ),
    "bria-fibo-2": (
        "BriaFibo2Transformer2DModel",
        BRIA_FIBO_2,
        lambda: given(timestep=FRACTIONS, encoder_hidden_states=rand(2, 2, TEXT, 16)),
        {},
    ),
    "longcat": (
        "LongCatImageTransformer2DModel",
        {**FLUX, "pooled_projection_dim": 16},
        lambda: packed(*IMAGE),
        PACKED,
    ),
    "ovis": ("OvisImageTransformer2DModel", {**FLUX, "out_channels": 4}, lambda: packed(*IMAGE), PACKED),
    "ernie": (
        "ErnieImageTransformer2DModel",
        ERNIE,
        lambda: {
            "hidden_states": rand(2, 4, 6, 9),
            "timestep": STEPS,
            "text_bth": TEXTS,
            "text_lens": torch.tensor([7, 5]),
        },
        {},
    ),
    "krea-2": (
        "Krea2Transformer2DModel",
        KREA2,
        lambda: {
            "hidden_states": rand(2, 54, 4),
            "encoder_hidden_states": rand(2, TEXT, 2, 16),
            "timestep": FRACTIONS,
            "position_ids": torch.cat([torch.zeros(TEXT, 3), position_ids(*IMAGE)]),
        },
        PACKED,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_class(name, check_class):
    model, config, arguments, more = CASES[name]
    check_class(model, config, arguments(), **{"shapes": IMAGE, "axes": "BCHW", **more})
