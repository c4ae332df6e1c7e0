"""The exact choice, against every choice there is."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from ziggurat.search.choose import Problem, choose, total


def problem(seed: int, *, layers: int = 2, heads: int = 2, candidates: int = 5, launch: float = 0.3) -> Problem:
    random = np.random.default_rng(seed)
    return Problem(
        errors=random.random((layers, heads, candidates)),
        seconds=random.random((layers, heads, candidates)),
        groups=[0, 0, 1, 2, 3][:candidates],
        launch=launch,
        stock=1.4,
    )


def every_choice(one: Problem):
    layers, heads, candidates = one.errors.shape
    of_layer = [None, *map(list, product(range(candidates), repeat=heads))]
    of_layer = [picks for picks in of_layer if picks is None or len({one.groups[c] for c in picks}) <= 3]
    return [total(one, list(picks)) for picks in product(of_layer, repeat=layers)]


@pytest.mark.parametrize("seed", range(6))
def test_the_solver_finds_what_trying_everything_finds(seed: int):
    one = problem(seed)
    everything = every_choice(one)
    for limit in (0.3, 0.8, 1.5, 2.5):
        found = choose(one, max_error=limit)
        best = min((choice.seconds for choice in everything if choice.error <= limit), default=None)
        assert found is not None
        assert best is not None
        assert found.error <= limit * (1 + 1e-6)
        assert found.seconds == pytest.approx(best, rel=2e-3)
        quick = choose(one, max_seconds=limit)
        least = min((choice.error for choice in everything if choice.seconds <= limit), default=None)
        assert (quick is None) == (least is None)
        if quick is not None:
            assert quick.seconds <= limit * (1 + 1e-6)
            assert quick.error == pytest.approx(least, rel=2e-3, abs=1e-9)


def test_a_launch_keeps_a_layer_in_one_group_where_that_pays():
    errors = np.array([[[0.10, 0.09], [0.09, 0.10]]])
    seconds = np.zeros((1, 2, 2))
    cheap = Problem(errors=errors, seconds=seconds, groups=[0, 1], launch=0.0, stock=9.0)
    dear = Problem(errors=errors, seconds=seconds, groups=[0, 1], launch=1.0, stock=9.0)
    both, one = choose(cheap, max_seconds=1.5), choose(dear, max_seconds=1.5)
    assert both is not None
    assert both.picks == [[1, 0]]
    assert one is not None
    assert one.picks[0] in ([0, 0], [1, 1])


def test_four_layouts_are_one_too_many():
    errors = np.full((1, 4, 4), 1.0)
    errors[0, range(4), range(4)] = 0.0
    found = choose(
        Problem(errors=errors, seconds=np.zeros((1, 4, 4)), groups=[0, 1, 2, 3], launch=0.0, stock=9.0), max_seconds=1.0
    )
    assert found is not None
    assert found.error == pytest.approx(1.0)


def test_what_no_choice_keeps_is_told():
    assert choose(problem(0), max_seconds=1e-3) is None
    with pytest.raises(ValueError, match="one bound"):
        choose(problem(0))


def test_a_model_of_2400_heads_takes_seconds():
    import time

    random = np.random.default_rng(0)
    quality = np.sort(random.random(30))[::-1]
    errors = quality * random.uniform(0.2, 2, (60, 40, 1)) * random.uniform(0.7, 1.3, (60, 40, 30))
    seconds = np.broadcast_to(1 - quality, errors.shape) * random.uniform(0.9, 1.1, errors.shape)
    large = Problem(errors=errors, seconds=seconds, groups=[i % 2 for i in range(30)], launch=0.1, stock=60.0)
    begun = time.monotonic()
    found = choose(large, max_seconds=0.4 * 60 * 40)
    assert found is not None
    assert found.seconds <= 0.4 * 60 * 40 * (1 + 1e-6)
    assert time.monotonic() - begun < 60
