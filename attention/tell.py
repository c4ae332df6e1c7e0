"""Plans in words: what one says of every layer and head, and where two of them differ."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from .expect import mean_density
from .plan import Grid, HeadGroup, HeadPlan, LayerPlan, Plan

TOLD = {"version", "name", "note", "model_class", "config_hash", "heads", "head_dim", "grid", "layers"}
"""Fields that `show` has lines of their own for, beside these three."""
TABLES = ("schedule", "predicted", "measured")
STOCK = "stock"
"""What the heads of a layer without groups count as."""
SPARSE = "every step sparse"


def families(plan: Plan) -> list[list[str]]:
    """The selector's name for each [layer][head]; STOCK in layers that are left to the host's attention."""
    found = []
    for layer in plan.layers:
        row = [STOCK] * plan.heads
        for group in layer.groups:
            for entry in group.entries:
                for head in entry.heads:
                    row[head] = entry.selector.name
        found.append(row)
    return found


def describe(plan: Plan, densities: Sequence[Sequence[float]], grid: Grid | None = None) -> list[str]:
    """A plan in lines for people. densities: of each [layer][head] (`head_densities`) on a grid, by default its own."""
    told = plan.model_dump(mode="json", exclude_none=True)
    count = Counter(name for row in families(plan) for name in row)
    where = "that grid" if grid is None or grid == plan.grid else f"{sizes(grid)}, which it was not made for"
    rows = [
        ("name", plan.name or "unnamed"),
        ("note", plan.note),
        ("model", f"{plan.model_class}, {len(plan.layers)} layers, {plan.heads} heads, head_dim {plan.head_dim}"),
        ("config", plan.config_hash or "any"),
        ("grid", f"{sizes(plan.grid)} latent patches, {math.prod(plan.grid)} tokens"),
        *((name, str(value)) for name, value in told.items() if name not in TOLD and name not in TABLES),
        ("schedule", _schedule(plan.schedule.model_dump(exclude_defaults=True)) or SPARSE),
        *((name, ", ".join(f"{key} {value:.4g}" for key, value in told[name].items())) for name in TABLES[1:]),
        ("density", f"{mean_density(densities):.1%} of the lists to expect on {where}; dense steps not counted"),
        ("heads", ", ".join(f"{number} {name}" for name, number in count.most_common())),
    ]
    lines = [f"{name:11} {value}" for name, value in rows if value]
    told_of = [
        (_layer(layer), f"{mean_density([row]):6.1%}") for layer, row in zip(plan.layers, densities, strict=True)
    ]
    # Plans often repeat one layer: forty times the same lines would hide what is not.
    for said, alike in groupby(enumerate(told_of), key=lambda item: item[1]):
        (first, *others), density = said
        lines.append(f"{layers_of([number for number, _ in alike]):12}{density}  {first}")
        lines += [f"{'':20}{other}" for other in others]
    return lines


def _layer(layer: LayerPlan) -> tuple[str, ...]:
    """A line for each entry, those of one group below each other."""
    if layer.dense is not None:
        return (f"dense: {layer.dense}",)
    own = layer.schedule
    lines = [] if own is None else [f"own schedule: {_schedule(own.model_dump(exclude_defaults=True)) or SPARSE}"]
    for group in layer.groups:
        for number, entry in enumerate(group.entries):
            where = layout(group) if number == 0 else " " * len(layout(group))
            lines.append(f"{where}  {heads_of(entry.heads)}: {in_words(entry)}")
    return tuple(lines)


def layout(group: HeadGroup) -> str:
    """What heads of one group share, in words; levels where they are not what the entries imply anyway."""
    levels = f", levels {'/'.join(map(str, group.factors))}" if _own_levels(group) else ""
    return f"{group.order} order, tile {group.tile}, block {group.block}{levels}"


def _own_levels(group: HeadGroup) -> tuple[int, ...]:
    return () if group.factors in ((1,), (1, group.block)) else group.factors


def in_words(entry: HeadPlan) -> str:
    """A selector with what is not its default, and what becomes of the rest."""
    given = entry.selector.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
    said = " ".join([entry.selector.name, *(f"{name}={_compact(value)}" for name, value in given.items())])
    if not entry.selector.covers:
        said += f", rest {'pooled' if entry.pooled else 'dropped'}"
    return said if entry.correction == "none" else f"{said}, correction {entry.correction}"


def differences(one: Plan, other: Plan) -> list[tuple[str, str, str]]:
    """Where two plans differ, and what either says there: field by field, then by layers and heads. Empty if equal."""
    first, second = (plan.model_dump(mode="json", exclude={"version", "layers"}) for plan in (one, other))
    found = []
    for name in first:
        before, after = first[name], second[name]
        if isinstance(before, dict):
            pairs = [(f"{name}.{key}", before.get(key), after.get(key)) for key in {**before, **after}]
        else:
            pairs = [(name, before, after)]
        found += [(path, *_apart(x, y)) for path, x, y in pairs if x != y]
    if len(one.layers) != len(other.layers):
        found.append(("layers", str(len(one.layers)), str(len(other.layers))))
    changes = [_changes(a, b, one.heads, other.heads) for a, b in zip(one.layers, other.layers, strict=False)]
    by_change: dict[tuple[str, str, str], list[int]] = {}
    for number, changed in enumerate(changes):
        for change in changed:
            by_change.setdefault(change, []).append(number)
    for (where, before, after), numbers in by_change.items():
        name = layers_of(numbers)
        found.append((f"{name}, {where}" if where else name, before, after))
    return found


def _changes(one: LayerPlan, other: LayerPlan, heads: int, others: int) -> list[tuple[str, str, str]]:
    """Where one layer differs from another: heads or schedule, and what either says."""
    if one == other:
        return []
    found = []
    if one.schedule != other.schedule:
        before, after = (_schedule(own.model_dump()) if own else "the plan's" for own in (one.schedule, other.schedule))
        found.append(("schedule", before, after))
    changed: dict[tuple[str, str], list[int]] = {}
    for head, (a, b) in enumerate(zip(_by_head(one, heads), _by_head(other, others), strict=False)):
        if a != b:
            (_, said, there), (_, says, here) = a, b
            if there != here:
                said, says = (", ".join(filter(None, pair)) for pair in ((said, there), (says, here)))
            changed.setdefault((said, says if says != said else f"{says}, in another permutation"), []).append(head)
    found += [(heads_of(members), said, says) for (said, says), members in changed.items()]
    # Equal heads can be dealt out to groups in another way, or with levels that they don't read.
    return found or [("groups", _dealt(one), _dealt(other))]


def _by_head(layer: LayerPlan, heads: int) -> list[tuple[Any, str, str]]:
    """For each head what tells it from others, and in words the selector and the layout."""
    found: list[tuple[Any, str, str]] = [(layer.dense, f"dense ({layer.dense})", "")] * heads
    for group in layer.groups:
        for entry in group.entries:
            alone = entry.model_copy(update={"heads": ()})
            key = (group.order, group.tile, group.block, _own_levels(group), alone)
            for head in entry.heads:
                found[head] = (key, in_words(entry), layout(group))
    return found


def _dealt(layer: LayerPlan) -> str:
    said = [" + ".join(ranges(e.heads) for e in g.entries) + f" (levels {_compact(g.factors)})" for g in layer.groups]
    return " | ".join(said)


def in_steps(plan: Plan, noise_levels: Sequence[float]) -> str:
    """What each step of a run with these noise levels does, by the plan's schedule and by those of layers with one of
    their own: "16 steps: 0-2 dense, 3 refresh, 4-15 reuse; layers 0-2: 0 dense, 1 refresh, 2-15 reuse"."""
    own: dict[str, list[int]] = {}
    for number, layer in enumerate(plan.layers):
        if layer.schedule is not None:
            own.setdefault(layer.schedule.describe(noise_levels), []).append(number)
    said = [f"{layers_of(numbers)}: {steps}" for steps, numbers in own.items()]
    if sum(map(len, own.values())) < len(plan.layers):
        said.insert(0, plan.schedule.describe(noise_levels))
    return f"{len(noise_levels)} steps: " + "; ".join(said)


def layers_of(numbers: Sequence[int]) -> str:
    return f"layer{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"


def heads_of(numbers: Sequence[int]) -> str:
    return f"head{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as people write them: "0-3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _schedule(given: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_compact(value)}" for name, value in given.items() if value not in (None, (), []))


def _compact(value: Any) -> str:
    said = json.dumps(value, default=str, ensure_ascii=False, separators=(",", ":")).strip('"')
    return "none" if value is None else said if len(said) <= 120 else f"{said[:117]}..."


def _apart(one: Any, other: Any) -> tuple[str, str]:
    """Two values that differ, as short as they still do."""
    first, second = (f"{value:.5g}" if isinstance(value, float) else _compact(value) for value in (one, other))
    return (first, second) if first != second else (_compact(one), _compact(other))


def sizes(grid: Grid) -> str:
    """A grid as people write it: "17x16x16"."""
    return "x".join(map(str, grid))
