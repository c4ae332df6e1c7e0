"""The embedded model's grammar, renderer and training."""

import dataclasses
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.pipelines.wan.pipeline_wan import WanPipeline

from ziggurat.pipelines.shapes.build import (
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
)
from ziggurat.pipelines.shapes.data import draw_clips, draw_patchwork, draw_windows
from ziggurat.pipelines.shapes.guide import FEATURES, describe
from ziggurat.pipelines.shapes.muon import StackedMuon
from ziggurat.pipelines.shapes.render import DIRECTION, place, render
from ziggurat.pipelines.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    draw_scene,
    held_out_scenes,
    parse_caption,
    single_scenes,
    training_scenes,
    unknown_words,
)
from ziggurat.pipelines.shapes.train import TINY
from ziggurat.pipelines.shapes.train_flow import (
    Difficulty,
    FlowStage,
    Grid,
    LatentPool,
    Student,
    draw_noise_levels,
    flow_loss,
    train_flow,
)
from ziggurat.pipelines.shapes.train_vae import VaeStage, train_vae


def test_every_caption_is_read_back():
    random = Random(0)
    scenes = [*single_scenes(), *(draw_scene(random, two_share=1.0) for _ in range(50))]
    assert len(single_scenes()) == 540
    assert [parse_caption(str(scene)) for scene in scenes] == scenes


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "a large red circle moving left",
        "a huge red circle moving left on a gray background",
        "a large red circle moving left on a pink background",
        "a large red circle flying on a gray background",
    ],
)
def test_other_sentences_are_refused_with_the_grammar(caption: str):
    with pytest.raises(ValueError, match="SIZE COLOUR SHAPE MOTION"):
        parse_caption(caption)


def test_unknown_words_are_named_once():
    assert unknown_words("A Large teal circle, moving teal on a gray background.") == ["teal"]
    assert unknown_words(str(single_scenes()[0])) == []


def test_training_never_shows_a_held_out_caption():
    random = Random(1)
    drawn = [draw_scene(random, two_share=0.3) for _ in range(3000)]
    held_out = set(held_out_scenes())
    assert len(held_out) == 100
    assert len(set(training_scenes()) & held_out) == 0
    for scene in drawn:
        assert not held_out & {dataclasses.replace(scene, things=(thing,)) for thing in scene.things}


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 32), (5, 32, 64), (9, 48, 32)])
def test_clips_show_their_scene(frames: int, height: int, width: int):
    random = Random(2)
    scenes = [draw_scene(random, two_share=0.4) for _ in range(40)]
    tracks = [place(scene, random, width / height) for scene in scenes]
    clips = render(scenes, tracks, frames, height, width)
    assert clips.shape == (40, 3, frames, height, width)
    unit = min(height, width)
    for scene, each, clip in zip(scenes, tracks, clips, strict=True):
        assert _bytes(clip[:, 0, 0, 0]) == BACKGROUNDS[scene.background]
        for thing, track in zip(scene.things, each, strict=True):
            for end, frame in ((track.start, 0), (track.end, -1)):
                x, y = (int(coordinate * unit) for coordinate in (end if frames > 1 else track.start))
                assert _bytes(clip[:, frame, y, x]) == COLOURS[thing.colour]
            travel = tuple(b - a for a, b in zip(track.start, track.end, strict=True))
            assert tuple((part > 0) - (part < 0) for part in travel) == DIRECTION[thing.motion]


def _bytes(pixel: torch.Tensor) -> tuple[int, ...]:
    return tuple(((pixel + 1) * 127.5).round().int().tolist())


def test_outlines_are_smooth():
    random = Random(3)
    scene = parse_caption("a large white circle staying still on a black background")
    clip = render([scene], [place(scene, random)], 1, 64, 64)
    assert ((clip > -0.8) & (clip < 0.8)).any()


def test_batches_follow_from_their_seed():
    one, two = (draw_clips(Random("step 7"), 3, 5, 32, 32, two_share=0.5) for _ in range(2))
    assert torch.equal(one.pixels, two.pixels)
    assert one.captions == two.captions
    assert torch.equal(describe(one), describe(two))
    for draw in (draw_windows, draw_patchwork):
        assert torch.equal(draw(Random(1), 2, 5, 32), draw(Random(1), 2, 5, 32))
        assert draw(Random(1), 2, 5, 32).shape == (2, 3, 5, 32, 32)


def test_noise_levels_cover_the_top():
    levels = draw_noise_levels(20_000, TINY, torch.Generator().manual_seed(0))
    assert levels.min() > 0
    assert levels.max() < 1
    assert (levels > 0.98).float().mean() > 0.15
    assert (levels < 0.5).float().mean() > 0.1


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    return Student(build_text_encoder(build_tokenizer()), build_transformer()).eval()


def test_short_text_weighs_as_the_pipelines_512_rows(student: Student):
    tokenizer: Any = build_tokenizer()
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=student.text_encoder,
        transformer=student.transformer,
        vae=build_vae(),
        scheduler=build_scheduler(),
    )
    prompts = ["a small red circle", "a large blue square moving left on a gray background"]
    text, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
    noisy, timestep = torch.randn(2, 8, 3, 8, 8), torch.tensor([300.0, 990.0])
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    ids, mask = (torch.nn.functional.pad(tokens[name], (0, 1)) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        stock = student.transformer(noisy, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]
        ours, _ = student(noisy, timestep, ids, mask)
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)


def test_sizes_are_those_promised():
    vae: Any = build_vae()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 33, 32, 32)).latent_dist.mode()
    assert latents.shape == (1, 8, 17, 8, 8)
    assert vae.config.scale_factor_temporal == 2
    assert vae.config.scale_factor_spatial == 4


def test_the_vae_learns_and_resumes(tmp_path: Path):
    torch.manual_seed(0)
    errors: list[float] = []

    def report(_stage: str, _step: int, _total: int, figures: dict[str, float]) -> None:
        errors.append(figures["l1"])

    stage = VaeStage(steps=24, stills=24, batch=4, size=16, save_every=12)
    accelerator = Accelerator(cpu=True)
    train_vae(build_vae(), dataclasses.replace(stage, steps=12), tmp_path / "vae", accelerator, report)
    vae: Any = train_vae(build_vae(), stage, tmp_path / "vae", Accelerator(cpu=True), report)
    assert len(errors) == 24
    assert sum(errors[-6:]) < 0.9 * sum(errors[:6])
    assert len(vae.config.latents_mean) == 8
    assert min(vae.config.latents_std) > 0

    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    tail = VaeStage(steps=2, stills=0, batch=1, size=16, frames=(5,), decoder_only=True)
    train_vae(vae, tail, tmp_path / "decoder", Accelerator(cpu=True), report)
    moved = {name.split(".")[0] for name, tensor in vae.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved == {"decoder", "post_quant_conv"}


def test_the_flow_learns_resumes_and_ends_with_averages(tmp_path: Path, student: Student):
    torch.manual_seed(0)
    vae, tokenizer = build_vae(), build_tokenizer()
    grid = Grid(frames=1, size=16, batch=8, fresh=4)
    stage = FlowStage(name="tiny", steps=6, grids=((1.0, grid),), save_every=3)
    seen: list[int] = []

    def report(_stage: str, step: int, _total: int, _figures: dict[str, float]) -> None:
        seen.append(step)

    def fresh() -> Student:
        torch.manual_seed(1)
        return Student(build_text_encoder(tokenizer), build_transformer())

    train_flow(fresh(), vae, tokenizer, (dataclasses.replace(stage, steps=3),), tmp_path, Accelerator(cpu=True), report)
    trained = fresh()
    before = [parameter.clone() for parameter in trained.parameters()]
    train_flow(trained, vae, tokenizer, (stage,), tmp_path, Accelerator(cpu=True), report)
    assert seen == [1, 2, 3, 4, 5, 6]
    moved = [not torch.equal(old, new) for old, new in zip(before, trained.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    each, weight, guide_loss, _ = flow_loss(trained, LatentPool(grid, vae), tokenizer, Random(0), Accelerator(cpu=True))
    assert each.shape == weight.shape == (grid.batch,)
    assert torch.isfinite(each).all()
    assert torch.isfinite(guide_loss)


def test_every_noise_level_comes_to_weigh_alike():
    """Where the loss is a hundred times larger at the top, weighted losses there are no larger than below."""
    difficulty, generator = Difficulty(shift=5.0), torch.Generator().manual_seed(0)
    for _ in range(200):
        level = torch.rand(8, generator=generator)
        loss = torch.where(level > 0.9, 1.0, 0.01) * (0.5 + torch.rand(8, generator=generator))
        difficulty.weigh(level, loss)
    level = torch.tensor([0.1, 0.5, 0.8, 0.95, 0.99])
    mean = torch.where(level > 0.9, 1.0, 0.01)
    weighted = difficulty.weigh(level, mean) * mean
    assert weighted.max() < 1.6 * weighted.min()


def test_stacked_muon_is_muon():
    torch.manual_seed(0)
    shapes = [(16, 16), (16, 16), (48, 16), (16, 48), (16, 16)]
    one = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    two = [torch.nn.Parameter(parameter.detach().clone()) for parameter in one]
    plain = torch.optim.Muon(one, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    stacked = StackedMuon(two, lr=0.02, weight_decay=0.1)
    for _ in range(3):
        for a, b in zip(one, two, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        plain.step()
        stacked.step()
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
    torch.optim.Muon(one, lr=0.1).load_state_dict(stacked.state_dict())


def test_crops_hold_the_object():
    """The part cut out shows as much of the object as the whole: its pixels differ from the background's."""
    for seed in range(20):
        whole = draw_clips(Random(seed), 1, 5, 128, 128, span=33)
        part = draw_clips(Random(seed), 1, 5, 128, 128, span=33, crop=80)
        assert whole.captions == part.captions
        assert part.pixels.shape == (1, 3, 5, 80, 80)
        corner = whole.pixels[..., :1, :1]
        counts = [((clips.pixels - corner).abs().amax(1) > 0.05).sum() for clips in (whole, part)]
        assert counts[0] == counts[1] > 50


def test_tokens_should_know_what_the_picture_shows():
    """Where the outline's distance says inside, the pixels differ from the background, in crops and windows too."""
    for seed in range(6):
        clips = draw_clips(Random(seed), 2, 5, 128, 128, two_share=0.5, span=33, crop=96)
        known = describe(clips)
        assert known.shape == (2, FEATURES, 3, 12, 12)
        for shown, fact, scene in zip(clips.pixels, known, clips.scenes, strict=True):
            fine = torch.zeros(3, 24, 24)
            for i, (a, b) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
                fine[:, a::2, b::2] = fact[i]
            background = torch.tensor(BACKGROUNDS[scene.background]).view(3, 1, 1) / 127.5 - 1
            # The first latent frame is the first frame; a latent's middle is the corner of its four inner pixels.
            drawn = (shown[:, 0] - background).abs().amax(0).view(24, 4, 24, 4)[:, 1:3, :, 1:3].mean((1, 3)) > 0.05
            sure = fine[0].abs() > 0.3
            assert torch.equal((fine[0] < 0)[sure], drawn[sure])
            shapes = {SHAPES[i] for i in fact[-5:-2].amax((1, 2, 3)).nonzero().flatten()}
            assert shapes == {thing.shape for thing in scene.things}


def test_the_guide_teaches_the_middle_and_leaves_nothing_behind(student: Student):
    keys = student.transformer.state_dict().keys()
    assert not any("guide" in key for key in keys)
    noisy = torch.randn(1, 8, 1, 4, 4)
    ids, mask = torch.ones(1, 24, dtype=torch.long), torch.ones(1, 24, dtype=torch.long)
    _, guess = student(noisy, torch.tensor([500.0]), ids, mask)
    assert guess.shape == (1, 4, FEATURES)
    guess.square().mean().backward()
    blocks: Any = student.transformer.blocks
    assert blocks[0].ffn.net[2].weight.grad is not None
    assert blocks[-1].ffn.net[2].weight.grad is None
