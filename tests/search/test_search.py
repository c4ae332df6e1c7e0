"""A search finds what was planted, resumes as if in one go, and says what it could not do."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from ziggurat.attention.dense import Dense
from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.order import TokenOrder, coordinates
from ziggurat.attention.plan import Plan
from ziggurat.attention.schedule import Schedule
from ziggurat.attention.skip import Skip
from ziggurat.attention.topk import TopK
from ziggurat.attention.window import Window
from ziggurat.kernels.attend import attend
from ziggurat.kernels.listops import all_blocks
from ziggurat.kernels.pyramid import build_pyramid
from ziggurat.search import run as searching
from ziggurat.search import scoring
from ziggurat.search.candidates import default_candidates, load_candidates, to_toml, with_dense
from ziggurat.search.capture import Sample
from ziggurat.search.choose import Problem, choose
from ziggurat.search.compose import layer_plan
from ziggurat.search.entry import entries_of
from ziggurat.search.findings import Candidate, Findings
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


def planted(grid: TokenGrid, head_dim: int = 32) -> Sample:
    """Heads: frame by frame, one patch's column over all frames, every second row and column, everything alike."""
    frame, row, column = (axis.float() for axis in coordinates(grid.visual[0].grid))
    width = grid.visual[0].grid[2]
    parity = 2 * (row % 2) + column % 2
    kinds = [frame, row * width + column, parity, torch.zeros_like(frame)]
    generator = torch.Generator().manual_seed(0)
    heads = []
    for kind in kinds:
        codes = torch.randn(int(kind.max()) + 1, 256, generator=generator)
        codes = torch.linalg.qr(codes.T)[0].T if len(codes) <= 256 else codes / codes.norm(dim=1, keepdim=True)
        heads.append(codes[kind.long()])
    key = torch.stack(heads)[None]
    query = key * 200
    # A head that attends to everything alike reads the mean.
    query[:, 3] = 0
    # Without it keys of a kind would be equal, and reading them pooled would be exact.
    key = key + 0.1 * torch.randn(key.shape, generator=generator)
    value = torch.randn(1, len(kinds), grid.tokens, 256, generator=generator)
    return Sample(source="planted", query=query, key=key, value=value, grid=grid)


def test_planted_patterns_give_those_families_back():
    grid = TokenGrid.video(6, 8, 8)
    layout = {"tile": 64, "block": 16}
    tried = with_dense(
        [
            Candidate(selector=Window(frames=1), rest="drop", order=TokenOrder.model_validate("raster"), **layout),
            Candidate(
                selector=Window(height=1, width=1), rest="drop", order=TokenOrder.model_validate("temporal"), **layout
            ),
            Candidate(
                selector=Window(dilation=(1, 2, 2)),
                rest="drop",
                order=TokenOrder.model_validate("strided(2)"),
                **layout,
            ),
            Candidate(selector=Skip(), rest="pooled", order=TokenOrder.model_validate("raster"), **layout),
        ]
    )
    found = score(planted(grid), entries_of(tried, grid))
    seconds = np.array(found["densities"])[None]
    problem = Problem(
        errors=np.array(found["errors"])[None],
        seconds=seconds,
        groups=list(range(len(tried))),
        launch=0.0,
        stock=100.0,
    )
    wanted = ["window frames=1", "window height=1 width=1", "window dilation=(1, 2, 2)"]
    # One head at a time: a layer may hold three groups, and these would be four.
    for head, name in enumerate(wanted):
        one = Problem(
            errors=problem.errors[:, head : head + 1],
            seconds=seconds[:, head : head + 1],
            groups=problem.groups,
            launch=0.0,
            stock=100.0,
        )
        choice = choose(one, max_error=0.02)
        assert choice is not None
        assert choice.picks[0] is not None
        assert str(tried[choice.picks[0][0]]).startswith(name)
    uniform = Problem(
        errors=problem.errors[:, 3:4], seconds=seconds[:, 3:4], groups=problem.groups, launch=0.0, stock=100.0
    )
    choice = choose(uniform, max_error=0.02)
    assert choice is not None
    assert choice.picks[0] is not None
    assert tried[choice.picks[0][0]].family == "skip"


def test_scores_are_those_of_attention_itself():
    grid = TokenGrid.video(3, 7, 5)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 2, grid.tokens, 16, generator=generator) for _ in range(3))
    sample = Sample(source="captured", query=query, key=key, value=value, grid=grid)
    tried = with_dense(FEW)
    found = score(sample, entries_of(tried, grid))
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    for number, entry in enumerate(entries_of(tried, grid)):
        pyramid = build_pyramid(key, value, entry.layout.key_rows, block=16)
        _, lse = attend(query, pyramid, all_blocks(entry.layout.query_rows, 16))
        blocks, pyramid = entry.select(sample, lse, None, None)
        out, _ = attend(query, pyramid, blocks, backend="reference")
        for head in range(2):
            error = float((out - exact)[0, head].norm() / exact[0, head].norm())
            assert found["errors"][head][number] == pytest.approx(error, abs=1e-5)
        assert np.mean([head[number] for head in found["densities"]]) == pytest.approx(blocks.density(pyramid))
    assert [head[0] for head in found["recalls"]] == pytest.approx([1.0, 1.0])


def test_of_long_sequences_some_tiles_are_measured(monkeypatch: pytest.MonkeyPatch):
    grid = TokenGrid.video(4, 8, 8)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 2, grid.tokens, 16, generator=generator) for _ in range(3))
    sample = Sample(source="captured", query=query, key=key, value=value, grid=grid)
    whole = score(sample, entries_of(FEW, grid))
    monkeypatch.setattr(scoring, "MOST_ROWS", 100)
    part = score(sample, entries_of(FEW, grid))
    assert (whole["rows"], part["rows"]) == (256, 96)
    assert part["densities"] == whole["densities"]
    assert np.allclose(part["errors"], whole["errors"], rtol=0.5, atol=1e-6)
    assert part["errors"] != whole["errors"]


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
    calls = iter(range(100))
    with pytest.raises(Cancelled):
        run(wan, tmp_path / "parts", proofs=0, cancelled=lambda: next(calls) == 9)
    journal = tmp_path / "parts/scores.jsonl"
    before = journal.read_text().splitlines()
    assert len(before) == 10
    with journal.open("a") as file:
        file.write('{"prompt": 1, "st')
    made: list[tuple] = []
    original = scoring.score
    monkeypatch.setattr(scoring, "score", lambda *given: made.append(given) or original(*given))
    parts = run(wan, tmp_path / "parts", proofs=0, resume=True)
    assert len(made) == 16 - 9
    for name in ("errors", "recalls", "densities", "weights"):
        assert getattr(parts.findings, name) == getattr(whole.findings, name)
    with pytest.raises(ValueError, match="of another search"):
        run(wan, tmp_path / "parts", proofs=0, resume=True, seed=1)


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
    first, second = sensitivities(wan, wan.transformer, forwards)
    assert first > 20 * second > 0


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
