"""What a search has scored, kept as it comes, so that an interrupted one goes on from there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Score:
    """One layer's call, every candidate: lists [heads][candidates] of relative error, recall and list density.

    norms: of each head's dense output.
    """

    prompt: int
    step: int
    branch: str
    layer: int
    noise_level: float
    rows: int
    norms: list[float]
    errors: list[list[float]]
    recalls: list[list[float]]
    densities: list[list[float]]

    @property
    def place(self) -> tuple[int, int, str, int]:
        return self.prompt, self.step, self.branch, self.layer


class Journal:
    """Finished scores, a line each, appended as they come; a torn last line of an interrupted search is dropped."""

    def __init__(self, path: Path, header: dict[str, Any]):
        self.path = path
        text = json.dumps(header, sort_keys=True)
        self.scores: dict[tuple[int, int, str, int], Score] = {}
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            if not lines or lines[0].strip() != text:
                raise ValueError(
                    f"{path} is of another search (its model, prompts, candidates or steps differ): "
                    "give a new folder, or search without resume"
                )
            whole = [line for line in lines if line.endswith("\n")]
            for line in whole[1:]:
                score = Score(**json.loads(line))
                self.scores[score.place] = score
            if len(whole) < len(lines):
                part = path.with_name(f".{path.name}.part")
                part.write_text("".join(whole))
                part.replace(path)
        else:
            path.write_text(text + "\n")

    def add(self, score: Score) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(score.__dict__) + "\n")
        self.scores[score.place] = score
