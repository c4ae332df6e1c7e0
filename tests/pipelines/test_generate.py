"""generate: figures, repeatability, defaults, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from ziggurat.pipelines import attach
from ziggurat.pipelines.fidelity import psnr
from ziggurat.pipelines.generate import generate, stock_attention
from ziggurat.pipelines.record import figures, record_of
from ziggurat.pipelines.request import Request
from ziggurat.pipelines.settings import model_settings
from ziggurat.pipelines.sizes import check_memory, in_bytes, memory_needed, size_rule

PROMPT = "a large red circle moving left"
SMALL: dict[str, Any] = {"frames": 9, "height": 32, "width": 48, "steps": 2, "seed": 7}


@pytest.fixture
def untouched(wan, monkeypatch):
    """The pipeline, failing the test if any denoising happens."""

    def forbidden(*_args, **_kwargs):
        raise AssertionError("work was done before the checks")

    monkeypatch.setattr(wan.transformer, "forward", forbidden)
    monkeypatch.setattr(wan.text_encoder, "forward", forbidden)
    return wan


def stock(pipe, seed: int = 7) -> np.ndarray:
    frames = pipe(
        PROMPT,
        num_frames=9,
        height=32,
        width=48,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]
    return (frames * 255).round().astype(np.uint8)


def test_without_a_plan_it_is_the_stock_pipeline(wan):
    before = dict(wan._progress_bar_config)
    made = generate(wan, PROMPT, plan="none", **SMALL)
    assert np.array_equal(made.frames, stock(wan))
    assert (made.density, made.list_density, made.plan, made.plan_name) == (1.0, 1.0, None, "none")
    assert (made.tokens, made.dtype, made.device) == (120, "float32", "cpu")
    assert made.request.guidance == 5.0, "the pipeline's own default"
    assert wan._progress_bar_config == before
    assert not any(module._forward_pre_hooks for module in wan.transformer.modules())


def test_under_a_plan_beside_dense(wan, sparse_plan):
    seen = []
    plan = sparse_plan(rest="pooled", name="small")
    made = generate(wan, PROMPT, plan=plan, compare=True, progress=lambda *told: seen.append(told), **SMALL)
    assert seen == [("denoise", 1, 2), ("denoise", 2, 2), ("dense", 0, 2), ("dense", 1, 2), ("dense", 2, 2)]
    assert 0 < made.density < 1
    assert made.list_density == pytest.approx(made.density)
    assert 0 < (made.attention_share or 0) < 1
    assert made.dense_frames is not None
    assert np.array_equal(made.dense_frames, stock(wan))
    assert not np.array_equal(made.frames, made.dense_frames)
    assert made.psnr == psnr(made.dense_frames, made.frames)
    found = figures(made)
    assert 10 < found["psnr"] < 100
    assert 0 < found["ssim"] < 1
    assert found["dense_seconds"] > 0


def test_again_from_its_record(wan, sparse_plan, tmp_path):
    path = sparse_plan().save(tmp_path / "plan.json")
    made = generate(
        wan, PROMPT, plan=path, **{**SMALL, "seed": None}, negative="blue", arguments={"max_sequence_length": 64}
    )
    record = json.loads(json.dumps(record_of(made), allow_nan=False))
    assert record["plan"] == {**record["plan"], "name": "plan", "path": str(path)}
    assert len(record["plan"]["sha256"]) == 64
    assert record["versions"].keys() == {"python", "ziggurat", "torch", "diffusers", "transformers"}
    again = generate(
        record["model"], record["prompt"], plan=record["plan"]["path"], dtype=record["dtype"], **record["settings"]
    )
    assert np.array_equal(again.frames, made.frames)
    other = generate(wan, PROMPT, plan=path, **{**record["settings"], "seed": record["seed"] + 1})
    assert not np.array_equal(other.frames, made.frames)


def test_one_frame(wan):
    assert generate(wan, PROMPT, plan="none", **{**SMALL, "frames": 1, "steps": 1}).frames.shape == (1, 32, 48, 3)


def test_defaults_and_grammar_come_from_the_models_folder(wan_folder, tiny_wan, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(wan_folder, folder)
    said = {"frames": 5, "height": 16, "width": 32, "steps": 1, "guidance": 1.0, "captions": "shapes"}
    (folder / "ziggurat.json").write_text(json.dumps(said))
    pipe, warned = tiny_wan(folder), []
    made = generate(pipe, "a large pink circle moving left", warn=warned.append, height=32)
    assert made.frames.shape == (5, 32, 32, 3)
    assert (made.request.steps, made.request.guidance) == (1, 1.0)
    unplanned, unknown = warned
    assert "no plan is shipped for this WanTransformer3DModel of 2 layers" in unplanned
    assert "never seen the word 'pink'; it knows a SIZE COLOUR SHAPE" in unknown
    for text, words in (("{", "not valid JSON"), ('{"frames": 0}', "frames"), ('{"fames": 1}', "fames")):
        (folder / "ziggurat.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            model_settings(pipe)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"frames": 8}, "multiple of 2 plus 1 for this model, got 8: the nearest that work are 7 and 9"),
        ({"frames": 2}, "the nearest that work are 1 and 3"),
        ({"height": 40}, "height must be a multiple of 16 .* got 40: the nearest that work are 32 and 48"),
        ({"width": 7}, "width must be a multiple of 16 .* nearest that work are 16$"),
        ({"frames": 1_000_000}, r"1000000 frames of 48x32 need about .*B of memory and .*B are free: about \d+ frames"),
        ({"frames": 1, "height": 16_000_000, "width": 1600}, "take a smaller height and width"),
        (
            {"height": 1024},
            "height makes 128 latent patches, but this model knows positions up to 64: take at most 512",
        ),
        ({"frames": 201}, "frames makes 101 latent patches, .* up to 64: take at most 127"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
        ({"seed": -1}, "seed must lie in"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": "red " * 600}, "prompt has 601 tokens, but the model reads 512"),
        ({"negative": "red " * 600}, "negative has 601 tokens"),
        ({"prompt": "red " * 99, "arguments": {"max_sequence_length": 64}}, "has 100 tokens, but the model reads 64"),
        ({"arguments": {"strenght": 1}}, "WanPipeline has no argument 'strenght'; it takes guidance_scale_2, "),
        ({"arguments": {"num_frames": 1}}, "num_frames can't be set twice: give it as frames"),
        ({"arguments": {"generator": 1}}, "Ziggurat gives it"),
        ({"image": "absent.png"}, "image absent.png does not exist"),
        ({"image": np.zeros((8, 8, 3))}, "WanPipeline takes no image"),
        ({"plan": "absent.json"}, "plan absent.json does not exist"),
        ({"compare": True, "plan": "none"}, "compare needs a plan"),
        ({"dtype": "fp32"}, "dtype and device are for a model that is still to be loaded"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused_before_any_work(untouched, changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        generate(untouched, **{"prompt": PROMPT, "plan": "none", **SMALL, **changes})
    assert "\n" not in str(caught.value)


def test_plan_for_another_head_count(untouched, sparse_plan):
    with pytest.raises(ValueError, match="its heads is 3, the model's is 2"):
        generate(untouched, PROMPT, plan=sparse_plan(heads=3), **SMALL)


@pytest.mark.parametrize("planned", [True, False], ids=["plan", "stock"])
def test_nan_stops_the_run_naming_layer_and_step(wan, sparse_plan, planned):
    plan = sparse_plan() if planned else None
    with torch.no_grad():
        wan.transformer.blocks[0].ffn.net[2].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"layer 1 \(blocks\.1\.attn1\) was given NaN or infinity at step 0"):
        generate(wan, PROMPT, plan=plan, **SMALL)
    with torch.no_grad():
        wan.transformer.blocks[0].ffn.net[2].bias.zero_()
        wan.transformer.proj_out.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="behind the last layer at step 0"):
        generate(wan, PROMPT, plan=plan, **SMALL)
    assert not any(module._forward_pre_hooks for module in wan.transformer.modules())


def test_stock_attention_puts_the_chosen_backend_back(wan):
    chosen = AttentionBackendName._NATIVE_MATH
    active = _AttentionBackendRegistry._active_backend
    try:
        wan.transformer.set_attention_backend(chosen.value)
        processor = wan.transformer.blocks[0].attn1.processor
        with stock_attention(wan):
            assert processor._attention_backend is None
            assert _AttentionBackendRegistry._active_backend == AttentionBackendName.NATIVE
        assert processor._attention_backend == chosen
        assert _AttentionBackendRegistry._active_backend == chosen
    finally:
        _AttentionBackendRegistry._active_backend = active


def test_memory_is_estimated_from_sizes(wan, monkeypatch):
    rule = size_rule(wan)
    assert rule.patch == (2, 8, 8)
    assert [rule.grid(frames, 32, 48) for frames in (1, 9, 33)] == [(1, 4, 6), (5, 4, 6), (17, 4, 6)]
    small, middle, large = (memory_needed(wan, rule, frames, 32, 48, compare=False) for frames in (9, 81, 153))
    assert large - middle == middle - small > 8 * 3 * 32 * 48 * 9, "each frame costs at least its pixels"
    assert memory_needed(wan, rule, 9, 32, 48, compare=True) > small
    monkeypatch.setattr("ziggurat.pipelines.sizes.memory_free", lambda device: small)
    check_memory(wan, rule, 9, 32, 48)
    with pytest.raises(ValueError, match="are free: about"):
        check_memory(wan, rule, 11, 32, 48)
    assert [in_bytes(number) for number in (1, 12_345, 2.1e10)] == ["1 B", "12.3 kB", "21 GB"]


def test_a_request_checks_itself():
    request = Request(prompt="a", frames=1)
    with pytest.raises(ValueError, match="width must be at least 1"):
        replace(request, width=-16)


def test_a_handle_runs_its_plan_and_stays_attached(wan, sparse_plan):
    plan = sparse_plan()
    alone = generate(wan, PROMPT, plan=plan, **SMALL)
    with attach(wan, plan) as handle:
        for _ in range(2):
            made = generate(wan, PROMPT, plan=handle, **SMALL)
            assert np.array_equal(made.frames, alone.frames)
            assert (made.plan, made.density) == (plan, alone.density)
        assert handle.attached
        with pytest.raises(ValueError, match="compare can't run stock attention beside a handle"):
            generate(wan, PROMPT, plan=handle, compare=True, **SMALL)
        with pytest.raises(ValueError, match="a handle of another pipeline"):
            generate(copy(wan), PROMPT, plan=handle, **SMALL)
    with pytest.raises(ValueError, match="a handle that was detached"):
        generate(wan, PROMPT, plan=handle, **SMALL)
