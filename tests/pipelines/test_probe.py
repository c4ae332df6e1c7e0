"""The probe: rows for transformers of which nothing is known, and the verb that prints them."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import pytest
import torch

from ziggurat.app.cli import main
from ziggurat.pipelines.catalogue import rows
from ziggurat.pipelines.probe import probe, probe_folder

# Type checkers see nothing of what diffusers imports late.
library: Any = diffusers


def joint() -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    transformer = library.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    return transformer.eval(), {
        "hidden_states": torch.randn(1, 4, 3, 8, 12),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([6000.0]),
    }


def test_where_tokens_stand():
    transformer, arguments = joint()
    found = probe(transformer, arguments)
    assert (found.latents, found.axes) == ("hidden_states", "BCFHW")
    blocks = {finding.paths: finding for finding in found.findings}
    assert blocks["single_transformer_blocks.{}.attn"].order == (("visual", 72), ("text", 7))
    assert blocks["single_transformer_blocks.{}.attn"].grid == (3, 4, 6)
    assert blocks["single_transformer_blocks.{}.attn"].raster
    assert not blocks["context_embedder.token_refiner.refiner_blocks.{}.attn"].visual
    assert found.row == (
        'ModelRow(model="HunyuanVideoTransformer3DModel", kind="video",'
        ' tokens=Tokens(visual=latents("BCFHW"), order=("visual", "text")),'
        r' dense=r"context_embedder\.token_refiner\.refiner_blocks\.\d+\.attn")'
    )
    for first, noise in ((1.0, ', noise="fraction"'), (0.0, ', noise="1 - fraction"')):
        assert noise in probe(transformer, arguments | {"timestep": torch.tensor([first])}).row
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())


def test_tokens_out_of_raster_order_are_seen(monkeypatch):
    transformer, arguments = joint()
    embed = transformer.x_embedder.forward
    monkeypatch.setattr(transformer.x_embedder, "forward", lambda latents: embed(latents).flip(1))
    found = probe(transformer, arguments)
    assert not next(finding for finding in found.findings if finding.visual).raster
    assert "not in raster order" in found.row


def test_experts_of_one_class_are_told_once(experts_folder):
    assert [found.model for found in probe_folder(experts_folder)] == ["WanTransformer3DModel"]


def test_what_can_not_be_probed():
    transformer, arguments = joint()
    with pytest.raises(ValueError, match="latents must name a floating-point tensor"):
        probe(transformer, arguments, latents="timestep")
    with pytest.raises(ValueError, match="Linear has no attention module"):
        probe(torch.nn.Linear(1, 1), {"input": torch.zeros(1)})


def verb(capsys, *arguments: str) -> tuple[int, list[str], str]:
    with pytest.raises(SystemExit) as stop:
        main(["models", *arguments])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out.splitlines(), said.err


def test_models_prints_the_table(capsys):
    code, lines, _ = verb(capsys, "--json")
    assert code == 0
    assert json.loads(lines[-1]) == {"rows": rows()}
    assert len(lines) == len(rows()) + 1
    assert any("WanTransformer3DModel" in line and "sparse (visual)" in line for line in lines)


def test_models_probes_a_pipelines_folder(wan_folder, capsys, tmp_path):
    code, lines, said = verb(capsys, "--probe", str(wan_folder), "--json")
    assert code == 0
    row = (
        'ModelRow(model="WanTransformer3DModel", kind="video", tokens=Tokens(visual=latents("BCFHW")),'
        r' dense=r"blocks\.\d+\.attn2")'
    )
    assert row in lines
    assert json.loads(lines[-1]) == {"rows": [{"class": "WanTransformer3DModel", "axes": "BCFHW", "row": row}]}
    assert "has a row for WanTransformer3DModel already" in said
    code, _, said = verb(capsys, "--probe", str(tmp_path))
    assert code == 1
    assert "holds no model_index.json" in said
