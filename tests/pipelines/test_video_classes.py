"""Video transformers of diffusers under a plan; each costs a row, a tiny configuration (.json), and a case here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ziggurat.pipelines.models import MODELS

VIDEO = ((3, 4, 6),)
TEXT = 7
TINY: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("tiny_transformers.json").read_text())


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def lengths(*valid: int) -> torch.Tensor:
    """A mask [B, TEXT] of which the first tokens are valid."""
    return (torch.arange(TEXT) < torch.tensor(valid)[:, None]).long()


LATENTS, TEXTS, STEPS = rand(2, 4, 3, 8, 12), rand(2, TEXT, 16), torch.tensor([500, 500])


def given(**more: Any) -> dict[str, Any]:
    return {"hidden_states": LATENTS, "encoder_hidden_states": TEXTS, "timestep": STEPS, **more}


def hunyuan(**more: Any) -> dict[str, Any]:
    return given(
        encoder_attention_mask=lengths(5, 4),
        pooled_projections=rand(2, 8),
        guidance=torch.tensor([6000.0, 6000.0]),
        **more,
    )


def with_history() -> dict[str, Any]:
    found = hunyuan(image_embeds=rand(2, 3, 16), indices_latents=torch.arange(3) + 5)
    for name, frames in (("latents_clean", 2), ("latents_history_2x", 3), ("latents_history_4x", 4)):
        found |= {name: rand(2, 4, frames, 8, 12), f"indices_{name}": torch.arange(frames)}
    return found


def helios_history() -> dict[str, Any]:
    found = given(indices_hidden_states=torch.ones(2, 3))
    for name, frames in (("short", 1), ("mid", 2), ("long", 4)):
        found |= {f"latents_history_{name}": rand(2, 4, frames, 8, 12)}
        found |= {f"indices_latents_history_{name}": torch.ones(2, frames)}
    return found


def packed(**more: Any) -> dict[str, Any]:
    return given(hidden_states=rand(2, 72, 4), num_frames=3, height=4, width=6, **more)


Case = tuple[str, dict[str, Any], Callable[[], dict[str, Any]], dict[str, Any]]

CASES: dict[str, Case] = {
    "wan": ("WanTransformer3DModel", TINY["wan"], given, {}),
    "wan-i2v": (
        "WanTransformer3DModel",
        {**TINY["wan"], "image_dim": 16, "added_kv_proj_dim": 32},
        lambda: given(encoder_hidden_states_image=rand(2, 5, 16)),
        {},
    ),
    "wan-vace": (
        "WanVACETransformer3DModel",
        {**TINY["wan"], "vace_layers": [0], "vace_in_channels": 8},
        lambda: given(control_hidden_states=rand(2, 8, 3, 8, 12)),
        {},
    ),
    "wan-animate": (
        "WanAnimateTransformer3DModel",
        TINY["animate"],
        lambda: given(
            hidden_states=rand(2, 12, 3, 8, 12),
            encoder_hidden_states_image=rand(2, 5, 16),
            pose_hidden_states=rand(2, 4, 2, 8, 12),
            face_pixel_values=rand(2, 3, 5, 16, 16),
        ),
        {},
    ),
    "chronoedit": ("ChronoEditTransformer3DModel", {**TINY["wan"], "rope_temporal_skip_len": 2}, given, {}),
    "anyflow": (
        "AnyFlowTransformer3DModel",
        TINY["wan"],
        lambda: given(
            hidden_states=rand(2, 3, 4, 8, 12),
            timestep=torch.full((2, 3), 500.0),
            r_timestep=torch.full((2, 3), 400.0),
        ),
        {"axes": "BFCHW"},
    ),
    "skyreels-v2": ("SkyReelsV2Transformer3DModel", TINY["wan"], given, {}),
    "hunyuan": ("HunyuanVideoTransformer3DModel", TINY["hunyuan"], hunyuan, {}),
    "framepack": (
        "HunyuanVideoFramepackTransformer3DModel",
        {**TINY["hunyuan"], "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        with_history,
        {},
    ),
    "hunyuan-1.5": (
        "HunyuanVideo15Transformer3DModel",
        TINY["hunyuan_15"],
        lambda: given(
            hidden_states=rand(2, 4, 3, 4, 6),
            timestep=STEPS.float(),
            encoder_attention_mask=lengths(5, 4),
            encoder_hidden_states_2=rand(2, 4, 12),
            encoder_attention_mask_2=torch.ones(2, 4),
            image_embeds=rand(2, 3, 8),
        ),
        {},
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        TINY["cogvideox"],
        lambda: given(hidden_states=rand(2, 3, 4, 8, 12)),
        {"axes": "BFCHW"},
    ),
    "cogvideox-1.5": (
        "CogVideoXTransformer3DModel",
        {**TINY["cogvideox"], "patch_size_t": 2, "use_rotary_positional_embeddings": True, "patch_bias": False},
        lambda: given(hidden_states=rand(2, 6, 4, 8, 12), image_rotary_emb=(rand(72, 16), rand(72, 16))),
        {"axes": "BFCHW"},
    ),
    "consisid": (
        "ConsisIDTransformer3DModel",
        TINY["consisid"],
        lambda: given(
            hidden_states=rand(2, 3, 4, 8, 12), id_vit_hidden=[torch.ones(2, 2, 2)], id_cond=torch.ones(2, 2)
        ),
        {"axes": "BFCHW"},
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        TINY["ltx"],
        lambda: packed(encoder_attention_mask=lengths(5, 4)),
        {"axes": "BNC"},
    ),
    "ltx-2": (
        "LTX2VideoTransformer3DModel",
        TINY["ltx2"],
        lambda: packed(
            timestep=torch.full((2, 1), 500.0),
            audio_hidden_states=rand(2, 9, 4),
            audio_encoder_hidden_states=TEXTS,
            audio_num_frames=9,
        ),
        {"axes": "BNC"},
    ),
    "mochi": ("MochiTransformer3DModel", TINY["mochi"], lambda: given(encoder_attention_mask=lengths(5, 4).bool()), {}),
    "allegro": (
        "AllegroTransformer3DModel",
        TINY["allegro"],
        lambda: given(
            encoder_hidden_states=TEXTS[:, None],
            attention_mask=torch.ones(2, 3, 8, 12),
            encoder_attention_mask=lengths(5, 4),
        ),
        {},
    ),
    "cosmos": (
        "CosmosTransformer3DModel",
        TINY["cosmos"],
        lambda: given(timestep=torch.tensor([0.5, 0.5]), fps=24, padding_mask=torch.zeros(1, 1, 8, 12)),
        {},
    ),
    "easyanimate": ("EasyAnimateTransformer3DModel", TINY["easyanimate"], given, {}),
    "kandinsky-5": (
        "Kandinsky5Transformer3DModel",
        TINY["kandinsky"],
        lambda: {
            "hidden_states": rand(1, 3, 8, 12, 4),
            "encoder_hidden_states": TEXTS[:1],
            "timestep": torch.tensor([500.0]),
            "pooled_projections": rand(1, 8),
            "visual_rope_pos": (torch.arange(3), torch.arange(4), torch.arange(6)),
            "text_rope_pos": torch.arange(TEXT),
        },
        {"axes": "BFHWC"},
    ),
    "kandinsky-6": (
        "Kandinsky6Transformer3DModel",
        TINY["kandinsky_6"],
        lambda: {
            "hidden_states": rand(1, 3, 8, 12, 4),
            "encoder_hidden_states": TEXTS[:1],
            "pooled_projections": rand(1, 8),
            "timestep": torch.tensor([500.0]),
        },
        {"axes": "BFHWC"},
    ),
    "latte": (
        "LatteTransformer3DModel",
        TINY["latte"],
        lambda: given(hidden_states=rand(2, 4, 5, 16, 24)),
        {"shapes": ((5, 8, 12),)},
    ),
    "helios": ("HeliosTransformer3DModel", TINY["helios"], helios_history, {}),
    "motif": ("MotifVideoTransformer3DModel", TINY["motif"], lambda: given(encoder_attention_mask=lengths(5, 4)), {}),
}


def test_each_row_has_a_case():
    assert {model for model, *_ in CASES.values()} == {row.model for row in MODELS.values() if row.kind == "video"}


@pytest.mark.parametrize("name", CASES)
def test_class(name, check_class):
    model, config, arguments, more = CASES[name]
    check_class(model, config, arguments(), **{"shapes": VIDEO, **more})
