"""Video transformers of diffusers under a plan; each costs its row in the table and one tiny configuration here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

VIDEO = ((3, 4, 6),)
TEXT = 7


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def lengths(*valid: int) -> torch.Tensor:
    """A mask [B, TEXT] of which the first tokens are valid."""
    return (torch.arange(TEXT) < torch.tensor(valid)[:, None]).long()


LATENTS, TEXTS, STEPS = rand(2, 4, 3, 8, 12), rand(2, TEXT, 16), torch.tensor([500, 500])


def given(**more: Any) -> dict[str, Any]:
    return {"hidden_states": LATENTS, "encoder_hidden_states": TEXTS, "timestep": STEPS, **more}


WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
ANIMATE: dict[str, Any] = {
    **WAN,
    "in_channels": 12,
    "latent_channels": 4,
    "image_dim": 16,
    "added_kv_proj_dim": 32,
    "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 1,
}
HUNYUAN: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}
HUNYUAN_15: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "text_embed_2_dim": 12,
    "image_embed_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}
COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 16,
    "num_layers": 2,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 9,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": TEXT,
}
CONSISID: dict[str, Any] = {
    **COGVIDEOX,
    "is_train_face": True,
    "cross_attn_interval": 1,
    "cross_attn_dim_head": 8,
    "cross_attn_num_heads": 2,
    "LFE_id_dim": 2,
    "LFE_vit_dim": 2,
    "LFE_depth": 5,
    "LFE_dim_head": 8,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 1,
    "LFE_num_querie": 1,
    "LFE_output_dim": 21,
    "LFE_ff_mult": 1,
    "LFE_num_scale": 1,
}
LTX: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": 16,
}
LTX2: dict[str, Any] = {
    **LTX,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "rope_double_precision": False,
}
MOCHI: dict[str, Any] = {
    "patch_size": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "pooled_projection_dim": 16,
    "in_channels": 4,
    "text_embed_dim": 16,
    "time_embed_dim": 4,
    "max_sequence_length": TEXT,
}
ALLEGRO: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "cross_attention_dim": 48,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 3,
    "caption_channels": 16,
}
COSMOS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": 16,
    "adaln_lora_dim": 4,
    "max_size": (4, 16, 16),
    "concat_padding_mask": False,
}
EASYANIMATE: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "sample_width": 12,
    "sample_height": 8,
    "num_layers": 2,
    "mmdit_layers": 1,
    "time_embed_dim": 2,
    "text_embed_dim": 16,
}
KANDINSKY: dict[str, Any] = {
    "in_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 16,
    "out_visual_dim": 4,
    "patch_size": (1, 2, 2),
    "model_dim": 32,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
}
KANDINSKY_6: dict[str, Any] = {**KANDINSKY, "visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4}
LATTE: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 1,
    "cross_attention_dim": 32,
    "sample_size": 8,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "caption_channels": 16,
    "video_length": 5,
    "attention_bias": True,
}
HELIOS: dict[str, Any] = {**WAN, "rope_dim": (4, 6, 6)}
del HELIOS["rope_max_seq_len"]
MOTIF: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}


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
    "wan": ("WanTransformer3DModel", WAN, given, {}),
    "wan-i2v": (
        "WanTransformer3DModel",
        {**WAN, "image_dim": 16, "added_kv_proj_dim": 32},
        lambda: given(encoder_hidden_states_image=rand(2, 5, 16)),
        {},
    ),
    "wan-vace": (
        "WanVACETransformer3DModel",
        {**WAN, "vace_layers": [0], "vace_in_channels": 8},
        lambda: given(control_hidden_states=rand(2, 8, 3, 8, 12)),
        {},
    ),
    "wan-animate": (
        "WanAnimateTransformer3DModel",
        ANIMATE,
        lambda: given(
            hidden_states=rand(2, 12, 3, 8, 12),
            encoder_hidden_states_image=rand(2, 5, 16),
            pose_hidden_states=rand(2, 4, 2, 8, 12),
            face_pixel_values=rand(2, 3, 5, 16, 16),
        ),
        {},
    ),
    "chronoedit": ("ChronoEditTransformer3DModel", {**WAN, "rope_temporal_skip_len": 2}, given, {}),
    "anyflow": (
        "AnyFlowTransformer3DModel",
        WAN,
        lambda: given(
            hidden_states=rand(2, 3, 4, 8, 12),
            timestep=torch.full((2, 3), 500.0),
            r_timestep=torch.full((2, 3), 400.0),
        ),
        {"axes": "BFCHW"},
    ),
    "skyreels-v2": ("SkyReelsV2Transformer3DModel", WAN, given, {}),
    "hunyuan": ("HunyuanVideoTransformer3DModel", HUNYUAN, hunyuan, {}),
    "framepack": (
        "HunyuanVideoFramepackTransformer3DModel",
        {**HUNYUAN, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        with_history,
        {},
    ),
    "hunyuan-1.5": (
        "HunyuanVideo15Transformer3DModel",
        HUNYUAN_15,
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
        COGVIDEOX,
        lambda: given(hidden_states=rand(2, 3, 4, 8, 12)),
        {"axes": "BFCHW"},
    ),
    "cogvideox-1.5": (
        "CogVideoXTransformer3DModel",
        {**COGVIDEOX, "patch_size_t": 2, "use_rotary_positional_embeddings": True, "patch_bias": False},
        lambda: given(hidden_states=rand(2, 6, 4, 8, 12), image_rotary_emb=(rand(72, 16), rand(72, 16))),
        {"axes": "BFCHW"},
    ),
    "consisid": (
        "ConsisIDTransformer3DModel",
        CONSISID,
        lambda: given(
            hidden_states=rand(2, 3, 4, 8, 12), id_vit_hidden=[torch.ones(2, 2, 2)], id_cond=torch.ones(2, 2)
        ),
        {"axes": "BFCHW"},
    ),
    "ltx": ("LTXVideoTransformer3DModel", LTX, lambda: packed(encoder_attention_mask=lengths(5, 4)), {"axes": "BNC"}),
    "ltx-2": (
        "LTX2VideoTransformer3DModel",
        LTX2,
        lambda: packed(
            timestep=torch.full((2, 1), 500.0),
            audio_hidden_states=rand(2, 9, 4),
            audio_encoder_hidden_states=TEXTS,
            audio_num_frames=9,
        ),
        {"axes": "BNC"},
    ),
    "mochi": ("MochiTransformer3DModel", MOCHI, lambda: given(encoder_attention_mask=lengths(5, 4).bool()), {}),
    "allegro": (
        "AllegroTransformer3DModel",
        ALLEGRO,
        lambda: given(
            encoder_hidden_states=TEXTS[:, None],
            attention_mask=torch.ones(2, 3, 8, 12),
            encoder_attention_mask=lengths(5, 4),
        ),
        {},
    ),
    "cosmos": (
        "CosmosTransformer3DModel",
        COSMOS,
        lambda: given(timestep=torch.tensor([0.5, 0.5]), fps=24, padding_mask=torch.zeros(1, 1, 8, 12)),
        {},
    ),
    "easyanimate": ("EasyAnimateTransformer3DModel", EASYANIMATE, given, {}),
    "kandinsky-5": (
        "Kandinsky5Transformer3DModel",
        KANDINSKY,
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
        KANDINSKY_6,
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
        LATTE,
        lambda: given(hidden_states=rand(2, 4, 5, 16, 24)),
        {"shapes": ((5, 8, 12),)},
    ),
    "helios": ("HeliosTransformer3DModel", HELIOS, helios_history, {}),
    "motif": ("MotifVideoTransformer3DModel", MOTIF, lambda: given(encoder_attention_mask=lengths(5, 4)), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_class(name, check_class):
    model, config, arguments, more = CASES[name]
    check_class(model, config, arguments(), **{"shapes": VIDEO, **more})
