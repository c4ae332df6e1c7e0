"""load: names, folders and Hub ids; safetensors only; what is refused, in one sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from ziggurat import pipelines
from ziggurat.pipelines import load
from ziggurat.pipelines.loading import embedded_models, fastest_dtype


def test_local_folder_in_each_dtype(wan_folder):
    assert load(wan_folder, dtype=torch.float32).transformer.dtype == torch.float32
    assert load(str(wan_folder), dtype="bf16").transformer.dtype == torch.bfloat16
    dtype, reason = fastest_dtype("cpu")
    assert load(wan_folder).transformer.dtype == dtype
    assert load(wan_folder, dtype="auto").transformer.dtype == dtype
    assert reason.startswith({torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype])


def test_arguments_reach_from_pretrained(wan_folder):
    assert load(wan_folder, dtype="fp32", text_encoder=None).text_encoder is None


@pytest.mark.parametrize("model", ["no-such-model", "./absent/folder", "/absent", "a/b/c", ""])
def test_unknown_model_lists_what_exists(model):
    with pytest.raises(ValueError, match="neither an embedded model") as caught:
        load(model)
    for name in embedded_models():
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nobody/nothing-here' is not on this disk and the Hub") as caught:
        load("nobody/nothing-here")
    assert "\n" not in str(caught.value)


def test_folder_without_an_index(tmp_path):
    with pytest.raises(ValueError, match=r"holds no model_index\.json"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_broken_index(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ValueError, match="not a JSON object"):
        load(tmp_path)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "WanTransformer3DModel"]}))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"transformer/diffusion_pytorch_model\.bin, a pickle"):
        load(tmp_path)


def test_missing_weights(wan_folder, tmp_path):
    shutil.copytree(wan_folder, tmp_path / "copy")
    next((tmp_path / "copy" / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="can't be read as safetensors"):
        load(tmp_path / "copy")


@pytest.mark.parametrize("argument", ["trust_remote_code", "custom_pipeline", "use_safetensors"])
def test_code_is_never_taken_from_a_model(wan_folder, argument):
    with pytest.raises(ValueError, match=argument):
        load(wan_folder, **dict.fromkeys([argument], True))  # type: ignore[arg-type]


def test_component_with_its_own_code_is_refused(wan_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(wan_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["evil", "Evil"]
    (folder / "model_index.json").write_text(json.dumps(index))
    for place in (folder, folder / "transformer"):
        (place / "evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ValueError, match="own code"):
        load(folder)


@pytest.mark.parametrize(("arguments", "words"), [({"dtype": "int9"}, "dtype"), ({"offload": "disk"}, "offload")])
def test_bad_choices(wan_folder, arguments, words):
    with pytest.raises(ValueError, match=words):
        load(wan_folder, **arguments)


def test_offload_to_the_cpu_makes_no_sense(wan_folder):
    with pytest.raises(ValueError, match="device is cpu"):
        load(wan_folder, offload="model", device="cpu")


def test_import_does_no_work():
    code = (
        "import sys, ziggurat.pipelines as pipelines; assert 'load' in pipelines.__all__;"
        " assert not {'torch', 'diffusers', 'pydantic', 'triton', 'gradio'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_exposed():
    for name in pipelines.__all__:
        assert callable(getattr(pipelines, name)), "a module of the same name would shadow it"
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        pipelines.lode  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
