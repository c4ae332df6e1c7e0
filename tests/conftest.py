"""A tiny random-weight WanPipeline, built once, saved as a folder, and loaded through the project's own `load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ziggurat.attention.order import TokenOrder
from ziggurat.attention.plan import HeadGroup, HeadPlan, Plan
from ziggurat.attention.rest import Rest
from ziggurat.attention.schedule import Schedule
from ziggurat.attention.stripe import Box, Stripe
from ziggurat.attention.window import Window
from ziggurat.pipelines import load

LAYERS, HEADS, HEAD_DIM = 2, 2, 16
SIZE = {"height": 32, "width": 48, "num_frames": 9}
GRID = (5, 4, 6)


def build_tiny_wan(folder: Path, *, experts: bool = False) -> Path:
    """Write a WanPipeline of a few thousand parameters: `GRID` latent patches for a video of `SIZE`."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", "a", "large", "red", "circle", "moving", "left", "blue"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformer = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": LAYERS,
        "rope_max_seq_len": 64,
    }
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    pipe = WanPipeline(
        tokenizer=fast,
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ).eval(),
        transformer=WanTransformer3DModel(**transformer).eval(),
        transformer_2=WanTransformer3DModel(**transformer).eval() if experts else None,
        boundary_ratio=0.8 if experts else None,
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            scale_factor_temporal=2,
            scale_factor_spatial=4,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(autouse=True)
def few_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_wan(tmp_path_factory.mktemp("wan") / "tiny-wan")


@pytest.fixture(scope="session")
def experts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_wan(tmp_path_factory.mktemp("wan") / "tiny-wan-two-experts", experts=True)


def _tiny_wan(folder: Path):
    pipe = load(str(folder), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def wan(wan_folder: Path):
    return _tiny_wan(wan_folder)


def _latents_of(pipe, *, seed: int = 0, steps: int = 3, guidance: float = 5.0, **kwargs) -> torch.Tensor:
    """The final latents of a run: comparing them skips the VAE, which no plan touches."""
    arguments = {
        "prompt": "a large red circle moving left",
        "negative_prompt": "blue",
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "max_sequence_length": 16,
        **SIZE,
        **kwargs,
    }
    return pipe(**arguments).frames


def _fields(changes: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_class": "WanTransformer3DModel",
        "layers": LAYERS,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "grid": GRID,
        **changes,
    }


def _dense_plan(**changes: Any) -> Plan:
    return Plan.dense(**_fields(changes))


def _sparse_plan(*, rest: Rest = "drop", schedule: Schedule | None = None, **changes: Any) -> Plan:
    """A window for the first head and a stripe for the others, in blocks that do not divide the 120 tokens."""
    fields = _fields(changes)
    window = HeadPlan(heads=(0,), selector=Window(frames=2, height=3), rest=rest)
    stripe = HeadPlan(heads=tuple(range(1, fields["heads"])), selector=Stripe(boxes=(Box(frames=(0, 1)),)), rest=rest)
    groups = [HeadGroup(order=TokenOrder(name="temporal"), tile=16, block=16, entries=(window, stripe))]
    return Plan.uniform(groups, schedule=schedule or Schedule(), **fields)


@pytest.fixture(scope="session")
def tiny_wan():
    return _tiny_wan


@pytest.fixture(scope="session")
def latents_of():
    return _latents_of


@pytest.fixture(scope="session")
def dense_plan():
    return _dense_plan


@pytest.fixture(scope="session")
def sparse_plan():
    return _sparse_plan
