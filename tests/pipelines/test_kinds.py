"""Whole pipelines of each kind on random weights: step, noise level, branch and grid are right at every call."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from ziggurat.app.cli import main
from ziggurat.attention.run import PlanRun
from ziggurat.pipelines import attach, load
from ziggurat.pipelines.plans import model_shape

# Type checkers see nothing of what diffusers imports late.
library: Any = diffusers

STEPS, TEXT = 3, 7
JOINT: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
Scheduler = library.FlowMatchEulerDiscreteScheduler


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def other(*shape: int) -> torch.Tensor:
    return -rand(*shape)


def text_to_video() -> tuple[Any, dict[str, Any]]:
    transformer = library.HunyuanVideoTransformer3DModel(
        **JOINT,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    parts: Any = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    return library.HunyuanVideoPipeline(transformer=transformer, scheduler=Scheduler(), **parts), {
        "prompt_embeds": rand(1, TEXT, 16),
        "pooled_prompt_embeds": rand(1, 8),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": other(1, TEXT, 16),
        "negative_pooled_prompt_embeds": other(1, 8),
        "negative_prompt_attention_mask": mask,
        "true_cfg_scale": 3.0,
        "height": 64,
        "width": 96,
        "num_frames": 9,
    }


def both_branches_in_one_batch() -> tuple[Any, dict[str, Any]]:
    transformer = library.CogVideoXTransformer3DModel(
        **JOINT,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=TEXT,
    )
    parts: Any = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    scheduler = library.CogVideoXDDIMScheduler()
    return library.CogVideoXPipeline(transformer=transformer, scheduler=scheduler, **parts), {
        "prompt_embeds": rand(1, TEXT, 16),
        "negative_prompt_embeds": other(1, TEXT, 16),
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "guidance_scale": 3.0,
    }


def text_to_image() -> tuple[Any, dict[str, Any]]:
    transformer = library.Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 32, 32),
        cap_feat_dim=16,
    )
    parts: Any = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    mask = torch.ones(1, TEXT, dtype=torch.bool)
    return library.Lumina2Pipeline(transformer=transformer, scheduler=Scheduler(), **parts), {
        "prompt_embeds": rand(1, TEXT, 16),
        "negative_prompt_embeds": other(1, TEXT, 16),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "height": 96,
        "width": 144,
        "guidance_scale": 3.0,
    }


def image_batch_of_lists() -> tuple[Any, dict[str, Any]]:
    transformer = library.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    parts: Any = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    return library.ZImagePipeline(transformer=transformer, scheduler=Scheduler(), **parts), {
        "prompt_embeds": [rand(TEXT, 16)],
        "negative_prompt_embeds": [other(40, 16)],
        "height": 96,
        "width": 144,
        "guidance_scale": 3.0,
    }


def editing() -> tuple[Any, dict[str, Any]]:
    transformer = library.FluxTransformer2DModel(
        **JOINT,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    parts: Any = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return library.FluxKontextPipeline(transformer=transformer, scheduler=Scheduler(), **parts), {
        "image": rand(1, 16, 8, 12),
        "prompt_embeds": rand(1, TEXT, 16),
        "pooled_prompt_embeds": rand(1, 8),
        "negative_prompt_embeds": other(1, TEXT, 16),
        "negative_pooled_prompt_embeds": other(1, 8),
        "true_cfg_scale": 2.0,
        "height": 96,
        "width": 144,
        "max_area": 96 * 144,
        "_auto_resize": False,
    }


KINDS: list[tuple[Callable[[], tuple[Any, dict[str, Any]]], list[str], list[str]]] = [
    (text_to_video, ["cond", "uncond"], ["3x4x6 + 7 text"] * 2),
    (both_branches_in_one_batch, ["cond_uncond"], ["7 text + 3x4x6"] * 2),
    (text_to_image, ["text 0", "text 1"], ["1x6x9", "7 text + 1x6x9"]),
    (image_batch_of_lists, ["text 0"], ["1x6x9 + 10 reference", "1x6x9 + 74 text"]),
    (editing, ["text 0", "text 1"], ["7 text + 1x6x9 + 1x4x6"] * 2),
]


Seen = tuple[int, int, float, str, str]


@pytest.fixture
def seen(monkeypatch):
    """Every call that reaches a plan: (layer, step, noise level, branch, grid), and by which transformer's run."""
    found: list[tuple[Seen, PlanRun]] = []
    original = PlanRun.attend_layer

    def spy(self, *args, layer, noise_level, step, branch, grid, **kwargs):
        found.append(((layer, step, noise_level, branch, str(grid)), self))
        told = {"layer": layer, "noise_level": noise_level, "step": step, "branch": branch, "grid": grid}
        return original(self, *args, **told, **kwargs)

    monkeypatch.setattr(PlanRun, "attend_layer", spy)
    return found


def expected_calls(timesteps: torch.Tensor, branches: list[str], grids: list[str]) -> list[tuple]:
    return [
        (layer, step, pytest.approx(float(timestep) / 1000, abs=1e-6), branch, grid)
        for step, timestep in enumerate(timesteps)
        for branch in branches
        for layer, grid in enumerate(grids)
    ]


@pytest.mark.parametrize(("kind", "branches", "grids"), KINDS, ids=lambda value: getattr(value, "__name__", ""))
def test_step_and_branch_are_right_at_every_call(kind, branches, grids, sparse_plan, seen):
    torch.manual_seed(0)
    pipe, arguments = kind()
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        output = pipe(**arguments, num_inference_steps=STEPS, output_type="latent", generator=generator)
        return output.frames if hasattr(output, "frames") else output.images

    stock = run()
    fields: dict[str, Any] = vars(model_shape(pipe.transformer)) | {"grid": (3, 4, 6)}
    with attach(pipe, sparse_plan(**fields)) as handle:
        sparse = torch.empty(0)
        for _ in range(2):
            seen.clear()
            sparse = run()
            assert [call for call, _ in seen] == expected_calls(pipe.scheduler.timesteps, branches, grids)
    assert all(record.dense_calls == 0 for record in handle.steps)
    assert torch.isfinite(sparse).all()
    assert not torch.equal(sparse, stock)
    assert torch.equal(run(), stock)


@pytest.fixture
def announced(monkeypatch):
    """The timesteps of each run, as its scheduler set them."""
    found: list[torch.Tensor] = []
    original = Scheduler.set_timesteps

    @functools.wraps(original)
    def spy(self, *args, **kwargs):
        original(self, *args, **kwargs)
        found.append(self.timesteps)

    monkeypatch.setattr(Scheduler, "set_timesteps", spy)
    return found


def image_to_video(wan_folder: Path, *, experts: bool) -> Any:
    """WanImageToVideoPipeline without an image encoder, as Wan 2.2 is: of 5B, or of 14B with two experts."""
    parts = load(wan_folder, dtype=torch.float32).components
    config = {**parts["transformer"].config, "in_channels": 10}
    torch.manual_seed(0)
    found = [library.WanTransformer3DModel.from_config(config) for _ in range(1 + experts)]
    keys = ("tokenizer", "text_encoder", "vae", "scheduler")
    return library.WanImageToVideoPipeline(
        transformer=found[0],
        transformer_2=found[1] if experts else None,
        boundary_ratio=0.8 if experts else None,
        image_encoder=None,
        image_processor=None,
        **{key: parts[key] for key in keys},
    )


def image_editing(wan_folder: Path) -> Any:
    """FluxKontextPipeline, whole: two text encoders, and a VAE for what is edited."""
    tokenizer = load(wan_folder, dtype=torch.float32).components["tokenizer"]
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 77
    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, eos_token_id=1
    )
    t5 = T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    vae = library.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=1,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    return library.FluxKontextPipeline(
        scheduler=Scheduler(),
        vae=vae.eval(),
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=short,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=tokenizer,
        transformer=editing()[0].transformer.eval(),
    )


WITH_IMAGE = {
    "image-to-video": (
        lambda folder: image_to_video(folder, experts=False),
        ["--frames", "9", "--height", "32", "--width", "48"],
        (["cond", "uncond"], ["5x4x6"] * 2),
    ),
    "image-to-video-by-two-experts": (
        lambda folder: image_to_video(folder, experts=True),
        ["--frames", "9", "--height", "32", "--width", "48"],
        (["cond", "uncond"], ["5x4x6"] * 2),
    ),
    "editing": (
        image_editing,
        [
            *("--height", "96", "--width", "144", "--negative", "blue", "--set", "true_cfg_scale=2"),
            *("--set", f"max_area={96 * 144}", "--set", "_auto_resize=false", "--set", f"max_sequence_length={TEXT}"),
        ],
        (["text 0", "text 1"], ["7 text + 1x6x9 + 1x2x3"] * 2),
    ),
}


@pytest.mark.parametrize("kind", WITH_IMAGE)
def test_what_takes_an_image_by_the_command_line(kind, wan_folder, tmp_path, sparse_plan, seen, announced, capsys):
    build, sizes, expected = WITH_IMAGE[kind]
    pipe = build(wan_folder)
    folder = tmp_path / "model"
    pipe.save_pretrained(folder, safe_serialization=True)
    plan = sparse_plan(**(vars(model_shape(pipe.transformer)) | {"grid": (5, 4, 6)})).save(tmp_path / "plan.json")
    made = []
    for colour in ("red", "blue"):
        picture = tmp_path / f"{colour}.png"
        Image.new("RGB", (48, 32), colour).save(picture)
        out = tmp_path / f"{colour}-made.png"
        paths = ["--model", str(folder), "--plan", str(plan), "--image", str(picture), "--out", str(out)]
        seen.clear()
        with pytest.raises(SystemExit) as ended:
            main(
                [
                    "generate",
                    "a large red circle",
                    *paths,
                    "--dtype",
                    "fp32",
                    "--json",
                    "--seed",
                    "1",
                    "--steps",
                    "4",
                    *sizes,
                ]
            )
        assert ended.value.code in (0, None)
        assert len(announced[-1]) == 4
        assert [call for call, _ in seen] == expected_calls(announced[-1], *expected)
        runs = list(dict.fromkeys(id(run) for _, run in seen))
        assert [id(run) for _, run in seen] == sorted((id(run) for _, run in seen), key=runs.index)
        assert len(runs) == 1 + (getattr(pipe, "transformer_2", None) is not None)
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert 0 < figures["density"] < 1
        with Image.open(out) as video:
            made.append(np.asarray(video.convert("RGB")))
    assert not np.array_equal(*made), "the picture was not felt"
