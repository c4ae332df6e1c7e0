"""A search finds what was planted, resumes as if in one go, and says what it could not do."""

from __future__ import annotations

import functools
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from ziggurat.attention.dense import Dense
from ziggurat.attention.plan import Plan
from ziggurat.attention.schedule import Schedule
from ziggurat.attention.skip import Skip
from ziggurat.attention.topk import TopK
from ziggurat.attention.window import Window
from ziggurat.search import captured, scoring
from ziggurat.search import run as searching
from ziggurat.search.candidates import default_candidates, load_candidates, to_toml, with_dense
from ziggurat.search.compose import layer_plan
from ziggurat.search.findings import Candidate, Findings
from ziggurat.search.measured import Measured
from ziggurat.search.prove import cheapest
from ziggurat.search.scoring import Cancelled
from ziggurat.search.sensitivity import kept_forwards, middle_steps, sensitivities

FEW = [
    Candidate(selector=Dense(), tile=32, block=16),
    Candidate(selector=Skip(), rest="pooled", tile=32, block=16),
    Candidate(selector=Window(frames=1), rest="pooled", tile=32, block=16),
    Candidate(selector=TopK(density=0.3), rest="drop", tile=32, block=16),
]
SETTINGS = {"frames": 9, "height": 32, "width": 48, "steps": 3}
PROMPTS = ["a large red circle", "a blue"]


def run(wan, out: Path, **options):
    return searching.search(
        wan,
        out,
        **{"prompts": PROMPTS, "held_out": ["a green"], "candidates": FEW, "proofs": 1, "noise_steps": 2}
        | {"guidance": 5.0, "schedule": Schedule(), **SETTINGS, **options},
    )


def test_a_search_writes_what_it_found(wan, tmp_path: Path):
    told: list[tuple[str, int, int]] = []
    result = run(wan, tmp_path / "one", report=lambda *what: told.append(what))
    assert result.met
    assert {stage for stage, _, _ in told} == {"capture", "sensitivity", "cost", "choice", "proof", "pictures"}
    # Two prompts, two steps, two branches, two layers.
    assert max(done for stage, done, _ in told if stage == "capture") == 16
    again = searching.load_result(tmp_path / "one")
    assert again.plan == result.plan == Plan.load(tmp_path / "one/plan.json")
    assert again.findings == result.findings
    assert (tmp_path / "one/report.html").stat().st_size > 1000
    assert result.proof is not None
    assert result.plan.measured["psnr"] == result.proof.psnr
    assert result.findings.chosen is not None
    assert result.plan.predicted["error"] == result.front[result.findings.chosen].error
    front = result.front
    assert all(a.seconds <= b.seconds and a.error >= b.error for a, b in pairwise(front))
    assert not any(module._forward_pre_hooks for module in wan.transformer.modules())


def test_resumed_it_comes_to_the_same(wan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = run(wan, tmp_path / "whole", proofs=0)
    cost = Measured.model_validate_json((tmp_path / "whole/measured.json").read_bytes()).cost
    monkeypatch.setattr(searching, "measure", lambda *given, **more: cost)
    calls = iter(range(100))
    with pytest.raises(Cancelled):
        run(wan, tmp_path / "parts", proofs=0, cancelled=lambda: next(calls) == 9)
    journal = tmp_path / "parts/scores.jsonl"
    assert len(journal.read_text().splitlines()) == 10
    with journal.open("a") as file:
        file.write('{"prompt": 1, "st')
    made: list[tuple] = []
    original = scoring.score
    monkeypatch.setattr(scoring, "score", lambda *given, **more: made.append(given) or original(*given, **more))
    parts = run(wan, tmp_path / "parts", proofs=0, resume=True)
    assert len(made) == 16 - 9
    assert parts.plan == whole.plan
    assert parts.findings.model_dump(exclude={"costs"}) == whole.findings.model_dump(exclude={"costs"})
    # What is measured once is there for the next time, as are the runs of prompts that are done.
    monkeypatch.setattr(searching, "measure", None)
    monkeypatch.setattr(searching, "sensitivities", None)
    prompts: list[str] = []
    called = type(wan).__call__

    @functools.wraps(called)
    def noted(pipe, **more):
        prompts.append(more["prompt"])
        return called(pipe, **more)

    monkeypatch.setattr(type(wan), "__call__", noted)
    again = run(wan, tmp_path / "parts", proofs=0, resume=True)
    assert again.plan == whole.plan
    # The first is run for what else it tells; maps are drawn from a forward that it kept.
    assert prompts == PROMPTS[:1]
    with pytest.raises(ValueError, match="of another search"):
        run(wan, tmp_path / "parts", proofs=0, resume=True, seed=1)


def test_what_is_scored_is_what_attention_received(wan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(captured, "own_is_faster", lambda *_, **sizes: False)
    seen, scored = [], []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, *args, **kwargs):
        if query.shape[2] == key.shape[2] == 120:
            seen.append((query.clone(), key.clone(), value.clone()))
        return sdpa(query, key, value, *args, **kwargs)

    def keep(call, *given, **more):
        sample = call.sample
        scored.append((sample.step, sample.branch, sample.layer, sample.query, sample.key, sample.value))
        return original(call, *given, **more)

    original = scoring.score
    monkeypatch.setattr(scoring, "score", keep)
    monkeypatch.setattr(searching, "sensitivities", lambda *_: (_ for _ in ()).throw(Cancelled))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with pytest.raises(Cancelled):
        run(wan, tmp_path / "kept", prompts=PROMPTS[:1])
    # The first two steps of three; two branches; two layers, in the order that they ran.
    places = [(step, branch, layer) for step in (0, 1) for branch in ("cond", "uncond") for layer in (0, 1)]
    assert [one[:3] for one in scored] == places
    for (step, branch, layer), one in zip(places, scored, strict=True):
        given = seen[4 * step + 2 * (branch == "uncond") + layer]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one[3:], given, strict=True))


def test_runs_but_the_first_end_with_the_last_step_that_is_scored(wan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    forwards: list[int] = []
    freed: list[int] = []
    original = wan.maybe_free_model_hooks
    monkeypatch.setattr(wan, "maybe_free_model_hooks", lambda: (freed.append(len(forwards)), original()))
    monkeypatch.setattr(searching, "sensitivities", lambda *_: (_ for _ in ()).throw(Cancelled))
    counted = wan.transformer.register_forward_hook(lambda *_: forwards.append(0))
    with pytest.raises(Cancelled):
        run(wan, tmp_path / "short")
    counted.remove()
    # Three steps of two branches, of which the first two are scored; either way the models are freed.
    assert freed == [6, 6 + 4]


def test_whoever_runs_the_dense_steps_scores_are_the_same(wan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    errors = []
    for own in (False, True):
        asked = []
        monkeypatch.setattr(
            captured, "own_is_faster", lambda *what, own=own, asked=asked, **_: (asked.append(what), own)[1]
        )
        errors.append(np.array(run(wan, tmp_path / str(own), proofs=0).findings.errors))
        assert asked == [((5, 4, 6),)]
    assert 0 < np.abs(errors[0] - errors[1]).max() < 1e-4


def test_nan_is_named_by_layer(wan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(searching, "sensitivities", None)
    with torch.no_grad():
        wan.transformer.blocks[1].attn1.to_v.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"layer 1 .*NaN"):
        run(wan, tmp_path / "nan")


def test_impossible_bounds_end_with_the_nearest(wan, tmp_path: Path):
    result = run(wan, tmp_path / "fast", budget=1e-9, proofs=0)
    assert not result.met
    assert result.findings.chosen == 0
    result = run(wan, tmp_path / "sharp", target_psnr=1000.0)
    assert not result.met
    assert result.findings.chosen == len(result.front) - 1
    with pytest.raises(ValueError, match="one bound"):
        run(wan, tmp_path / "two", budget=0.3, max_error=0.1)
    with pytest.raises(ValueError, match="must be 1 to 16, got 17"):
        run(wan, tmp_path / "many", prompts=["a"] * 17)


def test_the_cheapest_that_reaches_a_target_is_found():
    for first in range(7):
        asked: list[int] = []

        def prove(number: int, first: int = first, asked: list[int] = asked) -> float:
            asked.append(number)
            return float(number >= first)

        assert cheapest(7, prove, 1.0) == (first, True)
        assert len(set(asked)) <= 4
    assert cheapest(7, lambda number: 0.0, 1.0) == (6, False)


def test_sensitivities_tell_a_layer_that_matters(wan):
    with torch.no_grad():
        wan.transformer.blocks[1].attn1.to_out[0].weight.mul_(1e-3)
    with kept_forwards(wan.transformer, lambda: (0,), lambda: 0) as forwards:
        wan("a", num_frames=9, height=32, width=48, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    first, second = sensitivities(wan, wan.transformer, forwards, 3)
    assert first > 20 * second > 0


def test_sensitivities_are_the_mean_over_forwards(wan):
    call = {"num_frames": 9, "height": 32, "width": 48, "guidance_scale": 1.0, "output_type": "latent"}
    calls = iter(range(9))
    with kept_forwards(wan.transformer, lambda: (0, 2), lambda: next(calls)) as forwards:
        wan("a", num_inference_steps=3, **call)
    alone = [np.array(sensitivities(wan, wan.transformer, [forward], 3)) for forward in forwards]
    told: list[tuple[int, int]] = []
    every = sensitivities(wan, wan.transformer, forwards, 6, lambda *what: told.append(what))
    # Two layers and one run as it is, for two forwards.
    assert told[-1] == (6, 6)
    assert np.allclose(every, (alone[0] + alone[1]) / 2)
    assert not np.allclose(alone[0], alone[1])


def test_forwards_stand_in_the_middles_of_equal_growth_of_the_signal():
    levels = [0.999, 0.98, 0.9, 0.0]
    # The signal grows fivefold in the first of two sparse steps, and tenfold in the second.
    assert middle_steps(levels, [1, 2], 1) == [2]
    assert middle_steps(levels, [1, 2], 2) == [1, 2]
    assert middle_steps(levels, [0, 1, 2], 9) == [0, 1, 2]
    # It doubles from each step to the next, and nearly twice in the last.
    assert middle_steps([1 - 0.001 * 2**step for step in range(9)], range(1, 9), 2) == [3, 7]
    # A run whose steps are not told has none.
    assert middle_steps([], [], 3) == []
    # What a step to no noise at all brings is finite; two that fall into one step take the next.
    assert middle_steps([1.0, 0.5], [0, 1], 1) == [0]
    assert middle_steps([1.0, 0.5, 0.2], [0, 1, 2], 2) == [0, 1]
    assert middle_steps([1.0, 0.999, 0.9985], [0, 1, 2], 2) == [1, 2]


def test_of_two_experts_the_one_asked_for_is_searched(experts_folder, tiny_wan, tmp_path: Path):
    pipe = tiny_wan(experts_folder)
    result = run(pipe, tmp_path / "second", expert="transformer_2", steps=4, max_error=100.0, across=2)
    assert result.plan.expert == "transformer_2"
    found = result.findings
    # Of four steps the first is above the boundary, and is the other expert's.
    assert all(level < 0.8 for level in found.noise_levels)
    assert found.calls == 2 * (4 - sum(level >= 0.8 for level in levels_of(pipe, 4)))
    assert found.branches == 2
    assert {proof.point for proof in found.proofs} >= {0, len(found.front) - 1}
    with pytest.raises(ValueError, match="expert must be one of transformer and transformer_2"):
        run(pipe, tmp_path / "third", expert="transformer_3")


def levels_of(pipe, steps: int) -> list[float]:
    pipe.scheduler.set_timesteps(steps)
    return [float(timestep) / 1000 for timestep in pipe.scheduler.timesteps]


def test_candidates_files(tmp_path: Path):
    every = default_candidates("cpu")
    assert {one.tile for one in every} == {64}
    assert {one.tile for one in default_candidates("cuda")} == {128}
    assert len(every) >= 30
    assert len({str(one) for one in every}) == len(every)
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(every))
    assert load_candidates(path) == with_dense(every)
    path.write_text('[[candidate]]\nselector = { name = "topk", density = 7 }\n')
    with pytest.raises(ValueError, match=r"number 1: selector\.topk\.density"):
        load_candidates(path)
    path.write_text("")
    with pytest.raises(ValueError, match=r"no \[\[candidate\]\]"):
        load_candidates(path)


def test_heads_of_one_selector_become_one_entry():
    layer = layer_plan([1, 3, 1, 0], FEW)
    (group,) = layer.groups
    assert [entry.heads for entry in group.entries] == [(0, 2), (1,), (3,)]
    assert layer_plan(None, FEW).dense


def test_a_folder_without_a_search_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="does not exist"):
        Findings.load(tmp_path)
    (tmp_path / "search.json").write_text(json.dumps({"shape": 1}))
    with pytest.raises(ValueError, match="not a search's result"):
        Findings.load(tmp_path)
