"""The table of transformer classes: where each one's visual tokens stand, and how their grid follows from a forward.

A row holds facts about a class and no code of any method; a class of diffusers costs one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .absent import ABSENT
from .image_rows import IMAGE_ROWS
from .row import ModelRow
from .video_rows import VIDEO_ROWS

MODELS: Mapping[str, ModelRow] = {row.model: row for row in (*VIDEO_ROWS, *IMAGE_ROWS)}


def row_of(transformer: Any) -> ModelRow:
    """The row of a transformer's class.

    Raises ValueError for a class without one, saying why where that is known.
    """
    name = type(transformer).__name__
    if name in MODELS:
        return MODELS[name]
    if name in ABSENT:
        raise ValueError(
            f"transformer is a {name}, for which no plan can run ({ABSENT[name].status}): {ABSENT[name].why}"
        )
    raise ValueError(
        f"transformer is a {name}, for which no plan can run: it has no row in the table (`ziggurat models` lists them,"
        " `ziggurat models --probe FOLDER` finds where its tokens stand)"
    )
