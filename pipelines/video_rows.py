"""The rows of the video transformers."""

from __future__ import annotations

from .row import Arguments, Config, ModelRow, Tokens
from .visual import given, latents, only_if, patches, sizes, spatial, temporal

WAN = Tokens(visual=latents())
WAN_CROSS = r".*\.attn2"


def framepack_history(config: Config, arguments: Arguments) -> dict[str, int]:
    """Framepack's history, in front of the video: each level cut into patches 1, 2 and 4 times as large, padded."""
    f, h, w = patches(config)
    total = 0
    for name, factor in (("latents_clean", 1), ("latents_history_2x", 2), ("latents_history_4x", 4)):
        shape = getattr(arguments.get(name), "shape", None)
        if shape is not None and arguments.get(f"indices_{name}") is not None:
            frames, height, width = (
                -(-size // (patch * factor)) for size, patch in zip(shape[2:], (f, h, w), strict=True)
            )
            total += frames * height * width
    return {"history": total}


VIDEO_ROWS = (
    ModelRow(model="WanTransformer3DModel", kind="video", tokens=WAN, dense=WAN_CROSS),
    ModelRow(model="WanVACETransformer3DModel", kind="video", tokens=WAN, dense=WAN_CROSS),
    ModelRow(model="WanAnimateTransformer3DModel", kind="video", tokens=WAN, dense=rf"{WAN_CROSS}|face_adapter\..*"),
    ModelRow(model="ChronoEditTransformer3DModel", kind="video", tokens=WAN, dense=WAN_CROSS),
    ModelRow(model="AnyFlowTransformer3DModel", kind="video", tokens=Tokens(visual=latents("BFCHW")), dense=WAN_CROSS),
    ModelRow(
        model="SkyReelsV2Transformer3DModel",
        kind="video",
        tokens=WAN,
        dense=WAN_CROSS,
        partly="diffusion forcing over blocks of frames has a block-causal mask, which stays stock",
    ),
    ModelRow(
        model="HunyuanVideoTransformer3DModel",
        kind="video",
        tokens=Tokens(visual=latents(), order=("visual", "text")),
        dense=r"context_embedder\..*",
    ),
    ModelRow(
        model="HunyuanVideoFramepackTransformer3DModel",
        kind="video",
        tokens=Tokens(visual=latents(), order=("history", "visual", "text"), lengths=framepack_history),
        dense=r"context_embedder\..*",
    ),
    ModelRow(
        model="HunyuanVideo15Transformer3DModel",
        kind="video",
        tokens=Tokens(visual=latents(), order=("visual", "text")),
        dense=r"context_embedder\..*",
        mask="shared",
    ),
    ModelRow(
        model="CogVideoXTransformer3DModel",
        kind="video",
        tokens=Tokens(visual=latents("BFCHW"), order=("text", "visual")),
    ),
    ModelRow(
        model="ConsisIDTransformer3DModel",
        kind="video",
        tokens=Tokens(visual=latents("BFCHW"), order=("text", "visual")),
    ),
    ModelRow(model="LTXVideoTransformer3DModel", kind="video", tokens=Tokens(visual=sizes()), dense=WAN_CROSS),
    ModelRow(
        model="LTX2VideoTransformer3DModel",
        kind="video",
        tokens=Tokens(visual=sizes()),
        dense=r".*\.(attn2|audio_.*|.*_to_.*)",
        partly="the sound's own self-attention stays dense",
    ),
    ModelRow(
        model="MochiTransformer3DModel",
        kind="video",
        tokens=Tokens(visual=latents(), order=("visual", "text")),
    ),
    ModelRow(model="AllegroTransformer3DModel", kind="video", tokens=Tokens(visual=latents()), dense=WAN_CROSS),
    ModelRow(
        model="CosmosTransformer3DModel",
        kind="video",
        tokens=Tokens(visual=latents()),
        dense=WAN_CROSS,
        noise="fraction",
    ),
    ModelRow(
        model="EasyAnimateTransformer3DModel",
        kind="video",
        tokens=Tokens(visual=latents(), order=("text", "visual")),
    ),
    ModelRow(
        model="Kandinsky5Transformer3DModel",
        kind="video",
        tokens=Tokens(
            visual=only_if(given("sparse_params", "Kandinsky's own sparse attention is on"), latents("BFHWC"))
        ),
        dense=r"text_transformer_blocks\..*|.*\.cross_attention",
        partly="versions with NABLA keep their own sparse attention",
    ),
    ModelRow(
        model="Kandinsky6Transformer3DModel",
        kind="video",
        tokens=Tokens(visual=latents("BFHWC")),
        dense=r"(?!.*video_dec_block\.self_attention$).*",
        partly="the sound's own self-attention stays dense",
    ),
    ModelRow(
        model="LatteTransformer3DModel",
        kind="video",
        tokens=Tokens(visual=spatial(latents())),
        elsewhere={r"temporal_transformer_blocks\..*": Tokens(visual=temporal(latents()))},
        dense=r".*\.attn2",
        partly="factorised: pictures and places are sequences of their own, each within a plan",
    ),
    ModelRow(
        model="HeliosTransformer3DModel",
        kind="video",
        tokens=Tokens(visual=latents(), order=("history", "visual")),
        dense=WAN_CROSS,
    ),
    ModelRow(
        model="MotifVideoTransformer3DModel",
        kind="video",
        tokens=Tokens(visual=latents(), order=("visual", "text")),
        dense=r"context_embedder\..*",
    ),
)
