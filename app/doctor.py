"""`ziggurat doctor`: what this machine has, and whether attention is right on it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .console import Debug


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Last line of output: the findings as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Say what works on this machine and what is missing, and test attention on each device.

    Example: ziggurat doctor
    """
    from ..kernels import selftest
    from .machine import machine, machine_lines, versions

    found = []
    for device in selftest.devices():
        about, test = selftest.describe(device), selftest.self_test(device)
        found.append({**about, **test})
        print(f"{about['device']}: {about['name']}, bfloat16 {'yes' if about['bf16'] else 'no'}")
        print(f"  auto takes {about['auto']}: {about['why']}")
        verdict = "passed" if test["passed"] else "FAILED"
        print(f"  self-test {verdict}: error {test['error']:.1e} against float64, in {test['seconds']:.1f} s")
    lacking = selftest.backends()
    for name, lack in lacking.items():
        print(f"backend {name}: {lack or 'ready'}")
    said = {"versions": versions(), **machine()}
    print(", ".join(f"{name} {number or 'missing'}" for name, number in said["versions"].items()))
    for line in machine_lines(said):
        print(line)
    if as_json:
        print(json.dumps({"devices": found, "backends": lacking, **said}))
    if not all(item["passed"] for item in found):
        raise typer.Exit(1)
