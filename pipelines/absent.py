"""The transformers of diffusers that no plan reaches, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from .row import Absent

Kind = Literal["video", "image", "audio", "other"]

LINEAR = "its self-attention is linear"
SOUND = "sound: a sequence without a grid"
KEYS_ALONE = "text stands among the keys alone: queries and keys are not one sequence"
CONTROL = "a ControlNet: it runs as it is beside its transformer, which runs the plan"

NOT_REACHED: Mapping[Kind, Mapping[str, str]] = {
    "video": {
        "AnyFlowFARTransformer3DModel": "FlexAttention with a block mask of its own over chunks of frames",
        "Cosmos3OmniTransformer": "text, video, sound and actions are packed into one ragged sequence",
        "CosmosControlNetModel": CONTROL,
        "Kandinsky6SRTransformer3DModel": "its own sparse FlexAttention (NABLA) over 8x8 tiles",
        "LTX2VideoDiffusionDecoderModel": "decodes latents by neighbourhoods, in FlexAttention with a block mask",
        "MiniMaxH3Transformer3DModel": "text, video and sound are packed into one sequence by indices",
        "SanaVideoTransformer3DModel": LINEAR,
        "SanaWMLTX2RefinerTransformer3DModel": (
            "its rotary embedding, not its arguments, tells the grid, and a cache holds the keys of earlier chunks"
        ),
        "SanaWMTransformer3DModel": "linear but for every fourth layer, which calls SDPA from modules of its own",
        "TransformerTemporalModel": "a part of U-Nets, without a forward of its own timesteps",
        "WanAnimate2Transformer3DModel": (
            "queries read a cache of the reference's keys: queries and keys are not one sequence"
        ),
    },
    "image": {
        "DreamLiteTransformer2DModel": "a part of a U-Net",
        "FluxControlNetModel": CONTROL,
        "HunyuanDiT2DControlNetModel": CONTROL,
        "Ideogram4Transformer2DModel": (
            "text and image rows are packed into one tensor, with a mask between the samples in it"
        ),
        "JoyImageEditPlusTransformer3DModel": "images of different sizes are packed over the batch",
        "NucleusMoEImageTransformer2DModel": KEYS_ALONE,
        "OmniGenTransformer2DModel": "its mask is causal over the text, not a key mask",
        "PRXTransformer2DModel": KEYS_ALONE,
        "QwenImage21Transformer2DModel": "its condition is causal, by FlexAttention, and cached",
        "QwenImageControlNetModel": CONTROL,
        "SD3ControlNetModel": CONTROL,
        "SanaControlNetModel": LINEAR,
        "SanaTransformer2DModel": LINEAR,
        "Transformer2DModel": "a part of U-Nets",
        "UVit2DModel": "fills in masked tokens: no noise level for a schedule to speak of",
        "UniDiffuserModel": "image and text are both denoised, each with a timestep of its own",
        "ZImageControlNetModel": CONTROL,
    },
    "audio": {
        "AceStepTransformer1DModel": SOUND,
        "LongCatAudioDiTTransformer": SOUND,
        "MiniMaxMusic3RVQDepthDecoder": SOUND,
        "MiniMaxMusic3Transformer1DModel": SOUND,
        "StableAudio3DiTModel": SOUND,
        "StableAudioDiTModel": SOUND,
        "T5FilmDecoder": SOUND,
    },
    "other": {
        "PriorTransformer": "embeddings of one picture: a handful of tokens without a grid",
        "RFD4ProteinaTransformer": "proteins: no grid of latents",
    },
}

ABSENT: Mapping[str, Absent] = {
    model: Absent(
        model=model, kind=kind, status="no softmax self-attention" if why == LINEAR else "not reached", why=why
    )
    for kind, found in NOT_REACHED.items()
    for model, why in found.items()
}
