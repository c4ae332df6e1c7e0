"""What comes with the package: the embedded model loads by diffusers alone, and its plan fits it and keeps its word."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline

from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.run import PlanRun
from ziggurat.pipelines import find_plan, load
from ziggurat.pipelines.generate import generate
from ziggurat.pipelines.settings import model_settings
from ziggurat.pipelines.shapes.scenes import BACKGROUNDS, VOCABULARY

GRID = (17, 16, 16)
SHAPES = Path(str(files("ziggurat.assets"))) / "shapes"


@pytest.fixture(scope="module")
def shapes() -> Any:
    pipe = load("shapes", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_diffusers_alone_loads_it(shapes: Any):
    stock: Any = WanPipeline.from_pretrained(str(SHAPES))
    for name in ("transformer", "vae", "text_encoder"):
        ours, theirs = getattr(shapes, name).state_dict(), getattr(stock, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert stock.vae.config.scale_factor_temporal == 2
    assert stock.vae.config.scale_factor_spatial == 4
    unknown = stock.tokenizer.unk_token_id
    assert unknown not in stock.tokenizer(" ".join(VOCABULARY)).input_ids
    assert unknown in stock.tokenizer("teal").input_ids


# Of few steps those that are exact are many: the first, and those that measure what lists leave out.
MOST = {8: 0.63, 10: 0.51, 12: 0.51, 16: 0.39, **dict.fromkeys((20, 25, 30, 50), 0.31)}


@pytest.mark.parametrize(("steps", "most"), MOST.items())
def test_the_shipped_plan_reads_at_most_31_percent(shapes: Any, steps: int, most: float, list_density: float):
    path, plan = find_plan(shapes, GRID) or pytest.fail("no plan is shipped for shapes")
    assert plan.grid == GRID, path
    shapes.scheduler.set_timesteps(steps)
    levels = [float(timestep) / 1000 for timestep in shapes.scheduler.timesteps]
    assert all(group.corrected for layer in plan.layers for group in layer.groups)
    actions = [(layer.schedule or plan.schedule).steps(levels) for layer in plan.layers]
    exact = sum(action != "reuse" for each in actions for action in each) / steps / len(actions)
    assert exact + (1 - exact) * list_density <= most


def test_a_default_run_is_among_those_of_31_percent(shapes: Any):
    assert MOST[model_settings(shapes).steps or 0] == 0.31


@pytest.fixture(scope="module")
def list_density(shapes: Any) -> float:
    found = find_plan(shapes, GRID)
    assert found is not None
    run = PlanRun(found[1])
    query = torch.zeros(1, 4, 17 * 16 * 16, 32)
    for layer in range(len(found[1].layers)):
        for step in (5, 6):  # the first of them measures corrections
            run.attend_layer(query, query, query, layer=layer, noise_level=0.5, step=step, grid=TokenGrid.video(*GRID))
    return run.list_density()


@pytest.mark.filterwarnings("ignore:the plan shipped for this model")
def test_a_sentence_becomes_a_video_by_the_plan(shapes: Any):
    sentence = "a large red circle moving left on a gray background"
    made = generate(shapes, sentence, frames=5, height=128, width=128, steps=6, seed=0)
    assert made.frames.shape == (5, 128, 128, 3)
    assert made.plan_name == "shapes"
    assert made.tokens == 3 * 16 * 16
    assert 0 < made.density < 1
    corners = made.frames[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert abs(np.median(corners, (0, 1)) - BACKGROUNDS["gray"]).max() < 20
    reddish = (made.frames[..., 0] > 150) & (made.frames[..., 1:] < 110).all(-1)
    assert 0.04 < reddish.mean() < 0.3
