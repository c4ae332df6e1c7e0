"""A plan runs on the transformers and at the sizes that it was not made for as it says that it does."""

from __future__ import annotations

import pytest
import torch

from ziggurat.pipelines import attach
from ziggurat.pipelines.plans import all_block_plan, fitting, model_shape


def test_another_size_is_told_before_and_after_the_run(wan, latents_of, sparse_plan):
    plan = sparse_plan(predicted={"list_density": 0.5})
    with attach(wan, plan) as handle:
        latents_of(wan)
        assert "extrapolates" not in handle.summary()
        latents_of(wan, height=48)
        told = next(line for line in handle.summary().splitlines() if line.startswith("extrapolates"))
        assert "made for 5x4x6 latent patches, runs at 5x6x6, 1.5 times the tokens" in told
        assert f"list density {handle.list_density:.1%}, 50.0% where it was made" in told
        latents_of(wan)
        assert "extrapolates" not in handle.summary()
    with attach(wan, plan, grid=(5, 6, 6)) as handle:
        before = next(line for line in handle.summary().splitlines() if line.startswith("extrapolates"))
        latents_of(wan, height=48)
        assert f"list density {handle.list_density:.1%} is to be expected" in before
        assert f"list density {handle.list_density:.1%}," in handle.summary()


def test_a_plan_for_one_expert_leaves_the_other_alone(experts_folder, tiny_wan, latents_of, sparse_plan):
    pipe = tiny_wan(experts_folder)
    stock = latents_of(pipe)
    plan = sparse_plan(expert="transformer_2")
    assert fitting(plan, pipe) == ["transformer_2"]
    with attach(pipe, plan) as handle:
        sparse = latents_of(pipe)
        assert 0 < len(handle.steps) < 3
        assert all(step.sparse_calls for step in handle.steps)
        assert "transformer: stock attention, the plan is for transformer_2 alone" in handle.summary()
        with pytest.raises(ValueError, match="already has a plan on its transformer_2"):
            attach(pipe, plan)
        # The other one may have its own, and what runs is both.
        with attach(pipe, sparse_plan(expert="transformer")) as other:
            both = latents_of(pipe)
            assert len(other.steps) + len(handle.steps) == 3
    assert torch.equal(latents_of(pipe), stock)
    with attach(pipe, sparse_plan()):
        assert torch.equal(latents_of(pipe), both)
    assert not torch.equal(sparse, both)
    assert not torch.equal(sparse, stock)


def test_a_plan_for_an_expert_that_is_not_there_is_refused(wan, sparse_plan):
    with pytest.raises(ValueError, match="its expert is 'transformer_2', the model has transformer;"):
        attach(wan, sparse_plan(expert="transformer_2"))
    assert "set_timesteps" not in wan.scheduler.__dict__


def test_the_plan_of_all_blocks_is_dense_attention(wan, latents_of):
    with attach(wan, all_block_plan(model_shape(wan.transformer))) as handle:
        latents = latents_of(wan)
        assert handle.density == 1.0
        assert handle.steps[0].sparse_calls > 0
    torch.testing.assert_close(latents, latents_of(wan), rtol=0, atol=1e-4)
