"""Attention while the embedded model is trained: dense on one kernel, and under a plan."""

import math
from random import Random
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.transformers import transformer_wan

from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.plan import HeadGroup, HeadPlan, LayerPlan, Plan
from ziggurat.attention.run import PlanRun
from ziggurat.attention.schedule import Schedule
from ziggurat.attention.window import Window
from ziggurat.pipelines.shapes.build import build_text_encoder, build_tokenizer, build_transformer, build_vae
from ziggurat.pipelines.shapes.guide import FEATURES
from ziggurat.pipelines.shapes.train import train
from ziggurat.pipelines.shapes.train_attention import LISTED_ROWS, LongAttention, batched_attention
from ziggurat.pipelines.shapes.train_flow import Grid, LatentPool, Student, flow_loss

GRID = (5, 15, 14)  # 1,050 tokens


def plan_of(layers: int, heads: int = 2, head_dim: int = 32) -> Plan:
    """Narrow windows with the rest dropped in every head, dense above noise level 0.9."""
    entry = HeadPlan(heads=tuple(range(heads)), selector=Window(frames=1, height=5, width=5), rest="drop")
    group = HeadGroup(entries=(entry,), tile=64, block=16)
    return Plan(
        model_class="WanTransformer3DModel",
        grid=GRID,
        heads=heads,
        head_dim=head_dim,
        layers=tuple(LayerPlan(groups=(group,)) for _ in range(layers)),
        schedule=Schedule(dense_until=0.9),
    )


@pytest.mark.parametrize("rows", [40, LISTED_ROWS + 5])
def test_self_attention_in_training_is_attention(rows: int):
    module: Any = transformer_wan
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, rows, 2, 32, generator=generator, requires_grad=True) for _ in range(3))
    stock = module.dispatch_attention_fn
    with batched_attention(torch.zeros(1, 1, 24), LongAttention()):
        own = module.dispatch_attention_fn(query, key, value)
    assert module.dispatch_attention_fn is stock
    exact = stock(query, key, value)
    torch.testing.assert_close(own, exact, rtol=1e-4, atol=1e-5)
    given = torch.randn(own.shape, generator=generator)
    grads = [torch.autograd.grad(out, (query, key, value), given) for out in (own, exact)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("noise_level", [0.5, 0.95])
def test_long_clips_run_by_the_plan(noise_level: float):
    """Forward and backward are those of the plan's own run, dense where its schedule says so."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 1050, 2, 32, generator=generator, requires_grad=True) for _ in range(3)]
    plan, module = plan_of(2), transformer_wan
    long = LongAttention(plan)
    long.begin(GRID, noise_level)
    with batched_attention(torch.zeros(1, 1, 24), long):
        own = [module.dispatch_attention_fn(*tensors) for _ in plan.layers][-1]
    query, key, value = (x.transpose(1, 2) for x in tensors)
    run = PlanRun(plan)
    exact = run.attend_layer(query, key, value, layer=1, noise_level=noise_level, step=0, grid=TokenGrid.video(*GRID))
    dense: Any = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    exact = dense if exact is None else exact
    assert torch.allclose(dense, exact, atol=1e-3) == (noise_level > 0.9)
    torch.testing.assert_close(own.transpose(1, 2), exact, rtol=1e-4, atol=1e-5)
    given = torch.randn(own.shape, generator=generator)
    mine = torch.autograd.grad(own, tensors, given)
    theirs = torch.autograd.grad(exact, tensors, given.transpose(1, 2))
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)

    long.begin(None, noise_level)
    with batched_attention(torch.zeros(1, 1, 24), long):
        torch.testing.assert_close(module.dispatch_attention_fn(*tensors).transpose(1, 2), dense, rtol=1e-4, atol=1e-5)


def test_a_plan_is_needed_to_run_by_one():
    with pytest.raises(ValueError, match="no plan"):
        LongAttention().begin(GRID, 0.5)


def test_a_teacher_is_what_a_plan_is_to_follow():
    """Dense, the student's own copy is followed exactly; under a plan that leaves much out long clips are not."""
    torch.manual_seed(0)
    transformer: Any = build_transformer()
    plan = plan_of(transformer.config.num_layers, transformer.config.num_attention_heads)
    tokenizer = build_tokenizer()
    student = Student(build_text_encoder(tokenizer), transformer, plan).eval()
    teacher = Student(student.text_encoder, transformer).eval()

    def loss(shape: tuple[int, int, int], planned: bool) -> float:
        pool = LatentPool(Grid(frames=1, size=16, batch=1, fresh=0, top_share=0.0, shift=1.0), build_vae())
        latents = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1))
        pool.clips = [(latents, "", torch.zeros(FEATURES, shape[0], shape[1] // 2, shape[2] // 2))]
        accelerator = Accelerator(cpu=True)
        each, weight, *_ = flow_loss(student, pool, tokenizer, Random(3), accelerator, planned=planned, teacher=teacher)
        assert torch.isfinite(weight).all()
        return each.mean().item()

    frames, height, width = GRID
    long, short = (frames, 2 * height, 2 * width), (1, 2 * height, 2 * width)
    assert math.prod(GRID) >= LISTED_ROWS
    assert loss(long, False) == loss(short, False) == loss(short, True) == 0
    assert loss(long, True) > 1e-5


def test_a_plan_of_another_model_is_refused():
    with pytest.raises(ValueError, match="layers"):
        Student(build_text_encoder(build_tokenizer()), build_transformer(), plan_of(3))


def test_the_stage_under_a_plan_needs_one(tmp_path):
    with pytest.raises(ValueError, match="needs a checkpoint to start from"):
        train(tmp_path / "model", run=tmp_path, stages=("planned",))
