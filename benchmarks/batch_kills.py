"""Batches killed with SIGKILL at random moments, and run again: nothing done is lost or repeated, nothing is left over.

python -P benchmarks/batch_kills.py [--kills 20] [--seed 0] [--model shapes] [--devices cpu,cpu] [--out FILE]
"""

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

JOB = "ziggurat.pipelines.batch.run"
SIZE: dict[str, Any] = {"frames": 9, "height": 32, "width": 48, "steps": 2}
PROMPTS = [f"a large {colour} circle moving left" for colour in ("red", "blue", "green")]
COMMON = {"manifest.jsonl", "index.html"}


def work(folder: Path, model: str, devices: tuple[str, ...]) -> None:
    """One run of the batch, in a process of its own."""
    import torch

    from ziggurat.pipelines import generate_many

    torch.set_num_threads(1)
    where: dict[str, Any] = {"devices": devices} if devices else {"device": "cpu"}
    generate_many(model, PROMPTS, folder, plan="none", seeds=2, dtype="fp32", warn=lambda _: None, **where, **SIZE)


class Campaign:
    def __init__(self, model: str, devices: tuple[str, ...]):
        # A fork of a process that has imported everything begins at once, so that kills fall into the work.
        self.context: Any = multiprocessing.get_context("spawn" if devices else "forkserver")
        if not devices:
            self.context.set_forkserver_preload([JOB, "diffusers.pipelines.wan.pipeline_wan"])
        self.model, self.devices = model, devices

    def start(self, folder: Path) -> Any:
        process = self.context.Process(target=work, args=(folder, self.model, self.devices))
        process.start()
        return process

    def whole(self, folder: Path) -> float:
        """A run to its end; its seconds."""
        started = time.perf_counter()
        process = self.start(folder)
        process.join()
        assert process.exitcode == 0, f"a run that nobody killed ended with {process.exitcode}"
        return time.perf_counter() - started

    def run(self, kills: int, seed: int) -> dict[str, Any]:
        """Raises AssertionError for a promise that was broken."""
        chance = random.Random(seed)
        found: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as root:
            reference = Path(root) / "reference"
            self.whole(reference)
            # Again, with all that a first run warms up behind it.
            seconds = self.whole(Path(root) / "second")
            expected = {path.name: path.read_bytes() for path in reference.iterdir() if _is_item(path)}
            assert len(expected) == 2 * len(PROMPTS)
            folders = 0
            while len(found) < kills:
                folders += 1
                folder = Path(root) / f"killed-{folders}"
                finished = False
                while not finished and len(found) < kills:
                    kept = done(folder)
                    finished = self.kill(folder, chance.uniform(0, seconds), found)
                    check_kept(folder, kept)
                kept = done(folder)
                self.whole(folder)
                check_kept(folder, kept)
                check_end(folder, expected)
        return {"kills": len(found), "batches": folders, "items": len(expected), "seconds": seconds, "moments": found}

    def kill(self, folder: Path, delay: float, found: list[dict[str, Any]]) -> bool:
        """Start a run and kill it; True where it had ended by itself."""
        process = self.start(folder)
        process.join(delay)
        if process.exitcode is not None:
            assert process.exitcode == 0, f"a run that nobody killed ended with {process.exitcode}"
            return True
        process.kill()
        process.join()
        parts = sum(path.suffix == ".part" for path in folder.iterdir()) if folder.is_dir() else 0
        found.append({"after": round(delay, 3), "done": len(done(folder)), "parts": parts})
        return False


def _is_item(path: Path) -> bool:
    return path.suffix in (".mp4", ".png", ".gif") and path.name[0] != "."


def done(folder: Path) -> dict[str, tuple[int, int]]:
    """The items that stand there whole, and which files on the disk they are."""
    if not folder.is_dir():
        return {}
    items = [path for path in folder.iterdir() if _is_item(path) and Path(f"{path}.json").is_file()]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in items}


def check_kept(folder: Path, kept: dict[str, tuple[int, int]]) -> None:
    now = done(folder)
    assert {name: now.get(name) for name in kept} == kept, "an item that was done is gone or was made again"


def check_end(folder: Path, expected: dict[str, bytes]) -> None:
    """All items are there, byte for byte as a run that nobody disturbed makes them, and nothing else is."""
    items = {path.name: path.read_bytes() for path in folder.iterdir() if _is_item(path)}
    assert items == expected, "the items differ from those of a run that nobody killed"
    names = {path.name for path in folder.iterdir()}
    stray = names - COMMON - items.keys() - {f"{name}.json" for name in items}
    assert not stray, f"left over: {sorted(stray)}"
    entries = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert sorted(entry["name"] for entry in entries) == sorted(items), "the manifest lists other items"
    assert {entry["status"] for entry in entries} == {"done"}
    for name in items:
        assert json.loads((folder / f"{name}.json").read_text())["prompt"] in PROMPTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--devices", default="")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    devices = tuple(asked.devices.split(",")) if asked.devices else ()
    result = Campaign(asked.model, devices).run(asked.kills, asked.seed)
    from ziggurat.pipelines.record import surroundings

    told = {"seed": asked.seed, "model": Path(asked.model).name, "devices": list(devices), **result, "broken": 0}
    asked.out.write_text(json.dumps({**told, **surroundings()}, indent=1) + "\n")
    halves = sum(one["parts"] > 0 for one in result["moments"])
    told = f"{result['kills']} kills in {result['batches']} batches of {result['items']} items"
    print(f"{told}, {halves} of them with a file half written: nothing lost, repeated or left over")


if __name__ == "__main__":
    main()
