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
from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.loglinear import LogLinear
from ziggurat.attention.order import TokenOrder, coordinates
from ziggurat.attention.plan import LayerPlan, Plan
from ziggurat.attention.precise import Precise
from ziggurat.attention.pyramid import Pyramid
from ziggurat.attention.run import PlanRun
from ziggurat.attention.schedule import Schedule
from ziggurat.attention.skip import Skip
from ziggurat.attention.stripe import Box, Stripe
from ziggurat.attention.topk import TopK
from ziggurat.attention.window import Window
from ziggurat.search import run as searching
from ziggurat.search import scoring
from ziggurat.search.candidates import default_candidates, load_candidates, to_toml, with_dense
from ziggurat.search.capture import Sample
from ziggurat.search.choose import Problem, choose
from ziggurat.search.compose import layer_plan
from ziggurat.search.entry import Call, entries_of
from ziggurat.search.findings import Candidate, Findings
from ziggurat.search.measured import Measured
from ziggurat.search.prove import cheapest
from ziggurat.search.scoring import Cancelled, score
from ziggurat.search.sensitivity import kept_forwards, sensitivities

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


def planted(grid: TokenGrid) -> Sample:
    """Four heads: one looks at its own frame, one at every second row and column, one at the first frame, one at
    everything alike."""
    frame, row, column = coordinates(grid.visual[0].grid)
    parity = 2 * (row % 2) + column % 2
    first = (frame > 0).long()
    dead = torch.zeros_like(frame)
    generator = torch.Generator().manual_seed(0)
    codes = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    key = torch.stack([codes[kind] for kind in (frame, parity, first, dead)])[None]
    query = torch.stack([codes[frame], codes[parity], codes[dead], codes[dead] * 0])[None] * 200
    # Without it keys of a kind would be equal, and reading them pooled would be exact.
    key = key + 0.1 * torch.randn(key.shape, generator=generator)
    value = torch.randn(1, 4, grid.tokens, 32, generator=generator)
    return Sample(source="planted", query=query, key=key, value=value, grid=grid)


def test_planted_patterns_give_those_families_back():
    """All four heads of one layer in one choice, among candidates that read as much or more, and dynamic ones."""
    grid = TokenGrid.video(6, 8, 8)
    layout = {"tile": 64, "block": 16}
    raster, strided, temporal = (TokenOrder.model_validate(name) for name in ("raster", "strided(2)", "temporal"))
    stripe = Stripe(boxes=(Box(frames=(0, 1)),))
    wanted = [
        Candidate(selector=Window(frames=1), rest="drop", order=raster, **layout),
        Candidate(selector=Window(dilation=(1, 2, 2)), rest="drop", order=strided, **layout),
        Candidate(selector=stripe, rest="drop", order=raster, **layout),
        Candidate(selector=Skip(), rest="pooled", order=raster, **layout),
    ]
    others = [
        Candidate(selector=Skip(), rest="drop", order=raster, **layout),
        Candidate(selector=Window(frames=3), rest="drop", order=raster, **layout),
        Candidate(selector=Window(height=3, width=3), rest="drop", order=temporal, **layout),
        Candidate(selector=Window(frames=3, height=5, width=5), rest="pooled", order=raster, **layout),
        *(Candidate(selector=TopK(density=share), rest="drop", order=raster, **layout) for share in (0.1, 0.25)),
        Candidate(selector=Precise(density=0.2, by="error"), rest="pooled", order=raster, **layout),
    ]
    tried = with_dense([*others, *wanted])
    found = score(Call(planted(grid)), entries_of(tried, grid))
    # What the cost model knows: lists that look at queries and keys take time to build.
    built = np.array([0.0 if one.selector.static else 0.1 for one in tried])
    problem = Problem(
        errors=np.array(found["errors"])[None],
        seconds=np.array(found["densities"])[None] + built,
        groups=[[raster, strided, temporal].index(one.order) for one in tried],
        launch=0.01,
        stock=4.0,
    )
    choice = choose(problem, max_error=0.25)
    assert choice is not None
    assert choice.picks[0] is not None
    assert [str(tried[number]) for number in choice.picks[0]] == [str(one) for one in wanted]


def random_sample(grid: TokenGrid, seed: int = 1, *, heads: int = 2, head_dim: int = 16) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, heads, grid.tokens, head_dim, generator=generator) for _ in range(3))
    return Sample(source="captured", query=query, key=key, value=value, grid=grid)


EVERY_KIND = [
    *FEW,
    Candidate(selector=TopK(density=0.3, by="error"), rest="pooled", tile=32, block=16),
    Candidate(selector=Precise(density=0.3), rest="drop", tile=32, block=16),
    Candidate(selector=Precise(density=0.5), rest="pooled", tile=32, block=16),
    Candidate(selector=LogLinear(keep=2), tile=32, block=16),
    Candidate(selector=Pyramid(), rest="pooled", tile=32, block=16),
    Candidate(selector=Stripe(boxes=(Box(frames=(0, 1)),)), rest="pooled", tile=32, block=16),
    Candidate(selector=Window(height=3, width=3), order=TokenOrder(name="temporal"), tile=32, block=16),
]


def test_scores_are_those_of_attention_itself():
    """Every selector's score is the error of what the plan's own run would compute."""
    grid = TokenGrid.video(3, 7, 5)
    sample = random_sample(grid)
    tried = with_dense(EVERY_KIND)
    found = score(Call(sample), entries_of(tried, grid))
    query, key, value = sample.query, sample.key, sample.value
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    shares = torch.softmax(query @ key.mT / 4, -1)
    for number, candidate in enumerate(tried):
        group = candidate.group.model_copy(update={"entries": (candidate.entry.model_copy(update={"heads": (0, 1)}),)})
        plan = Plan(model_class="X", heads=2, head_dim=16, grid=(3, 7, 5), layers=(LayerPlan(groups=(group,)),))
        run = PlanRun(plan)
        for step in (0, 1):
            # The first step of lists that need an lse is exact.
            out = run.attend_layer(query, key, value, layer=0, noise_level=0.5, step=step, grid=grid)
        assert out is not None
        for head in range(2):
            error = float((out - exact)[0, head].norm() / exact[0, head].norm())
            assert found["errors"][head][number] == pytest.approx(error, abs=1e-5), str(candidate)
        if candidate.family not in ("precise", "dense"):
            assert np.mean([row[number] for row in found["densities"]]) == pytest.approx(run.list_density())
    frame_by_frame = tried.index(FEW[2])
    layout = entries_of(tried, grid)[frame_by_frame].layout
    own = torch.zeros(grid.tokens, grid.tokens)
    for tile in layout.query_rows[0]:
        queries = tile[tile >= 0].long()
        near = {int(token) // 35 for token in queries}
        for block in layout.key_rows[0].view(-1, 16):
            keys = block[block >= 0].long()
            own[queries[:, None], keys] = float(bool(near & {int(token) // 35 for token in keys}))
    recall = (shares[0] * own).sum((1, 2)) / grid.tokens
    assert [row[frame_by_frame] for row in found["recalls"]] == pytest.approx(recall.tolist(), abs=1e-5)


def test_dynamic_lists_are_as_old_as_the_schedule_leaves_them(tmp_path: Path):
    """A score at a step is the error of the plan's own run, whose lists an earlier step may have built."""
    grid, levels = TokenGrid.video(3, 7, 5), [0.99, 0.9, 0.7, 0.4, 0.2]
    schedule = Schedule(dense_until=0.95, refresh_at=(0.5,))
    tried = with_dense([FEW[3], FEW[2], Candidate(selector=LogLinear(keep=1), tile=32, block=16)])
    samples = [random_sample(grid, seed) for seed in range(len(levels))]
    run = scoring.ScoringRun(
        Plan.dense(model_class="X", config_hash="0", layers=1, heads=2, head_dim=16, grid=(1, 1, 1)),
        tried,
        scoring.Journal(tmp_path / "scores", {}),
        schedule=schedule,
        count=4,
        rows=None,
        takes_part=lambda level: True,
        report=lambda: None,
        cancelled=lambda: False,
    )
    plans = [
        Plan(
            **{"model_class": "X", "heads": 2, "head_dim": 16, "grid": (3, 7, 5), "schedule": schedule},
            layers=(LayerPlan(groups=(one.group.model_copy(update={"entries": (entry,)}),)),),
        )
        for one in tried
        for entry in [one.entry.model_copy(update={"heads": (0, 1)})]
    ]
    own = [PlanRun(plan) for plan in plans]
    for each in (run, *own):
        each.begin(levels)
    assert run.wanted == [1, 2, 3, 4]
    assert run.builds == {1: 1, 2: 1, 3: 3, 4: 3}
    wanted: dict[int, list[list[float]]] = {}
    for step, (level, sample) in enumerate(zip(levels, samples, strict=True)):
        qkv = sample.query, sample.key, sample.value
        call = {"layer": 0, "noise_level": level, "step": step, "branch": "cond", "grid": grid}
        run.attend_layer(*qkv, **call)
        exact = torch.nn.functional.scaled_dot_product_attention(*qkv)
        outputs = [each.attend_layer(*qkv, **call) for each in own]
        if step:
            off = [(out - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3)) for out in outputs if out is not None]
            wanted[step] = torch.stack(off)[:, 0].T.tolist()
    found = {score.step: score.errors for score in run.journal.scores.values()}
    assert found.keys() == wanted.keys()
    for step in wanted:
        assert np.allclose(found[step], wanted[step], atol=1e-5), step
    fresh = score(Call(samples[2]), entries_of(tried, grid))["errors"]
    assert not np.allclose(found[2], fresh, atol=1e-2)


def test_of_long_sequences_tiles_take_turns():
    """Together the turns measure every query once: their squared errors add up to those of all."""
    grid = TokenGrid.video(4, 8, 8)
    sample = random_sample(grid)
    entries = entries_of(EVERY_KIND, grid)
    whole = score(Call(sample), entries)
    turns = [score(Call(sample, rows=64, turn=turn), entries) for turn in range(4)]
    assert [part["rows"] for part in turns] == [64] * 4
    norms = np.array([part["norms"] for part in turns])[:, :, None]
    off = ((np.array([part["errors"] for part in turns]) * norms) ** 2).sum(0)
    everything = (np.array(whole["errors"]) * np.array(whole["norms"])[:, None]) ** 2
    own = [number for number, one in enumerate(EVERY_KIND) if one.order.name != "temporal"]
    assert np.allclose(off[:, own], everything[:, own], rtol=1e-3, atol=1e-6)
    assert turns[0]["errors"] != turns[1]["errors"]
    assert np.allclose(np.mean([part["densities"] for part in turns], 0), whole["densities"], rtol=1e-6)
    assert np.allclose(np.mean([part["recalls"] for part in turns], 0), whole["recalls"], atol=1e-3)


def test_text_is_read_and_counted_but_not_sampled():
    grid = TokenGrid.video(4, 8, 8, text_after=40)
    sample = random_sample(grid)
    entries = entries_of(EVERY_KIND, grid)
    whole = score(Call(sample), entries)
    turns = [score(Call(sample, rows=100, turn=turn), entries) for turn in range(3)]
    assert sum(part["rows"] for part in turns) == 256
    assert whole["rows"] == 296
    # Two tiles or three of eight are of equal weight where all tiles read equally much.
    assert np.allclose(np.mean([part["densities"] for part in turns], 0), whole["densities"], rtol=0.05)


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
    assert PROMPTS[1] not in prompts
    with pytest.raises(ValueError, match="of another search"):
        run(wan, tmp_path / "parts", proofs=0, resume=True, seed=1)


def test_what_is_scored_is_what_attention_received(wan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
    # Steps 0 and 2 of three; two branches; two layers, in the order that they ran.
    places = [(step, branch, layer) for step in (0, 2) for branch in ("cond", "uncond") for layer in (0, 1)]
    assert [one[:3] for one in scored] == places
    for (step, branch, layer), one in zip(places, scored, strict=True):
        given = seen[4 * step + 2 * (branch == "uncond") + layer]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one[3:], given, strict=True))


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


def test_sensitivities_of_many_layers_are_those_of_some(wan):
    with kept_forwards(wan.transformer, lambda: (0,), lambda: 0) as forwards:
        wan("a", num_frames=9, height=32, width=48, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    told: list[tuple[int, int]] = []
    found = sensitivities(wan, wan.transformer, forwards * 3, 6, lambda *what: told.append(what))
    # Two layers and one run as it is, for two of the three forwards.
    assert told[-1] == (6, 6)
    assert found == pytest.approx(sensitivities(wan, wan.transformer, forwards, 3))


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
    every = default_candidates()
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
