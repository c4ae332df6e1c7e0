"""The model of the GPU kernels, and that docs/gpu.md shows what it says of the committed binaries."""

from pathlib import Path

import pytest

from ziggurat.kernels import gpu_model
from ziggurat.kernels.binaries import table
from ziggurat.kernels.gpu_devices import DEVICES

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
FORWARD = [row for row in table() if row["kernel"] == "forward"]


def test_the_page_shows_the_models_tables():
    assert PAGE.read_text().partition("## What it gives\n\n")[2] == gpu_model.page(table()) + "\n"


def test_clocks_follow_from_the_arithmetic():
    device = DEVICES["cuda:90"]
    clocks = gpu_model.step_clocks(device, tile=128, rows=64, head_dim=128)
    # 4 · 128 · 64 · 128 operations at 4096 a clock; (128 · 64 + 128) exponentials at 16 a clock.
    assert clocks["products"] == pytest.approx(1024, rel=0.01)
    assert clocks["exp2"] == 520
    assert clocks["L2"] == 64 * (2 * 128 * 2 + 12) / 39
    twice = gpu_model.step_clocks(device, tile=128, rows=64, head_dim=128, blocks=2)
    assert twice == {name: 2 * value for name, value in clocks.items()}


@pytest.mark.parametrize("row", FORWARD, ids=lambda row: f"{row['target']}-{row['head_dim']}-{row['block']}")
def test_a_share_is_one_and_falls_with_density_and_occupancy(row):
    shares = [gpu_model.predict(row["target"], row, density=density).share for density in (1.0, 0.125, 0.03, 0.01)]
    assert shares[-1] > 0
    assert shares[0] <= 1
    assert shares == sorted(shares, reverse=True)
    more = gpu_model.predict(row["target"], {**row, "occupancy": row["occupancy"] + 1})
    assert more.share >= shares[1]
    found = gpu_model.predict(row["target"], row)
    assert found.likely < found.share
    assert found.break_even <= 1
