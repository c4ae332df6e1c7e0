"""`ziggurat kernels` and `ziggurat doctor`."""

import json

import pytest
import torch

from ziggurat.app.cli import main
from ziggurat.kernels import selftest
from ziggurat.kernels.binaries import table

ASKED = (
    *("kernel", "target", "tile", "block", "group", "head_dim", "warps", "stages", "registers", "stack", "shared"),
    *("occupancy", "wgmma", "tcgen05", "mma_sync", "mfma", "async_copies"),
)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0), capsys.readouterr().out.splitlines()


def test_kernels_prints_the_committed_table(capsys):
    code, lines = run(capsys, "kernels", "--json")
    assert code == 0
    rows = json.loads(lines[-1])["rows"]
    assert rows == table()
    assert all(name in row for row in rows for name in ASKED)
    text = "\n".join(lines[:-1])
    assert all(word in text for word in ("forward", "grad_rows", "cuda:100", "hip:gfx942", "registers"))
    assert sum("mass" in line for line in lines[:-1]) == sum(row["kernel"] == "mass" for row in rows)


def test_doctor_says_what_auto_takes_and_tests_it(capsys):
    code, lines = run(capsys, "doctor", "--json")
    assert code == 0
    found = json.loads(lines[-1])
    assert found["devices"][0]["device"] == "cpu"
    assert found["devices"][0]["auto"] == "torch"
    assert all(item["passed"] and 0 < item["error"] < 1e-5 for item in found["devices"])
    assert "auto takes torch" in lines[1]


def test_doctor_sees_a_wrong_answer(capsys, monkeypatch):
    right = selftest.attend

    def wrong(*given, backend, **named):
        out, lse = right(*given, backend=backend, **named)
        return (out, lse) if backend == "reference" else (out * 1.001, lse)

    monkeypatch.setattr(selftest, "attend", wrong)
    # torchao, where another test quantises by it, allows products in tf32, of which less is asked.
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    code, lines = run(capsys, "doctor")
    assert code == 1
    assert any("FAILED" in line for line in lines)
