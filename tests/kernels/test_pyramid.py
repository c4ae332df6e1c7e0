"""The key/value pyramid: levels, weights, padding and what is refused."""

import math
from typing import Any

import pytest
import torch

from ziggurat.kernels import native_build
from ziggurat.kernels.pyramid import build_pyramid


@pytest.mark.parametrize("tokens", [1, 15, 64, 203])
def test_levels_are_padded_and_weigh_all_tokens(tokens):
    key, value = torch.randn(2, 3, tokens, 8), torch.randn(2, 3, tokens, 8)
    pyramid = build_pyramid(key, value, block=16, factors=(1, 4, 16))
    assert all(offset % 16 == 0 for offset in pyramid.offsets)
    assert pyramid.log_weight.shape == (1, 1, pyramid.rows)
    assert pyramid.pooled_key.shape == (2, 3, pyramid.rows - pyramid.offsets[1], 8)
    for level in range(pyramid.levels):
        begin, end = pyramid.offsets[level], pyramid.offsets[level + 1]
        assert float(pyramid.log_weight[..., begin:end].exp().sum()) == pytest.approx(tokens)
        assert pyramid.blocks_at(level) == range(begin // 16, end // 16)


def test_pooled_rows_are_means_over_live_rows():
    key, value = torch.randn(1, 1, 10, 4, dtype=torch.float64), torch.randn(1, 1, 10, 4, dtype=torch.float64)
    weight = torch.zeros(1, 1, 10)
    weight[..., 1] = -math.inf
    weight[..., 4:8] = -math.inf
    weight[..., 9] = math.log(3)
    key[..., 1, :] = math.nan
    pyramid = build_pyramid(key, value, block=4, factors=(1, 4), key_log_weight=weight)
    pooled, logs = pyramid.pooled_key[0, 0], pyramid.log_weight[0, 0, pyramid.offsets[1] :]
    torch.testing.assert_close(pooled[0], key[0, 0, [0, 2, 3]].mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pooled[2], (key[0, 0, 8] + 3 * key[0, 0, 9]) / 4, rtol=1e-6, atol=1e-6)
    assert bool((pooled[[1, 3]] == 0).all())
    torch.testing.assert_close(logs, torch.tensor([math.log(3), -math.inf, math.log(4), -math.inf]))


def test_per_head_rows_and_weights():
    key = torch.randn(2, 2, 6, 4)
    rows = torch.tensor([[0, 1, 2, 3, 4, 5, -1, -1], [5, -1, 4, 3, -1, 2, 1, 0]], dtype=torch.int32)
    weight = torch.randn(2, 1, 6)
    pyramid = build_pyramid(key, key, rows, block=4, factors=(1, 2), key_log_weight=weight)
    assert pyramid.log_weight.shape == (2, 2, 12)
    assert float(pyramid.log_weight[1, 1, 3]) == pytest.approx(float(weight[1, 0, 3]))
    assert float(pyramid.log_weight[0, 1, 4]) == -math.inf
    torch.testing.assert_close(pyramid.pooled_key[1, 1, 0], key[1, 1, 5])


def test_gradients_reach_tokens_through_pooled_rows():
    key = torch.randn(1, 1, 10, 4).requires_grad_()
    pyramid = build_pyramid(key, key, block=4, factors=(1, 4))
    (gradient,) = torch.autograd.grad(pyramid.pooled_key.sum(), key)
    torch.testing.assert_close(gradient[0, 0, :, 0], torch.tensor([0.25] * 8 + [0.5] * 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block": 0}, "block must be positive"),
        ({"factors": (2, 4)}, "factors must start with 1"),
        ({"factors": (1, 4, 4)}, "factors must start with 1"),
        ({"value": torch.zeros(1, 1, 9, 4)}, "same four dimensions"),
        ({"value": torch.zeros(1, 1, 10, 4).double()}, "one floating dtype"),
        ({"key_rows": torch.zeros(1, 10, dtype=torch.int32)}, "multiple of block"),
        ({"key_rows": torch.full((1, 16), 10, dtype=torch.int32)}, "key_rows must lie in"),
        ({"key_log_weight": torch.zeros(1, 1, 9)}, "key_log_weight must be"),
        ({"key_log_weight": torch.full((1, 1, 10), math.nan)}, "finite or -inf"),
    ],
)
def test_refusals(change, words):
    key = torch.zeros(1, 1, 10, 4)
    given = {"key": key, "value": key, "block": 16, **change}
    with pytest.raises(ValueError, match=words):
        build_pyramid(given.pop("key"), given.pop("value"), given.pop("key_rows", None), **given)


@pytest.mark.parametrize("factors", [(1, 2, 4, 8, 16), (1, 3, 4, 6, 9), (1, 16, 256)], ids=str)
@pytest.mark.parametrize("tokens", [5, 203, 700])
def test_levels_are_means_of_tokens_whatever_levels_lie_between(tokens: int, factors: tuple[int, ...]):
    key = torch.randn(1, 2, tokens, 8, dtype=torch.float64)
    pyramid = build_pyramid(key, 2 * key, block=16, factors=factors)
    for level, factor in enumerate(factors[1:], 1):
        begin = pyramid.offsets[level] - pyramid.offsets[1]
        for row, part in enumerate(key.split(factor, 2)):
            torch.testing.assert_close(pyramid.pooled_key[:, :, begin + row], part.mean(2), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(pyramid.pooled_value[:, :, begin + row], 2 * part.mean(2), rtol=1e-6, atol=1e-6)
            weight = pyramid.log_weight[..., pyramid.offsets[level] + row]
            assert float(weight) == pytest.approx(math.log(part.shape[2]), abs=1e-5)
        rest = pyramid.log_weight[..., pyramid.offsets[level] + -(-tokens // factor) : pyramid.offsets[level + 1]]
        assert bool((rest == -math.inf).all())


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("factors", [(1, 2, 4, 8), (1, 3, 4, 6, 9), (1, 16, 256, 512), (1, 64)], ids=str)
@pytest.mark.parametrize("head_dim", [128, 48, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_levels_agree_with_float64(dtype, head_dim, factors, compiled, monkeypatch):
    """Rows per head, weights per batch entry, keys that are not read and hold NaN, and inputs that are views."""
    if not compiled:
        monkeypatch.setattr(native_build, "lacking", lambda dtype, device: "left out")
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(2, 333, 3, head_dim, generator=generator).to(dtype).transpose(1, 2) for _ in range(2))
    weight = torch.randn(2, 3, 333, generator=generator)
    weight[:, :, 40:140] = -math.inf
    rows = torch.stack([torch.randperm(333, generator=generator) for _ in range(3)]).int()
    rows = torch.nn.functional.pad(rows, (0, 19), value=-1)
    exact = build_pyramid(key.double(), value.double(), rows, block=16, factors=factors, key_log_weight=weight)
    key[:, :, 40:140] = value[:, :, 40:140] = math.nan
    got = build_pyramid(key, value, rows, block=16, factors=factors, key_log_weight=weight)
    torch.testing.assert_close(got.log_weight, exact.log_weight, rtol=1e-5, atol=1e-5)
    # A level made from a finer one is rounded twice.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for one, two in ((got.pooled_key, exact.pooled_key), (got.pooled_value, exact.pooled_value)):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), two, rtol=tolerance, atol=tolerance)


def test_what_follows_from_the_rows_alone_is_made_once():
    rows = torch.nn.functional.pad(torch.randperm(90, generator=torch.Generator().manual_seed(0)), (0, 6), value=-1)
    memo: dict[str, Any] = {}
    kept = []
    for seed in range(2):
        key, value = torch.randn(2, 1, 3, 90, 32, generator=torch.Generator().manual_seed(seed))
        weight = torch.randn(1, 1, 90, generator=torch.Generator().manual_seed(seed))
        for given in (None, weight, None):
            more: dict[str, Any] = {"block": 16, "factors": (1, 4, 16), "key_log_weight": given}
            got = build_pyramid(key, value, rows[None], memo=memo, **more)
            expected = build_pyramid(key, value, rows[None], **more)
            for name in ("log_weight", "pooled_key", "pooled_value"):
                assert torch.equal(getattr(got, name), getattr(expected, name))
            kept.append(memo["weight"])
    assert all(one is kept[0] for one in kept)
