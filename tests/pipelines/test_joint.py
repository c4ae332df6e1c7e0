"""Joint attention: whatever the text's length, its rows and columns are exact, and padding is nobody's key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ziggurat.attention.run import PlanRun
from ziggurat.pipelines import attach
from ziggurat.pipelines.plans import model_shape

JOINT: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "out_channels": 4}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "text-first": (
        "CogView3PlusTransformer2DModel",
        {**JOINT, "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4, "sample_size": 16}
        | {"pos_embed_max_size": 16},
        {"hidden_states": torch.zeros(1, 4, 12, 18), "timestep": torch.tensor([500])}
        | dict.fromkeys(("original_size", "target_size", "crop_coords"), torch.tensor([[96, 144]])),
    ),
    "text-last-masked": (
        "HunyuanVideoTransformer3DModel",
        {**JOINT, "in_channels": 4, "text_embed_dim": 16, "num_single_layers": 1, "num_refiner_layers": 1}
        | {"pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6)},
        {"hidden_states": torch.zeros(1, 4, 1, 12, 18), "timestep": torch.tensor([500])}
        | {"pooled_projections": torch.ones(1, 8), "guidance": torch.tensor([6000.0])},
    ),
}


@pytest.mark.parametrize("text", [1, 7, 40])
@pytest.mark.parametrize("case", CASES)
def test_text_is_read_and_reads_exactly(case, text, build, forward, bare_pipe, sparse_plan, monkeypatch):
    torch.manual_seed(0)
    model, config, arguments = CASES[case]
    transformer, valid = build(model, config), max(1, text - 2)
    arguments = arguments | {
        "hidden_states": torch.randn(arguments["hidden_states"].shape),
        "encoder_hidden_states": torch.randn(1, text, 16),
    }
    if "masked" in case:
        arguments["encoder_attention_mask"] = (torch.arange(text) < valid).long()[None]
    original, checked = PlanRun.attend_layer, []

    def spy(self, query, key, value, *, grid, key_log_weight=None, **call):
        def routed(values: torch.Tensor) -> torch.Tensor:
            found = original(self, query, key, values, grid=grid, key_log_weight=key_log_weight, **call)
            assert found is not None
            return found

        words = next(part for part in grid.segments if part.kind == "text").positions()
        pixels = grid.visual[0].positions()
        assert len(words) == text
        mask = None if key_log_weight is None else key_log_weight[:, :, None]
        out = routed(value)
        exact = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=call.get("scale"))
        torch.testing.assert_close(out[:, :, words], exact[:, :, words], rtol=0, atol=1e-5)
        assert (out - exact)[:, :, pixels].abs().max() > 1e-3, "the plan was not felt: nothing is compared"
        for some in words.split(value.shape[-1]):
            # Of values that are 1 for one word and 0 for all else, the output is that word's share.
            one_hot = torch.zeros_like(value)
            one_hot[:, :, some, torch.arange(len(some))] = 1
            share = routed(one_hot)[:, :, pixels, : len(some)]
            heard = torch.ones(len(some), dtype=torch.bool)
            if key_log_weight is not None:
                heard = torch.isfinite(key_log_weight[0, 0, some])
            assert bool((share > 0).eq(heard).all())
        checked.append(call["layer"])
        return out

    monkeypatch.setattr(PlanRun, "attend_layer", spy)
    with attach(bare_pipe(transformer), sparse_plan(**(vars(model_shape(transformer)) | {"grid": (1, 6, 9)}))):
        forward(transformer, arguments)
    assert checked == list(range(model_shape(transformer).layers))
