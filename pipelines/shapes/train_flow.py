"""The later stages of training: transformer and text encoder, by flow matching on the VAE's latents."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from ...attention.plan import Plan
from ..plans import model_shape
from .data import draw_clips
from .guide import FEATURES, describe
from .muon import StackedMuon
from .train_attention import LISTED_ROWS, LongAttention, batched_attention, padding_log_weight
from .train_vae import Report, quick_convolutions

GUIDE_SHARE = 0.5
SHORT_TEXT_ROWS = 24  # enough for two objects and some padding; one length for all, so that one compiled graph serves


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A size of clip to train on: `batch` clips a step, on average `fresh` of them new, the others seen lately.

    With a `span`, clips are windows of ones of so many frames; with a `crop`, parts of so many pixels. The more tokens
    a clip has, the higher the noise at which its shapes can still be told: `shift` grows with them.
    """

    frames: int
    size: int
    batch: int
    fresh: float
    keep: int = 2048
    two_share: float = 0.1
    span: int | None = None
    crop: int | None = None
    shift: float = 3.0
    top_share: float = 0.15


@dataclass(frozen=True, kw_only=True)
class FlowStage:
    """`steps` optimizer steps over a mix of grids, each step on one grid drawn by its share.

    With a `plan_share`, so many of the steps on long clips run by the plan to train under, and the target of all is
    what a teacher says, run dense: the model goes on drawing as it did, dense and under the plan.
    """

    name: str
    steps: int
    grids: tuple[tuple[float, Grid], ...]
    learning_rate: float = 2e-3
    cooldown: int = 0
    save_every: int = 250
    plan_share: float = 0.0


class Student(nn.Module):
    """Text encoder and transformer, trained together, and what the transformer's middle is asked for on the way."""

    def __init__(
        self, text_encoder: UMT5EncoderModel, transformer: WanTransformer3DModel, plan: Plan | None = None
    ) -> None:
        super().__init__()
        if plan is not None:
            plan.check(**asdict(model_shape(transformer)))
        self.text_encoder, self.transformer = text_encoder, transformer
        config: Any = transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        self.guide = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, FEATURES))
        self._long = LongAttention(plan)
        self._middle = torch.empty(0)
        blocks = transformer.blocks
        blocks[(len(blocks) - 1) // 2].register_forward_hook(self._keep)

    def forward(
        self, noisy: Tensor, timestep: Tensor, ids: Tensor, mask: Tensor, planned: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The velocity that leads from data to noise, [B, C, F, H, W], for token ids and mask [B, rows], and what the
        middle layer knows of the scene, [B, tokens, FEATURES], as `guide.describe`. planned: run by the plan, as at
        the highest of the noise levels."""
        text = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        # The pipeline zeroes what lies behind the prompt and pads with zeros to 512 rows.
        text = torch.where(mask.bool()[..., None], text, 0)
        self._long.begin(patches(noisy) if planned else None, timestep.max().item() / 1000)
        with batched_attention(padding_log_weight(mask), self._long):
            velocity = self.transformer(
                hidden_states=noisy, timestep=timestep, encoder_hidden_states=text, return_dict=False
            )[0]
        return velocity, self.guide(self._middle.float())

    def _keep(self, _block: nn.Module, _given: object, out: Tensor) -> None:
        self._middle = out


class Difficulty:
    """The running mean of the loss at each noise level of one grid.

    At the highest levels, where nobody could tell where an object will be, the loss is ten times that of the levels
    that draw its outline, and its scatter would drown what those have to teach. Dividing by the mean lets every level
    pull alike, as EDM2 (arXiv 2312.02696) does with a learned curve.
    """

    def __init__(self, shift: float, bins: int = 12):
        self.shift = shift
        self.mean, self.seen = torch.ones(bins), torch.zeros(bins)

    def weigh(self, level: Tensor, loss: Tensor) -> Tensor:
        """Weights [B] of samples with noise levels and losses [B], of mean about one; takes note of the losses."""
        place = level / (self.shift - (self.shift - 1) * level)  # in which a grid's usual levels lie evenly
        bins = (place * len(self.mean)).long().clamp(0, len(self.mean) - 1)
        for index, value in zip(bins.tolist(), loss.tolist(), strict=True):
            self.seen[index] += 1
            self.mean[index] += (value - self.mean[index]) * max(1 / self.seen[index].item(), 0.03)
        known = self.mean[self.seen > 0].mean()
        # A level at which there is nothing left to learn shall not be all that is learned.
        return known / self.mean[bins].clamp(min=0.03 * known.item() + 1e-12)


def patches(latents: Tensor) -> tuple[int, int, int]:
    """Frames, height and width of the transformer's tokens for latents [B, C, F, H, W]."""
    frames, height, width = latents.shape[2:]
    return frames, height // 2, width // 2


def draw_noise_levels(count: int, grid: Grid, generator: torch.Generator) -> Tensor:
    """Noise levels [count] in 0…1, a share of them in the top 6 %: there it is decided which way an object moves."""
    uniform = torch.rand(count, generator=generator)
    usual = grid.shift * uniform / (1 + (grid.shift - 1) * uniform)
    top = 0.94 + 0.06 * uniform
    return torch.where(torch.rand(count, generator=generator) < grid.top_share, top, usual)


class LatentPool:
    """Encoded clips of one grid: a few new ones each step, the rest drawn from those of the last steps."""

    def __init__(self, grid: Grid, vae: Any):
        self.grid, self.vae = grid, vae
        self.mean, self.deviation = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        self.clips: list[tuple[Tensor, str, Tensor]] = []
        self.difficulty = Difficulty(grid.shift)

    def draw(self, random: Random) -> tuple[Tensor, list[str], Tensor]:
        """Normalised latents [batch, C, F, H, W], their captions, and what their tokens should know."""
        grid = self.grid
        fresh = int(grid.fresh + random.random()) if len(self.clips) >= grid.batch else grid.batch
        new = self._render(random, fresh) if fresh else []
        batch = new + random.sample(self.clips, grid.batch - fresh)
        self.clips = (self.clips + new)[-grid.keep :]
        latents, captions, known = zip(*batch, strict=True)
        return torch.stack(latents), list(captions), torch.stack(known)

    def _render(self, random: Random, count: int) -> list[tuple[Tensor, str, Tensor]]:
        grid = self.grid
        size = (grid.frames, grid.size, grid.size)
        clips = draw_clips(random, count, *size, two_share=grid.two_share, span=grid.span, crop=grid.crop)
        with torch.no_grad():
            latents = self.vae.encode(clips.pixels.to(self.vae.device)).latent_dist.mode().float().cpu()
        return list(zip((latents - self.mean) / self.deviation, clips.captions, describe(clips), strict=True))


def train_flow(
    student: Student,
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    stages: tuple[FlowStage, ...],
    run: Path,
    accelerator: Accelerator,
    report: Report,
    seed: int = 0,
    compiled: bool = False,
    teacher: Student | None = None,
) -> None:
    """Train `student` in place through `stages`, resuming from `run`; at the end it holds the averaged weights.

    teacher: for stages with a `plan_share`."""
    vae = vae.to(accelerator.device).eval().requires_grad_(False)
    quick_convolutions(vae)
    hidden, others = split_parameters(student)
    muon = StackedMuon(hidden, lr=1.0, weight_decay=0.01)
    adam = torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0)
    average = EMAModel(student.parameters(), decay=0.998, use_ema_warmup=True, power=0.75)
    student, muon, adam = accelerator.prepare(student, muon, adam)
    progress = Progress()
    accelerator.register_for_checkpointing(average, progress)
    state = run / "flow-state"
    if state.exists():
        accelerator.load_state(str(state))
    models = [accelerator.unwrap_model(student)]
    if teacher is not None:
        models.append(teacher.to(accelerator.device).eval().requires_grad_(False))
    for model in models if compiled else ():
        for block in model.transformer.blocks:
            block.compile(dynamic=False)
    total, before = sum(stage.steps for stage in stages), 0
    for stage in stages:
        pools = [LatentPool(grid, vae) for _, grid in stage.grids]
        shares = [share for share, _ in stage.grids]
        while progress.step < before + stage.steps:
            step = progress.step
            for optimizer, factor in ((muon, 1.0), (adam, 0.5)):
                for group in optimizer.param_groups:
                    group["lr"] = factor * learning_rate(stage, step - before, step)
            random = Random(f"flow {seed} {step}")
            pool = random.choices(pools, shares)[0]
            followed = teacher if stage.plan_share else None
            planned = random.random() < stage.plan_share
            each, weight, guide_loss, top_loss = flow_loss(
                student, pool, tokenizer, random, accelerator, planned=planned, teacher=followed
            )
            accelerator.backward((weight * each).mean() + (GUIDE_SHARE if followed is None else 0) * guide_loss)
            accelerator.clip_grad_norm_(student.parameters(), 1.0)
            for optimizer in (muon, adam):
                optimizer.step()
                optimizer.zero_grad()
            average.step(student.parameters())
            progress.step += 1
            progress.clips += pool.grid.batch
            figures = {f"loss {pool.grid.frames}x{pool.grid.crop or pool.grid.size}": each.mean().item()}
            figures |= {"guide": guide_loss.item(), "top": top_loss}
            report(stage.name, progress.step, total, figures)
            if progress.step % stage.save_every == 0 or progress.step == before + stage.steps:
                accelerator.save_state(str(state))
        before += stage.steps
    average.copy_to(student.parameters())


@dataclass
class Progress:
    """How far training has come; saved and resumed with it."""

    step: int = 0
    clips: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "clips": self.clips}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.clips = state["step"], state["clips"]


def learning_rate(stage: FlowStage, step: int, overall: int) -> float:
    """A warm-up at the very beginning, then constant, then linear to zero over the stage's `cooldown` last steps."""
    left = (stage.steps - step) / stage.cooldown if stage.cooldown else 1.0
    return stage.learning_rate * min((overall + 1) / 100, left, 1.0)


def split_parameters(student: Student) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices inside the transformer's blocks, for Muon, and everything else, for AdamW."""
    hidden = [p for p in student.transformer.blocks.parameters() if p.ndim == 2]
    chosen = set(map(id, hidden))
    return hidden, [p for p in student.parameters() if id(p) not in chosen]


def flow_loss(
    student: nn.Module,
    pool: LatentPool,
    tokenizer: PreTrainedTokenizerFast,
    random: Random,
    accelerator: Accelerator,
    *,
    planned: bool = False,
    teacher: nn.Module | None = None,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The squared errors of the predicted velocity on one batch, [B], their weights, [B], the error of what the middle
    knows, and the mean of the first above noise level 0.94.

    planned: a long clip runs by the student's plan. teacher: whose velocity is the target, in place of the true one."""
    with accelerator.autocast():
        clean, captions, known = pool.draw(random)
    captions = ["" if random.random() < 0.1 else caption for caption in captions]
    generator = torch.Generator().manual_seed(random.getrandbits(62))
    level = draw_noise_levels(len(captions), pool.grid, generator)
    noise = torch.randn(clean.shape, generator=generator)
    mix = level.view(-1, 1, 1, 1, 1)
    tokens = tokenizer(captions, padding="max_length", max_length=SHORT_TEXT_ROWS, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    clean, known, noise, noisy, ids, mask, timestep = (
        x.to(accelerator.device)
        for x in (clean, known, noise, clean * (1 - mix) + noise * mix, ids, mask, level * 1000)
    )
    planned = planned and math.prod(patches(noisy)) >= LISTED_ROWS
    with accelerator.autocast():
        velocity, guess = student(noisy, timestep, ids, mask, planned)
        with torch.no_grad():
            target = noise - clean if teacher is None else teacher(noisy, timestep, ids, mask)[0].float()
    each = (velocity.float() - target).square().mean((1, 2, 3, 4))
    weight = pool.difficulty.weigh(level, each.detach().cpu()).to(each.device)
    top = each.detach()[(level > 0.94).to(each.device)]
    guide_loss = (guess - known.flatten(2).mT).square().mean()
    return each, weight, guide_loss, top.mean().item() if len(top) else math.nan
