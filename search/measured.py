"""What a search measures once: sensitivities and costs, kept in its folder, so that a resumed one goes on from them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from .cost import Cost
from .findings import Record

MEASURED = "measured.json"


class Measured(Record):
    """sensitivities: of each layer. cost: of this device. cross_by: see `attention.plan.Plan`."""

    sensitivities: list[float]
    cost: Cost
    cross_by: Literal["own"] | None = None

    @classmethod
    def of(
        cls,
        path: Path,
        *,
        resume: bool,
        sensitivities: Callable[[], list[float]],
        cost: Callable[[], Cost],
        cross_by: Callable[[], Literal["own"] | None],
    ) -> Measured:
        """What `path` holds where a search resumes; else measured, and written there.

        The journal of scores, which is looked at first, holds that both are of one search.
        """
        if resume and path.is_file():
            return cls.model_validate_json(path.read_bytes())
        found = cls(sensitivities=sensitivities(), cost=cost(), cross_by=cross_by())
        part = path.with_name(f".{path.name}.part")
        part.write_text(found.model_dump_json() + "\n")
        os.replace(part, path)
        return found
