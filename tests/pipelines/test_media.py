"""Files: the right frames, whole or not at all."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest

from ziggurat.pipelines import media
from ziggurat.pipelines.media import check_output, record_path, side_by_side, write_video


def clip(frames: int = 6, height: int = 32, width: int = 48) -> np.ndarray:
    """A bright square that moves, so that no two frames are alike."""
    video = np.full((frames, height, width, 3), 40, np.uint8)
    for index in range(frames):
        video[index, 8:20, 2 * index : 2 * index + 12] = (220, 40, 200)
    return video


@pytest.mark.parametrize("size", [(6, 32, 48), (5, 33, 47), (1, 32, 48)], ids=str)
@pytest.mark.parametrize("extension", [".mp4", ".gif", ".png"])
def test_frames_come_back(tmp_path: Path, size: tuple[int, int, int], extension: str):
    video = clip(*size)
    path = write_video(tmp_path / f"video{extension}", video, 12, record={"seed": 1})
    # imageio's frames of a picture format are its pages.
    pages: Any = None if extension == ".mp4" else ...
    read = iio.imread(path, index=pages)
    assert len(read) == len(video)
    cut = read[:, : size[1], : size[2], :3].astype(int)
    assert np.abs(cut - video).mean() < {".mp4": 6, ".gif": 3, ".png": 0.001}[extension]
    assert json.loads(record_path(path).read_text()) == {"seed": 1}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name, f"{path.name}.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_replaces_a_file_only_when_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_video(tmp_path / "video.png", clip(1))
    before = path.read_bytes()

    def full(part: Path, *_):
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(media, "_encode", full)
    with pytest.raises(OSError, match="removed: free some space") as caught:
        write_video(path, clip(1), record={})
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["video.png"]


@pytest.mark.parametrize("extension", [".mp4", ".gif", ".png"])
def test_a_real_limit_in_mid_file(tmp_path: Path, extension: str):
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="free some space"):
            write_video(tmp_path / f"video{extension}", noise, record={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_record_that_does_not_fit_takes_the_video_with_it(tmp_path: Path):
    with pytest.raises(TypeError):
        write_video(tmp_path / "video.png", clip(1), record={"tensor": object()})
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_ffmpeg_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def pad(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return arguments[0]

    monkeypatch.setattr(media.np, "pad", pad)
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "video.mp4", clip())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("video.avi", ValueError, "must end in .mp4, .gif or .png"),
        ("video", ValueError, "must end in"),
        ("absent/video.mp4", FileNotFoundError, "does not exist: make"),
        ("/proc/video.gif", PermissionError, "can't be written"),
    ],
)
def test_outputs_that_can_never_be(tmp_path: Path, name: str, kind: type[Exception], words: str):
    with pytest.raises(kind, match=words):
        check_output(tmp_path / name)


def test_folder_as_output(tmp_path: Path):
    (tmp_path / "video.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_output(tmp_path / "video.mp4")


def test_missing_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def absent():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", absent)
    with pytest.raises(ValueError, match="needs ffmpeg"):
        check_output(tmp_path / "video.mp4")
    assert check_output(tmp_path / "video.gif")


@pytest.mark.parametrize("frames", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8)], ids=["floats", "one image"])
def test_frames_of_another_kind(tmp_path: Path, frames: np.ndarray):
    with pytest.raises(ValueError, match="frames must be uint8"):
        write_video(tmp_path / "video.gif", frames)


def test_side_by_side():
    both = side_by_side({"left": clip(), "right": 255 - clip()})
    assert both.shape == (6, 32 + media.LABEL_HEIGHT, 96, 3)
    below = both[:, media.LABEL_HEIGHT :]
    assert np.array_equal(below[:, :, :48], clip())
    assert np.array_equal(below[:, :, 48:], 255 - clip())
    assert both[0, : media.LABEL_HEIGHT].max() > 200, "a label is drawn"
