"""The Triton backend's numbers, from Triton's interpreter in processes of their own, against the float64 reference."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ziggurat.kernels.attend import attend
from ziggurat.kernels.case_pairs import AXES, pairwise_cases
from ziggurat.kernels.cases import Case, build
from ziggurat.kernels.mass import block_mass

pytest.importorskip("triton")

HERE = Path(__file__).parent
PARTS = 2
# One large case, the pairs, and one in each of four smaller launches: see JOBS of interpreted.py.
COUNT = 1 + len(pairwise_cases()) + 4


def run_interpreted(*arguments: str) -> list[subprocess.Popen]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "interpreted.py")]
    return [
        subprocess.Popen([*command, *part], stdout=subprocess.PIPE, text=True, env=environment)
        for part in ([arguments] if arguments else [(str(part), str(PARTS)) for part in range(PARTS)])
    ]


@pytest.fixture(scope="module")
def measured():
    """What each case measured, by its number."""
    running = run_interpreted()
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * PARTS
    found = {found["number"]: found for found in map(json.loads, "".join(said).splitlines())}
    assert sorted(found) == list(range(COUNT))
    return found


def test_any_two_settings_meet_in_a_case():
    rows = [{**vars(case), "dtype": dtype, "sizes": (case.batch, case.heads)} for case, dtype in pairwise_cases()]
    assert len(rows) <= 120
    assert all(row["tokens"] <= 300 for row in rows)
    missing = [
        (a, x, b, y)
        for a in AXES
        for b in AXES
        if a < b
        for x in AXES[a]
        for y in AXES[b]
        if not any(row[a] == x and row[b] == y for row in rows) and {x, y} != {"overlapping", (1,)}
    ]
    assert not missing


@pytest.mark.parametrize("number", range(COUNT))
def test_a_case_is_as_exact_as_its_precision(measured, number):
    """Held to the reference in float64; what inputs nudged by one rounding change sets the scale."""
    found = measured[number]
    assert "failed" not in found, found["failed"]
    dtype = found["dtype"]
    assert found["dtypes"] == [dtype, "torch.float32", dtype, dtype, dtype]
    assert found["finite"]
    assert found["empty"], "queries that read nothing must give zeros and -inf, others must not"
    assert found["repeats"], "the same input must give the same bits"
    unit, size = found["unit"], torch.finfo(torch.float32).eps * (1 + found["lse"])
    for name in ("out", "query", "key", "value"):
        # Besides, roundings of logits, shares, their products and sums, of numbers of size one where all cancels.
        allowed = 5 * found[f"{name} moved"] + (2 * unit + size) * found[f"{name} norm"] + 4 * unit
        assert found[f"{name} error"] <= allowed, name
    # The lse of a shift of all logits by a rounding each.
    assert found["lse error"] <= 5 * found["lse moved"] + 4 * size * found["lse norm"]
    assert found["mass shape"]
    # Roundings of float32 logits, a share's exponent, which go to some tens, and of their sums.
    assert found["mass error"] <= 64 * size * max(1, found["mass queries"])
    assert found["mass total error"] <= 64 * size * max(1, found["mass queries"])


def test_the_interpreter_sees_a_wrong_answer(measured):
    """The bound is tight: an output off by a hundredth of its size fails it in float32 and float16."""
    for found in measured.values():
        if found["dtype"] != "torch.bfloat16" and found["out norm"] > 0:
            unit, size = found["unit"], torch.finfo(torch.float32).eps * (1 + found["lse"])
            allowed = 5 * found["out moved"] + (2 * unit + size) * found["out norm"] + 4 * unit
            assert allowed < 0.05 * found["out norm"], found["case"]


def test_torch_compile_takes_it_whole():
    (process,) = run_interpreted("compile")
    said, _ = process.communicate()
    assert process.returncode == 0
    found = json.loads(said.splitlines()[-1])
    assert found == {"same": [True, True], "lse has no gradient": True, "refused": True, "checked": True}


@pytest.mark.slow
def test_offsets_may_pass_two_to_the_31():
    (process,) = run_interpreted("far")
    said, _ = process.communicate()
    assert process.returncode == 0
    found = json.loads(said.splitlines()[-1])
    assert found["same"] == [True] * 6
    assert found["last offset"] > 4 << 31


def test_refusals_are_one_sentence():
    problem = build(Case(lists="random"), torch.float32)
    with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu: use backend='torch'"):
        attend(problem.query, problem.pyramid(), problem.blocks, backend="triton")
    lse = torch.zeros(problem.query.shape[:3])
    with pytest.raises(ValueError, match="needs tensors on a GPU, got cpu: use backend='torch'"):
        block_mass(problem.query, problem.pyramid(), lse, problem.blocks.query_rows, backend="triton")
    wide = build(Case(lists="random"), torch.float64)
    with pytest.raises(ValueError, match=r"query must be float16, bfloat16 or float32 .* got torch.float64"):
        attend(wide.query, wide.pyramid(), wide.blocks, backend="triton")
