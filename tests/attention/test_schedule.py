"""A schedule means the same at 4, 30 and 50 steps."""

import pytest
import torch
from pydantic import ValidationError

from ziggurat.attention.schedule import Schedule


def levels(steps: int, shift: float = 3.0) -> list[float]:
    """Noise levels of a shifted flow-matching run."""
    linear = [1 - step / steps for step in range(steps)]
    return [shift * t / (1 + (shift - 1) * t) for t in linear]


@pytest.mark.parametrize("steps", [1, 4, 30, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_dense_while_the_noise_is_high(steps: int, shift: float):
    schedule = Schedule(dense_until=0.91, dense_from=0.19)
    for level, action in zip(levels(steps, shift), schedule.steps(levels(steps, shift)), strict=True):
        assert (action == "dense") == (level > 0.91 or level < 0.19)


@pytest.mark.parametrize(("steps", "text"), [
    (4, "0 dense, 1 refresh, 2 reuse, 3 refresh"),
    (30, "0-7 dense, 8 refresh, 9-17 reuse, 18 refresh, 19-29 reuse"),
    (50, "0-12 dense, 13 refresh, 14-29 reuse, 30 refresh, 31-49 reuse"),
])  # fmt: skip
def test_the_steps_that_result(steps: int, text: str):
    assert Schedule(dense_until=0.9, refresh_at=(0.67,)).describe(levels(steps)) == text


def test_levels_that_the_host_rounded():
    run = levels(30)
    schedule = Schedule.from_steps(run, dense_first=6, dense_last=3, refresh=[9])
    rounded = torch.tensor(run, dtype=torch.float32).tolist()
    assert schedule.steps(rounded) == schedule.steps(run)


def test_first_sparse_step_refreshes_and_missed_refreshes_count_once():
    run = levels(10, 1.0)
    assert Schedule().steps(run) == ("refresh",) + ("reuse",) * 9
    steps = Schedule(dense_until=0.6, refresh_at=(0.9, 0.8, 0.31, 0.3)).steps(run)
    assert steps == ("dense",) * 4 + ("refresh", "reuse", "reuse", "refresh", "reuse", "reuse")


@pytest.mark.parametrize("steps", [4, 30, 50])
def test_steps_as_sugar(steps: int):
    run = levels(steps)
    schedule = Schedule.from_steps(run, dense_first=1, dense_last=1, refresh=[2])
    assert schedule.steps(run)[:3] == ("dense", "refresh", "refresh" if steps > 3 else "dense")
    assert [i for i, action in enumerate(schedule.steps(run)) if action == "dense"] == [0, steps - 1]
    assert Schedule.from_steps(run).steps(run).count("dense") == 0
    assert Schedule.from_steps(run, dense_first=steps).steps(run).count("dense") >= steps - 1
    assert Schedule(dense_first_steps=2).steps(run)[:3] == ("dense", "dense", "refresh")


def test_refresh_every_so_many_steps():
    run = levels(30)
    schedule = Schedule.from_steps(run, dense_first=5, dense_last=2, refresh=[7], refresh_every=10)
    actions = schedule.steps(run)
    assert [i for i, action in enumerate(actions) if action == "refresh"] == [5, 7, 15, 25]
    assert actions.count("dense") == 7
    with pytest.raises(ValueError, match="refresh_every must be at least 1"):
        Schedule.from_steps(run, refresh_every=0)


@pytest.mark.parametrize("beta", ["linear", "scaled_linear"])
def test_ddim_levels_are_the_timesteps_too(beta: str):
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    schedule = Schedule(dense_until=0.8, refresh_at=(0.5,))
    for steps in (4, 50):
        scheduler = DDIMScheduler(beta_schedule=beta)
        scheduler.set_timesteps(steps)
        run = [float(timestep) / scheduler.config["num_train_timesteps"] for timestep in scheduler.timesteps]
        actions = schedule.steps(run)
        assert actions[0] == "refresh" if run[0] <= 0.8 else "dense"
        assert sum(action == "dense" for action in actions) == sum(level > 0.8 for level in run)
        assert actions.count("refresh") == 2


def test_what_is_still_to_come():
    schedule = Schedule(refresh_at=(0.8, 0.5, 0.1), dense_from=0.2)
    assert [schedule.refreshes_after(level) for level in (1.0, 0.8, 0.6, 0.5, 0.3)] == [True, True, True, False, False]
    assert not Schedule().refreshes_after(1.0)


def test_refused():
    with pytest.raises(ValidationError, match="refresh_at must fall"):
        Schedule(refresh_at=(0.3, 0.5))
    with pytest.raises(ValidationError, match="dense_from must not exceed"):
        Schedule(dense_until=0.2, dense_from=0.4)
    with pytest.raises(ValidationError):
        Schedule(dense_until=900)
    for level in (float("nan"), -0.1, 999.0):
        with pytest.raises(ValueError, match="noise_level must lie in 0"):
            Schedule().is_dense(level, 0)
    with pytest.raises(ValueError, match="must fit 4 steps"):
        Schedule.from_steps(levels(4), dense_first=5)
    with pytest.raises(ValueError, match="refresh must hold steps"):
        Schedule.from_steps(levels(4), refresh=[4])
