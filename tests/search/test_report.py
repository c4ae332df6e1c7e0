"""The report of a search tells its figures, shows every picture, and needs nothing beside itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ziggurat.attention.expect import head_densities
from ziggurat.attention.plan import Plan
from ziggurat.attention.selectors import SELECTORS
from ziggurat.search import figures, tables
from ziggurat.search.heatmap import COLOURS, STOCK, _outline, attention_map, families, heatmap, save
from ziggurat.search.report import write_report


class Page(HTMLParser):
    """What a page shows: its text, and what its tags name."""

    def __init__(self, text: str):
        super().__init__()
        self.words: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "img":
            self.sources.append(found["src"] or "")
        self.links += [str(found[name]) for name in ("href", "action", "data") if name in found]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_report_holds_every_picture_and_nothing_from_outside(made_up, made_up_map, made_up_videos, tmp_path: Path):
    findings = made_up()
    maps = {"layer 1, head 0: window <1>": made_up_map(), "layer 2, head 3: topk": made_up_map(8, 20)}
    (tmp_path / "map-7.png").write_bytes(b"of an earlier search")
    path = write_report(tmp_path, findings, findings.plan(5), maps, made_up_videos())
    names = {"heatmap", "front", "predicted", "costs", "sensitivity", "frames", "map-0", "map-1"}
    assert {one.name for one in tmp_path.iterdir()} == {f"{name}.png" for name in names} | {"report.html"}
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.sources) == len(names)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert page.links == []
    assert not re.search(r"https?:|url\(|@import|<script", text)
    words = " ".join(page.words)
    # What came from outside is text, not markup.
    assert "a small <b>blue</b> square & nothing else" in words
    assert "0.930, 0.710, 0.280 of 30 steps" in words
    assert "a sample of 96 of 320" in words


def test_a_search_without_proof_has_a_report_too(made_up, tmp_path: Path):
    findings = made_up(proofs=[], costs=[], held_out=[])
    (tmp_path / "predicted.png").write_bytes(b"of an earlier search")
    path = write_report(tmp_path, findings, findings.plan(5), {}, {})
    assert {one.name for one in tmp_path.glob("*.png")} == {"heatmap.png", "front.png", "sensitivity.png"}
    assert "not proved" in path.read_text(encoding="utf-8")


def test_an_unfinished_search_has_no_report(made_up, tmp_path: Path):
    findings = made_up(chosen=None)
    with pytest.raises(ValueError, match="no chosen plan"):
        write_report(tmp_path, findings, findings.plan(0), {}, {})


def test_layers_add_up_to_the_plan(made_up):
    findings = made_up()
    plan = findings.plan(5)
    _, *rows, every = tables.layers(findings, plan)
    assert [row[0] for row in rows] == [str(layer) for layer in range(findings.shape.layers)]
    heads_each = findings.shape.heads
    assert rows[0][1] == f"{heads_each} {STOCK}"
    for row, layer in zip(rows, plan.layers, strict=True):
        counted = {name: int(count) for count, name in (part.split(" ") for part in row[1].split(", "))}
        heads = {e.selector.name: 0 for g in layer.groups for e in g.entries}
        for group in layer.groups:
            for entry in group.entries:
                heads[entry.selector.name] += len(entry.heads)
        assert counted == (heads or {STOCK: heads_each})
    assert sum(float(row[4]) for row in rows) == pytest.approx(findings.front[5].error, abs=1e-3)
    assert every[4] == f"{findings.front[5].error:.4f}"
    assert [float(row[5]) for row in rows] == findings.sensitivities


def test_tables_tell_prediction_beside_measurement(made_up):
    findings = made_up()
    rows = {row[0]: row for row in tables.proofs(findings)[1:]}
    assert [row[4] for row in rows.values()] == ["-4%", "+8%", "+20%"]
    assert rows["5 (chosen)"][6] == "28.5"
    _, *kinds, every = tables.residuals(findings)
    assert [row[0] for row in kinds] == ["16, dropped", "16, pooled", "64, dropped", "64, pooled"]
    off = [abs(row.fitted / row.seconds - 1) for row in findings.costs]
    assert every[3:] == (f"{np.median(off):.1%}", f"{max(off):.1%}")
    said = {row[0]: row[1:] for row in tables.headline(findings)[1:]}
    proof = findings.proofs[1]
    measured = proof.own_dense_attention_seconds / proof.attention_seconds
    assert said["faster than our kernel with all blocks"][1] == f"{measured:.2f} times"


def test_the_best_alone_takes_no_more_time(made_up):
    findings = made_up()
    point = findings.front[5]
    least = min(error for _, seconds, error in figures.singles(findings) if seconds <= point.seconds)
    assert f"error {least:.4f} " in tables.best_alone(findings)


def test_every_family_has_a_colour_of_its_own():
    assert set(COLOURS) == set(SELECTORS)
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_a_heatmap_shows_family_density_and_stock_layers(sparse_plan):
    plan: Plan = sparse_plan()
    mixed = plan.model_copy(update={"layers": (plan.layers[0], Plan.dense(**plan_fields(plan)).layers[0])})
    assert families(mixed) == [["window", "stripe"], [STOCK, STOCK]]
    assert head_densities(mixed)[1] == [1.0, 1.0]
    figure = heatmap(mixed, [[0.004, 1.0], [1.0, 1.0]])
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["0.4", "100"]
    picture = np.asarray(axes.images[0].get_array())
    # The paler, the sparser; stock is grey.
    assert picture[0, 0].sum() > 2.4
    assert np.ptp(picture[1, 0]) < 0.03
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["window (1)", "stripe (1)", "stock attention (2)"]
    own = heatmap(mixed).axes[0].texts
    assert [text.get_text() for text in own] == [f"{100 * share:.0f}" for share in head_densities(mixed)[0]]
    with pytest.raises(ValueError, match=r"must be \[2 layers\]\[2 heads\], got \[1, 2\]"):
        heatmap(mixed, [[0.5, 0.5]])


def plan_fields(plan: Plan) -> dict:
    return {
        "layers": 1,
        **{name: getattr(plan, name) for name in ("model_class", "heads", "head_dim", "grid")},
    }


def test_an_attention_map_outlines_what_is_read():
    mass = torch.full((3, 4), 0.25)
    reads = torch.zeros(3, 4, dtype=torch.bool)
    reads[1, 1:3] = True
    edges = {frozenset(edge) for edge in _outline(reads.numpy())}
    box = {"top": ((0.5, 0.5), (2.5, 0.5)), "bottom": ((0.5, 1.5), (2.5, 1.5))}
    box |= {"left": ((0.5, 0.5), (0.5, 1.5)), "right": ((2.5, 0.5), (2.5, 1.5))}
    assert edges == {frozenset(edge) for edge in box.values()}
    figure = attention_map(mass, reads, "a title")
    assert "17% of the blocks, 17% of the mass" in figure.axes[1].get_title(loc="left")
    with pytest.raises(ValueError, match="one shape"):
        attention_map(mass, reads[:2])


def test_frames_keep_their_shape(made_up_videos, tmp_path: Path):
    videos = made_up_videos(1)
    assert figures.frames({}) is None
    figure = figures.frames(videos, count=3)
    assert figure is not None
    with Image.open(save(figure, tmp_path / "frames.png")) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    red = (abs(pixels - (220, 60, 50)).max(-1) <= 3)[: pixels.shape[0] // 2]
    height, width = red.any(1).sum(), red.any(0)
    first = np.flatnonzero(width)[0]
    run = np.flatnonzero(~width[first:])[0]
    # A square of 24 x 20 pixels.
    assert height / run == pytest.approx(24 / 20, rel=0.05)


def test_a_picture_is_written_whole_or_not_at_all(made_up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figure = figures.layers(made_up())

    def broken(part, **_):
        Path(part).write_bytes(b"half")
        raise RuntimeError("in the middle")

    monkeypatch.setattr(figure, "savefig", broken)
    with pytest.raises(RuntimeError):
        save(figure, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
