"""Time and memory of a search on a Wan of real width: `python benchmarks/search_wan30.py [folder] [out.json]`.

A random-weight WanTransformer3DModel of 30 layers, 12 heads of 128 (Wan 2.1 1.3B's own sizes) with the text encoder and
VAE of `shapes`, at 4,096 tokens: 4 prompts, 3 noise levels, both guidance branches, the default candidates, errors
measured on 128 queries of a call. Random maps are uniform, so that this tells time and memory alone; nothing is proved.
A search that was interrupted goes on, and its seconds add up. On a machine that does nothing else.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ziggurat.attention.schedule import Schedule
from ziggurat.pipelines import load
from ziggurat.pipelines.record import surroundings
from ziggurat.search import run as searching

FRAMES, SIZE = 31, 128
"""16 latent frames of 16 x 16 patches."""
STEPS = 4
"""One that builds lists and measures what they leave out, and three to be scored."""
ROWS, PASSES = 128, 5
LAYERS, HEADS, HEAD_DIM, FFN = 30, 12, 128, 8960


def pipeline() -> Any:
    """`shapes` with a transformer of another size, in the dtype that is fastest here."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    pipe: Any = load("shapes", dtype="auto")
    own, dtype = dict(pipe.transformer.config), pipe.transformer.dtype
    torch.manual_seed(0)
    wanted: dict[str, Any] = {
        "num_layers": LAYERS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "ffn_dim": FFN,
    }
    names = ("patch_size", "in_channels", "out_channels", "text_dim", "freq_dim", "rope_max_seq_len")
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        transformer: Any = WanTransformer3DModel(**{name: own[name] for name in names}, **wanted)
    finally:
        torch.set_default_dtype(default)
    pipe.transformer = transformer.eval()
    return pipe


def main(folder: Path, out: Path) -> None:
    """Search, or go on with it, and write what it took."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = pipeline()
    model_bytes = sum(tensor.nbytes for tensor in pipe.transformer.parameters())
    spent = folder / "seconds.json"
    before: dict[str, float] = json.loads(spent.read_text()) if spent.is_file() else {}
    begun, stages = time.monotonic(), dict(before)
    last = begun

    def tell(stage: str, done: int, count: int) -> None:
        nonlocal last
        now = time.monotonic()
        stages[stage] = stages.get(stage, 0.0) + now - last
        last = now
        spent.write_text(json.dumps(stages))
        print(f"\r{stage} {done} of {count}, {sum(stages.values()):.0f} s ", end="", file=sys.stderr, flush=True)

    result = searching.search(
        pipe,
        folder,
        frames=FRAMES,
        height=SIZE,
        width=SIZE,
        steps=STEPS,
        guidance=4.0,
        schedule=Schedule(),
        rows=ROWS,
        passes=PASSES,
        proofs=0,
        resume=(folder / "scores.jsonl").is_file(),
        report=tell,
    )
    found = result.findings
    said = {
        **{"layers": LAYERS, "heads": HEADS, "head_dim": HEAD_DIM, "tokens": found.tokens, "dtype": found.dtype},
        **{
            "candidates": len(found.candidates),
            "prompts": len(found.prompts),
            "steps_measured": len(found.noise_levels),
        },
        **{"branches": found.branches, "rows_measured": found.sampled_rows, "model_bytes": model_bytes},
        **{"seconds": sum(stages.values()), "stages": stages, "resumed": bool(before)},
        "peak_process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "plan_bytes": (folder / "plan.json").stat().st_size,
    }
    fresh = out.with_suffix(".tmp")
    fresh.write_text(json.dumps({**said, **surroundings("cpu")}, indent=1) + "\n")
    fresh.replace(out)
    print(json.dumps(said))


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(Path(given.get(1, "runs/wan30")), Path(given.get(2, "benchmarks/search_wan30.json")))
