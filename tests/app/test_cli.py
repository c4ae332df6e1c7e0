"""The command line: what it prints, its exit codes, and that it leaves no half file."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import typer

from ziggurat.app.cli import VERBS, app, main
from ziggurat.app.generate import parse_setting
from ziggurat.pipelines.generate import generate

PROMPT = "a large red circle moving left"
SIZE = ["--frames", "9", "--height", "32", "--width", "48"]
SMALL = [*SIZE, "--steps", "2", "--seed", "7", "--dtype", "fp32", "--device", "cpu"]


@pytest.fixture
def run(wan_folder, capsys, tmp_path, monkeypatch):
    """`ziggurat generate` on the tiny pipeline in an empty folder: exit code, stdout and stderr lines."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, prompt: str = PROMPT) -> tuple[int, list[str], list[str]]:
        with pytest.raises(SystemExit) as stop:
            main(["generate", prompt, "--model", str(wan_folder), *SMALL, *arguments])
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out.splitlines(), said.err.splitlines()

    return call


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"]], ids=" ".join)
def test_help_is_quick_and_imports_no_torch(arguments):
    code = (
        "import sys\nfrom ziggurat.app.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit as stop:\n    code = stop.code\n"
        "sys.exit(code or bool({'torch', 'diffusers', 'transformers', 'numpy', 'gradio'} & set(sys.modules)) and 7)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "Usage: ziggurat" in done.stdout
    assert "\x1b" not in done.stdout
    # Of the processor, which a busy machine does not stretch; a second on a quiet one is far above what it takes.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def every_command(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from every_command(below, (*path, name))


COMMANDS = dict(every_command(typer.main.get_command(app)))


def test_verbs_are_in_the_order_of_use_with_a_line_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    shown = [line.strip("│ \n") for line in text[text.index("─ Commands") :].splitlines()[1:-1] if line.startswith("│")]
    assert [tuple(line.split(maxsplit=1)) for line in shown] == [(name, line) for name, (_, line) in VERBS.items()]
    assert set(COMMANDS[()].commands) == set(VERBS)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "ziggurat")
def test_every_help_has_an_example_that_parses(path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main([*path, "--help"])
    assert not stop.value.code
    example = next(line for line in capsys.readouterr().out.splitlines() if "Example: " in line)
    name, *words = shlex.split(example.strip().removeprefix("Example: "))
    assert (name, words[: len(path)]) == ("ziggurat", list(path))
    command, context, rest = COMMANDS[()], None, words
    while hasattr(command, "commands"):
        context = command.make_context(command.name, list(rest), parent=context)
        _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(command.name, list(rest), parent=context)


def test_version_names_what_decides_a_video(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert not stop.value.code
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["torch"] == torch.__version__
    assert said.keys() >= {"ziggurat", "python", "diffusers", "transformers", "cpu"}
    assert said["cpu"].endswith("kernel backend torch")


def test_doctor_says_what_is_missing_and_how_to_get_it(capsys, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr("ziggurat.app.machine.find_spec", lambda name: None if name == "gradio" else there(name))
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: "/there/ffmpeg")
    well = {"passed": True, "error": 0.0, "seconds": 0.0}
    monkeypatch.setattr("ziggurat.kernels.selftest.self_test", lambda _device: well)
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--json"])
    assert not stop.value.code
    lines = capsys.readouterr().out.splitlines()
    assert "extra app: pip install 'ziggurat[app]' (the app in a browser)" in lines
    assert "ffmpeg: /there/ffmpeg" in lines
    said = json.loads(lines[-1])
    assert said["extras"]["batch"] == ""
    assert 0 < said["memory"]["free"] < said["memory"]["total"]
    assert said["versions"]["torch"] == torch.__version__


def test_shells_can_complete_it():
    code = "from ziggurat.app.cli import main; main()"
    for words, found in (("ziggurat ev", {"evaluate"}), ("ziggurat generate --comp", {"--compare"})):
        asked = {"_ZIGGURAT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=False
        )
        assert set(done.stdout.split()) == found, done.stderr


def test_json_is_the_last_line_and_the_record_makes_it_again(run, sparse_plan, tmp_path):
    plan = sparse_plan(name="small").save(tmp_path / "plan.json")
    code, out, err = run("--plan", str(plan), "--out", "video.png", "--json", "--set", "max_sequence_length=32")
    assert code == 0, err
    result = json.loads(out[-1])
    assert (result["out"], result["plan"], result["seed"], result["steps"]) == ("video.png", "small", 7, 2)
    assert (result["tokens"], result["dtype"]) == (120, "float32")
    assert 0 < result["density"] < 1
    assert result["seconds"] > 0
    assert out[-2].startswith("out      video.png (9 frames of 48x32; ")
    assert any("float32 on cpu" in line for line in out)
    record = json.loads(Path("video.png.json").read_text())
    assert record["settings"]["arguments"] == {"max_sequence_length": 32}
    again = generate(
        record["model"], record["prompt"], plan=record["plan"]["path"], dtype=record["dtype"], **record["settings"]
    )
    pages: Any = ...
    assert np.array_equal(iio.imread("video.png", index=pages)[..., :3], again.frames)


def test_compare(run, sparse_plan, tmp_path):
    plan = sparse_plan(rest="pooled").save(tmp_path / "plan.json")
    code, out, err = run("--plan", str(plan), "--compare", "--json")
    assert code == 0, err
    result = json.loads(out[-1])
    assert result.keys() >= {"dense_seconds", "psnr", "ssim", "attention_share", "density", "seconds"}
    assert any(line.startswith("dense ") and "PSNR" in line for line in out)
    assert iio.imread("video.mp4").shape == (9, 48, 96, 3)


def test_stated_dtype_is_the_fastest_one(run):
    code, out, err = run("--plan", "none", "--dtype", "auto", "--out", "one.gif", "--frames", "1")
    assert code == 0, err
    assert out[0].rstrip(")").split("(")[1].startswith(("bf16: ", "fp32: ")), out[0]
    assert iio.imread("one.gif", index=0).shape[:2] == (32, 48)


def assert_refused(told: tuple[int, list[str], list[str]], words: str) -> None:
    code, out, err = told
    assert code == 1
    assert not out
    assert [line.startswith("error: ") for line in err].count(True) == 1
    assert words in err[-1]
    assert "Traceback" not in "".join(err)


BROKEN = {
    "truncated": (lambda text: text[: len(text) // 2], "not valid JSON"),
    "deep": (lambda text: '{"version": 1, "name": ' + "[" * 100_000, "nested too deeply"),
    "nan": (lambda text: text.replace('"measured": {}', '"measured": {"error": NaN}'), "measured.error"),
    "version": (lambda text: text.replace('"version": 1', '"version": 99'), "version 99"),
    "binary": (lambda text: "\0\1", "not valid JSON"),
    "heads": (lambda text: text.replace('"head_dim": 16', '"head_dim": 32'), "head_dim is 32, the model's is 16"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_plans(run, dense_plan, how):
    change, words = BROKEN[how]
    text = dense_plan().to_json()
    Path("plan.json").write_text(change(text))
    assert Path("plan.json").read_text() != text
    assert_refused(run("--plan", "plan.json", "--json"), words)
    assert os.listdir() == ["plan.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no-such-model"], "neither an embedded model"),
        (["--plan", "absent.json"], "plan absent.json does not exist"),
        (["--height", "40"], "nearest that work are 32 and 48"),
        (["--frames", "0"], "frames must be at least 1"),
        (["--frames", "1000000"], "need about"),
        (["--steps", "-1"], "steps must be at least 1"),
        (["--set", "strenght=1"], "no argument 'strenght'"),
        (["--image", "absent.png"], "does not exist"),
        (["--out", "absent/video.mp4"], "does not exist: make absent first"),
        (["--out", "/proc/video.mp4"], "can't be written"),
        (["--out", "video.avi"], "must end in"),
        (["--dtype", "int9"], "dtype must be"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(run, arguments, words):
    assert_refused(run("--plan", "none", *arguments, "--json"), words)
    assert not os.listdir()


@pytest.mark.parametrize(
    ("prompt", "words"), [("", "prompt is empty"), ("red " * 600, "601 tokens")], ids=["empty", "long"]
)
def test_bad_prompts(run, prompt, words):
    assert_refused(run("--plan", "none", prompt=prompt), words)


def test_full_disk(run, monkeypatch):
    def full(part: Path, *_):
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ziggurat.pipelines.media._encode", full)
    assert_refused(run("--plan", "none", "--json"), "video.mp4 could not be written whole and was removed")
    assert not os.listdir()


def test_missing_ffmpeg_is_found_before_the_model_is_loaded(run, monkeypatch):
    def absent():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", absent)
    assert_refused(run("--model", "no-such-model"), "needs ffmpeg")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("x"), "unexpected KeyError: 'x'; run again with --debug"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory ran out"),
        (ValueError("first\n  second"), "error: first second"),
    ],
    ids=["bug", "memory", "lines"],
)
def test_errors_from_elsewhere(run, monkeypatch, error, words):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("ziggurat.pipelines.loading.load", fail)
    assert_refused(run(), words)


def test_debug_shows_the_traceback(run):
    code, out, err = run("--steps", "0", "--debug")
    assert (code, out) == (1, [])
    assert "Traceback (most recent call last):" in err
    assert err[-1].startswith("error: steps must be at least 1")
    code, out, err = run("--steps", "0")
    assert "Traceback" not in "".join(err)


@pytest.mark.parametrize(
    "arguments", [["--set", "nothing"], ["--frames", "many"], ["--nonsense"], ["--fps", "0"]], ids=str
)
def test_wrong_usage_is_exit_code_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, [])
    assert "Traceback" not in "".join(err)


def test_settings_are_json_or_text():
    assert parse_setting("a=1") == ("a", 1)
    assert parse_setting("a=[0.5, true]") == ("a", [0.5, True])
    assert parse_setting("a=b=c") == ("a", "b=c")


def test_ctrl_c_leaves_nothing_and_exits_130(wan_folder, tmp_path):
    command = [sys.executable, "-c", "from ziggurat.app.cli import main; main()", "generate", PROMPT]
    many = ["--model", str(wan_folder), *SMALL, "--steps", "100000", "--plan", "none", "--out", "video.gif"]
    process = subprocess.Popen(
        [*command, *many],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore interrupts, and so would whatever they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "WanPipeline" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert not out
    assert "Traceback" not in err
    assert err.rstrip().splitlines()[-1].startswith("stopped; no file was left half written")
    assert not os.listdir(tmp_path)


def test_ctrl_c_at_a_step(run, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ziggurat.pipelines.watch.Watch._end_of_step", interrupted)
    code, out, err = run("--plan", "none")
    assert (code, out) == (130, [])
    assert err[-1].startswith("stopped; no file")
    assert not os.listdir()
    assert torch.is_grad_enabled()
