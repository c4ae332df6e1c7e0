"""What every transformer class of the table has to pass, on one tiny instance of random weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from ziggurat.attention.dense import Dense
from ziggurat.attention.grid import TokenGrid
from ziggurat.attention.plan import HeadGroup, HeadPlan, Plan
from ziggurat.pipelines import attach, generate_many
from ziggurat.pipelines.batch.run import Batch
from ziggurat.pipelines.models import MODELS
from ziggurat.pipelines.modules import attention_modules
from ziggurat.pipelines.plans import model_shape
from ziggurat.pipelines.probe import Sighting, sightings
from ziggurat.pipelines.row import Shape
from ziggurat.pipelines.visual import patches


class Pipe:
    """As much of a pipeline as attach needs."""

    scheduler = None

    def __init__(self, transformer: torch.nn.Module):
        self.transformer = transformer


def _build(model: str, config: Mapping[str, Any]) -> Any:
    torch.manual_seed(0)
    transformer = getattr(diffusers, model)(**config).eval()
    for weight in transformer.parameters():
        # What starts at zero would hide what attention does.
        if weight.ndim > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    return transformer


def _forward(transformer: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out = transformer(**arguments, return_dict=False)
    while not isinstance(out, torch.Tensor):
        out = torch.stack(list(out)) if isinstance(out, list) and len(out) > 1 else out[0]
    return out


def _poisoned(latents: Any, axes: str, shapes: tuple[Shape, ...], patch: Shape, marked: torch.Tensor) -> Any:
    """The latents with NaN in the voxels of the marked tokens, bool [tokens] in the order of the sequence."""
    if isinstance(latents, list):
        return [_poisoned(one[None], "B" + axes[1:], shapes, patch, marked)[0] for one in latents]
    if axes == "BNC":
        return latents.masked_fill(marked[None, :, None], math.nan)
    voxels = marked.view(len(shapes), *shapes[0])
    for dim, size in enumerate(patch, 1):
        voxels = voxels.repeat_interleave(size, dim)
    names = [name for name in axes if name in "NFHW"]
    if "N" not in names:
        voxels = voxels[0]
    if "F" not in names:
        voxels = voxels[0]
    sizes = [size if axis in names else 1 for axis, size in zip(axes, latents.shape, strict=True)]
    return latents.masked_fill(voxels.view(sizes), math.nan)


def _token_numbers(transformer: Any, arguments: Mapping[str, Any], latent: str, axes: str, shapes: tuple[Shape, ...]):
    """For each attention call: the number of the token that each query row holds, -1 if none; and whether keys do."""
    tokens = sum(math.prod(shape) for shape in shapes)
    patch = patches(transformer.config)
    if axes.startswith("L"):
        side = transformer.config["all_patch_size"][0]
        patch = (1, side, side)

    def seen(marked: torch.Tensor) -> list[Sighting]:
        poisoned = _poisoned(arguments[latent], axes, shapes, patch, marked)
        return sightings(transformer, {**arguments, latent: poisoned})

    number = torch.arange(tokens)
    everything = seen(torch.ones(tokens, dtype=torch.bool))
    bits = [seen((number >> bit) % 2 == 1) for bit in range(tokens.bit_length())]
    for index, call in enumerate(everything):
        value = sum(seen[index].query.long() << bit for bit, seen in enumerate(bits))
        yield call, torch.where(call.query, value, -1)


def _expected_numbers(grid: TokenGrid, shapes: tuple[Shape, ...], last_first: bool) -> torch.Tensor:
    """[items, N], one item unless the class folds frames or places into the batch."""
    frames, height, width = shapes[0]
    number = torch.arange(sum(math.prod(shape) for shape in shapes))
    if last_first:
        number = number.roll(math.prod(shapes[-1]))
    if len(grid.visual) == 1 and grid.visual[0].grid != shapes[0]:
        folded = number.view(frames, height * width)
        return folded if grid.visual[0].grid == (1, height, width) else folded.T
    expected = torch.full((grid.tokens,), -1)
    expected[torch.cat([segment.positions() for segment in grid.visual])] = number
    return expected[None]


def _check_class(
    model: str,
    config: Mapping[str, Any],
    arguments: Mapping[str, Any],
    shapes: tuple[Shape, ...],
    sparse_plan: Callable[..., Plan],
    *,
    latent: str = "hidden_states",
    axes: str = "BCFHW",
    last_first: bool = False,
) -> Any:
    """Every visual self-attention call of a class is routed, with the right grid; plans and detach do as they should.

    shapes: of the latents' visual segments in patches. axes: of the latents; "LCFHW" for a list of images.
    last_first: the class moves the last segment to the front.
    Returns the transformer.
    """
    transformer, row = _build(model, config), MODELS[model]
    layers = row.layers(attention_modules(transformer))
    routed = 0
    for call, numbers in _token_numbers(transformer, arguments, latent, axes, shapes):
        visual = bool(call.query.any()) and bool(call.key.any()) and call.query.shape == call.key.shape
        assert visual == (call.path in layers), f"{call.path}: {call}"
        if not visual:
            continue
        routed += 1
        measure = row.tokens_of(call.path).measure(transformer.config, arguments)
        grid = measure.token_grid(numbers.shape[1])
        assert isinstance(grid, TokenGrid), f"{call.path}: {grid}"
        expected = _expected_numbers(grid, shapes, last_first)
        repeated = expected.repeat(len(numbers) // len(expected), 1)
        assert torch.equal(numbers, repeated), f"{call.path} with {grid}"
    assert routed >= len(layers)

    fields: dict[str, Any] = vars(model_shape(transformer)) | {"grid": shapes[0]}
    stock, pipe = _forward(transformer, arguments), Pipe(transformer)
    assert torch.isfinite(stock).all()
    everything = HeadPlan(heads=tuple(range(fields["heads"])), selector=Dense())
    plan = Plan.uniform([HeadGroup(tile=16, block=16, entries=(everything,))], **fields)
    with attach(pipe, plan) as handle:
        dense = _forward(transformer, arguments)
        assert "dense," not in handle.summary(), handle.summary()
        assert sum(step.sparse_calls for step in handle.steps) == routed
    torch.testing.assert_close(dense, stock, rtol=0, atol=3e-5 * max(1.0, float(stock.abs().max())))

    sparse = []
    for backend in ("torch", "reference"):
        with attach(pipe, sparse_plan(rest="pooled", **fields), backend=backend) as handle:
            sparse.append(_forward(transformer, arguments))
            assert handle.list_density < 1
    torch.testing.assert_close(sparse[0], sparse[1], rtol=0, atol=3e-5 * max(1.0, float(stock.abs().max())))
    felt = (sparse[0] - stock).abs().max()
    assert felt > max(10 * (sparse[0] - sparse[1]).abs().max(), 1e-5), "the plan was not felt: nothing is compared"
    assert torch.equal(_forward(transformer, arguments), stock), "detach left something behind"
    return transformer


@pytest.fixture(scope="session")
def build():
    return _build


@pytest.fixture(scope="session")
def forward():
    return _forward


@pytest.fixture(scope="session")
def bare_pipe():
    return Pipe


@pytest.fixture
def check_class(sparse_plan):
    def check(model: str, config: Mapping[str, Any], arguments: Mapping[str, Any], shapes: Any, **more: Any) -> Any:
        return _check_class(model, config, arguments, shapes, sparse_plan, **more)

    return check


@pytest.fixture
def batch(wan_folder, tmp_path):
    """generate_many at a size that takes no time, with what is not asked otherwise."""
    small: dict[str, Any] = {"frames": 1, "height": 16, "width": 16, "steps": 1, "guidance": 1.0}

    def run(rows: Any, **changes: Any) -> Batch:
        model = changes.pop("model", wan_folder)
        options = {"plan": "none", "dtype": "fp32", "device": "cpu", "out": tmp_path / "out", **small, **changes}
        result = generate_many(model, rows, **options)
        assert result is not None
        return result

    return run


@pytest.fixture
def files() -> Callable[[Path], dict[str, tuple[int, int]]]:
    """What stands in a folder beside manifest and page, and which files on the disk it is."""

    def found(folder: Path) -> dict[str, tuple[int, int]]:
        made = (path for path in folder.iterdir() if path.name not in ("index.html", "manifest.jsonl"))
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in made}

    return found
