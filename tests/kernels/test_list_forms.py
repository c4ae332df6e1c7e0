"""Block lists transposed, as bits, and large."""

import time

import pytest
import torch

from ziggurat.kernels.bitsets import to_bits
from ziggurat.kernels.blocklist import ALL, identity_rows
from ziggurat.kernels.cases import Case, build
from ziggurat.kernels.listops import from_dense, select_batch, to_dense, to_pairs, unpack_rows
from ziggurat.kernels.pyramid import KVPyramid
from ziggurat.kernels.transpose import transpose

LISTS = ["all", "none", "single", "random", "shared", "per_batch", "some_all", "masked", "unread", "joined"]


def problem_of(name):
    factors = (1, 4) if name in ("masked", "random") else (1,)
    problem = build(Case(lists=name, tokens=203, factors=factors), torch.float32)
    return problem.blocks, problem.pyramid()


@pytest.mark.parametrize("name", LISTS)
def test_transposed_list_holds_the_same_pairs(name):
    blocks, pyramid = problem_of(name)
    tiles = transpose(blocks, pyramid)
    batch, heads, columns = tiles.start.shape
    assert columns == pyramid.blocks
    read = torch.zeros(batch, heads, blocks.tiles, columns, blocks.block, dtype=torch.bool)
    level = len(pyramid.blocks_at(0))
    for b in range(batch):
        for h in range(heads):
            for c in range(columns):
                begin, count = int(tiles.start[b, h, c]), int(tiles.count[b, h, c])
                run = tiles.pool[begin : begin + count].tolist()
                assert run == sorted(set(run))
                for tile, mask in zip(run, tiles.mask[begin : begin + count].tolist(), strict=True):
                    rows = True if mask < 0 else unpack_rows(blocks.row_masks[mask : mask + 1], blocks.block)[0]
                    read[b, h, tile, c] = rows
            begin, count = int(tiles.all_start[b, h]), int(tiles.all_count[b, h])
            read[b, h, tiles.all_pool[begin : begin + count].long(), :level] = True
    assert torch.equal(read.flatten(3), to_dense(blocks, pyramid))


@pytest.mark.parametrize("name", LISTS)
def test_bits_there_and_back(name):
    blocks, pyramid = problem_of(name)
    bits = to_bits(blocks, pyramid)
    again = bits.to_list()
    assert torch.equal(to_dense(again, pyramid), to_dense(blocks, pyramid))
    assert torch.equal(again.count == ALL, blocks.count == ALL)
    again.validate(pyramid, 203)
    for one, two in zip(to_pairs(again, pyramid), to_pairs(bits.to_list(), pyramid), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", LISTS)
def test_some_batch_entries(name):
    blocks, pyramid = problem_of(name)
    some = select_batch(blocks, [1, 0, 1] if blocks.batch > 1 else [0])
    wanted = to_dense(blocks, pyramid)
    assert torch.equal(to_dense(some, pyramid), wanted[[1, 0, 1]] if blocks.batch > 1 else wanted)
    some.validate(pyramid, 203)
    if blocks.batch > 1:
        with pytest.raises(ValueError, match="batch entries must lie in"):
            select_batch(blocks, [2])


def test_a_long_videos_list_is_built_quickly_and_is_small():
    """75,600 tokens × 40 heads at 15 %, blocks of 64."""
    rows = identity_rows(75_600, 128)
    columns = -(-75_600 // 64)
    random = torch.Generator().manual_seed(0)
    mask = torch.rand(40, rows.shape[1], columns, generator=random).lt_(0.15)[None]
    # Of this thread alone, so that a busy machine does not count.
    begin = time.thread_time()
    blocks = from_dense(mask, rows, 64)
    seconds = time.thread_time() - begin
    held = blocks.nbytes
    assert held < 20e6
    assert seconds < 2, f"{seconds:.2f} s"
    key = torch.zeros(1, 1, 1, 1).expand(1, 40, 75_600, 1)
    pyramid = KVPyramid(
        key=key,
        value=key,
        key_rows=torch.zeros(1, columns * 64, dtype=torch.int32),
        pooled_key=key[:, :, :0],
        pooled_value=key[:, :, :0],
        log_weight=torch.zeros(1, 1, columns * 64),
        offsets=(0, columns * 64),
        factors=(1,),
        block=64,
    )
    bits = to_bits(blocks, pyramid)
    assert bits.nbytes < 0.25 * held
    assert torch.equal(bits.to_list().pool, blocks.pool)
    assert transpose(blocks, pyramid).pool.numel() == blocks.pool.numel()
