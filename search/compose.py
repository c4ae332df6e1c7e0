"""A choice of candidates as a plan: heads of one layout become a group, heads of one selector an entry."""

from __future__ import annotations

from dataclasses import asdict

from ..attention.plan import HeadGroup, LayerPlan, Plan
from .findings import Candidate, Findings

STOCK = "stock attention was chosen: no sparse candidate is worth its error or its time here"


def layer_plan(picks: list[int] | None, candidates: list[Candidate]) -> LayerPlan:
    """One layer's plan from its heads' candidates; None = stock."""
    if picks is None:
        return LayerPlan(dense=STOCK)
    groups: dict[tuple, dict[Candidate, list[int]]] = {}
    for head, number in enumerate(picks):
        candidate = candidates[number]
        groups.setdefault(candidate.layout, {}).setdefault(candidate, []).append(head)
    return LayerPlan(
        groups=tuple(
            HeadGroup(
                order=order,
                tile=tile,
                block=block,
                entries=tuple(one.entry.model_copy(update={"heads": tuple(heads)}) for one, heads in members.items()),
            )
            for (order, tile, block), members in groups.items()
        )
    )


def compose(found: Findings, point: int) -> Plan:
    """The plan of a point of the front, with what was predicted, and measured if it was proved.

    Raises ValueError for a number that the front does not have.
    """
    if not 0 <= point < len(found.front):
        raise ValueError(f"point must be one of the front's {len(found.front)}, got {point}")
    chosen = found.front[point]
    dense = found.dense_seconds * found.calls * found.shape.layers
    stock = found.stock_seconds * found.calls * found.shape.layers
    lists = [
        found.densities[layer][head][number]
        for layer, picks in enumerate(chosen.picks)
        for head, number in enumerate(picks or ())
    ]
    predicted = {
        "attention_seconds": chosen.seconds,
        "error": chosen.error,
        "density": chosen.density,
        "list_density": sum(lists) / len(lists) if lists else 1.0,
        "share_of_own_dense": chosen.seconds / dense,
        "share_of_stock": chosen.seconds / stock,
    }
    measured: dict[str, float] = {}
    for proof in found.proofs:
        if proof.point == point:
            measured = {name: float(value) for name, value in proof.model_dump(exclude={"point"}).items()}
    shape = asdict(found.shape)
    return Plan(
        name=f"{found.shape.model_class} at {chosen.seconds / dense:.0%}",
        note=f"Found by search on {len(found.prompts)} prompts, {len(found.candidates)} candidates a head.",
        model_class=shape["model_class"],
        config_hash=shape["config_hash"],
        heads=shape["heads"],
        head_dim=shape["head_dim"],
        expert=found.expert,
        grid=found.grid,
        text_length=found.text_length,
        guidance=found.guidance,
        schedule=found.schedule,
        cross_by=found.cross_by,
        predicted=predicted,
        measured=measured,
        layers=tuple(layer_plan(picks, found.candidates) for picks in chosen.picks),
    )
