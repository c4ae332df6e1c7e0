"""The prompts that a search is calibrated and proved on where none are given."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def read_prompts(path: str | Path) -> list[str]:
    """A file's prompts, one a line; lines that are empty or begin with # count for nothing.

    Raises ValueError for a file that is not there or holds none.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"prompts {path} does not exist: give a text file with a prompt on each line")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ValueError(f"prompts {path} holds no prompt: write one on each line")
    return found


def default_prompts(captions: str | None) -> tuple[list[str], list[str]]:
    """To calibrate on and, held out, to prove on. captions: the grammar that the model speaks, None = any sentence."""
    folder = Path(str(files("ziggurat.assets"))) / "prompts"
    name = captions if captions and (folder / f"{captions}.txt").is_file() else "general"
    return read_prompts(folder / f"{name}.txt"), read_prompts(folder / f"{name}-held-out.txt")
