"""The model card tells how it was trained, by every run, and one score."""

from pathlib import Path

from ziggurat.pipelines.shapes.card import card, write_score
from ziggurat.pipelines.shapes.evaluate import wilson
from ziggurat.pipelines.shapes.train import STAGES, recipe


def test_a_card_keeps_what_its_start_was_trained_on(tmp_path: Path):
    (tmp_path / "README.md").write_text(card(["tiny: 10 steps"], None))
    write_score(tmp_path, {"captions": 8, "steps": 4, "guidance": 4.0, "dtype": "bfloat16", "dense": {}})
    again = card(["full: 20 steps"], tmp_path)
    assert "- tiny: 10 steps\n- full: 20 steps\n" in again
    assert "Score" not in again


def test_a_new_score_replaces_the_old(tmp_path: Path):
    (tmp_path / "README.md").write_text(card(["tiny: 10 steps"], None))
    for right in (3, 7):
        result = {"captions": 8, "steps": 4, "guidance": 4.0, "dtype": "bfloat16", "dense": {"all": wilson(right, 8)}}
        write_score(tmp_path, result)
    text = (tmp_path / "README.md").read_text()
    assert text.count("## Score") == 1
    assert "| all attributes | 87.5% |" in text
    assert "37.5%" not in text
    assert not list(tmp_path.glob("*.part"))


def test_a_start_whose_past_is_unknown_is_said(tmp_path: Path):
    assert "from nothing" in card(["tiny: 10 steps"], None)
    text = card(["tiny: 10 steps"], tmp_path)
    assert f"going on from {tmp_path.name}" in text
    assert "from nothing" not in text


def test_training_under_a_plan_is_told():
    told = {stage.name: recipe(stage) for stage in STAGES}
    assert "under a sparse plan" in told["planned"]
    assert "plan" not in told["full"]
