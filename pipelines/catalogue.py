"""The table of transformer classes for people and programs, and what attach composes with."""

from __future__ import annotations

from .absent import ABSENT
from .models import MODELS

COMPOSES = (
    ("`torch.compile`, whole or regional, `fullgraph=True`", "yes", "as many graphs as stock; attach before compiling"),
    ("pyramid attention broadcast, first block cache, MagCache, TaylorSeer", "yes", "calls they skip are not counted"),
    ("FasterCache", "yes", "with guidance in one batch"),
    (
        "`set_attention_backend`, before or after attach",
        "yes",
        "it runs what stays dense: steps, layers, cross-attention",
    ),
    (
        "other attention processors, before or after attach",
        "yes",
        "found at the next forward, whatever module they are of",
    ),
    ("LoRA, loaded or fused, before or after attach", "yes", ""),
    ("model, sequential and group offload", "yes", "lists live on the device of the queries"),
    ("quantised weights (torchao int8)", "yes", "attention sees activations alone"),
    ("gradient checkpointing and training", "yes", "the kernels are differentiable in queries, keys and values"),
    ("several pipelines in several threads", "yes", "each thread has its own slot, each pipeline its own state"),
    (
        "Ulysses context parallelism",
        "yes",
        "enabled before attach; a rank runs its share of heads; joint layouts are unpicked (tested: Wan, Flux, Qwen)",
    ),
    ("ControlNets", "yes", "they run as they always did, beside the transformer"),
    ("ring attention", "no", "a rank sees one shard of the keys at a time: raises ValueError"),
    ("CUDA graphs", "no", "step and branch are read when the operator runs, which a replay does not do"),
)
"""(what, whether, a remark)."""


HEAD = """\
# Which models, and what composes

`attach` reaches the visual self-attention of the transformers of diffusers below; everything else in them (text
encoders, cross-attention, text refiners, sound) runs as it always did. `handle.summary()` has a line for each layer:
sparse, dense, or why not. A model that is not here: `ziggurat models --probe FOLDER` finds where its tokens stand and
prints the row to add.

*Order* is how tokens follow each other in a call of self-attention; all that is not visual is read, and reads, exactly.
*partly* names what of a class stays as it is.
"""

TAIL = """\
What `attach` adds to a call that stays dense is measured by `benchmarks/attach_overhead.py`: at the 30 layers of
Wan 2.1 1.3B less than 50 µs, of a CPU's time.
"""


def rows() -> list[dict[str, str]]:
    """One entry a class: class, kind, order, status ("sparse", "partly", "no softmax self-attention", "not reached"),
    and why where it is not plainly sparse.
    """
    found = [
        {
            "class": row.model,
            "kind": row.kind,
            "order": ", ".join(row.tokens.order),
            "status": "partly" if row.partly else "sparse",
            "why": row.partly,
        }
        for row in MODELS.values()
    ]
    found += [
        {"class": row.model, "kind": row.kind, "order": "", "status": row.status, "why": row.why}
        for row in ABSENT.values()
    ]
    kinds = ["video", "image", "audio", "other"]
    return sorted(found, key=lambda row: (kinds.index(row["kind"]), row["status"] != "sparse", row["class"].lower()))


def page() -> str:
    """The page docs/models.md, as Markdown; `ziggurat models --markdown` writes it."""
    lines = [*HEAD.splitlines(), ""]
    table = rows()
    for kind in dict.fromkeys(row["kind"] for row in table):
        lines += [f"## {kind.capitalize()}", "", "| class | order | status | |", "|---|---|---|---|"]
        lines += [
            f"| `{row['class']}` | {row['order']} | {row['status']} | {row['why']} |"
            for row in table
            if row["kind"] == kind
        ]
        lines.append("")
    lines += ["## What composes", "", "| with | | |", "|---|---|---|"]
    lines += [f"| {what} | {whether} | {remark} |" for what, whether, remark in COMPOSES]
    lines += ["", *TAIL.splitlines()]
    return "\n".join(lines) + "\n"
