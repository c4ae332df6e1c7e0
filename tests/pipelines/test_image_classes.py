"""Image transformers of diffusers under a plan; each costs a row, a tiny configuration (.json), and a case here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ziggurat.pipelines.models import MODELS

IMAGE, TWO = ((1, 6, 9),), ((1, 6, 9), (1, 4, 6))
TEXT = 7
TINY: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("tiny_transformers.json").read_text())


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
        {**TINY["flux"], "pooled_projection_dim": 8},
        lambda: packed(*IMAGE, pooled_projections=rand(2, 8)),
        PACKED,
    ),
    "flux-kontext": (
        "FluxTransformer2DModel",
        {**TINY["flux"], "pooled_projection_dim": 8},
        lambda: packed(*TWO, pooled_projections=rand(2, 8)),
        {**PACKED, "shapes": TWO},
    ),
    "flux-2": (
        "Flux2Transformer2DModel",
        {**TINY["flux"], "timestep_guidance_channels": 16, "axes_dims_rope": [4, 4, 4, 4]},
        lambda: packed(*TWO, columns=4, guidance=torch.ones(2)),
        {**PACKED, "shapes": TWO},
    ),
    "flux-3": (
        "Flux3Transformer2DModel",
        {**TINY["flux"], "cond_in_channels": 4, "timestep_channels": 16, "axes_dims_rope": [4, 4, 4, 4]},
        lambda: packed(*IMAGE, columns=4),
        PACKED,
    ),
    "lumina-next": (
        "LuminaNextDiT2DModel",
        TINY["lumina_next"],
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
        TINY["joyimage"],
        lambda: given(hidden_states=rand(2, 2, 4, 1, 12, 18)),
        {"axes": "BNCFHW", "shapes": (*IMAGE, *IMAGE), "last_first": True},
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {**TINY["flux"], **TINY["chroma"]},
        lambda: packed(*IMAGE, attention_mask=torch.cat([lengths(5, 4), torch.ones(2, 54)], 1).float()),
        PACKED,
    ),
    "qwen": (
        "QwenImageTransformer2DModel",
        TINY["qwen"],
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
        TINY["qwen"],
        lambda: given(
            hidden_states=rand(2, 78, 16),
            timestep=FRACTIONS,
            encoder_hidden_states_mask=lengths(5, 4),
            img_shapes=[[*TWO]] * 2,
        ),
        {**PACKED, "shapes": TWO},
    ),
    "sd3": ("SD3Transformer2DModel", TINY["sd3"], lambda: given(pooled_projections=rand(2, 8)), {}),
    "sd3.5": (
        "SD3Transformer2DModel",
        {**TINY["sd3"], "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        lambda: given(pooled_projections=rand(2, 8)),
        {},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        TINY["pixart"],
        lambda: given(
            encoder_attention_mask=lengths(5, 4), added_cond_kwargs={"resolution": None, "aspect_ratio": None}
        ),
        {},
    ),
    "dit": (
        "DiTTransformer2DModel",
        TINY["dit"],
        lambda: {"hidden_states": rand(2, 4, 16, 16), "timestep": STEPS, "class_labels": torch.tensor([1, 2])},
        {"shapes": ((1, 8, 8),)},
    ),
    "hunyuan-dit": (
        "HunyuanDiT2DModel",
        TINY["hunyuan_dit"],
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
        TINY["hunyuan_image"],
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
        TINY["z_image"],
        lambda: {"x": [rand(4, 1, 12, 18), rand(4, 1, 12, 18)], "t": FRACTIONS, "cap_feats": [TEXTS[0], rand(40, 16)]},
        {"latent": "x", "axes": "LCFHW"},
    ),
    "lumina-2": (
        "Lumina2Transformer2DModel",
        TINY["lumina2"],
        lambda: given(timestep=FRACTIONS, encoder_attention_mask=lengths(5, 5).bool()),
        {},
    ),
    "auraflow": ("AuraFlowTransformer2DModel", TINY["auraflow"], lambda: given(timestep=FRACTIONS), {}),
    "cogview3": (
        "CogView3PlusTransformer2DModel",
        {**TINY["cogview"], "pos_embed_max_size": 16, "sample_size": 16},
        lambda: given(**CROPS),
        {},
    ),
    "cogview4": (
        "CogView4Transformer2DModel",
        {**TINY["cogview"], "rope_axes_dim": (8, 8)},
        lambda: given(**CROPS, attention_mask=lengths(5, 4)),
        {},
    ),
    "glm-image": (
        "GlmImageTransformer2DModel",
        {**TINY["cogview"], "prior_vq_quantizer_codebook_size": 16},
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
        TINY["hidream"],
        lambda: {
            "hidden_states": rand(2, 4, 16, 16),
            "timesteps": STEPS,
            "encoder_hidden_states_t5": TEXTS,
            "encoder_hidden_states_llama3": rand(2, 2, TEXT, 12),
            "pooled_embeds": rand(2, 8),
        },
        {"shapes": ((1, 8, 8),)},
    ),
    "bria": ("BriaTransformer2DModel", TINY["flux"], lambda: packed(*IMAGE, timestep=STEPS), PACKED),
    "bria-fibo": (
        "BriaFiboTransformer2DModel",
        {**TINY["flux"], "text_encoder_dim": 16},
        lambda: packed(*IMAGE, timestep=STEPS, text_encoder_layers=[TEXTS, TEXTS]),
        PACKED,
    ),
    "bria-fibo-2": (
        "BriaFibo2Transformer2DModel",
        TINY["bria_fibo_2"],
        lambda: given(timestep=FRACTIONS, encoder_hidden_states=rand(2, 2, TEXT, 16)),
        {},
    ),
    "longcat": (
        "LongCatImageTransformer2DModel",
        {**TINY["flux"], "pooled_projection_dim": 16},
        lambda: packed(*IMAGE),
        PACKED,
    ),
    "ovis": ("OvisImageTransformer2DModel", {**TINY["flux"], "out_channels": 4}, lambda: packed(*IMAGE), PACKED),
    "ernie": (
        "ErnieImageTransformer2DModel",
        TINY["ernie"],
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
        TINY["krea2"],
        lambda: {
            "hidden_states": rand(2, 54, 4),
            "encoder_hidden_states": rand(2, TEXT, 2, 16),
            "timestep": FRACTIONS,
            "position_ids": torch.cat([torch.zeros(TEXT, 3), position_ids(*IMAGE)]),
        },
        PACKED,
    ),
}


def test_each_row_has_a_case():
    assert {model for model, *_ in CASES.values()} == {row.model for row in MODELS.values() if row.kind == "image"}


@pytest.mark.parametrize("name", CASES)
def test_class(name, check_class):
    model, config, arguments, more = CASES[name]
    check_class(model, config, arguments(), **{"shapes": IMAGE, "axes": "BCHW", **more})
