"""What `attach` with a dense plan adds to each attention call of a tiny Wan, gates, routing and bookkeeping included.

Forwards with and without the plan alternate, each behind one that warms it; the figure is the median over pairs of
(with - without) / attention calls, in seconds of the one thread that runs. Everything is so small that only the Python
around attention is measured.

python -P benchmarks/attach_overhead.py [--pairs 300] [--layers 2 30] [--out FILE]
"""

import argparse
import gc
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch

from ziggurat.attention.plan import Plan
from ziggurat.pipelines import attach
from ziggurat.pipelines.plans import model_shape
from ziggurat.pipelines.record import surroundings

# Type checkers see nothing of what diffusers imports late.
library: Any = diffusers
STEPS = 50


def tiny_pipeline(layers: int) -> Any:
    """A Wan pipeline without its VAE and text encoder, of random weights: 60 visual tokens, 2 heads of 16."""
    torch.manual_seed(0)
    transformer = library.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
    ).eval()
    parts: Any = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    scheduler = library.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    return library.WanPipeline(transformer=transformer, scheduler=scheduler, **parts)


def forward_seconds(pipe: Any, step: int) -> float:
    """One forward at that step, as the pipeline calls it."""
    latents, text = torch.zeros(1, 4, 5, 4, 12), torch.zeros(1, 4, 16)
    timestep = pipe.scheduler.timesteps[step : step + 1]
    started = time.thread_time()
    with pipe.transformer.cache_context("cond"):
        pipe.transformer(latents, timestep, text, return_dict=False)
    return time.thread_time() - started


def added_seconds(layers: int, pairs: int) -> list[tuple[float, float]]:
    """(without, with) of each pair, in seconds an attention call."""
    pipe = tiny_pipeline(layers)
    plan = Plan.dense(**vars(model_shape(pipe.transformer)), grid=(5, 2, 6))
    found = []
    for pair in range(pairs):
        step = pair % (STEPS - 1)
        forward_seconds(pipe, step)
        without = forward_seconds(pipe, step + 1)
        with attach(pipe, plan):
            forward_seconds(pipe, step)
            found.append((without / layers, forward_seconds(pipe, step + 1) / layers))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 30])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    gc.disable()
    told = []
    with torch.no_grad():
        for layers in asked.layers:
            seconds = added_seconds(layers, asked.pairs)
            added = sorted(1e6 * (attached - stock) for stock, attached in seconds)
            row = {
                "layers": layers,
                "microseconds_added_a_call": round(median(added), 1),
                "quartiles": [round(added[len(added) * part // 4], 1) for part in (1, 3)],
                "microseconds_stock_a_layer": round(1e6 * median(stock for stock, _ in seconds), 1),
            }
            told.append(row)
            print(f"{layers} layers: {median(added):.1f} us a call")
    asked.out.write_text(json.dumps({"pairs": asked.pairs, "rows": told, **surroundings("cpu")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
