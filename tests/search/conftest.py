"""What a search could have found: six layers of four heads, the default candidates, three proofs, all from a seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ziggurat.attention.expect import expected_density
from ziggurat.attention.schedule import Schedule
from ziggurat.pipelines.plans import ModelShape
from ziggurat.search.candidates import default_candidates, with_dense
from ziggurat.search.findings import CostRow, Findings, Point, Proof

GRID = (5, 8, 8)
LAYERS, HEADS = 6, 4
CALLS, DENSE_CALLS = 60, 8
OWN, STOCK, LAUNCH = 0.0125, 0.011, 0.0002
SENSITIVITIES = [0.9, 0.31, 0.24, 0.2, 0.34, 0.62]


def _made_up(**changes) -> Findings:
    """A whole search of three proofs, its chosen plan with one stock layer; `changes` replace fields."""
    random = np.random.default_rng(0)
    tried = with_dense(default_candidates("cpu"))
    density = np.array([min(1.0, expected_density(one.group, one.entry, GRID)) for one in tried])
    liking = random.gamma(1.2, 0.5, (LAYERS, HEADS, len(tried)))
    errors = liking * (1 / density.clip(0.02) - 1) ** 0.5 * 0.12 + 0.01 * (1 - density)
    weights = np.array(SENSITIVITIES)[:, None] * random.dirichlet([4] * HEADS, LAYERS)
    seconds = (0.0004 + OWN * density) / HEADS * 1.15

    front = []
    for price in np.geomspace(3, 300, 14):
        picks = (errors * weights[..., None] + price * seconds).argmin(-1)
        # No layer may hold more than three groups.
        picks[[len({tried[n].layout for n in row}) > 3 for row in picks]] = len(tried) - 1
        whole: list[list[int] | None] = [None if layer == 0 else row.tolist() for layer, row in enumerate(picks)]
        taken = STOCK + sum(seconds[row].sum() + LAUNCH for row in picks[1:])
        error = sum(weights[i][h] * errors[i][h][n] for i, row in enumerate(picks) if i for h, n in enumerate(row))
        share = (1 + density[picks[1:]].mean(-1).sum()) / LAYERS
        front.append(
            Point(
                seconds=float(taken * (CALLS - DENSE_CALLS) + STOCK * DENSE_CALLS * LAYERS),
                error=float(error),
                density=float((share * (CALLS - DENSE_CALLS) + DENSE_CALLS) / CALLS),
                picks=whole,
            )
        )
    front.sort(key=lambda point: point.seconds)
    fields = {
        "shape": ModelShape(
            model_class="WanTransformer3DModel", layers=LAYERS, heads=HEADS, head_dim=32, config_hash="44bc7d684d2b7e15"
        ),
        "guidance": 4.0,
        "grid": GRID,
        "tokens": 320,
        "dtype": "bfloat16",
        "steps": 30,
        "seed": 0,
        "quantile": 1.0,
        "prompts": ["a large red circle moving left", "a small <b>blue</b> square & nothing else"],
        "held_out": ["a yellow triangle", "two green circles"],
        "noise_levels": [0.93, 0.71, 0.28],
        "sampled_rows": 96,
        "schedule": Schedule(dense_until=0.96, refresh_at=(0.9, 0.5)),
        "candidates": tried,
        "errors": errors.tolist(),
        "recalls": (1 / (1 + errors)).tolist(),
        "densities": np.broadcast_to(density, errors.shape).tolist(),
        "weights": weights.tolist(),
        "sensitivities": SENSITIVITIES,
        "seconds": seconds.tolist(),
        "dense_seconds": OWN,
        "stock_seconds": STOCK,
        "launch_seconds": LAUNCH,
        "calls": CALLS,
        "dense_calls": DENSE_CALLS,
        "costs": [
            CostRow(
                block=block,
                tokens=4352,
                head_dim=32,
                heads=HEADS,
                pooled=pooled,
                list_density=share,
                seconds=float((0.0004 + OWN * share) * random.normal(1, 0.05)),
                fitted=0.0004 + OWN * share,
            )
            for block in (16, 64)
            for pooled in (False, True)
            for share in (0.05, 0.1, 0.25, 0.5, 1.0)
        ],
        "front": front,
        "chosen": 5,
        "proofs": [_proof(number, front[number], off) for number, off in ((2, 0.96), (5, 1.08), (11, 1.2))],
        "machine": {"processor": "a processor", "cores": 2, "memory_gb": 23.5, "gpu": None},
    }
    return Findings(**{**fields, **changes})


def _proof(number: int, point: Point, off: float) -> Proof:
    own = OWN * CALLS * LAYERS
    return Proof(
        point=number,
        prompts=2,
        psnr=26.0 + number / 2,
        ssim=0.88 + number / 200,
        density=min(1.0, point.density * 1.02),
        seconds=point.seconds * off + 3,
        own_dense_seconds=own + 3,
        stock_seconds=STOCK * CALLS * LAYERS + 3,
        attention_seconds=point.seconds * off,
        own_dense_attention_seconds=own,
    )


def _made_up_map(tiles: int = 24, blocks: int = 72) -> tuple[Tensor, Tensor]:
    """A head that looks at its own frame and at the first: mass, and what a window and a stripe would read of it."""
    near = (torch.linspace(0, 1, tiles)[:, None] - torch.linspace(0, 1, blocks)[None]).abs()
    mass = torch.exp(-12 * near) + 0.4 * (torch.arange(blocks) < 5) + 0.02 * torch.rand(tiles, blocks)
    mass = mass / mass.sum(1, keepdim=True)
    return mass, (near < 0.12) | (torch.arange(blocks) < 5)


def _made_up_videos(count: int = 2) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A square that moves, and the same with noise."""
    random = np.random.default_rng(0)
    found = {}
    for number in range(count):
        video = np.full((9, 64, 64, 3), 90, np.uint8)
        for frame in range(9):
            video[frame, 20:44, 4 + 4 * frame : 24 + 4 * frame] = (220, 60 + 100 * number, 50)
        noisy = (video + random.normal(0, 9, video.shape)).clip(0, 255).astype(np.uint8)
        found[f"a square moving right, number {number}"] = (video, noisy)
    return found


@pytest.fixture(scope="session")
def made_up():
    return _made_up


@pytest.fixture(scope="session")
def made_up_map():
    return _made_up_map


@pytest.fixture(scope="session")
def made_up_videos():
    return _made_up_videos
