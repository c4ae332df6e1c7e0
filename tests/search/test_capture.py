"""Captured queries, keys and values are those of the run; the pipeline is left as it was."""

from __future__ import annotations

import pytest
import torch

from ziggurat.pipelines import attach
from ziggurat.search.capture import capture

SIZE = {"height": 32, "width": 48, "num_frames": 9}
CALL = {**SIZE, "num_inference_steps": 3, "max_sequence_length": 16}


def test_keeps_the_calls_asked_for(wan, monkeypatch):
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, *args, **kwargs):
        out = original(query, key, value, *args, **kwargs)
        if query.shape[2] == key.shape[2] == 120:
            seen.append((query.clone(), key.clone(), value.clone()))
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    prompts = ["a large red circle", "a blue"]
    samples = capture(wan, prompts, layers=[1], steps=[0, 2], guidance_scale=5.0, **CALL)
    for owner, name in (
        (wan.transformer, "cache_context"),
        (wan.scheduler, "set_timesteps"),
        (wan, "maybe_free_model_hooks"),
    ):
        assert name not in owner.__dict__
    assert not any(module._forward_pre_hooks for module in wan.transformer.modules())
    places = [(s.prompt, s.step, s.branch, s.layer) for s in samples]
    assert places == [(p, step, branch, 1) for p in prompts for step in (0, 2) for branch in ("cond", "uncond")]
    assert all(str(s.grid) == "5x4x6" and s.source == "captured" for s in samples)
    # Two layers, two branches, three steps, two prompts, in the order they ran.
    calls = [2 * (2 * step + branch) + 12 * prompt + 1 for prompt in (0, 1) for step in (0, 2) for branch in (0, 1)]
    for sample, place in zip(samples, calls, strict=True):
        for kept, given in zip((sample.query, sample.key, sample.value), seen[place], strict=True):
            assert torch.equal(kept, given)


def test_refused(wan, dense_plan):
    with pytest.raises(ValueError, match=r"layers must lie in 0 ... 1, got \[7\]"):
        capture(wan, ["a"], layers=[0, 7], steps=[0], **CALL)
    with pytest.raises(ValueError, match="nothing was captured"):
        capture(wan, ["a"], layers=[0], steps=[99], guidance_scale=1.0, **CALL)
    with attach(wan, dense_plan()), pytest.raises(ValueError, match="pipe already has a plan"):
        capture(wan, ["a"], layers=[0], steps=[0], **CALL)
    assert "set_timesteps" not in wan.scheduler.__dict__
