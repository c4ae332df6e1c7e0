"""Cross-attention by our own kernel: the same latents, padding read once, and only where the plan says so."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_wan

from ziggurat.pipelines import attach
from ziggurat.pipelines.cross import CrossRun
from ziggurat.pipelines.models import row_of
from ziggurat.search.cross import cross_by
from ziggurat.search.sensitivity import kept_forwards

LAYERS = 2


def test_latents_are_those_of_stock_attention_and_padding_is_read_once(wan, latents_of, dense_plan):
    stock = latents_of(wan)
    with attach(wan, dense_plan().model_copy(update={"cross_by": "own"})) as handle:
        torch.testing.assert_close(latents_of(wan), stock, rtol=0, atol=2e-5)
        summary = handle.summary()
    # Three steps of two branches; the prompt has seven tokens with its end, the negative one two, of 16 rows each.
    calls = 3 * 2 * LAYERS
    assert f"cross-attention: our kernel, {calls} calls, {calls // 2 * (8 + 3)} of {calls * 16} rows read" in summary
    assert torch.equal(latents_of(wan), stock)


def test_the_chosen_backend_is_not_asked(wan, latents_of, sparse_plan, monkeypatch):
    asked: list[int] = []
    stock = dispatch_attention_fn

    def counted(query, key, value, **options):
        asked.append(key.shape[1])
        return stock(query, key, value, **options)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", counted)
    with attach(wan, sparse_plan().model_copy(update={"cross_by": "own"})) as handle:
        latents_of(wan)
    assert asked == []
    assert handle.density is not None
    assert handle.density < 1


def test_a_second_run_counts_afresh(wan, latents_of, sparse_plan):
    with attach(wan, sparse_plan().model_copy(update={"cross_by": "own"})) as handle:
        latents_of(wan, steps=1)
        first = handle.summary()
        latents_of(wan, steps=1)
        assert handle.summary() == first


def test_a_mask_stays_stock_and_says_so(wan):
    run = CrossRun(wan.transformer, row_of(wan.transformer))
    module = wan.transformer.blocks[0].attn2
    hidden, text = torch.randn(1, 40, 32), torch.randn(1, 16, 32)
    mask = torch.zeros(1, 1, 40, 16).masked_fill(torch.arange(16) > 7, -torch.inf)
    try:
        with torch.no_grad():
            masked, free = module(hidden, text, mask), module(hidden, text)
    finally:
        run.remove()
    with torch.no_grad():
        assert torch.equal(masked, module(hidden, text, mask))
        torch.testing.assert_close(free, module(hidden, text), rtol=0, atol=1e-5)
    assert run.describe() == "our kernel, 1 calls, 16 of 16 rows read; stock, a mask (1 calls)"


def test_compiled_fullgraph(wan, latents_of, sparse_plan):
    torch._dynamo.reset()
    with attach(wan, sparse_plan().model_copy(update={"cross_by": "own"})) as handle:
        expected = latents_of(wan)
        wan.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(latents_of(wan), expected, rtol=0, atol=1e-5)
        assert f"our kernel, {3 * 2 * LAYERS} calls" in handle.summary()
    torch._dynamo.reset()


@pytest.mark.parametrize(("seconds", "chosen"), [(0.5, "own"), (1.0, None), (2.0, None)])
def test_a_search_chooses_by_the_time_of_a_forward(wan, latents_of, monkeypatch, seconds, chosen):
    with kept_forwards(wan.transformer, lambda: {0}, lambda: 0) as forwards:
        latents_of(wan, steps=1)
    hooks = copy.copy(wan.transformer.blocks[0].attn2._forward_hooks)
    clock = iter(range(100))
    monkeypatch.setattr(
        "ziggurat.search.cross._seconds",
        lambda transformer, forward: (
            transformer(*forward.args, **forward.kwargs),
            seconds if next(clock) % 2 == 0 else 1.0,  # one forward warms up; then stock and own take turns
        )[1],
    )
    assert cross_by(wan.transformer, forwards) == chosen
    assert next(clock) == 7
    assert wan.transformer.blocks[0].attn2._forward_hooks == hooks


def test_of_slow_forwards_one_of_each_will_do(wan, latents_of, monkeypatch):
    with kept_forwards(wan.transformer, lambda: {0}, lambda: 0) as forwards:
        latents_of(wan, steps=1)
    timed = []
    monkeypatch.setattr(
        "ziggurat.search.cross._seconds",
        lambda transformer, forward: (transformer(*forward.args, **forward.kwargs), timed.append(1), 20.0)[2],
    )
    assert cross_by(wan.transformer, forwards) is None
    assert len(timed) == 3
