"""Block lists as bits: one per tile and block, the smaller form of lists denser than a thirty-second."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocklist import ALL, BlockList
from .checks import ragged
from .listops import from_pairs, pack_rows, unpack_rows
from .pyramid import KVPyramid


@dataclass(frozen=True, kw_only=True)
class BitList:
    """A block list to keep: bits for what is read whole, entries for what is read by row masks.

    words: int32 [B|1, H|1, T, ceil(C / 32)], bit c % 32 of word c // 32 set = block c is read whole, C blocks in all.
    every: bool [B|1, H|1, T], tiles that read every level-0 block and have no bits.
    masked_tile: int32 [M], (batch · heads + head) · T + tile of each entry with a row mask.
    masked_block: int32 [M], its block.
    row_masks: int32 [M, ceil(block / 32)], its rows.
    query_rows: int32 [H|1, T, tile]. columns: C. block: rows per block.
    """

    words: Tensor
    every: Tensor
    masked_tile: Tensor
    masked_block: Tensor
    row_masks: Tensor
    query_rows: Tensor
    columns: int
    block: int

    @property
    def nbytes(self) -> int:
        """Memory of the tensors in bytes, the shared query rows among them."""
        tensors = (self.words, self.every, self.masked_tile, self.masked_block, self.row_masks, self.query_rows)
        return sum(tensor.nbytes for tensor in tensors)

    def to_list(self) -> BlockList:
        """The list again: each tile's masked blocks, then the others, both ascending."""
        batch, heads, _ = self.every.shape
        tile, block = unpack_rows(self.words.flatten(0, 2), self.columns).nonzero().unbind(1)
        masked = torch.arange(self.masked_tile.numel(), device=tile.device)
        return from_pairs(
            torch.cat([self.masked_tile.long(), tile]),
            torch.cat([self.masked_block.long(), block]),
            self.query_rows,
            self.block,
            batch=batch,
            heads=heads,
            masked=masked,
            row_masks=unpack_rows(self.row_masks, self.block),
            dense=self.every,
        )


def to_bits(blocks: BlockList, pyramid: KVPyramid) -> BitList:
    """The list as bits; `to_list` gives back the same blocks and masks, in ascending order within each tile."""
    total, columns = blocks.start.numel(), pyramid.blocks
    read = torch.zeros(total, columns, dtype=torch.bool, device=blocks.pool.device)
    tile, entry = ragged(blocks.start, blocks.count)
    read[tile, blocks.pool[entry].long()] = True
    masked_tile, masked_entry = ragged(blocks.start, blocks.masked_count)
    _, slot = ragged(blocks.mask_start, blocks.masked_count)
    masked_block = blocks.pool[masked_entry]
    read[masked_tile, masked_block.long()] = False
    return BitList(
        words=pack_rows(read, columns).view(*blocks.start.shape, -1),
        every=blocks.count == ALL,
        masked_tile=masked_tile.to(torch.int32),
        masked_block=masked_block,
        row_masks=blocks.row_masks[slot],
        query_rows=blocks.query_rows,
        columns=columns,
        block=blocks.block,
    )


def smaller(blocks: BlockList, pyramid: KVPyramid) -> BlockList | BitList:
    """The list in whichever of its two forms takes less memory: to be kept."""
    return min(blocks, to_bits(blocks, pyramid), key=lambda form: form.nbytes)


def as_list(form: BlockList | BitList) -> BlockList:
    """The list that was kept."""
    return form.to_list() if isinstance(form, BitList) else form
