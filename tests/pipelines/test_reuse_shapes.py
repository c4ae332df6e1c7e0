"""Which steps build lists, reuse them or run dense, counted in runs of the embedded model itself."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from ziggurat.attention.order import TokenOrder
from ziggurat.attention.plan import HeadGroup, HeadPlan, Plan
from ziggurat.attention.precise import Precise
from ziggurat.attention.schedule import Schedule
from ziggurat.attention.topk import TopK
from ziggurat.pipelines import attach, load
from ziggurat.pipelines.handle import Handle
from ziggurat.pipelines.plans import model_shape

# The first steps dense, a refresh half-way through the noise.
SCHEDULE = Schedule(dense_until=0.95, refresh_at=(0.7,))


@pytest.fixture(scope="module")
def shapes():
    pipe = load("shapes", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def plan_of(shapes):
    shape = asdict(model_shape(shapes.transformer))

    def make(selector: Any, schedule: Schedule = SCHEDULE, **more: Any) -> Plan:
        entry = HeadPlan(heads=tuple(range(shape["heads"])), selector=selector, **more)
        group = HeadGroup(order=TokenOrder(name="hilbert"), tile=32, block=8, entries=(entry,))
        return Plan.uniform([group], grid=(3, 8, 8), schedule=schedule, **shape)

    return make


def run(pipe: Any, steps: int, guidance: float, **more: Any) -> torch.Tensor:
    arguments = {"num_frames": 5, "height": 64, "width": 64, "num_inference_steps": steps, "guidance_scale": guidance}
    generator = torch.Generator().manual_seed(0)
    return pipe("a large red circle", generator=generator, output_type="latent", **{**arguments, **more}).frames


def check_counts(handle: Handle, schedule: Schedule, branches: int, layers: int) -> list[str]:
    """What each step did, after checking that it is what the schedule says."""
    levels = [record.noise_level for record in handle.steps]
    actions = list(schedule.steps(levels))
    lists = layers * (1 if schedule.share_branches else branches)
    for record, action in zip(handle.steps, actions, strict=True):
        assert record.lists_built == (lists if action == "refresh" else 0), (record.step, action)
        assert record.dense_calls == (layers * branches if action == "dense" else 0)
        assert record.sparse_calls == (0 if action == "dense" else layers * branches)
    return list(actions)


@pytest.mark.parametrize("steps", [4, 30])
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_steps_build_reuse_or_run_dense_by_the_schedule(shapes, plan_of, steps: int, guidance: float):
    branches, layers = (2 if guidance > 1 else 1), len(shapes.transformer.blocks)
    with attach(shapes, plan_of(TopK(density=0.2))) as handle:
        first = run(shapes, steps, guidance)
        actions = check_counts(handle, SCHEDULE, branches, layers)
        assert len(actions) == steps
        assert {"dense", "refresh", "reuse"} <= set(actions)
        assert actions.count("refresh") == 2
        # Twice in a row is the same again.
        assert torch.equal(run(shapes, steps, guidance), first)
        assert check_counts(handle, SCHEDULE, branches, layers) == actions


def stop_at_2(_pipe: Any, step: int, _timestep: Any, values: dict) -> dict:
    if step == 2:
        raise KeyboardInterrupt
    return values


def interrupt_at_2(pipe: Any, step: int, _timestep: Any, values: dict) -> dict:
    pipe._interrupt = step >= 2
    return values


def test_a_run_after_a_cancelled_one_starts_afresh(shapes, plan_of):
    layers = len(shapes.transformer.blocks)
    with attach(shapes, plan_of(TopK(density=0.2))) as handle:
        whole = run(shapes, 4, 4.0)
        plan_run = handle._runs["transformer"].plan_run
        with pytest.raises(KeyboardInterrupt):
            run(shapes, 4, 4.0, callback_on_step_end=stop_at_2)
        shapes.scheduler.set_timesteps(4)
        assert plan_run.reuse.nbytes == 0, "the next run's beginning frees what a cancelled one left"
        assert torch.equal(run(shapes, 4, 4.0), whole)
        check_counts(handle, SCHEDULE, 2, layers)


def test_no_run_leaves_a_list_behind(shapes, plan_of):
    with attach(shapes, plan_of(TopK(density=0.2))) as handle:
        reuse = handle._runs["transformer"].plan_run.reuse
        run(shapes, 4, 1.0)
        assert reuse.nbytes == 0, "a finished run"
        run(shapes, 4, 1.0, callback_on_step_end=interrupt_at_2)
        assert len(handle.steps) == 3
        assert reuse.nbytes == 0, "one interrupted by diffusers' own flag"
        with pytest.raises(ValueError, match="NaN"):
            run(shapes, 4, 1.0, callback_on_step_end=poison_at_1)
        assert reuse.nbytes == 0, "one that raised"
        assert "kept between steps: lists" in handle.summary()
        with pytest.raises(KeyboardInterrupt):
            run(shapes, 4, 1.0, callback_on_step_end=stop_at_2)
    assert reuse.nbytes == 0, "a detached one"
    assert "maybe_free_model_hooks" not in shapes.__dict__


def poison_at_1(_pipe: Any, step: int, _timestep: Any, values: dict) -> dict:
    if step == 1:
        values["latents"] = torch.full_like(values["latents"], torch.nan)
    return values


def test_branches_may_share_their_lists(shapes, plan_of):
    schedule = SCHEDULE.model_copy(update={"share_branches": True})
    with attach(shapes, plan_of(TopK(density=0.2), schedule)) as handle:
        run(shapes, 4, 4.0)
        check_counts(handle, schedule, 2, len(shapes.transformer.blocks))


def test_another_scheduler_meets_the_same_noise_levels(shapes, plan_of):
    kept = shapes.scheduler
    try:
        shapes.scheduler = UniPCMultistepScheduler.from_config(
            kept.config, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        with attach(shapes, plan_of(TopK(density=0.2))) as handle:
            run(shapes, 8, 1.0)
            actions = check_counts(handle, SCHEDULE, 1, len(shapes.transformer.blocks))
        assert actions.count("refresh") == 2
    finally:
        shapes.scheduler = kept


def test_precise_lists_come_from_one_dense_step(shapes, plan_of):
    with attach(shapes, plan_of(Precise(density=0.2), rest="drop")) as handle:
        run(shapes, 4, 1.0)
        actions = check_counts(handle, SCHEDULE, 1, len(shapes.transformer.blocks))
        sparse = len(actions) - actions.count("dense")
        # The first refresh runs dense; the second takes the old lse.
        expected = (len(actions) - sparse + 1 + (sparse - 1) * handle.list_density) / len(actions)
        assert handle.density == pytest.approx(expected)
        assert handle.list_density < 0.3
        summary = handle.summary()
        assert "lse" in summary


def test_a_small_cap_is_told_in_the_summary(shapes, plan_of):
    with attach(shapes, plan_of(TopK(density=0.2)), max_cache_bytes=10) as handle:
        run(shapes, 4, 1.0)
        sparse = sum(record.sparse_calls for record in handle.steps)
        assert sum(record.lists_built for record in handle.steps) == sparse
        assert f"{sparse} times over 0 MiB a branch and rebuilt, not kept" in handle.summary()


def test_two_experts_build_lists_of_their_own_by_one_clock(experts_folder, tiny_wan, latents_of, sparse_plan):
    pipe = tiny_wan(experts_folder)
    base = sparse_plan(schedule=Schedule(refresh_at=(0.5,)))
    entry = HeadPlan(heads=(0, 1), selector=TopK(density=0.2))
    group = HeadGroup(order=TokenOrder(name="temporal"), tile=16, block=16, entries=(entry,))
    layers = tuple(layer.model_copy(update={"groups": (group,)}) for layer in base.layers)
    with attach(pipe, base.model_copy(update={"layers": layers})) as handle:
        for _ in range(2):
            latents_of(pipe, steps=6)
            first, second = (handle._runs[name].steps for name in ("transformer", "transformer_2"))
            # The boundary is at 0.8: the second expert begins below it, and meets the refresh at 0.5.
            built = len(layers) * 2
            assert [record.lists_built for record in first] == [built] + [0] * (len(first) - 1)
            late = [record.noise_level <= 0.5 for record in second]
            assert late.index(True) > 0
            wanted = {0, late.index(True)}
            assert [record.lists_built for record in second] == [built * (i in wanted) for i in range(len(second))]
        assert all(run.plan_run.reuse.nbytes == 0 for run in handle._runs.values())
