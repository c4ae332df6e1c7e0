"""The Triton kernels' binaries, compiled afresh for every target, against demands and against the committed table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ziggurat.kernels import binaries, gpu_targets
from ziggurat.kernels.gpu_devices import DEVICES, occupancy

pytest.importorskip("triton")

HERE = Path(__file__).parent
PARTS = 2
ROWS = {tuple(row[key] for key in binaries.KEYS): row for row in binaries.table()}


@pytest.fixture(scope="module")
def compiled():
    """Rows by their keys, compiled by two processes that share a cache of this run alone."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    commands = [[sys.executable, str(HERE / "compiled.py"), str(part), str(PARTS)] for part in range(PARTS)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for command in commands]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * PARTS
    rows = [json.loads(line) for text in said for line in text.splitlines()]
    return {tuple(row[key] for key in binaries.KEYS): row for row in rows}


def test_the_table_covers_every_kernel_on_every_target(compiled):
    wanted = {(k, t, d, b) for k in gpu_targets.KERNELS for t in DEVICES for d in (64, 128) for b in (16, 64)}
    assert set(ROWS) == wanted
    assert set(compiled) == wanted


@pytest.mark.parametrize("key", list(ROWS), ids=lambda key: "-".join(map(str, key)))
def test_a_binary_meets_the_demands_and_is_no_worse_than_before(compiled, key):
    assert not binaries.faults(compiled[key])
    assert not binaries.worse(compiled[key], ROWS[key])


def told(what: str):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "compiled.py"), what]
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)


@pytest.mark.slow
def test_what_the_table_leaves_out_does_not_spill_either():
    """float32 up to head_dim 128; a head_dim that is padded, and the largest."""
    assert told("wide") == {"float32": [0] * 8, "bfloat16": [0] * 10}


LAUNCHED = ["attend_tile", "dot_rows", "grad_query_tile", "grad_rows_block", "sum_rows", "sum_rows", "mass_tile"]


def test_what_the_host_launches_compiles():
    """Sizes of 1, which Triton makes constants of, and sizes that are no power of two."""
    assert [[name for name, _ in run] for run in told("launched")] == [LAUNCHED] * 3


def test_a_launch_that_does_not_fit_gives_way_to_the_next_smaller_one():
    """On a chip of compute capability 8.0 with 48 KiB of shared memory, of which the table's launches take more."""
    limit = 48 << 10
    found = told("tight")
    roomy, first, again = (dict(run) for run in (found["roomy"], *found["runs"]))
    assert list(first) == list(roomy) == list(dict.fromkeys(LAUNCHED))
    kernels = {"forward": "attend_tile", "grad_query": "grad_query_tile", "grad_rows": "grad_rows_block"}
    narrowed = {kernel for kernel, name in {**kernels, "mass": "mass_tile"}.items() if roomy[name] > limit}
    assert narrowed >= set(kernels)
    assert all(size <= limit for size in first.values())
    # Debug output says what was too large and what is taken; the next run takes it at once.
    assert {line.split()[0] for line in found["said"][0]} == narrowed
    assert all("needs too much shared memory, taking Launch(" in line for line in found["said"][0])
    assert found["said"][1] == []
    assert again == first
    assert "head_dim 128 with blocks of 64 rows does not fit this GPU's shared memory" in found["refused"]
    assert "use backend='torch'" in found["refused"]
    assert found["old"] == "backend='triton' needs compute capability 8.0 or later, got 7.5: use backend='torch'"


def test_why_rows_come_by_loads_on_gfx942():
    """Triton can be told to copy straight to shared memory; gfx942 does so 4 bytes at a time, gfx950 16."""
    assert told("direct") == {"hip:gfx942": ["global_load_lds_dword"], "hip:gfx950": ["global_load_lds_dwordx4"]}


def test_a_change_for_the_worse_is_seen():
    row = ROWS["forward", "cuda:90", 128, 16]
    assert not binaries.faults(row)
    for name, value, fault in (
        ("stack", 8, "8 stack"),
        ("spills", 1, "1 spills"),
        ("shared", 240 << 10, "shared memory"),
        ("wgmma", 0, "no wgmma"),
        ("work", 2.0, "2.0 times"),
        ("wide_share", 0.5, "50% of the rows come by 16-byte async copies"),
    ):
        assert fault in " ".join(binaries.faults({**row, name: value}))
    amd = ROWS["forward", "hip:gfx942", 128, 16]
    assert binaries.faults({**amd, "wide_share": 0.0}) == ["0% of the rows come by 16-byte wide loads"]
    for name, by in (("registers", 1), ("shared", 4), ("occupancy", -1), ("wide_share", -0.1)):
        assert binaries.worse({**row, name: row[name] + by}, row)
        assert not binaries.worse({**row, name: row[name] - by}, row)


LOOPS = """
$L__BB0_1:
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2;
	@%p1 bra $L__BB0_3;
$L__BB0_2:
	wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1, %rd2;
	bra.uni $L__BB0_4;
$L__BB0_3:
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
	@%p2 bra $L__BB0_2;
	bra.uni $L__BB0_5;
$L__BB0_4:
	@%p3 bra $L__BB0_3;
$L__BB0_5:
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2;
	ret;
"""


def test_a_loop_is_found_wherever_its_blocks_stand():
    pytest.importorskip("triton.backends.nvidia")
    from ziggurat.kernels.triton_backend.binaries import loops, products

    (loop,) = loops(LOOPS)
    assert "m64n128k16" in loop
    assert "0x10" in loop
    assert "m64n64k16" not in loop
    assert products(loop, LOOPS, 8) == (2 * 2 * 64 * 128 * 16, {"wgmma": 1, "tcgen05": 0, "mma_sync": 0, "mfma": 0})


@pytest.mark.parametrize("target", DEVICES)
@pytest.mark.parametrize("head_dim", [16, 48, 80, 128, 200, 256])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_every_size_has_a_configuration(target, head_dim, block):
    for kernel in gpu_targets.KERNELS:
        launch = gpu_targets.fit(kernel, getattr(gpu_targets.config(target, head_dim, block), kernel), 128, block)
        while (narrower := gpu_targets.smaller(kernel, launch, block)) is not None:
            launch = narrower
        assert (launch.stages, launch.tile) == (1, 16)


def test_configurations_of_devices_outside_of_the_table():
    assert gpu_targets.known("cuda:86") == "cuda:80"
    assert gpu_targets.known("cuda:103") == "cuda:100"
    assert gpu_targets.known("cuda:121") == "cuda:120"
    assert gpu_targets.known("hip:gfx950") == "hip:gfx942"
    with pytest.raises(ValueError, match="head_dim must be at most 256"):
        gpu_targets.config("cuda:90", 512, 64)


def test_occupancy():
    assert occupancy("cuda:90", warps=8, registers=128, shared=50 << 10) == 2
    assert occupancy("cuda:90", warps=8, registers=129, shared=50 << 10) == 1
    assert occupancy("cuda:90", warps=4, registers=64, shared=100 << 10) == 2
    assert occupancy("cuda:100", warps=4, registers=64, shared=1 << 10, tensor_columns=256) == 2
    assert occupancy("hip:gfx942", warps=4, registers=256, shared=32 << 10) == 2
    assert occupancy("hip:gfx942", warps=4, registers=257, shared=32 << 10) == 1
