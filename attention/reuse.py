"""What a run keeps from step to step: dynamic lists, the lse they came from and corrections, within a cap."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels.bitsets import BitList, as_list, smaller
from ..kernels.blocklist import BlockList
from ..kernels.listops import all_blocks
from .call import GroupCall
from .correct import Measured, measure
from .grid import TokenGrid
from .lists import ListCache, Places, joined, pyramid_heads, with_rest
from .select import DynamicSelector

MAX_CACHE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class _Lists:
    """The lists of a group's entries, None where static; their list densities; and the lse of those that need it."""

    epoch: int
    stamp: tuple[TokenGrid, int]
    lists: list[BlockList | BitList | None]
    densities: list[float]
    lse: list[Tensor | None]

    @property
    def nbytes(self) -> int:
        # The query rows belong to the layout.
        lists = sum(item.nbytes - item.query_rows.nbytes for item in self.lists if item is not None)
        return lists + sum(item.nbytes for item in self.lse if item is not None)


@dataclass(frozen=True, kw_only=True)
class _Lent:
    """The lse [B, H, N] of a layer's last dense step, all heads of the model."""

    stamp: tuple[TokenGrid, int]
    lse: Tensor

    @property
    def nbytes(self) -> int:
        return self.lse.nbytes


@dataclass(frozen=True, kw_only=True)
class _Correction:
    """What was measured of an entry's heads, all queries: rho [B, H, N], residual and trend [B, H, N, D]."""

    epoch: int
    stamp: tuple[TokenGrid, int]
    measured: Measured

    @property
    def nbytes(self) -> int:
        return self.measured.nbytes


@dataclass
class Reuse:
    """Builds the dynamic lists and corrections of a run, and hands them out until the schedule refreshes them.

    Lists are kept in the smaller of their two forms, entries or bits, and beside it as the kernel takes them, joined
    and checked, while there is room: up to half of `max_bytes`. Whatever would take the memory of a guidance branch
    over `max_bytes` is not kept, and is built anew at every step. peak: most bytes kept in the run, by what keeps them.
    unkept: how often something was not kept.
    """

    cache: ListCache
    max_bytes: int = MAX_CACHE_BYTES
    unkept: int = 0
    peak: dict[str, int] = field(default_factory=dict)
    _lists: dict[tuple[Hashable, Hashable], _Lists] = field(default_factory=dict)
    _ready: dict[tuple[Hashable, Hashable], BlockList] = field(default_factory=dict)
    _lent: dict[tuple[Hashable, Hashable], _Lent] = field(default_factory=dict)
    _corrections: dict[tuple[Hashable, Hashable], _Correction] = field(default_factory=dict)

    def begin(self) -> None:
        """Forget everything: it belongs to one run."""
        self.end()
        self.unkept = 0
        self.peak.clear()

    def end(self) -> None:
        """Free what is kept; the figures stay."""
        for store in (self._lists, self._ready, self._lent, self._corrections):
            store.clear()

    @property
    def nbytes(self) -> int:
        """Memory of everything kept, in bytes."""
        return sum(self._bytes().values())

    def attend(self, call: GroupCall) -> tuple[Tensor, float, float]:
        """Output [B, H, N, D] of a group with dynamic or corrected entries.

        Also the share of its heads that ran sparse, and the list density of those, summed over heads ÷ heads. Heads
        whose list or correction is measured now run dense by this package's own kernel, and their output is that.
        """
        exact: dict[int, tuple[Tensor, Tensor]] = {}
        kept = self._refreshed(call, exact)
        entries = call.group.entries
        if len(exact) == len(entries) and not call.group.corrected:
            out = torch.empty_like(call.query, memory_format=torch.contiguous_format)
            for number, heads in enumerate(call.prepared.heads):
                out[:, heads] = exact[number][0]
        else:
            out, lse = call.attend(self._whole(call, kept))
            if call.lends:
                self._lend(call, lse.detach())
            if exact or call.group.corrected:
                # A copy where autograd may need the output as it was.
                out, plain = out.clone() if out.requires_grad else out, out
                for number, heads in enumerate(call.prepared.heads):
                    if entries[number].correction != "none":
                        out[:, heads] = self._corrected(call, number, heads, plain[:, heads], lse[:, heads], exact)
                    if number in exact:
                        out[:, heads] = exact[number][0]
        total, sparse, density = len(call.group.heads), 0.0, 0.0
        for number, entry in enumerate(entries):
            if number not in exact:
                sparse += len(entry.heads) / total
                density += self._density(call, kept, number) * len(entry.heads) / total
        return out, sparse, density

    def _refreshed(self, call: GroupCall, exact: dict[int, tuple[Tensor, Tensor]]) -> _Lists | None:
        """The kept lists, or new ones in a new epoch; None where all are static."""
        if call.prepared.blocks is not None:
            return None
        branch = call.list_branch
        before = self._lists.get((branch, call.place))
        if before is not None and before.stamp != call.stamp:
            before = None
        if before is not None and before.epoch == call.epoch:
            return before
        lists: list[BlockList | BitList | None] = []
        densities, lses = [], []
        for number, heads in enumerate(call.prepared.heads):
            static = call.prepared.lists[number]
            if static is not None:
                lists.append(None)
                densities.append(static.density(call.pyramid))
                lses.append(None)
                continue
            old = before.lse[number] if before is not None else None
            blocks, lse = self._build(call, number, heads, old, exact)
            densities.append(blocks.density(call.pyramid))
            lists.append(smaller(blocks, call.pyramid))
            lses.append(None if call.final else lse)
        kept = _Lists(epoch=call.epoch, stamp=call.stamp, lists=lists, densities=densities, lse=lses)
        self._ready.pop((branch, call.place), None)
        self._keep(self._lists, (branch, call.place), kept)
        return kept

    def _build(
        self,
        call: GroupCall,
        number: int,
        heads: Places,
        lse: Tensor | None,
        exact: dict[int, tuple[Tensor, Tensor]],
    ) -> tuple[BlockList, Tensor | None]:
        entry, layout = call.group.entries[number], call.prepared.layouts[number]
        selector = entry.selector
        assert isinstance(selector, DynamicSelector)
        kept = lse
        if selector.needs_lse and entry.correction != "none":
            # Dense attention runs here anyway: its own lse is the better one.
            lse = self._exact(call, number, heads, exact)[1].detach()
        elif selector.needs_lse and lse is None and (lse := self._borrowed(call, heads)) is None:
            lse = kept = self._exact(call, number, heads, exact)[1].detach()
        own = pyramid_heads(call.pyramid, heads)
        with torch.no_grad():
            blocks = selector.select(call.query[:, heads], own.key, layout, own, scale=call.scale, lse=lse)
            blocks = with_rest(blocks, layout, call.prepared.factors, entry)
        self.cache.built += 1
        return blocks, kept

    def _lend(self, call: GroupCall, lse: Tensor) -> None:
        self._keep(self._lent, (call.branch, call.place[0]), _Lent(stamp=call.stamp, lse=lse))

    def _borrowed(self, call: GroupCall, heads: Places) -> Tensor | None:
        """The lse of an entry's heads at the layer's last dense step, where our own kernel ran it."""
        lent = self._lent.get((call.branch, call.place[0]))
        if lent is None or lent.stamp != call.stamp:
            return None
        whole = torch.tensor(call.group.heads, device=lent.lse.device)
        return lent.lse.index_select(1, whole[heads])

    def reclaim(self, branch: Hashable, layer: int) -> None:
        """No list of the layer will be built any more."""
        self._lent.pop((branch, layer), None)

    def _exact(
        self, call: GroupCall, number: int, heads: Places, exact: dict[int, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Output and lse of an entry's heads over all keys; computed once a call."""
        if number not in exact:
            layout = call.prepared.layouts[number]
            exact[number] = call.attend(all_blocks(layout.query_rows, layout.block), heads)
        return exact[number]

    def _corrected(
        self,
        call: GroupCall,
        number: int,
        heads: Places,
        out: Tensor,
        lse: Tensor,
        exact: dict[int, tuple[Tensor, Tensor]],
    ) -> Tensor:
        key = (call.branch, (call.place, number))
        kept = self._corrections.get(key)
        if kept is not None and kept.stamp != call.stamp:
            kept = None
        if kept is None or kept.epoch != call.epoch:
            full, full_lse = self._exact(call, number, heads, exact)
            kind, before = call.group.entries[number].correction, kept.measured if kept is not None else None
            found = measure(kind, out, lse, full, full_lse, noise_level=call.noise_level, before=before)
            self._keep(self._corrections, key, _Correction(epoch=call.epoch, stamp=call.stamp, measured=found))
            return full
        return kept.measured.apply(out, call.noise_level)

    def _whole(self, call: GroupCall, kept: _Lists | None) -> BlockList:
        """One list for all heads of the group."""
        if kept is None:
            assert call.prepared.blocks is not None
            return call.prepared.blocks
        key = (call.list_branch, call.place)
        if key in self._ready:
            return self._ready[key]
        lists = []
        for static, form in zip(call.prepared.lists, kept.lists, strict=True):
            blocks = form or static
            assert blocks is not None
            lists.append(as_list(blocks))
        whole = joined(lists, call.group)
        if self._lists.get(key) is kept and self._held(key[0]) + whole.nbytes <= self.max_bytes // 2:
            self._ready[key] = whole
            self._note()
        return whole

    def _density(self, call: GroupCall, kept: _Lists | None, number: int) -> float:
        if kept is not None:
            return kept.densities[number]
        blocks = call.prepared.lists[number]
        assert blocks is not None
        if "density" not in blocks.memo:
            blocks.memo["density"] = blocks.density(call.pyramid)
        return blocks.memo["density"]

    def _keep(self, store: dict[tuple[Hashable, Hashable], Any], key: tuple[Hashable, Hashable], item: Any) -> None:
        """Keep it in place of what was there before, if it fits."""
        store.pop(key, None)
        if self._fits(key[0], item.nbytes):
            store[key] = item
            self._note()

    def _fits(self, branch: Hashable, more: int) -> bool:
        if self._held(branch) + more > self.max_bytes:
            # What can be joined again gives way first.
            self._ready = {key: blocks for key, blocks in self._ready.items() if key[0] != branch}
        fits = self._held(branch) + more <= self.max_bytes
        self.unkept += not fits
        return fits

    def _held(self, branch: Hashable) -> int:
        stores = (self._lists, self._ready, self._lent, self._corrections)
        return sum(item.nbytes for store in stores for (owner, _), item in store.items() if owner == branch)

    def _bytes(self) -> dict[str, int]:
        lse = sum(part.nbytes for item in self._lists.values() for part in item.lse if part is not None)
        lists = sum(item.nbytes for item in self._lists.values()) - lse
        lse += sum(item.nbytes for item in self._lent.values())
        return {
            "lists": lists,
            "joined lists": sum(blocks.nbytes for blocks in self._ready.values()),
            "lse": lse,
            "corrections": sum(item.nbytes for item in self._corrections.values()),
        }

    def _note(self) -> None:
        now = self._bytes()
        if sum(now.values()) >= sum(self.peak.values()):
            self.peak = {name: size for name, size in now.items() if size}
