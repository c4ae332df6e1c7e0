"""The embedded model before training: diffusers' own Wan classes, small."""

import math
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .scenes import VOCABULARY

LATENT_CHANNELS = 8
TEXT_DIM = 64


def build_vae() -> AutoencoderKLWan:
    """A VAE that makes 17×32×32 latents of 8 channels from 33×128×128 pixels, ready to be trained."""
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        # Both factors have to be given: left at their defaults, the pipeline silently halves size and length.
        scale_factor_temporal=2,
        scale_factor_spatial=4,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    _keep_signal(vae)
    return vae


@torch.no_grad()
def _keep_signal(vae: Any) -> None:
    """Initialise so that what differs from place to place passes both halves at full strength.

    With PyTorch's own initialisation a change of the input is 15 times weaker at the output, and hundreds of steps
    pass before anything but the background is drawn.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            taps = math.prod(module.kernel_size[-2:])
            nn.init.normal_(module.weight, std=(module.in_channels * taps) ** -0.5)
            if module.weight.ndim == 5 and module.kernel_size[0] > 1:
                module.weight[:, :, :-1] *= 0.2  # a clip's first frame sees zeros in place of the past
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for mid in (vae.encoder.mid_block, vae.decoder.mid_block):
        for attention in mid.attentions:
            nn.init.zeros_(attention.proj.weight)
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        flat = convolution.weight.flatten(1)
        nn.init.orthogonal_(flat)
        convolution.weight.copy_(flat.view_as(convolution.weight))
    # The posterior's log-variance starts where its noise is a twelfth of the latents' spread.
    vae.quant_conv.weight[LATENT_CHANNELS:] = 0
    vae.quant_conv.bias[LATENT_CHANNELS:] = -5


def build_transformer() -> WanTransformer3DModel:
    """A transformer of 4,352 tokens for 33×128×128 pixels."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=512,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256,
    )


def build_text_encoder(tokenizer: PreTrainedTokenizerFast) -> UMT5EncoderModel:
    """A two-layer encoder over the captions' words."""
    special: Any = tokenizer
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_DIM,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=special.pad_token_id,
            eos_token_id=special.eos_token_id,
        )
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer of one token a word; what it does not know becomes `<unk>`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", *VOCABULARY]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Flow matching whose steps lie mostly at high noise, where direction and place are decided."""
    return FlowMatchEulerDiscreteScheduler(shift=5.0)
