"""What finding lists costs is measured on the lists that run."""

from __future__ import annotations

import pytest

from ziggurat.search import overhead as module
from ziggurat.search.overhead import overhead


def test_measures_each_selector(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(module.GRIDS, 960, (3, 16, 20))
    found = overhead(960, head_dim=16, block=16, repeats=1)
    assert [one.selector for one in found] == [
        "topk",
        "precise",
        "loglinear",
        "pyramid",
        "loglinear, keep 8, block 16",
    ]
    assert {one.heads for one in found} == {4}
    for one in found:
        parts = (one.lay_out_seconds, one.pyramid_seconds, one.select_seconds, one.attend_seconds)
        assert min(parts) > 0
        spent = one.lay_out_seconds + 5 * one.pyramid_seconds + one.select_seconds
        assert one.share == pytest.approx(spent / (5 * one.attend_seconds))
        assert one.microseconds_per_token == pytest.approx(1e6 * sum(parts[1:]) / 960 / one.heads)
    assert found[0].list_density == pytest.approx(0.125, abs=0.02)
    with pytest.raises(ValueError, match="tokens must be one of 4096, 4352, 65536"):
        overhead(7)
