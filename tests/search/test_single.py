"""Plans of one selector alone: at the density asked for, for the model at hand, and runnable."""

from __future__ import annotations

import pytest

from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.plan import Plan
from ziggurat.attention.run import PlanRun
from ziggurat.attention.schedule import Schedule
from ziggurat.pipelines.plans import ModelShape
from ziggurat.search.maps import synthetic
from ziggurat.search.single import ALONE, single_plan

GRID = TokenGrid.video(5, 16, 16)
SHAPE = ModelShape(model_class="Tiny", layers=2, heads=2, head_dim=32, config_hash="abc")


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("density", [0.15, 0.3])
def test_has_the_density_asked_for_in_a_run(name: str, density: float):
    sample = synthetic("clustered", GRID)
    plan = single_plan(name, density, [sample], SHAPE, schedule=Schedule(), tile=64)
    assert Plan.from_json(plan.to_json()) == plan
    assert {entry.selector.name for layer in plan.layers for g in layer.groups for entry in g.entries} == {name}
    run = PlanRun(plan)
    for _ in range(2):  # a precise list's first step runs dense
        run.attend_layer(sample.query, sample.key, sample.value, layer=0, noise_level=0.5, step=0, grid=GRID)
    assert run.list_density() == pytest.approx(plan.predicted["list_density"], abs=1e-3)
    assert run.list_density() == pytest.approx(density, rel=0.2)


def test_refused():
    sample = synthetic("local", TokenGrid.video(2, 4, 4))
    with pytest.raises(ValueError, match="name must be one of topk"):
        single_plan("magic", 0.1, [sample], SHAPE, schedule=Schedule())
    with pytest.raises(ValueError, match="density must be one that topk can have"):
        single_plan("topk", 0.01, [sample], SHAPE, schedule=Schedule())
