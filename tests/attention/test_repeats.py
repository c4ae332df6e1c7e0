"""Keys that are the same row many times over, as a prompt's padding is."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ziggurat.attention.repeats import attend_repeats, repeated_rows


def padded(rows: int, repeated: int, *, batch: int = 2, heads: int = 3, dim: int = 48, dtype=torch.float32) -> Tensor:
    """[batch, heads, rows, dim] whose last `repeated` rows are equal."""
    tensor = torch.randn(batch, heads, rows, dim, generator=torch.Generator().manual_seed(rows), dtype=dtype)
    tensor[:, :, rows - repeated :] = tensor[:, :, -1:].clone()
    return tensor


@pytest.mark.parametrize(("rows", "repeated"), [(1, 1), (7, 1), (7, 7), (512, 500), (101, 3)])
def test_repeated_rows_are_counted(rows: int, repeated: int):
    assert repeated_rows(padded(rows, repeated), padded(rows, repeated) + 1) == repeated


def test_rows_repeat_only_where_keys_and_values_do_in_every_batch_and_head():
    key, value = padded(20, 10), padded(20, 10)
    value[1, 2, 15] += 1
    assert repeated_rows(key, value) == 4
    key[0, 0, 18] += 1
    assert repeated_rows(key, value) == 1


def test_nan_is_equal_to_nothing():
    key = torch.full((1, 1, 5, 4), math.nan)
    assert repeated_rows(key, key) == 1


@pytest.mark.parametrize(
    ("rows", "repeated", "read"), [(512, 500, 13), (512, 1, 512), (9, 9, 1), (131, 60, 72), (1, 1, 1)]
)
@pytest.mark.parametrize("queries", [1, 131])
def test_the_output_is_that_of_reading_every_row(rows: int, repeated: int, read: int, queries: int):
    query = torch.randn(2, 3, queries, 48, generator=torch.Generator().manual_seed(1))
    key, value = padded(rows, repeated), padded(rows, repeated).flip(3)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=0.2)
    out, touched = attend_repeats(query, key, value, scale=0.2)
    assert touched == read
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_near_to_the_exact_output_as_stock_attention():
    query, key, value = (padded(n, r).bfloat16() for n, r in ((300, 1), (512, 500), (512, 500)))
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    stock = F.scaled_dot_product_attention(query, key, value)
    out, _ = attend_repeats(query, key, value)
    assert (out - exact).norm() <= 1.5 * (stock - exact).norm()


def test_gradients_are_those_of_every_row():
    query, key, value = (
        padded(n, r, dim=16).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for n, r in ((20, 1), (40, 30), (40, 30))
    )
    out, _ = attend_repeats(query, key, value)
    ours = torch.autograd.grad(out.square().sum(), (query, key, value))
    exact = torch.autograd.grad(F.scaled_dot_product_attention(query, key, value).square().sum(), (query, key, value))
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(ours[1:], exact[1:], strict=True):
        # Of equal rows one is read and takes the gradient of them all.
        torch.testing.assert_close(mine.sum(2), theirs.sum(2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine[:, :, :10], theirs[:, :, :10], rtol=1e-4, atol=1e-4)
