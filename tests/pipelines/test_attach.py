"""attach and detach: a pipeline is left as found, a dense plan changes nothing, and bad plans are refused."""

from __future__ import annotations

import copy
import gc
import inspect
import sys
import threading
import types
import weakref

import diffusers.models.transformers.transformer_wan as wan_module
import pytest
import torch

from ziggurat.pipelines import attach

LAYERS, HEADS = 2, 2
NAMES = ("dispatch_attention_fn", "F")


def fingerprint(pipe) -> dict[str, object]:
    """Everything attach could leave behind: attributes, hooks, processors, weights, rebound names."""
    found: dict[str, object] = {f"module {name}": getattr(wan_module, name) for name in NAMES}
    found["scheduler"] = sorted(pipe.scheduler.__dict__)
    for path, module in pipe.transformer.named_modules():
        found[f"{path} attributes"] = sorted(module.__dict__)
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called"):
            found[f"{path} {kind}"] = list(getattr(module, kind).items())
        found[f"{path} processor"] = id(getattr(module, "processor", None))
    for name, tensor in pipe.transformer.state_dict().items():
        found[f"weight {name}"] = (tensor.data_ptr(), tensor._version)
    return found


@pytest.mark.parametrize("kind", ["dense_plan", "sparse_plan"])
def test_detach_leaves_everything_as_found(wan, kind, latents_of, request):
    # diffusers itself leaves attributes behind on its first run.
    expected = latents_of(wan)
    before = fingerprint(wan)
    with attach(wan, request.getfixturevalue(kind)()) as handle:
        assert fingerprint(wan) != before
        latents_of(wan)
    assert not handle.attached
    handle.detach()
    assert fingerprint(wan) == before
    assert torch.equal(latents_of(wan), expected)


def test_dense_plan_changes_nothing_beyond_rounding(wan, latents_of, dense_plan):
    expected = latents_of(wan)
    with attach(wan, dense_plan()) as handle:
        torch.testing.assert_close(latents_of(wan), expected, rtol=0, atol=1e-5)
    assert handle.density == 1.0


@pytest.mark.parametrize("rest", ["drop", "pooled"])
def test_sparse_plan_equals_the_reference_backend(wan, rest, latents_of, sparse_plan):
    stock = latents_of(wan)
    with attach(wan, sparse_plan(rest=rest)) as handle:
        fast = latents_of(wan)
    assert handle.density is not None
    assert handle.density < 1
    with attach(wan, sparse_plan(rest=rest), backend="reference"):
        reference = latents_of(wan)
    torch.testing.assert_close(fast, reference, rtol=0, atol=1e-5)
    assert (fast - stock).abs().max() > 1e-3, "the plan was not felt: the test compares nothing"


def test_unknown_backend(wan, latents_of, sparse_plan):
    with attach(wan, sparse_plan(), backend="triton"), pytest.raises(ValueError, match="triton"):
        latents_of(wan)


def test_same_seed_same_plan_same_video(wan, latents_of, sparse_plan):
    with attach(wan, sparse_plan()):
        first, second, other = latents_of(wan), latents_of(wan), latents_of(wan, seed=1)
    with attach(wan, sparse_plan()):
        again = latents_of(wan)
    assert torch.equal(first, second)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"heads": HEADS + 1}, "heads"), ({"layers": LAYERS + 1}, "layers"), ({"head_dim": 32}, "head_dim")],
)
def test_plan_for_another_shape_is_refused(wan, changes, field, sparse_plan):
    before = fingerprint(wan)
    with pytest.raises(ValueError, match=rf"its {field} is \d+, the model's is \d+"):
        attach(wan, sparse_plan(**changes))
    assert fingerprint(wan) == before


def test_plan_for_another_class_is_refused(wan, sparse_plan):
    with pytest.raises(ValueError, match="its model_class is 'FluxTransformer2DModel'"):
        attach(wan, sparse_plan(model_class="FluxTransformer2DModel"))


def test_plan_from_a_file_and_a_missing_one(wan, tmp_path, sparse_plan):
    path = tmp_path / "plan.json"
    sparse_plan().save(path)
    with attach(wan, path) as handle:
        assert str(path) in handle.summary()
    with pytest.raises(ValueError, match=r"absent\.json"):
        attach(wan, tmp_path / "absent.json")


def test_auto_takes_the_shipped_plan_of_the_model(wan, tmp_path, monkeypatch, sparse_plan):
    monkeypatch.setattr("ziggurat.pipelines.plans.shipped_plans", lambda: sorted(tmp_path.glob("*.json")))
    with pytest.raises(ValueError, match=r"no shipped plan for WanTransformer3DModel of 2 layers, 2 heads"):
        attach(wan, "auto")
    sparse_plan(heads=HEADS + 1).save(tmp_path / "a-other.json")
    sparse_plan().save(tmp_path / "b-right.json")
    sparse_plan(grid=(1, 4, 6)).save(tmp_path / "c-image.json")
    with attach(wan, "auto", grid=(5, 4, 6)) as handle:
        assert handle.source.endswith("b-right.json")
    with attach(wan, "auto", grid=(1, 4, 5)) as handle:
        assert handle.source.endswith("c-image.json")


def test_second_attach_is_refused(wan, sparse_plan):
    with attach(wan, sparse_plan()), pytest.raises(ValueError, match="already has a plan"):
        attach(wan, sparse_plan())
    attach(wan, sparse_plan()).detach()


def test_pipeline_without_a_known_transformer(sparse_plan):
    class Other(torch.nn.Module):
        pass

    class Pipe:
        transformer = Other()

    with pytest.raises(ValueError, match="Other, for which no plan can run"):
        attach(Pipe(), sparse_plan())
    with pytest.raises(ValueError, match="str has none"):
        attach("shapes", sparse_plan())


def test_two_pipelines_in_two_threads(wan_folder, latents_of, tiny_wan, dense_plan, sparse_plan):
    pipes = [tiny_wan(wan_folder), tiny_wan(wan_folder)]
    plans = [sparse_plan(), dense_plan()]
    expected = []
    for pipe, plan in zip(pipes, plans, strict=True):
        with attach(pipe, plan):
            expected.append(latents_of(pipe, steps=6))
    handles = [attach(pipe, plan) for pipe, plan in zip(pipes, plans, strict=True)]
    found: list[torch.Tensor | None] = [None, None]

    def work(index: int) -> None:
        found[index] = latents_of(pipes[index], steps=6)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        result = found[index]
        assert result is not None
        assert torch.equal(result, expected[index])
    names = [getattr(wan_module, name) for name in NAMES]
    handles[0].detach()
    assert [getattr(wan_module, name) for name in NAMES] == names, "the second pipeline still needs the names"
    assert torch.equal(latents_of(pipes[1], steps=6), expected[1])
    handles[1].detach()
    assert [getattr(wan_module, name) for name in NAMES] != names


def test_unattached_pipeline_beside_an_attached_one_is_stock(wan_folder, latents_of, tiny_wan, sparse_plan):
    attached_pipe, stock = tiny_wan(wan_folder), tiny_wan(wan_folder)
    expected = latents_of(stock)
    with attach(attached_pipe, sparse_plan()):
        with pytest.raises(RuntimeError, match="stop here"):
            latents_of(attached_pipe, callback_on_step_end=stop)
        assert torch.equal(latents_of(stock), expected)


def stop(*_):
    raise RuntimeError("stop here")


@pytest.mark.parametrize("keep_handle", [True, False])
def test_deleted_pipeline_is_collected(wan_folder, keep_handle, latents_of, tiny_wan, sparse_plan):
    stock = [getattr(wan_module, name) for name in NAMES]
    pipe = tiny_wan(wan_folder)
    handles = [attach(pipe, sparse_plan())]
    latents_of(pipe)
    gone = [weakref.ref(pipe.transformer), weakref.ref(pipe.scheduler), weakref.ref(pipe)]
    del pipe
    if not keep_handle:
        handles.clear()
    gc.collect()
    assert [reference() for reference in gone] == [None, None, None]
    for handle in handles:
        handle.detach()
        assert "layer 1" in handle.summary()
    assert [getattr(wan_module, name) for name in NAMES] == stock


def test_copied_scheduler_keeps_its_own_timesteps(wan, sparse_plan):
    with attach(wan, sparse_plan()):
        copied = copy.deepcopy(wan.scheduler)
        wan.scheduler.set_timesteps(3)
        copied.set_timesteps(7)
        assert "sigmas" in inspect.signature(copied.set_timesteps).parameters
    assert (len(wan.scheduler.timesteps), len(copied.timesteps)) == (3, 7)
    copied.set_timesteps(5)
    assert len(copied.timesteps) == 5


def test_copied_transformer_is_stock_after_detach(wan, latents_of, sparse_plan):
    expected = latents_of(wan)
    with attach(wan, sparse_plan()):
        copied = copy.deepcopy(wan.transformer)
    wan.transformer = copied
    # Copies of weights stand elsewhere in memory, which changes the last bits of their products on some chips.
    torch.testing.assert_close(latents_of(wan), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_compiled_fullgraph(wan, regional, latents_of, sparse_plan):
    torch._dynamo.reset()
    original, stock = wan.transformer, latents_of(wan)
    with attach(wan, sparse_plan()) as handle:
        expected = latents_of(wan)
        if regional:
            original.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        else:
            wan.transformer = torch.compile(original, backend="aot_eager", fullgraph=True)
        torch._dynamo.utils.counters.clear()
        torch.testing.assert_close(latents_of(wan), expected, rtol=0, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert sum(step.sparse_calls for step in handle.steps) > 0
    torch.testing.assert_close(latents_of(wan), stock, rtol=0, atol=1e-5)
    torch._dynamo.reset()


def test_summary_has_a_line_per_layer(wan, latents_of, sparse_plan):
    with attach(wan, sparse_plan(), timing=True) as handle:
        assert handle.density is None
        assert "not called yet" in handle.summary()
        latents_of(wan)
        lines = handle.summary().splitlines()
    assert len(lines) == 1 + LAYERS
    assert "density" in lines[0]
    assert all("blocks." in line and "sparse" in line for line in lines[1:])
    assert handle.attention_seconds is not None
    assert handle.transformer_seconds is not None
    assert 0 < handle.attention_seconds < handle.transformer_seconds


def test_processor_swapped_for_one_of_another_module(wan, latents_of, sparse_plan, monkeypatch):
    elsewhere = types.ModuleType("someones_processors")
    elsewhere.__dict__.update(vars(wan_module))
    source = inspect.getsource(wan_module.WanAttnProcessor)
    exec("__name__ = 'someones_processors'\n" + source, elsewhere.__dict__)
    monkeypatch.setitem(sys.modules, "someones_processors", elsewhere)
    stock = elsewhere.dispatch_attention_fn
    with attach(wan, sparse_plan()) as handle:
        expected = latents_of(wan)
        wan.transformer.set_attn_processor(elsewhere.WanAttnProcessor())
        assert torch.equal(latents_of(wan), expected)
        assert all(step.sparse_calls == 2 * LAYERS for step in handle.steps)
    assert elsewhere.dispatch_attention_fn is stock


def test_processor_out_of_reach_stays_stock_and_says_so(wan, latents_of, sparse_plan, monkeypatch):
    stock = latents_of(wan)
    elsewhere = types.ModuleType("unreachable_processors")
    elsewhere.__dict__.update(vars(wan_module))
    source = inspect.getsource(wan_module.WanAttnProcessor).replace("dispatch_attention_fn", "their_own_attention")
    exec("__name__ = 'unreachable_processors'\n" + source, elsewhere.__dict__)
    elsewhere.__dict__["their_own_attention"] = elsewhere.__dict__["dispatch_attention_fn"]
    monkeypatch.setitem(sys.modules, "unreachable_processors", elsewhere)
    with attach(wan, sparse_plan()) as handle:
        wan.transformer.set_attn_processor(elsewhere.WanAttnProcessor())
        assert torch.equal(latents_of(wan), stock)
        lines = handle.summary().splitlines()
        assert all(
            "not called (skipped by a cache, or its processor is out of reach)" in line for line in lines[-LAYERS:]
        )
