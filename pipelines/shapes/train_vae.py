"""The first stage of training: the VAE, on windows of clips."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from ..convolutions import through_onednn
from .data import draw_clips, draw_patchwork, draw_windows

Report = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class VaeStage:
    """How the VAE is trained: `steps` batches of `batch` windows of `size`×`size` pixels and some of `frames` frames.

    The first `stills` steps see single frames, half of them patchwork, and squared errors: so the latents soon say
    what is where, which clips of mostly background would take long to teach. With `decoder_only` the latents stay as
    they are, and whoever has learned to make them need not learn again.
    """

    steps: int = 1000
    stills: int = 400
    batch: int = 6
    size: int = 40
    frames: tuple[int, ...] = (5, 5, 5, 9, 5, 5, 5, 1)
    patchwork: float = 0.15
    learning_rate: float = 2e-3
    kl_weight: float = 3e-5
    decoder_only: bool = False
    save_every: int = 100


def train_vae(
    vae: AutoencoderKLWan, stage: VaeStage, state: Path, accelerator: Accelerator, report: Report, seed: int = 0
) -> AutoencoderKLWan:
    """Train `vae` in place, resuming from `state` if it is there, and give it its latents' mean and deviation."""
    quick_convolutions(vae)
    if stage.decoder_only:
        vae.requires_grad_(False)
        for part in (vae.post_quant_conv, vae.decoder):
            part.requires_grad_(True)
    learning = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, max(1 - step / stage.steps, 0.01))
    )
    model, optimizer, schedule = accelerator.prepare(vae, optimizer, schedule)
    first = 0
    if state.exists():
        accelerator.load_state(str(state))
        first = schedule.state_dict()["last_epoch"]
    for step in range(first, stage.steps):
        random = Random(f"vae {seed} {step}")
        still = step < stage.stills
        frames = 1 if still else stage.frames[step % len(stage.frames)]
        draw = draw_patchwork if random.random() < (0.5 if still else stage.patchwork) else draw_windows
        clips = draw(random, stage.batch, frames, stage.size).to(accelerator.device)
        torch.manual_seed(step)
        with accelerator.autocast():
            posterior = model.encode(clips).latent_dist
            decoded = model.decode(posterior.sample()).sample
        error = (decoded.float() - clips).abs()
        kl = posterior.kl().sum() / posterior.mean.numel()
        # Most pixels are background: the worst tenth of them are the outlines, where shapes are told apart.
        edges = error.flatten().topk(error.numel() // 10).values.mean()
        loss = error.square().mean() + stage.kl_weight * kl
        if not still:
            loss = loss + error.mean() + 0.3 * edges
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        report(
            "decoder" if stage.decoder_only else "vae",
            step + 1,
            stage.steps,
            {"l1": error.mean().item(), "edges": edges.item(), "kl": kl.item()},
        )
        if (step + 1) % stage.save_every == 0 or step + 1 == stage.steps:
            accelerator.save_state(str(state))
    trained = accelerator.unwrap_model(model).requires_grad_(True)
    if not stage.decoder_only:
        mean, deviation = latent_statistics(trained, seed)
        trained.register_to_config(latents_mean=mean, latents_std=deviation)
    return trained


def quick_convolutions(vae: AutoencoderKLWan) -> None:
    """Have the convolutions run, and their weights laid out, as a CPU is fastest with."""
    through_onednn(vae)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]


@torch.no_grad()
def latent_statistics(vae: Any, seed: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over a few clips, for the VAE's own configuration."""
    latents: list[Tensor] = []
    for i in range(24):
        clips = draw_clips(Random(f"statistics {seed} {i}"), 2, 17, 64, 64).pixels
        latents.append(vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode().float().cpu())
    values = torch.cat(latents).transpose(0, 1).flatten(1)
    return values.mean(1).tolist(), values.std(1).tolist()
