"""Block lists as data: building, reading, joining, and what is refused."""

import time

import pytest
import torch

from ziggurat.kernels.blocklist import BlockList, identity_rows
from ziggurat.kernels.listops import (
    all_blocks,
    concat,
    from_dense,
    from_pairs,
    pack_rows,
    select_heads,
    to_dense,
    to_pairs,
    unpack_rows,
)
from ziggurat.kernels.pyramid import build_pyramid

TOKENS, BLOCK, TILE, HEADS = 203, 16, 32, 3
ROWS = identity_rows(TOKENS, TILE)


@pytest.fixture
def pyramid():
    key = torch.randn(2, HEADS, TOKENS, 8)
    return build_pyramid(key, key, block=BLOCK, factors=(1, 4))


@pytest.fixture
def dense(pyramid):
    mask = torch.rand(2, HEADS, ROWS.shape[1], pyramid.blocks) < 0.4
    rows = torch.rand(*mask.shape, BLOCK) < 0.7
    rows |= torch.rand(*mask.shape, 1) < 0.5
    return mask, rows


def test_dense_there_and_back(pyramid, dense):
    mask, rows = dense
    blocks = from_dense(mask, ROWS, BLOCK, rows)
    assert torch.equal(to_dense(blocks, pyramid), (mask[..., None] & rows).flatten(-2))
    assert bool((blocks.masked_count > 0).any())
    blocks.validate(pyramid, TOKENS)


def test_pairs_in_any_order(pyramid, dense):
    blocks = from_dense(dense[0], ROWS, BLOCK)
    tile, block = to_pairs(blocks, pyramid)
    order = torch.randperm(len(tile))
    again = from_pairs(tile[order], block[order], ROWS, BLOCK, batch=2, heads=HEADS)
    assert torch.equal(again.pool, blocks.pool)
    assert torch.equal(again.start, blocks.start)


@pytest.mark.parametrize("block", [1, 16, 32, 40, 64, 128])
def test_row_masks_there_and_back(block):
    rows = torch.rand(7, block) < 0.5
    words = pack_rows(rows, block)
    assert words.shape == (7, (block + 31) // 32)
    assert words.dtype == torch.int32
    assert torch.equal(unpack_rows(words, block), rows)
    # Bit r of a word is row r: the lowest bit is the first row.
    assert torch.equal((words[:, 0] & 1).bool(), rows[:, 0])


def test_heads_select_and_join(pyramid, dense):
    mask, rows = dense
    blocks = from_dense(mask, ROWS, BLOCK, rows)
    wanted = to_dense(blocks, pyramid)
    some = select_heads(blocks, [2, 0])
    assert torch.equal(to_dense(some, pyramid), wanted[:, [2, 0]])
    assert some.pool.numel() < blocks.pool.numel()
    joined = concat([some, select_heads(blocks, [1]), all_blocks(ROWS, BLOCK)])
    joined.validate(pyramid, TOKENS)
    assert joined.query_rows.shape[0] == 1
    read = to_dense(joined, pyramid)
    assert torch.equal(read[:, :3], wanted[:, [2, 0, 1]])
    assert bool(read[:, 3, :, : pyramid.offsets[1]].all())
    assert not bool(read[:, 3, :, pyramid.offsets[1] :].any())


def test_join_keeps_unlike_query_rows(pyramid):
    turned = ROWS.flip(1)
    joined = concat([all_blocks(ROWS, BLOCK), all_blocks(turned, BLOCK)])
    assert joined.heads == 2
    assert torch.equal(joined.query_rows, torch.cat([ROWS, turned]))


def test_rows_touched_and_density(pyramid):
    mask = torch.zeros(1, 1, ROWS.shape[1], pyramid.blocks, dtype=torch.bool)
    mask[..., 3] = True
    blocks = from_dense(mask, ROWS, BLOCK, torch.zeros(*mask.shape, BLOCK, dtype=torch.bool))
    assert bool((blocks.rows_touched(pyramid) == BLOCK).all())
    assert blocks.density(pyramid) == pytest.approx(1 / len(pyramid.blocks_at(0)))
    assert all_blocks(ROWS, BLOCK).density(pyramid) == 1
    assert bool((all_blocks(ROWS, BLOCK).rows_touched(pyramid) == pyramid.offsets[1]).all())


def changed(blocks, **fields):
    names = ("start", "count", "pool", "masked_count", "mask_start", "row_masks", "query_rows", "block")
    return BlockList(**{name: getattr(blocks, name) for name in names} | fields)


def test_refusals_say_where(pyramid, dense):
    blocks = from_dense(*[dense[0], ROWS, BLOCK, dense[1]])
    at = int(blocks.start[1, 2, 3])
    assert int(blocks.count[1, 2, 3]) > 1
    place = "batch 1, head 2, tile 3"

    def pool(position, index):
        tensor = blocks.pool.clone()
        tensor[position] = index
        return changed(blocks, pool=tensor)

    def at_tile(name, value):
        tensor = getattr(blocks, name).clone()
        tensor[1, 2, 3] = value
        return changed(blocks, **{name: tensor})

    twice = ROWS.clone()
    twice[0, 2, 5] = 7
    beyond = ROWS.clone()
    beyond[0, 0, 0] = TOKENS
    for wrong, words in (
        (pool(at + 1, int(blocks.pool[at])), f"block {int(blocks.pool[at])} twice in {place}"),
        (pool(at, pyramid.blocks), f"got {pyramid.blocks} in {place}"),
        (pool(at, -1), f"got -1 in {place}"),
        (at_tile("start", blocks.pool.numel()), f"start must .* {place}"),
        (at_tile("count", -2), f"count must .* {place}"),
        (at_tile("masked_count", int(blocks.count[1, 2, 3]) + 1), f"masked_count must .* {place}"),
        (changed(blocks, query_rows=twice), "token 7 twice in head 0"),
        (changed(blocks, query_rows=beyond), "query_rows must lie in"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong.validate(pyramid, TOKENS)


def test_wrong_types_and_shapes():
    blocks = all_blocks(ROWS, BLOCK)
    for fields, words in (
        ({"start": blocks.start.int()}, "start must be torch.int64"),
        ({"count": blocks.count[0]}, "count must be"),
        ({"row_masks": torch.zeros(1, 2, dtype=torch.int32)}, "row_masks must be"),
        ({"query_rows": ROWS[:, 1:]}, "query_rows must be"),
        ({"pool": torch.zeros(1, 1, dtype=torch.int32)}, "pool must have"),
    ):
        with pytest.raises(ValueError, match=words):
            changed(blocks, **fields)


def test_long_lists_build_and_check_without_loops():
    tiles, columns, heads = 591, 1182, 8
    rows = identity_rows(75_600, 128)
    mask = torch.rand(1, heads, tiles, columns) < 0.15
    tile, block = mask.view(-1, columns).nonzero().unbind(1)
    key = torch.zeros(1, 1, 1, 1).expand(1, 1, 75_600, 1)
    pyramid = build_pyramid(key, key, block=64)
    began = time.process_time()
    blocks = from_pairs(tile, block, rows, 64, heads=heads)
    blocks.validate(pyramid, 75_600)
    assert time.process_time() - began < 4
    assert blocks.nbytes < 5 * tile.numel()
