"""Sequence parallelism over two processes: the same as one process, joint layouts included; ring is refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist

from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.order import TokenOrder
from ziggurat.attention.plan import HeadGroup, HeadPlan, Plan
from ziggurat.attention.stripe import Box, Stripe
from ziggurat.attention.window import Window
from ziggurat.pipelines import attach
from ziggurat.pipelines.plans import model_shape
from ziggurat.pipelines.ulysses import deal, interleaved, share_of, shared_plan

# Type checkers see nothing of what diffusers imports late.
library: Any = diffusers

WORLD, HEADS = 2, 4
Share = SimpleNamespace


def test_joint_sequences_are_unpicked():
    grid = interleaved(TokenGrid.video(2, 3, 4, text_before=6), WORLD)
    assert isinstance(grid, TokenGrid)
    assert [(part.kind, part.runs) for part in grid.segments] == [
        ("text", ((0, 3), (15, 18))),
        ("visual", ((3, 15), (18, 30))),
    ]
    images = interleaved(TokenGrid.joined([("text", (4,)), ("visual", (1, 2, 3)), ("visual", (1, 1, 2))]), WORLD)
    assert isinstance(images, TokenGrid)
    assert [part.runs for part in images.segments] == [((0, 2), (6, 8)), ((2, 6), (8, 10)), ((10, 12),)]
    assert "not split evenly" in str(interleaved(TokenGrid.video(2, 3, 4, text_after=5), WORLD))


def plan_for(transformer: Any) -> Plan:
    fields: dict[str, Any] = vars(model_shape(transformer)) | {"grid": (3, 4, 6)}
    window = HeadPlan(heads=(3, 0), selector=Window(frames=2, height=3), rest="drop")
    stripe = HeadPlan(heads=(1, 2), selector=Stripe(boxes=(Box(frames=(0, 1)),)), rest="pooled")
    return Plan.uniform(
        [HeadGroup(order=TokenOrder(name="temporal"), tile=16, block=16, entries=(window, stripe))], **fields
    )


def wan() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = library.WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()
    return transformer, {
        "hidden_states": torch.randn(1, 4, 3, 8, 12),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, 16),
    }


def flux() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = library.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    places = torch.cartesian_prod(torch.arange(1), torch.arange(6), torch.arange(12)).float()
    return transformer, {
        "hidden_states": torch.randn(1, 72, 4),
        "encoder_hidden_states": torch.randn(1, 8, 16),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": places,
        "txt_ids": torch.zeros(8, 3),
    }


def qwen() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = library.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    return transformer, {
        "hidden_states": torch.randn(1, 72, 16),
        "encoder_hidden_states": torch.randn(1, 8, 16),
        "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]]),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 6, 12)]],
    }


class Pipe:
    scheduler = None

    def __init__(self, transformer: torch.nn.Module):
        self.transformer = transformer


def run(transformer: Any, arguments: dict[str, Any]) -> tuple[torch.Tensor, int, str]:
    with attach(Pipe(transformer), plan_for(transformer)) as handle, torch.no_grad():
        out = transformer(**arguments, return_dict=False)[0]
        return out, sum(step.sparse_calls for step in handle.steps), handle.summary()


def test_heads_are_dealt_from_entry_after_entry():
    plan = plan_for(wan()[0])
    assert deal(plan.layers[0], HEADS, WORLD) == [3, 1, 0, 2]
    for rank in range(WORLD):
        mine = shared_plan(plan, Share(world=WORLD, rank=rank))  # type: ignore[arg-type]
        assert mine.heads == HEADS // WORLD
        assert [entry.heads for entry in mine.layers[0].groups[0].entries] == [(0,), (1,)]
    with pytest.raises(ValueError, match="must divide the model's 4 heads, got 3"):
        shared_plan(plan, Share(world=3, rank=0))  # type: ignore[arg-type]


def test_ring_is_refused_saying_why(bare_pipe):
    transformer, _ = wan()
    for settings, words in (
        ({"ring_degree": 2, "ulysses_degree": 1}, "ring attention shows a rank one shard"),
        ({"ring_degree": 1, "ulysses_degree": 2, "ulysses_anything": True}, "unevenly"),
    ):
        transformer._parallel_config = SimpleNamespace(context_parallel_config=SimpleNamespace(**settings))
        with pytest.raises(ValueError, match=words):
            attach(bare_pipe(transformer), plan_for(transformer))
    assert not any(module._forward_pre_hooks for module in transformer.modules())
    assert share_of(None) is None


def test_parallelism_that_came_after_attach_is_refused(bare_pipe):
    transformer, arguments = wan()
    with attach(bare_pipe(transformer), plan_for(transformer)) as handle, torch.no_grad():
        transformer(**arguments)
        with pytest.raises(ValueError, match="changed after attach"):
            handle._runs["transformer"].deal(0, HEADS, Share(world=WORLD, rank=0))  # type: ignore[arg-type]


def work(port: str, folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    # Diffusers asks for an accelerator, and there is none here.
    accelerator: Any = torch.accelerator
    torch._C._get_accelerator = lambda *_: torch.device("cpu")  # type: ignore[method-assign]
    accelerator.device_count = lambda: 1
    for model in (wan, flux, qwen):
        transformer, arguments = model()
        transformer.enable_parallelism(config=library.ContextParallelConfig(ulysses_degree=WORLD))
        out, calls, summary = run(transformer, arguments)
        if rank == 0:
            torch.save((out.clone(), calls, summary), f"{folder}/{model.__name__}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, str(port), str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(WORLD)]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * WORLD, said
    for model in (wan, flux, qwen):
        out, calls, summary = torch.load(tmp_path / f"{model.__name__}.pt")
        expected, expected_calls, _ = run(*model())
        assert calls == expected_calls == 2, summary
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]))
