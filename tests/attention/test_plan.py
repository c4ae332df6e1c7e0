"""Invariant 6: a plan survives its file byte for byte, and a wrong one is refused by the name of the field."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from ziggurat.attention.dense import Dense
from ziggurat.attention.order import TokenOrder
from ziggurat.attention.plan import HeadGroup, HeadPlan, LayerPlan, Plan
from ziggurat.attention.schedule import Schedule
from ziggurat.attention.skip import Skip
from ziggurat.attention.stripe import Box, Stripe
from ziggurat.attention.window import Window

MODEL = {"model_class": "WanTransformer3DModel", "heads": 4, "head_dim": 32}


def example() -> Plan:
    temporal = HeadGroup(
        order=TokenOrder(name="temporal"),
        tile=64,
        block=16,
        entries=(
            HeadPlan(heads=(2, 0), selector=Window(height=5, width="12.5%")),
            HeadPlan(heads=(3,), selector=Stripe(boxes=(Box(frames=(0, 1)),)), rest="drop"),
        ),
    )
    tiles = HeadGroup(order=TokenOrder(name="tile", sizes=(4, 4, 4)), entries=(HeadPlan(heads=(1,), selector=Dense()),))
    return Plan(
        **MODEL,
        name="exämple",
        grid=(17, 16, 16),
        schedule=Schedule(dense_until=0.9, refresh_at=(0.8, 0.5)),
        predicted={"seconds": 1, "density": 1 / 3},
        measured={"psnr": 31.4159265358979},
        layers=(
            LayerPlan(dense="the first layer is sensitive"),
            LayerPlan(groups=(temporal, tiles), schedule=Schedule(dense_first_steps=2)),
        ),
    )


def test_survives_its_file(tmp_path: Path):
    plan = example()
    first = plan.save(tmp_path / "a.json").read_bytes()
    loaded = Plan.load(tmp_path / "a.json")
    assert loaded == plan
    assert loaded.save(tmp_path / "b.json").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
    data = json.loads(first)
    assert data["version"] == 1
    assert data["layers"][1]["groups"][0]["order"] == "temporal"
    assert data["layers"][1]["groups"][0]["factors"] == [1, 16]


def test_what_it_was_made_for_survives_and_is_left_out_where_unknown():
    text = example().to_json()
    assert not {"expert", "text_length", "guidance"} & json.loads(text).keys()
    told = example().model_copy(update={"expert": "transformer_2", "text_length": 0, "guidance": 4.0})
    assert Plan.from_json(told.to_json()) == told
    assert Plan.from_json(told.to_json()).to_json() == told.to_json()


def test_the_shipped_plan_keeps_its_text():
    path = Path(__file__).parents[2] / "assets/plans/shapes.json"
    assert Plan.load(path).to_json() == path.read_text(encoding="utf-8")


def test_hand_written_shorthand_becomes_one_text():
    data = json.loads(example().to_json())
    group = data["layers"][1]["groups"][0]
    del group["factors"], group["entries"][0]["rest"]
    assert Plan.from_json(json.dumps(data)).to_json() == example().to_json()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = example().save(tmp_path / "plan.json")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        example().model_copy(update={"name": "other"}).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_stays_small_when_every_head_differs():
    def layer(index: int) -> LayerPlan:
        window = [Window(frames=f"{index + 1}.125%", height=head + 1, width=f"{head}.875%") for head in range(40)]
        entries = tuple(HeadPlan(heads=(head,), selector=window[head]) for head in range(40))
        return LayerPlan(
            groups=tuple(
                HeadGroup(order=TokenOrder(name="tile", sizes=(4, 4, 4)), entries=entries[first:last])
                for first, last in ((0, 14), (14, 28), (28, 40))
            ),
            schedule=Schedule(dense_until=0.9, refresh_at=(0.8, 0.5)),
        )

    plan = Plan(model_class="X", heads=40, head_dim=128, grid=(21, 45, 80), layers=tuple(layer(i) for i in range(40)))
    assert len(plan.to_json()) < 2_000_000
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(("field", "value"), [
    ("model_class", "FluxTransformer2DModel"), ("layers", 3), ("heads", 40), ("head_dim", 128),
])  # fmt: skip
def test_another_model_is_refused(field: str, value: str | int):
    model = {"model_class": "WanTransformer3DModel", "layers": 2, "heads": 4, "head_dim": 32}
    example().check(**model)
    with pytest.raises(ValueError, match=f"its {field} is .* the model's is {value!r}"):
        example().check(**{**model, field: value})


def test_config_hash_is_compared_where_both_know_it():
    model = {"model_class": "WanTransformer3DModel", "layers": 2, "heads": 4, "head_dim": 32}
    hashed = example().model_copy(update={"config_hash": "abc"})
    hashed.check(**model)
    hashed.check(**model, config_hash="abc")
    example().check(**model, config_hash="abc")
    with pytest.raises(ValueError, match="config_hash is 'abc'"):
        hashed.check(**model, config_hash="def")


def refused(text: str | bytes) -> str:
    with pytest.raises(ValueError, match="plan") as caught:
        Plan.from_json(text)
    assert not isinstance(caught.value, ValidationError)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def changed(path: str, value: object) -> str:
    """The example's text with one field replaced."""
    data = json.loads(example().to_json())
    *parents, last = path.split(".")
    place = data
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    place[int(last) if last.isdigit() else last] = value
    return json.dumps(data)


ENTRY = "layers.1.groups.0.entries.0"


@pytest.mark.parametrize(("path", "value", "named"), [
    ("version", 2, "version 2"),
    ("version", "1", "version '1'"),
    ("measured.psnr", float("nan"), "measured.psnr"),
    ("predicted.seconds", float("inf"), "predicted.seconds"),
    ("schedule.dense_until", float("nan"), "schedule.dense_until"),
    ("schedule.refresh_at", [0.2, 0.8], "refresh_at must fall"),
    ("grid", [17, 16], "grid"),
    ("heads", 5, r"layers.1.groups must hold each of the 5 heads once, wrong are \[4\]"),
    ("heads", 10**9, "heads"),
    ("expert", 2, "expert"),
    ("text_length", -1, "text_length"),
    ("guidance", float("inf"), "guidance"),
    ("surprise", 1, "surprise"),
    (f"{ENTRY}.heads", [0, 1], "heads once"),
    (f"{ENTRY}.heads", [], f"{ENTRY}.heads"),
    (f"{ENTRY}.rest", "mean", f"{ENTRY}.rest"),
    (f"{ENTRY}.selector.name", "magic", f"{ENTRY}.selector"),
    (f"{ENTRY}.selector.height", "all", f"{ENTRY}.selector.window.height"),
    (f"{ENTRY}.selector.depth", 3, f"{ENTRY}.selector.window.depth"),
    ("layers.1.groups.0.factors", [1, 5], "factors must hold a divisor of block 16"),
    ("layers.1.groups.0.order", "spiral", "layers.1.groups.0.order"),
    ("layers.1.groups.0.tile", 0, "layers.1.groups.0.tile"),
    ("layers.1.groups", [], "layers.1"),
    ("layers.0.dense", None, "layers.0"),
    ("layers.1.schedule", {"dense_first_layers": 1}, "layers.1: a layer's own schedule can't say which layers"),
])  # fmt: skip
def test_refusals_name_the_field(path: str, value: object, named: str):
    message = refused(changed(path, value))
    assert named.replace("\\", "") in message


@pytest.mark.parametrize("text", [
    b"", b"null", b"[]", b"\xff\xfe\x00", b'{"version": 1}', b'{"version": 1, "heads": ' + b"9" * 5000 + b"}",
    b'{"version": 1, "name": "\\ud800"}', b"[" * 100_000, b'{"version": 1, "note": ' + b'{"a":' * 50_000,
], ids=lambda text: repr(text[:20]))  # fmt: skip
def test_broken_files_are_refused(text: bytes):
    assert refused(text).startswith("plan (text) ")


def test_truncated_and_deep_files_say_so(tmp_path: Path):
    text = example().to_json()
    for cut in range(1, len(text) - 2, 97):
        assert "truncated" in refused(text[:cut])
    deep: object = 1
    for _ in range(300):
        deep = [deep]
    assert "note" in refused(changed("note", deep))
    assert "too deeply" in refused(b'{"version": 1, "note": ' + b"[" * 10**6 + b"]" * 10**6 + b"}")
    with pytest.raises(ValueError, match="does not exist"):
        Plan.load(tmp_path / "none.json")


def test_more_than_three_groups_are_refused():
    group = HeadGroup(entries=(HeadPlan(heads=(0,), selector=Skip()),))
    with pytest.raises(ValidationError, match="at most 3"):
        LayerPlan(groups=(group,) * 4)


def test_plans_are_frozen_and_uniform_plans_share_groups():
    group = HeadGroup(entries=(HeadPlan(heads=(0, 1, 2, 3), selector=Skip(), rest="drop"),))
    plan = Plan.uniform([group], layers=3, dense_layers={0: "first"}, grid=(1, 2, 3), **MODEL)
    assert [layer.dense for layer in plan.layers] == ["first", None, None]
    assert plan.layers[1].groups[0].factors == (1,)
    with pytest.raises(ValidationError, match="frozen"):
        plan.heads = 5  # type: ignore[misc]
    dense = Plan.dense(layers=2, grid=(1, 2, 3), **MODEL)
    assert all(layer.dense for layer in dense.layers)
