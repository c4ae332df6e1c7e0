"""What users already switch on keeps working beside a plan, whichever came first."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from peft import LoraConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from ziggurat.attention.plan import Plan
from ziggurat.pipelines import attach
from ziggurat.pipelines.plans import model_shape

# Type checkers see nothing of what diffusers imports late.
library: Any = diffusers

STEPS = 6
MAG_RATIOS = torch.full((2 * STEPS,), 0.99)


def pyramid(pipe: Any) -> Any:
    return library.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(1, 999),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def first_block(_pipe: Any) -> Any:
    return library.FirstBlockCacheConfig(threshold=10.0)


def mag(_pipe: Any) -> Any:
    return library.MagCacheConfig(
        threshold=0.5, max_skip_steps=1, retention_ratio=0.2, num_inference_steps=STEPS, mag_ratios=MAG_RATIOS
    )


def taylor(_pipe: Any) -> Any:
    return library.TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"blocks\.\d+\.attn1"],
    )


def sparse_calls(handle: Any) -> int:
    return sum(step.sparse_calls for step in handle.steps)


@pytest.mark.parametrize("cache", [pyramid, first_block, mag, taylor], ids=lambda cache: cache.__name__)
def test_caches(wan, cache, latents_of, dense_plan, sparse_plan):
    with attach(wan, sparse_plan()) as handle:
        latents_of(wan, steps=STEPS)
        every = sparse_calls(handle)
        wan.transformer.enable_cache(cache(wan))
        after = latents_of(wan, steps=STEPS)
        assert 0 < sparse_calls(handle) < every, "the cache skips calls"
        assert [step.step for step in handle.steps] == list(range(STEPS))
    wan.transformer.disable_cache()
    wan.transformer.enable_cache(cache(wan))
    alone = latents_of(wan, steps=STEPS)
    with attach(wan, sparse_plan()):
        assert torch.equal(latents_of(wan, steps=STEPS), after)
    with attach(wan, dense_plan()):
        assert torch.equal(latents_of(wan, steps=STEPS), alone)
    assert not torch.equal(after, alone)
    wan.transformer.disable_cache()


def cogvideox() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = library.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=7,
    ).eval()
    parts: Any = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipe = library.CogVideoXPipeline(transformer=transformer, scheduler=library.CogVideoXDDIMScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(2, 7, 16)
    return pipe, {"prompt_embeds": text[:1], "negative_prompt_embeds": text[1:], "height": 64, "width": 96}


def test_faster_cache_with_guidance_in_one_batch(sparse_plan):
    pipe, arguments = cogvideox()
    config = library.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 901),
        attention_weight_callback=lambda _: 0.5,
        current_timestep_callback=lambda: pipe.current_timestep,
        tensor_format="BFCHW",
    )

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        more = {"num_frames": 9, "num_inference_steps": STEPS, "output_type": "latent", "generator": generator}
        return pipe(**arguments, **more).frames

    plan = sparse_plan(**(vars(model_shape(pipe.transformer)) | {"grid": (3, 4, 6)}))
    found = []
    with attach(pipe, plan) as handle:
        run()
        every = sparse_calls(handle)
        pipe.transformer.enable_cache(config)
        found.append(run())
        assert 0 < sparse_calls(handle) < every
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(config)
    with attach(pipe, plan):
        found.append(run())
    assert torch.equal(*found)
    assert torch.isfinite(found[0]).all()


def model_offload(transformer: Any) -> None:
    accelerate.cpu_offload_with_hook(transformer, execution_device="cpu")


def sequential_offload(transformer: Any) -> None:
    accelerate.cpu_offload(transformer, execution_device=torch.device("cpu"))


def group_offload(transformer: Any) -> None:
    transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", [model_offload, sequential_offload, group_offload], ids=lambda one: one.__name__)
def test_offload(wan, offload, when, latents_of, sparse_plan):
    with attach(wan, sparse_plan()) as handle:
        expected, calls = latents_of(wan), sparse_calls(handle)
    if when == "before":
        offload(wan.transformer)
    with attach(wan, sparse_plan()) as handle:
        if when == "after":
            offload(wan.transformer)
        assert torch.equal(latents_of(wan), expected)
        assert sparse_calls(handle) == calls


def test_gradient_checkpointing(wan, sparse_plan):
    torch.manual_seed(0)
    latents, text = torch.randn(1, 4, 5, 8, 12), torch.randn(1, 4, 16)
    wan.transformer.train()

    def gradients() -> list[torch.Tensor]:
        wan.transformer.zero_grad()
        wan.transformer(latents, torch.tensor([500]), text, return_dict=False)[0].square().sum().backward()
        return [weight.grad.clone() for weight in wan.transformer.parameters() if weight.grad is not None]

    stock = gradients()
    with attach(wan, sparse_plan()):
        plain = gradients()
        wan.transformer.enable_gradient_checkpointing()
        checkpointed = gradients()
    assert len(plain) == len(stock) == len(checkpointed)
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(one, other) for one, other in zip(plain, stock, strict=True))


@pytest.mark.parametrize("fused", [False, True], ids=["loaded", "fused"])
def test_lora(wan, fused, latents_of, sparse_plan):
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)

    def add() -> None:
        torch.manual_seed(0)
        wan.transformer.add_adapter(config, "style")
        if fused:
            wan.transformer.fuse_lora()

    with attach(wan, sparse_plan()) as handle:
        before = latents_of(wan)
        add()
        after = latents_of(wan)
        assert sparse_calls(handle) == 2 * 2 * 3
    with attach(wan, sparse_plan()):
        assert torch.equal(latents_of(wan), after)
    assert not torch.equal(before, after)


def test_quantised_weights(wan, latents_of, sparse_plan):
    quantize_(wan.transformer, Int8WeightOnlyConfig())
    stock = latents_of(wan)
    with attach(wan, sparse_plan()) as handle:
        assert not torch.equal(latents_of(wan), stock)
        assert sparse_calls(handle) == 2 * 2 * 3
    with attach(wan, sparse_plan(), backend="reference"):
        reference = latents_of(wan)
    with attach(wan, sparse_plan()):
        torch.testing.assert_close(latents_of(wan), reference, rtol=0, atol=1e-4)
    assert torch.equal(latents_of(wan), stock)


def joint_transformer(kind: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    if kind == "cogvideox":
        pipe, arguments = cogvideox()
        return pipe.transformer, {
            "hidden_states": torch.randn(1, 3, 4, 8, 12),
            "encoder_hidden_states": arguments["prompt_embeds"],
            "timestep": torch.tensor([500]),
        }
    if kind == "hunyuan":
        transformer = library.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(4, 6, 6),
        )
        return transformer.eval(), {
            "hidden_states": torch.randn(1, 4, 3, 8, 12),
            "encoder_hidden_states": torch.randn(1, 7, 16),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
            "pooled_projections": torch.randn(1, 8),
            "guidance": torch.tensor([6000.0]),
            "timestep": torch.tensor([500]),
        }
    transformer = library.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    places = torch.cartesian_prod(torch.arange(1), torch.arange(6), torch.arange(9)).float()
    return transformer.eval(), {
        "hidden_states": torch.randn(1, 54, 4),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": places,
        "txt_ids": torch.zeros(7, 3),
    }


def graphs_of(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    out = call()
    return out, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "regional"), [("cogvideox", False), ("hunyuan", True), ("flux", True), ("flux", False)], ids=str
)
def test_compiled_in_as_many_graphs_as_stock(kind, regional, bare_pipe, sparse_plan):
    transformer, arguments = joint_transformer(kind)
    plan: Plan = sparse_plan(**(vars(model_shape(transformer)) | {"grid": (3, 4, 6)}))

    def compiled() -> torch.Tensor:
        with torch.no_grad():
            if regional:
                transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
                return transformer(**arguments, return_dict=False)[0]
            whole: Any = torch.compile(transformer, backend="aot_eager", fullgraph=True)
            return whole(**arguments, return_dict=False)[0]

    _, expected = graphs_of(compiled)
    for module in transformer.modules():
        module._compiled_call_impl = None
    with attach(bare_pipe(transformer), plan) as handle, torch.no_grad():
        eager = transformer(**arguments, return_dict=False)[0]
        out, graphs = graphs_of(compiled)
        assert handle.steps[-1].sparse_calls == 2 * len(model_shape_layers(transformer))
    torch.testing.assert_close(out, eager, rtol=0, atol=1e-5)
    assert graphs == expected
    torch._dynamo.reset()


def model_shape_layers(transformer: Any) -> range:
    return range(model_shape(transformer).layers)


@pytest.mark.slow
def test_a_dense_plan_costs_little_a_call(tmp_path):
    """The committed benchmark's own figure, at the 30 layers of Wan 2.1 1.3B: at most 50 us a call."""
    script, out = Path(__file__).parents[2] / "benchmarks/attach_overhead.py", tmp_path / "overhead.json"
    command = [sys.executable, "-P", str(script), "--pairs", "100", "--layers", "30", "--out", str(out)]
    subprocess.run(command, check=True, timeout=600)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["layers"] == 30
    assert row["microseconds_added_a_call"] <= 50


def test_a_controlnet_beside_the_transformer_stays_stock(bare_pipe, forward, sparse_plan):
    transformer, arguments = joint_transformer("flux")
    controlnet = library.FluxControlNetModel.from_transformer(
        transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )
    torch.nn.init.normal_(controlnet.eval().controlnet_x_embedder.weight)
    for block in controlnet.controlnet_blocks:
        torch.nn.init.normal_(block.weight)
    picture = torch.randn(1, 54, 4)

    def control() -> list[torch.Tensor]:
        with torch.no_grad():
            return controlnet(**arguments, controlnet_cond=picture, return_dict=False)[0]

    stock = control()
    plan = sparse_plan(**(vars(model_shape(transformer)) | {"grid": (1, 6, 9)}))
    with attach(bare_pipe(transformer), plan) as handle:
        under = control()
        alone = forward(transformer, arguments)
        controlled = forward(transformer, {**arguments, "controlnet_block_samples": under})
        assert handle.steps[-1].sparse_calls == 2 * len(model_shape_layers(transformer))
    assert all(torch.equal(one, other) for one, other in zip(under, stock, strict=True))
    assert not torch.equal(alone, controlled)
