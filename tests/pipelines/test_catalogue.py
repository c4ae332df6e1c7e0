"""The table for people: the page in docs/, and that each class of diffusers is spoken of."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import diffusers

from ziggurat.pipelines.absent import ABSENT
from ziggurat.pipelines.catalogue import COMPOSES, page, rows
from ziggurat.pipelines.models import MODELS

ROOT = Path(__file__).parents[2]


def test_the_docs_page_is_the_table():
    assert (ROOT / "docs/models.md").read_text() == page(), "run: ziggurat models --markdown > docs/models.md"


def is_transformer(kind: type) -> bool:
    """Whether a class of diffusers is a transformer, or built of a transformer's blocks."""
    if not hasattr(kind, "from_pretrained") or "Multi" in kind.__name__:
        return False
    if kind.__module__.startswith("diffusers.models.controlnets."):
        return "from ..transformers." in inspect.getsource(sys.modules[kind.__module__])
    return kind.__module__.startswith("diffusers.models.transformers.") or "Transformer" in kind.__name__


def test_each_transformer_of_diffusers_has_a_row_or_a_reason():
    known = MODELS.keys() | ABSENT.keys()
    kinds = [kind for kind in (getattr(diffusers, name) for name in dir(diffusers)) if inspect.isclass(kind)]
    assert sorted({kind.__name__ for kind in kinds if is_transformer(kind)} - known) == []
    assert sorted(known - set(dir(diffusers))) == [], "a row for a class that this diffusers does not have"


def test_rows_say_what_they_have_to():
    table = rows()
    assert len(table) == len(MODELS) + len(ABSENT)
    assert {row["status"] for row in table} <= {"sparse", "partly", "no softmax self-attention", "not reached"}
    for row in table:
        assert row.keys() == {"class", "kind", "order", "status", "why"}
        assert (row["status"] == "sparse") == (not row["why"])
        assert ("visual" in row["order"]) == (row["status"] in ("sparse", "partly"))
    assert all(whether in ("yes", "no") for _, whether, _ in COMPOSES)
