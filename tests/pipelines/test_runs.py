"""Step, noise level and branch at every call; the host's own attention backend; NaN."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from ziggurat.attention.run import PlanRun
from ziggurat.attention.schedule import Schedule
from ziggurat.pipelines import attach
from ziggurat.pipelines.calls import Call
from ziggurat.pipelines.masks import key_log_weight

LAYERS, HEADS = 2, 2


@pytest.fixture
def calls(monkeypatch):
    """Every call that reaches a plan: (layer, step, noise level, branch, grid)."""
    seen: list[tuple] = []
    original = PlanRun.attend_layer

    def spy(self, *args, layer, noise_level, step, branch, grid, **kwargs):
        seen.append((layer, step, noise_level, branch, str(grid)))
        return original(
            self, *args, layer=layer, noise_level=noise_level, step=step, branch=branch, grid=grid, **kwargs
        )

    monkeypatch.setattr(PlanRun, "attend_layer", spy)
    return seen


def expected_calls(pipe, steps: int, branches: tuple[str, ...]) -> list[tuple]:
    return [
        (layer, step, pytest.approx(float(pipe.scheduler.timesteps[step]) / 1000), branch, "5x4x6")
        for step in range(steps)
        for branch in branches
        for layer in range(LAYERS)
    ]


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_four_runs_in_a_row_each_start_at_step_0(wan, calls, guidance, latents_of, sparse_plan):
    branches = ("cond", "uncond") if guidance > 1 else ("cond",)
    with attach(wan, sparse_plan()) as handle:
        for steps in (3, 1, 1, 4):
            calls.clear()
            latents_of(wan, steps=steps, guidance=guidance)
            assert calls == expected_calls(wan, steps, branches)
            assert [record.step for record in handle.steps] == list(range(steps))
            assert all(record.branches == list(branches) for record in handle.steps)


def test_begins_once_per_run(wan, monkeypatch, latents_of, sparse_plan):
    begun = []
    original = PlanRun.begin
    monkeypatch.setattr(PlanRun, "begin", lambda self, *a, **k: (begun.append(1), original(self, *a, **k))[1])
    with attach(wan, sparse_plan()):
        begun.clear()
        for _ in range(3):
            latents_of(wan, steps=2)
    assert len(begun) == 3


def test_run_after_a_cancelled_one(wan, calls, latents_of, sparse_plan):
    with attach(wan, sparse_plan()):
        whole = latents_of(wan)
        with pytest.raises(KeyboardInterrupt):
            latents_of(wan, callback_on_step_end=interrupt_at_1)
        calls.clear()
        assert torch.equal(latents_of(wan), whole)
        assert calls == expected_calls(wan, 3, ("cond", "uncond"))


def interrupt_at_1(_pipe, step, _timestep, values):
    if step == 1:
        raise KeyboardInterrupt
    return values


@pytest.mark.parametrize("swap", ["before", "between"])
def test_scheduler_swapped(wan, calls, swap, latents_of, sparse_plan):
    handle = attach(wan, sparse_plan())
    if swap == "between":
        latents_of(wan)
    first = wan.scheduler
    wan.scheduler = UniPCMultistepScheduler.from_config(wan.scheduler.config, use_flow_sigmas=True)
    for _ in range(2):
        calls.clear()
        latents_of(wan)
        assert calls == expected_calls(wan, 3, ("cond", "uncond"))
    handle.detach()
    assert "set_timesteps" not in first.__dict__
    assert "set_timesteps" not in wan.scheduler.__dict__


def test_set_timesteps_called_by_hand(wan, calls, latents_of, sparse_plan):
    with attach(wan, sparse_plan()) as handle:
        latents_of(wan)
        wan.scheduler.set_timesteps(9)
        assert len(handle.steps) == 3, "the figures of a run stay until the next one begins"
        calls.clear()
        latents_of(wan)
        assert calls == expected_calls(wan, 3, ("cond", "uncond"))


def forward(pipe, timestep: float | torch.Tensor, text: torch.Tensor, **kwargs):
    latents = torch.zeros(1, 4, 5, 8, 12)
    with torch.no_grad():
        return pipe.transformer(latents, torch.as_tensor(timestep).reshape(1), text, **kwargs)


def test_without_cache_context_the_timestep_and_the_text_tell(wan, calls, sparse_plan):
    first, second = torch.ones(1, 4, 16), torch.zeros(1, 4, 16)
    with attach(wan, sparse_plan()):
        for _ in range(2):
            calls.clear()
            wan.scheduler.set_timesteps(3)
            for timestep in wan.scheduler.timesteps:
                forward(wan, timestep, first)
                forward(wan, timestep, second)
            assert calls == expected_calls(wan, 3, ("text 0", "text 1"))


def test_second_order_scheduler_repeats_timesteps(wan, calls, sparse_plan):
    wan.scheduler = FlowMatchHeunDiscreteScheduler()
    text = torch.ones(1, 4, 16)
    with attach(wan, sparse_plan()):
        wan.scheduler.set_timesteps(3)
        for timestep in wan.scheduler.timesteps:
            forward(wan, timestep, text)
    steps = [call[1] for call in calls[::LAYERS]]
    assert len(steps) == 5
    assert steps == sorted(steps)
    assert steps[0] == 0


def test_without_a_scheduler_a_rise_in_noise_begins_a_run(wan, calls, sparse_plan):
    text = torch.ones(1, 4, 16)
    with attach(wan, sparse_plan()) as handle:
        for _ in range(2):
            for timestep in (900.0, 500.0, 100.0):
                forward(wan, timestep, text)
        assert [record.step for record in handle.steps] == [0, 1, 2]
    assert [call[1] for call in calls[::LAYERS]] == [0, 1, 2, 0, 1, 2]


def test_timestep_per_token_is_read_at_its_largest(wan, calls, sparse_plan):
    timesteps = torch.full((1, 120), 750.0)
    timesteps[:, :24] = 0
    with attach(wan, sparse_plan()), torch.no_grad():
        wan.transformer(torch.zeros(1, 4, 5, 8, 12), timesteps, torch.ones(1, 4, 16))
    assert {call[2] for call in calls} == {0.75}


def test_two_experts_share_one_clock(experts_folder, calls, latents_of, tiny_wan, sparse_plan):
    pipe = tiny_wan(experts_folder)
    with attach(pipe, sparse_plan()) as handle:
        for _ in range(2):
            calls.clear()
            latents_of(pipe, steps=4)
            assert calls == expected_calls(pipe, 4, ("cond", "uncond"))
            assert [record.step for record in handle.steps] == [0, 1, 2, 3]
            assert handle.summary().count("transformer_2 layer") == LAYERS
    assert handle.density is not None


@pytest.fixture
def xformers_stub(monkeypatch):
    """The registry's xformers entry counts its calls and answers with SDPA."""
    queries: list[tuple[int, int]] = []

    def stub(query, key, value, attn_mask=None, scale=None, **_):
        queries.append((query.shape[1], key.shape[1]))
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale).transpose(
            1, 2
        )

    name = AttentionBackendName.XFORMERS
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, stub)
    monkeypatch.setitem(
        _AttentionBackendRegistry._supported_arg_names, name, {"query", "key", "value", "attn_mask", "scale"}
    )
    monkeypatch.setitem(_AttentionBackendRegistry._constraints, name, [])
    monkeypatch.setattr(
        "diffusers.models.attention_dispatch._check_attention_backend_requirements", lambda backend: None
    )
    active = _AttentionBackendRegistry._active_backend
    yield queries
    _AttentionBackendRegistry._active_backend = active


@pytest.mark.parametrize("when", ["before", "after"])
def test_dense_layers_and_cross_attention_keep_the_chosen_backend(wan, xformers_stub, when, latents_of, dense_plan):
    if when == "before":
        wan.transformer.set_attention_backend("xformers")
    with attach(wan, dense_plan()) as handle:
        if when == "after":
            wan.transformer.set_attention_backend("xformers")
        latents_of(wan, steps=2, guidance=1.0)
    assert xformers_stub == [(120, 120), (120, 16)] * LAYERS * 2
    assert handle.density == 1.0


@pytest.mark.parametrize("when", ["before", "after"])
def test_backend_swap_does_not_turn_sparsity_off(wan, xformers_stub, when, latents_of, sparse_plan):
    if when == "before":
        wan.transformer.set_attention_backend("xformers")
    with attach(wan, sparse_plan()) as handle:
        if when == "after":
            wan.transformer.set_attention_backend("xformers")
        latents_of(wan, steps=2, guidance=1.0)
    assert xformers_stub == [(120, 16)] * LAYERS * 2
    assert [(record.sparse_calls, record.dense_calls) for record in handle.steps] == [(LAYERS, 0)] * 2


def test_scheduled_dense_steps_use_the_chosen_backend(wan, xformers_stub, latents_of, sparse_plan):
    wan.transformer.set_attention_backend("xformers")
    with attach(wan, sparse_plan(schedule=Schedule(dense_until=0.9))) as handle:
        latents_of(wan, steps=4, guidance=1.0)
    dense = [record.noise_level > 0.9 for record in handle.steps]
    assert 0 < sum(dense) < 4
    assert [record.dense_calls for record in handle.steps] == [LAYERS * is_dense for is_dense in dense]
    assert xformers_stub.count((120, 120)) == LAYERS * sum(dense)
    assert "dense" in handle.summary()


@pytest.mark.parametrize("dense_by", [None, "own"])
def test_dense_steps_count_as_dense_whoever_runs_them(wan, latents_of, sparse_plan, dense_by):
    with attach(wan, sparse_plan(schedule=Schedule(dense_first_steps=1, dense_by=dense_by))) as handle:
        latents_of(wan, steps=2)
        first, second = handle.steps
    assert first.sparse_calls == 0 < first.dense_calls
    assert second.dense_calls == 0 < second.sparse_calls


def test_nan_in_the_latents_stops_naming_layer_and_step(wan, latents_of, sparse_plan):
    with attach(wan, sparse_plan()):
        with pytest.raises(ValueError, match=r"layer 0 \(blocks\.0\.attn1\).* at step 1"):
            latents_of(wan, callback_on_step_end=poison)
        assert torch.isfinite(latents_of(wan)).all()


def poison(_pipe, _step, _timestep, values):
    values["latents"][0, 0, 0, 0, 0] = float("nan")
    return values


def test_mask_over_keys_alone_becomes_log_weights():
    weight = key_log_weight(torch.tensor([True, True, False, True, True, True])[None, None, None], 6)
    assert weight is not None
    assert weight.shape == (1, 1, 6)
    assert weight.tolist() == [[[0.0, 0.0, float("-inf"), 0.0, 0.0, 0.0]]]
    assert key_log_weight(torch.ones(1, 1, 6, 6, dtype=torch.bool), 6) is None
    assert key_log_weight(torch.ones(6, 6, dtype=torch.bool), 6) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"causal": True}, "causal attention"),
        ({"dropout": 0.1}, "dropout"),
        ({"grouped": True}, "grouped-query"),
        ({"key": torch.zeros(1, HEADS, 7, 16)}, r"not self-attention \(120 queries, 7 keys\)"),
        ({"mask": torch.ones(1, 1, 120, 120, dtype=torch.bool)}, "not a key mask"),
        ({"unusual": "attention_kwargs"}, "attention_kwargs given"),
        ({"query": torch.zeros(1, HEADS, 64, 16), "key": torch.zeros(1, HEADS, 64, 16)}, "grid unknown: 64 tokens"),
    ],
)
def test_what_no_plan_can_take_stays_stock_and_says_why(wan, changes, reason, sparse_plan):
    stock = torch.ones(1)
    with attach(wan, sparse_plan()) as handle:
        forward(wan, 500.0, torch.ones(1, 4, 16))
        tensor = torch.zeros(1, HEADS, 120, 16)
        call = Call(**{"query": tensor, "key": tensor, "value": tensor, **changes})
        run = handle._runs["transformer"]
        assert run.route(1, call, lambda: stock, token_dim=2) is stock
    assert re.search(f"layer 1 .*sparse.*; dense, .*{reason}.* \\(1 calls\\)", handle.summary())
    assert handle.density is not None
    assert handle.density < 1


def test_key_mask_is_honoured(wan, sparse_plan):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, HEADS, 120, 16)
    mask = torch.rand(1, 1, 1, 120) > 0.3
    with attach(wan, sparse_plan()) as handle:
        forward(wan, 500.0, torch.ones(1, 4, 16))
        run = handle._runs["transformer"]

        def routed(value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            call = Call(query=query, key=key, value=value, mask=mask)
            return run.route(0, call, lambda: torch.empty(0), token_dim=2)

        out = routed(value, mask)
        added = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
        torch.testing.assert_close(routed(value, added), out)
        torch.testing.assert_close(routed(torch.where(mask.mT, value, 1e4), mask), out)
        assert not torch.allclose(routed(value, torch.ones_like(mask)), out)
