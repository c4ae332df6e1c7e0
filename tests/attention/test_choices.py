"""What each dynamic selector chooses, against versions written tile by tile from the definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ziggurat.attention.budget import adaptive, top_mass
from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.levels import level0_reads, read_levels
from ziggurat.attention.loglinear import LogLinear
from ziggurat.attention.means import block_means
from ziggurat.attention.order import TokenOrder
from ziggurat.attention.plan import HeadGroup, HeadPlan
from ziggurat.attention.precise import Precise, pooled_mass
from ziggurat.attention.pyramid import Pyramid, sampled_importance
from ziggurat.attention.rows import Layout, lay_out
from ziggurat.attention.topk import TopK
from ziggurat.kernels.attend import attend
from ziggurat.kernels.listops import all_blocks, to_dense
from ziggurat.kernels.pyramid import KVPyramid, build_pyramid

TILE, BLOCK, DIM = 24, 8, 16
RAGGED = TokenGrid.video(3, 7, 13)
TEXT = TokenGrid.video(3, 7, 9, text_before=5, text_after=29)
REFERENCE = TokenGrid.joined([("visual", (2, 7, 9)), ("reference", (40,)), ("text", (3,)), ("visual", (1, 5, 9))])


def problem(
    grid: TokenGrid, factors: tuple[int, ...] = (1,), *, block: int = BLOCK, heads: int = 3, seed: int = 0
) -> tuple[Tensor, KVPyramid, Layout, Tensor]:
    """Queries [1, H, N, D], the pyramid, the layout, and the dense lse."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, heads, grid.tokens, DIM, generator=generator, dtype=torch.float64)
    layout = lay_out(grid, TokenOrder(name="hilbert"), tile=TILE, block=block)
    pyramid = build_pyramid(2 * key, value, layout.key_rows, block=block, factors=factors)
    lse = attend(query, pyramid, all_blocks(layout.query_rows, block))[1]
    return query, pyramid, layout, lse


def tokens(rows: Tensor) -> list[int]:
    return [row for row in rows.tolist() if row >= 0]


def tile_tokens(layout: Layout) -> list[list[int]]:
    return [tokens(rows) for rows in layout.query_rows[0]]


def block_tokens(layout: Layout) -> list[list[int]]:
    return [tokens(rows) for rows in layout.key_rows.view(-1, layout.block)]


def kinds(layout: Layout) -> list[str]:
    return [layout.grid.segments[int(index)].kind for index in layout.block_segment]


def best(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


def expected_by_segment(scores: list[float], layout: Layout, shares: dict[str, float]) -> set[int]:
    """Block indices: of every segment its own share of the best; text whole."""
    found: set[int] = set()
    for number, segment in enumerate(layout.grid.segments):
        own = (layout.block_segment == number).nonzero()[:, 0].tolist()
        count = len(own) if segment.kind == "text" else max(1, round(shares[segment.kind] * len(own)))
        found |= {own[i] for i in best([scores[b] for b in own], count)}
    return found


@pytest.mark.parametrize("grid", [RAGGED, TEXT, REFERENCE], ids=["ragged", "text", "reference"])
def test_topk_is_the_best_of_explicit_scores(grid: TokenGrid):
    query, pyramid, layout, _ = problem(grid)
    selector = TopK(density=0.2, reference=0.5)
    reads = level0_reads(selector.select(query, pyramid.key, layout, pyramid), layout.blocks).view(3, layout.tiles, -1)
    for head in range(3):
        for number, tile in enumerate(tile_tokens(layout)):
            mean = query[0, head, tile].mean(0)
            scores = [
                float(mean @ pyramid.key[0, head, block].mean(0)) / 4 + math.log(len(block))
                for block in block_tokens(layout)
            ]
            wanted = expected_by_segment(scores, layout, {"visual": 0.2, "reference": 0.5})
            if bool(layout.exact_tiles[number]):
                wanted = set(range(layout.blocks))
            assert set(reads[head, number].nonzero()[:, 0].tolist()) == wanted


def test_topk_by_error_orders_blocks_by_the_excess_over_their_mean():
    """With one query per tile and keys that differ in one component, the estimate is the definition's second order."""
    query, pyramid, layout, _ = problem(RAGGED)
    selector = TopK(density=0.2, by="error")
    reads = level0_reads(selector.select(query, pyramid.key, layout, pyramid), layout.blocks).view(3, layout.tiles, -1)
    for head in range(3):
        for number, tile in enumerate(tile_tokens(layout)):
            scores = []
            for block in block_tokens(layout):
                keys = pyramid.key[0, head, block]
                logit = float(query[0, head, tile].mean(0) @ keys.mean(0)) / 4
                variance = float(query[0, head, tile].square().mean(0) @ keys.var(0, correction=0)) / 16
                scores.append(len(block) * math.exp(logit) * math.expm1(variance / 2))
            count = max(1, round(0.2 * layout.blocks))
            assert set(reads[head, number].nonzero()[:, 0].tolist()) == best(scores, count)


def explicit_masses(query: Tensor, key: Tensor, layout: Layout) -> Tensor:
    """[H, T, K], float64."""
    shares = (query[0] @ key[0].mT / math.sqrt(DIM)).softmax(-1)
    rows = torch.stack([shares[:, tile].sum(1) for tile in tile_tokens(layout)], 1)
    return torch.stack([rows[..., block].sum(-1) for block in block_tokens(layout)], -1)


@pytest.mark.parametrize("grid", [RAGGED, TEXT, REFERENCE], ids=["ragged", "text", "reference"])
@pytest.mark.parametrize("by", ["density", "mass"])
def test_precise_is_the_best_of_explicit_masses(grid: TokenGrid, by: str):
    query, pyramid, layout, lse = problem(grid)
    masses = explicit_masses(query, pyramid.key, layout)
    selector = Precise(density=0.2) if by == "density" else Precise(mass=0.5)
    blocks = selector.select(query, pyramid.key, layout, pyramid, lse=lse)
    reads = level0_reads(blocks, layout.blocks).view(3, layout.tiles, -1)
    for head in range(3):
        for number in range(layout.tiles):
            own = masses[head, number].tolist()
            wanted = expected_by_segment(own, layout, {"visual": 0.2, "reference": 1.0})
            if by == "mass":
                wanted = {i for i, kind in enumerate(kinds(layout)) if kind != "visual"}
                for index, segment in enumerate(grid.segments):
                    if segment.kind == "visual":
                        part = (layout.block_segment == index).nonzero()[:, 0].tolist()
                        part.sort(key=lambda i: -own[i])
                        total, count = 0.0, 0
                        while total < 0.5 * sum(own[i] for i in part):
                            total, count = total + own[part[count]], count + 1
                        wanted |= set(part[:count])
            if bool(layout.exact_tiles[number]):
                wanted = set(range(layout.blocks))
            assert set(reads[head, number].nonzero()[:, 0].tolist()) == wanted


@pytest.mark.parametrize("factors", [(1,), (1, 4), (1, 8)], ids=str)
def test_error_is_the_mass_less_that_of_the_means(factors: tuple[int, ...]):
    query, pyramid, layout, lse = problem(TEXT, factors)
    held = explicit_masses(query, pyramid.key, layout)
    run = max(factors) if len(factors) > 1 else BLOCK
    pooled = torch.zeros_like(held)
    for head in range(3):
        for i, tile in enumerate(tile_tokens(layout)):
            for j, block in enumerate(block_tokens(layout)):
                for begin in range(0, len(block), run):
                    part = block[begin : begin + run]
                    logits = query[0, head, tile] @ pyramid.key[0, head, part].mean(0) / math.sqrt(DIM)
                    pooled[head, i, j] += len(part) * (logits - lse[0, head, tile]).exp().sum()
    scale = DIM**-0.5
    torch.testing.assert_close(pooled_mass(query, layout, pyramid, lse, scale)[0], pooled, rtol=1e-5, atol=1e-8)
    assert bool((held - pooled >= -1e-6).all())
    blocks = Precise(density=0.2, by="error").select(query, pyramid.key, layout, pyramid, lse=lse)
    reads = level0_reads(blocks, layout.blocks).view(3, layout.tiles, -1)
    for head in range(3):
        for i in (~layout.exact_tiles).nonzero()[:, 0].tolist():
            wanted = expected_by_segment((held - pooled)[head, i].tolist(), layout, {"visual": 0.2})
            assert set(reads[head, i].nonzero()[:, 0].tolist()) == wanted


def test_precise_keeps_the_mean_of_its_head_budgets():
    query, pyramid, layout, lse = problem(TokenGrid.video(4, 8, 8), heads=5)
    # Heads of sharp, middling and flat maps; all of a head's queries want the same.
    sharpness = torch.tensor([9.0, 8.0, 0.5, 0.1, 0.01], dtype=torch.float64)[None, :, None, None]
    query = query[:, :, :1].expand_as(query) * sharpness
    lse = attend(query, pyramid, all_blocks(layout.query_rows, BLOCK))[1]
    selector = Precise(density=0.25, heads="adaptive")
    counts = selector.select(query, pyramid.key, layout, pyramid, lse=lse).count[0]
    assert bool((counts == counts[:, :1]).all()), "equally many for every tile of a head"
    assert counts[:, 0].tolist() == [4, 4, 8, 12, 12]


@pytest.mark.parametrize(("recalls", "density", "wanted"), [
    ([0.9, 0.85, 0.5, 0.4], 0.2, [0.1, 0.1, 0.3, 0.3]),
    ([0.9, 0.95, 0.85, 0.4], 0.2, [0.1, 0.1, 0.3, 0.3]),
    ([0.9, 0.5, 0.5, 0.4], 0.2, [0.1, 0.2, 0.2, 0.3]),
    ([0.1, 0.2, 0.3, 0.4], 0.2, [0.2] * 4),
    ([0.9], 0.2, [0.2]),
    ([0.9, 0.1], 0.8, [0.6, 1.0]),
])  # fmt: skip
def test_head_budgets(recalls: list[float], density: float, wanted: list[float]):
    masses = torch.tensor([[recall, 1 - recall] for recall in recalls]).view(1, -1, 1, 2)
    reads = torch.tensor([True, False]).expand(masses.shape)
    torch.testing.assert_close(adaptive(masses, reads, density), torch.tensor(wanted, dtype=torch.float64))


def test_top_mass_reads_no_more_than_it_must_and_never_nothing():
    masses = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert top_mass(masses, 0.7).tolist() == [[True, True, False], [True, False, True], [True, False, False]]
    assert top_mass(masses, 1.0)[:2].all()


def test_old_lse_is_taken_again():
    query, pyramid, layout, lse = problem(RAGGED)
    later = query + 0.3 * torch.randn(query.shape, generator=torch.Generator().manual_seed(4), dtype=query.dtype)
    logits = later[0] @ pyramid.key[0].mT / math.sqrt(DIM) - lse[0][..., None]
    rows = torch.stack([logits.exp()[:, tile].sum(1) for tile in tile_tokens(layout)], 1)
    masses = torch.stack([rows[..., block].sum(-1) for block in block_tokens(layout)], -1)
    blocks = Precise(density=0.2).select(later, pyramid.key, layout, pyramid, lse=lse)
    reads = level0_reads(blocks, layout.blocks).view(3, layout.tiles, -1)
    count = int(reads[0, 0].sum())
    assert torch.equal(reads, torch.zeros_like(reads).scatter(-1, masses.topk(count).indices, True))
    with pytest.raises(ValueError, match="lse must be given"):
        Precise().select(query, pyramid.key, layout, pyramid)


def coarse_to_fine(selector: LogLinear, levels: int, query: Tensor, key: Tensor, layout: Layout) -> list[dict]:
    """For each tile what it reads, written from the definition: {(level, row)} by plain recursion, one head."""
    blocks, kind = block_tokens(layout), kinds(layout)

    def held(level: int, row: int) -> list[int]:
        span = BLOCK ** (level - 1)
        return [token for block in blocks[row * span : (row + 1) * span] for token in block]

    def has_text(level: int, row: int) -> bool:
        span = BLOCK ** (level - 1)
        return any(k != "visual" for k in kind[row * span : (row + 1) * span])

    found = []
    for tile in tile_tokens(layout):
        mean = query[tile].mean(0)
        read: set[tuple[int, int]] = set()
        candidates, chosen = list(range(math.ceil(len(blocks) / BLOCK ** (levels - 1)))), set()
        for level in range(levels, 0, -1):
            forced = {row for row in candidates if has_text(level, row)}
            scores = {
                row: float(mean @ key[held(level, row)].mean(0)) / math.sqrt(DIM) + math.log(len(held(level, row)))
                for row in candidates
                if row not in forced
            }
            chosen = set(sorted(scores, key=lambda row: -scores[row])[: selector.keep]) | forced
            read |= {(level, row) for row in candidates if row not in forced} - (
                {(level, row) for row in chosen} if selector.coverage == "partition" else set()
            )
            limit = math.ceil(len(blocks) / BLOCK ** (level - 2)) if level > 1 else 0
            candidates = [c for row in sorted(chosen) for c in range(row * BLOCK, (row + 1) * BLOCK) if c < limit]
        found.append({"coarse": read, "fine": chosen})
    return found


@pytest.mark.parametrize("coverage", ["partition", "overlap"])
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize(
    "grid",
    [TokenGrid.video(5, 11, 13), TokenGrid.video(5, 9, 11, text_before=70, text_after=29)],
    ids=["ragged", "text"],
)
def test_loglinear_goes_from_coarse_to_fine(grid: TokenGrid, levels: int, coverage: str):
    selector = LogLinear(keep=3, levels=levels, coverage=coverage)  # type: ignore[arg-type]
    factors = selector.factors(BLOCK, None)
    assert factors is not None
    query, pyramid, layout, _ = problem(grid, factors, heads=2)
    blocks = selector.select(query, pyramid.key, layout, pyramid)
    blocks.validate(pyramid, grid.tokens)
    read = to_dense(blocks, pyramid)[0] & (pyramid.log_weight > -math.inf)[0, :, None]
    for head in range(2):
        wanted = coarse_to_fine(selector, levels, query[0, head], pyramid.key[0, head], layout)
        for tile, rows in enumerate(wanted):
            if bool(layout.exact_tiles[tile]):
                continue
            expected = torch.zeros(pyramid.rows, dtype=torch.bool)
            for level, row in rows["coarse"]:
                expected[pyramid.offsets[level] + row] = True
            for block in rows["fine"]:
                expected[block * BLOCK : (block + 1) * BLOCK] = True
            assert torch.equal(read[head, tile], expected & (pyramid.log_weight[0, 0] > -math.inf))


@pytest.mark.parametrize(("tokens", "levels", "keep"), [(4096, 2, 8), (4096, 1, 3), (65536, 3, 4)], ids=str)
def test_loglinear_overlap_reads_exactly_as_many_rows_as_published(tokens: int, levels: int, keep: int):
    block = 16
    selector = LogLinear(keep=keep, levels=levels, coverage="overlap")
    layout = lay_out(TokenGrid.video(tokens // 1024, 32, 32), TokenOrder(), tile=128, block=block)
    query, key = torch.randn(2, 1, 1, tokens, 4)
    pyramid = build_pyramid(key, key, layout.key_rows, block=block, factors=selector.factors(block, None) or ())
    touched = selector.select(query, key, layout, pyramid).rows_touched(pyramid)
    assert bool((touched == keep * block * levels + tokens // block**levels).all())
    part = selector.model_copy(update={"coverage": "partition"})
    assert bool((part.select(query, key, layout, pyramid).rows_touched(pyramid) <= touched).all())


def test_loglinear_levels_follow_from_the_length():
    assert [len(LogLinear().factors(16, rows) or ()) - 1 for rows in (10, 4095, 4096, 65535, 65536)] == [1, 1, 2, 2, 3]
    assert LogLinear().factors(16, None) is None
    group = HeadGroup(block=16, entries=(HeadPlan(heads=(0,), selector=LogLinear()),))
    assert group.factors == ()
    assert group.levels(4352) == (1, 16, 256)
    with pytest.raises(ValueError, match=r"factors must hold \[256\] for the loglinear selector"):
        HeadGroup(block=16, factors=(1, 16), entries=(HeadPlan(heads=(0,), selector=LogLinear(levels=2)),))


def test_loglinear_refuses_levels_of_another_factor():
    query, pyramid, layout, _ = problem(RAGGED, (1, 4))
    with pytest.raises(ValueError, match="factors must hold the powers of block 8 up to 64"):
        LogLinear(levels=2).select(query, pyramid.key, layout, pyramid)


@pytest.mark.parametrize("grid", [RAGGED, TEXT], ids=["ragged", "text"])
@pytest.mark.parametrize("quotas", [(0.1, 0.05, 0.0, 0.2), (0.0, 0.3, 0.3, 0.4), (1.0, 0.0, 0.0, 0.0)], ids=str)
def test_pyramid_quotas_go_by_falling_importance(grid: TokenGrid, quotas: tuple[float, float, float, float]):
    query, pyramid, layout, _ = problem(grid, (1, 2, 4, 8))
    selector = Pyramid(quotas=quotas, importance="pooled")
    level = read_levels(selector.select(query, pyramid.key, layout, pyramid), layout, (1, 2, 4, 8))
    keys, weight = block_means(pyramid, BLOCK)
    for head in range(3):
        for number, tile in enumerate(tile_tokens(layout)):
            if bool(layout.exact_tiles[number]):
                continue
            scores = (query[0, head, tile].mean(0) @ keys[0, head].T / math.sqrt(DIM) + weight[0, 0]).tolist()
            visual = [i for i, kind in enumerate(kinds(layout)) if kind == "visual"]
            ordered = sorted(visual, key=lambda i: -scores[i])
            wanted = dict.fromkeys(range(layout.blocks), 0)
            ends = [round(sum(quotas[: i + 1]) * len(visual)) for i in range(4)]
            for rank, block in enumerate(ordered):
                wanted[block] = next((i for i, end in enumerate(ends) if rank < end), -1)
            wanted[ordered[0]] = 0
            assert level[0, head, number].tolist() == list(wanted.values())


def test_pyramid_bounds_are_of_cumulative_importance():
    query, pyramid, layout, _ = problem(RAGGED, (1, 2, 4, 8))
    bounds = (0.4, 0.5, 0.6, 0.8)
    selector = Pyramid(bounds=bounds, seed=3)
    level = read_levels(selector.select(query, pyramid.key, layout, pyramid), layout, (1, 2, 4, 8))
    importance = sampled_importance(query, layout, pyramid, DIM**-0.5, 3)
    for scores, got in zip(importance.flatten(0, 2).tolist(), level.flatten(0, 2).tolist(), strict=True):
        total, before = sum(scores), 0.0
        for rank, block in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i])):
            wanted = next((i for i, bound in enumerate(bounds) if before < bound * total), -1) if rank else 0
            assert got[block] == wanted
            before += scores[block]


def test_sampled_importance_takes_a_quarter_of_the_rows_at_the_same_places_of_every_block():
    query, pyramid, layout, _ = problem(RAGGED)
    generator = torch.Generator().manual_seed(7)
    key_places = torch.rand(3, BLOCK, generator=generator).argsort(-1)[:, : BLOCK // 4]
    query_places = torch.rand(3, TILE, generator=generator).argsort(-1)[:, : TILE // 4]
    got = sampled_importance(query, layout, pyramid, DIM**-0.5, 7)
    for head in range(3):
        for i, tile in enumerate(tile_tokens(layout)):
            peaks = []
            for row in {tile[int(p) % len(tile)] for p in query_places[head]}:
                peaks.append(
                    [
                        max(float(query[0, head, row] @ pyramid.key[0, head, b[int(p) % len(b)]]) / 4
                            for p in key_places[head])
                        for b in block_tokens(layout)
                    ]
                )  # fmt: skip
            wanted = [max(math.exp(peak[j] - max(peak)) for peak in peaks) for j in range(layout.blocks)]
            torch.testing.assert_close(got[0, head, i].tolist(), wanted, rtol=1e-5, atol=1e-7)


def test_similarity_lowers_the_level_where_keys_disagree():
    grid = TokenGrid.video(1, 1, 64)
    layout = lay_out(grid, TokenOrder(), tile=16, block=8)
    key = torch.randn(1, 1, 64, DIM, generator=torch.Generator().manual_seed(0))
    key[:, :, :8] = key[:, :, :1]  # all alike: level 8
    key[:, :, 8:16] = torch.cat([key[:, :, 8:9].expand(-1, -1, 4, -1), -key[:, :, 8:9].expand(-1, -1, 4, -1)], 2)
    key[:, :, 16:24] = key[:, :, 16:17] * torch.tensor([1.0, 1, -1, -1, 1, 1, -1, -1])[:, None]  # pairs: level 2
    key[:, :, 24:32] = key[:, :, 24:25] * torch.tensor([1.0, -1] * 4)[:, None]  # level 1
    pyramid = build_pyramid(key, key, layout.key_rows, block=8, factors=(1, 2, 4, 8))
    selector = Pyramid(quotas=(0.0, 0.0, 0.0, 1.0), similarity=(0.7, 0.65, 0.6))
    level = read_levels(selector.select(key, key, layout, pyramid), layout, pyramid.factors)[0, 0]
    most = level.amax(0)
    assert most[:4].tolist() == [3, 2, 1, 0]
    free = selector.model_copy(update={"similarity": None})
    assert (
        read_levels(free.select(key, key, layout, pyramid), layout, pyramid.factors)[0, 0].amax(0).tolist() == [3] * 8
    )


def test_small_blocks_merge_neighbours_into_one_masked_entry():
    """A block of 16 rows has 2 rows of level 8: eight neighbours share a block of that level."""
    query, pyramid, layout, _ = problem(TokenGrid.video(4, 8, 16), (1, 2, 4, 8), block=16)
    blocks = Pyramid(quotas=(0.0, 0.0, 0.0, 1.0)).select(query, pyramid.key, layout, pyramid)
    # 32 blocks, the best of them in full: 31 means of 2 rows each in 4 blocks of level 8, and that one.
    assert bool((blocks.count == 5).all())
    assert bool((blocks.masked_count == 1).all())
