"""The kernel benchmark measures what it says, and notices a wrong kernel."""

from dataclasses import replace

import pytest
import torch

from ziggurat.kernels import bench, gather, native_build
from ziggurat.kernels.chip import has_bfloat16

SMALL = bench.Setting(dtype="float32", tokens=300, head_dim=32, heads=2, tile=64, block=16, density=0.25)


@pytest.mark.parametrize("change", [{}, {"density": 1.0}, {"uneven": True}, {"backward": True}, {"dtype": "bfloat16"}])
def test_a_row_has_its_figures(change):
    row = bench.measure(replace(SMALL, **change), runs=1)
    assert row["backend"] == "torch"
    assert row["density"] == pytest.approx(change.get("density", 0.25), abs=0.06)
    assert row["speedup_x_density"] == pytest.approx(row["speedup"] * row["density"], rel=1e-3)
    assert 0 < row["max_error"] < 0.02
    # Less by far than the scores of dense attention in float32, and a few times that for their gradients.
    assert 0 < row["peak_bytes"] < 2 * 300 * 300 * 4 * 10


def test_flex_is_timed_beside_it(monkeypatch):
    # Compiling takes a quarter of a minute and changes no result.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert bench.measure(SMALL, runs=1, flex=True)["flex_seconds"] > 0
    with pytest.raises(ValueError, match="flex has no backward"):
        bench.measure(replace(SMALL, backward=True), runs=1, flex=True)


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    right = gather._forward

    def wrong(*arguments):
        out, lse = right(*arguments)
        return out + 0.01, lse

    monkeypatch.setattr(gather, "_forward", wrong)
    with pytest.raises(RuntimeError, match="is wrong by"):
        bench.measure(SMALL, runs=1)


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    monkeypatch.setattr(native_build, "lacking", lambda dtype, device: "left out")
    right = gather.backward_group

    def wrong(walk, out, grad_out, *rest):
        right(walk, out, 1.01 * grad_out, *rest)

    monkeypatch.setattr(gather, "backward_group", wrong)
    bench.measure(SMALL, runs=1)
    with pytest.raises(RuntimeError, match="is wrong by"):
        bench.measure(replace(SMALL, backward=True), runs=1)


def test_memory_is_what_tensors_hold_beyond_the_result():
    def call():
        one = torch.empty(1 << 20, dtype=torch.uint8)
        del one
        two = torch.empty(3 << 20, dtype=torch.uint8)
        three = torch.empty(1 << 20, dtype=torch.uint8)
        del two
        return (three,)

    assert bench._peak_bytes(call) == 3 << 20


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("backward", [False, True])
def test_working_memory_is_bounded(head_dim, backward):
    """64 MiB at 8,192 tokens and two threads; each further thread may add sums of its own to a backward."""
    # A chip without bfloat16 products would copy all that is bfloat16 to float32 first.
    dtype = "bfloat16" if has_bfloat16() else "float32"
    setting = bench.Setting(dtype=dtype, tokens=8192, head_dim=head_dim, backward=backward, backend="torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert bench._peak_bytes(bench._ours(setting, bench.build(setting))) <= 64 << 20
    finally:
        torch.set_num_threads(threads)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype must be one of"):
        bench.measure(replace(SMALL, dtype="int8"))
