"""What a model's folder says of its own defaults: `ziggurat.json` beside `model_index.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

FILE = "ziggurat.json"
FPS = 16.0
"""Frames a second where a folder says nothing: Wan's."""

Count = Annotated[int, Field(ge=1)]


class ModelSettings(BaseModel):
    """A model's own defaults; what is None is left to the pipeline's signature.

    captions: the grammar that the model was trained on ("shapes"), for a warning about words it has never seen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    frames: Count | None = None
    height: Count | None = None
    width: Count | None = None
    steps: Count | None = None
    guidance: float | None = None
    fps: Annotated[float, Field(gt=0)] = FPS
    captions: str | None = None


def model_settings(pipe: Any) -> ModelSettings:
    """The settings in the folder that a pipeline was loaded from; the defaults where there is none.

    Raises ValueError for a file that is not valid, naming the field.
    """
    path = Path(str(getattr(pipe, "name_or_path", None) or "")) / FILE
    if not path.is_file():
        return ModelSettings()
    try:
        return ModelSettings.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path} is not valid: {field}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
