"""The rows of the image transformers; an image is a video of one frame."""

from __future__ import annotations

from .row import ModelRow, Tokens
from .visual import (
    ids,
    image_shapes,
    joined,
    latents,
    list_of_images,
    only_if,
    same_lengths,
    stacked,
    with_pictures,
)

TEXT_FIRST = Tokens(visual=ids(), order=("text", "visual"))
FIBO_2 = with_pictures(latents("BCHW"), "context_latents")

IMAGE_ROWS = (
    ModelRow(model="FluxTransformer2DModel", kind="image", tokens=TEXT_FIRST, noise="fraction"),
    ModelRow(
        model="Flux2Transformer2DModel",
        kind="image",
        tokens=TEXT_FIRST,
        noise="fraction",
        partly="with a key/value cache of reference images (kv_cache) attention stays stock",
    ),
    ModelRow(
        model="Flux3Transformer2DModel",
        kind="image",
        tokens=Tokens(
            visual=joined(ids(), ids("image_cond_ids"), optional=("", "image_cond_ids")), order=("text", "visual")
        ),
        elsewhere={r"mode_blocks\.image\..*": Tokens(visual=ids())},
        dense=r"(txt_mode_blocks|mode_blocks\.(?!image\.)).*",
        noise="fraction",
        partly="references among themselves, in the blocks before they are joined, stay dense",
    ),
    ModelRow(
        model="ChromaTransformer2DModel",
        kind="image",
        tokens=TEXT_FIRST,
        noise="fraction",
        mask="shared",
    ),
    ModelRow(
        model="QwenImageTransformer2DModel",
        kind="image",
        tokens=Tokens(visual=image_shapes, order=("text", "visual")),
        noise="fraction",
    ),
    ModelRow(
        model="SD3Transformer2DModel",
        kind="image",
        tokens=Tokens(visual=latents("BCHW"), order=("visual", "text")),
        elsewhere={r".*\.attn2": Tokens(visual=latents("BCHW"))},
    ),
    ModelRow(
        model="PixArtTransformer2DModel",
        kind="image",
        tokens=Tokens(visual=latents("BCHW")),
        dense=r".*\.attn2",
    ),
    ModelRow(
        model="DiTTransformer2DModel",
        kind="image",
        tokens=Tokens(visual=latents("BCHW")),
        text="class_labels",
    ),
    ModelRow(
        model="HunyuanDiT2DModel",
        kind="image",
        tokens=Tokens(visual=latents("BCHW")),
        dense=r".*\.attn2",
    ),
    ModelRow(
        model="HunyuanImageTransformer2DModel",
        kind="image",
        tokens=Tokens(visual=latents("BCHW"), order=("visual", "text")),
        dense=r"context_embedder.*",
        partly="the refiner's video-shaped latents stay stock",
    ),
    ModelRow(
        model="ZImageTransformer2DModel",
        kind="image",
        tokens=Tokens(visual=list_of_images("x"), order=("visual", "text")),
        elsewhere={r"noise_refiner\..*": Tokens(visual=list_of_images("x"), order=("visual", "padding"))},
        dense=r"(context|siglip)_refiner\..*",
        timestep="t",
        text="cap_feats",
        noise="1 - fraction",
    ),
    ModelRow(
        model="Lumina2Transformer2DModel",
        kind="image",
        tokens=Tokens(
            visual=only_if(same_lengths("encoder_attention_mask"), latents("BCHW")), order=("text", "visual")
        ),
        elsewhere={r"noise_refiner\..*": Tokens(visual=latents("BCHW"))},
        dense=r"context_refiner\..*",
        noise="1 - fraction",
        partly="a batch whose texts differ in length stays stock",
    ),
    ModelRow(
        model="LuminaNextDiT2DModel",
        kind="image",
        tokens=Tokens(visual=latents("BCHW")),
        dense=r".*\.attn2",
        noise="1 - fraction",
        mask="shared",
    ),
    ModelRow(
        model="JoyImageEditTransformer3DModel",
        kind="image",
        tokens=Tokens(visual=stacked, order=("visual", "text")),
    ),
    ModelRow(
        model="AuraFlowTransformer2DModel",
        kind="image",
        tokens=Tokens(visual=latents("BCHW"), order=("text", "visual")),
        noise="fraction",
    ),
    ModelRow(
        model="CogView3PlusTransformer2DModel",
        kind="image",
        tokens=Tokens(visual=latents("BCHW"), order=("text", "visual")),
    ),
    ModelRow(
        model="CogView4Transformer2DModel",
        kind="image",
        tokens=Tokens(visual=latents("BCHW"), order=("text", "visual")),
        mask="shared",
    ),
    ModelRow(
        model="GlmImageTransformer2DModel",
        kind="image",
        tokens=Tokens(visual=latents("BCHW"), order=("text", "visual")),
        partly="with a key/value cache of reference images (kv_caches) attention stays stock",
    ),
    ModelRow(
        model="HiDreamImageTransformer2DModel",
        kind="image",
        tokens=Tokens(visual=latents("BCHW"), order=("visual", "text")),
        timestep="timesteps",
        text="encoder_hidden_states_t5",
        partly="packed latents of other than square images stay stock",
    ),
    ModelRow(model="BriaTransformer2DModel", kind="image", tokens=TEXT_FIRST),
    ModelRow(model="BriaFiboTransformer2DModel", kind="image", tokens=TEXT_FIRST, mask="shared"),
    ModelRow(
        model="BriaFibo2Transformer2DModel",
        kind="image",
        tokens=Tokens(visual=only_if(same_lengths("encoder_attention_mask"), FIBO_2), order=("text", "visual")),
        elsewhere={r"noise_refiner\..*": Tokens(visual=FIBO_2)},
        dense=r"perceiver\..*|.*\.cross_attention",
        noise="fraction",
        partly="a batch whose texts differ in length stays stock",
    ),
    ModelRow(model="LongCatImageTransformer2DModel", kind="image", tokens=TEXT_FIRST, noise="fraction"),
    ModelRow(model="OvisImageTransformer2DModel", kind="image", tokens=TEXT_FIRST, noise="fraction"),
    ModelRow(
        model="ErnieImageTransformer2DModel",
        kind="image",
        tokens=Tokens(visual=latents("BCHW"), order=("visual", "text")),
        text="text_bth",
    ),
    ModelRow(
        model="Krea2Transformer2DModel",
        kind="image",
        tokens=Tokens(visual=ids("position_ids", behind_text=True), order=("text", "visual")),
        dense=r"text_fusion\..*",
        noise="fraction",
    ),
)
