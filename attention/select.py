"""What a selector is: parameters that turn a layout, and for dynamic ones queries and keys, into a block list."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt
from torch import Tensor

from ..kernels.blocklist import BlockList
from ..kernels.listops import from_pairs
from ..kernels.pyramid import KVPyramid
from .order import Shape, TokenOrder
from .rows import Layout


class Selector(BaseModel):
    """One method's parameters, as a plan file holds them; a subclass adds `name` and its fields.

    static: the list follows from the layout alone, is built once per grid and shared by layers, steps and batch.
    covers: the list leaves nothing out, so that there is no rest to drop or to pool.
    needs_lse: the list is built from the logsumexp over all keys: of the layer's last dense step where our own kernel
        ran it, else the step that builds the first list runs dense for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    static: ClassVar[bool] = True
    covers: ClassVar[bool] = False
    needs_lse: ClassVar[bool] = False

    def key_order(self, shape: Shape, order: TokenOrder) -> Tensor | None:
        """An order of a visual segment's keys other than the queries': int64 local indices, or None."""
        return None

    def factors(self, block: int, rows: int | None) -> tuple[int, ...] | None:
        """The pyramid's factors that the lists read, for `rows` level-0 rows; None if they depend on unknown `rows`."""
        return (1,)

    @classmethod
    def candidates(cls) -> tuple[Selector, ...]:
        """The parameters worth trying where nothing is known yet, cheapest first."""
        return (cls(),)

    def select(self, query: Tensor | None, key: Tensor | None, layout: Layout, pyramid: KVPyramid | None) -> BlockList:
        """The blocks that each query tile reads.

        query, key: [B, H, N, D] of the heads concerned; None for static selectors, as is the pyramid over `layout`.
        Returns a list of [1, 1, T] (static) or [B|1, H|1, T] (dynamic).
        """
        raise NotImplementedError


class DynamicSelector(Selector):
    """A selector whose lists follow from queries and keys."""

    static: ClassVar[bool] = False

    def select(
        self,
        query: Tensor | None,
        key: Tensor | None,
        layout: Layout,
        pyramid: KVPyramid | None,
        *,
        scale: float | None = None,
        lse: Tensor | None = None,
    ) -> BlockList:
        """See `Selector.select`. scale: on the logits, None = D ** -0.5. lse: [B, H, N] over all keys if needed."""
        assert query is not None, "a dynamic selector is given queries"
        assert pyramid is not None, "a dynamic selector is given the pyramid"
        return self.choose(query, layout, pyramid, scale=query.shape[-1] ** -0.5 if scale is None else scale, lse=lse)

    def choose(
        self, query: Tensor, layout: Layout, pyramid: KVPyramid, *, scale: float, lse: Tensor | None
    ) -> BlockList:
        """The list, from queries [B, H, N, D] and a pyramid over `layout` that holds the selector's `factors`."""
        raise NotImplementedError


class RatedSelector(DynamicSelector):
    """A dynamic selector that rates every block for every tile, and then picks by a budget."""

    @property
    def basis(self) -> Hashable:
        """What the ratings depend on beside the tensors: of equal ones, one rating serves every budget."""
        raise NotImplementedError

    def rate(self, query: Tensor, layout: Layout, pyramid: KVPyramid, *, scale: float, lse: Tensor | None) -> Tensor:
        """How much each tile wants each level-0 block: [B, H, T, K]. The arguments are those of `choose`."""
        raise NotImplementedError

    def pick(self, ratings: Tensor, layout: Layout) -> BlockList:
        """The list that the budget allows."""
        raise NotImplementedError

    def choose(
        self, query: Tensor, layout: Layout, pyramid: KVPyramid, *, scale: float, lse: Tensor | None
    ) -> BlockList:
        return self.pick(self.rate(query, layout, pyramid, scale=scale, lse=lse), layout)


def level0_list(reads: Tensor, layout: Layout) -> BlockList:
    """A list from bool [B|1, H|1, T, K], true = the tile reads the block; text and reference tiles read all."""
    batch, heads, _, blocks = reads.shape
    dense = reads.all(-1) | layout.exact_tiles
    tile_index, block_index = (reads & ~dense[..., None]).reshape(-1, blocks).nonzero().unbind(1)
    return from_pairs(tile_index, block_index, layout.query_rows, layout.block, batch=batch, heads=heads, dense=dense)


def _check_percent(size: int | str) -> int | str:
    if isinstance(size, str) and not 0 <= float(size[:-1]) <= 100:
        raise ValueError(f"must lie in 0% ... 100%, got {size}")
    return size


Share = Annotated[float, Field(gt=0, le=1)]
"""A share of the blocks, or of the softmax mass."""
Percent = Annotated[str, Field(pattern=r"^\d{1,3}(\.\d{1,6})?%$")]
Size = Annotated[Annotated[StrictInt, Field(ge=1)] | Percent, AfterValidator(_check_percent)]
"""A length along one axis of the grid: a number of latent patches, or a share of the axis such as "12.5%"."""
Position = Annotated[Annotated[StrictInt, Field(ge=0)] | Percent, AfterValidator(_check_percent)]
"""A place along one axis of the grid: a number of latent patches from its start, or a share of the axis."""


def length(size: int | str, extent: int) -> int:
    """A `Size` in latent patches: at least one; "100%" is the extent."""
    return size if isinstance(size, int) else max(1, round(float(size[:-1]) / 100 * extent))
