"""Frames to files: mp4, GIF or PNG, whole or not at all, with a record beside them."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

EXTENSIONS = (".mp4", ".gif", ".png")
LABEL_HEIGHT = 16


def record_path(path: Path) -> Path:
    """Where the record of a video stands: its name and .json."""
    return path.with_name(f"{path.name}.json")


def check_output(path: str | os.PathLike[str]) -> Path:
    """The path, if a video can be written there.

    Raises ValueError for an unknown extension or a missing ffmpeg, OSError for a folder that can't be written.
    """
    path = Path(path)
    if path.suffix.lower() not in EXTENSIONS:
        raise ValueError(f"out must end in {', '.join(EXTENSIONS[:-1])} or {EXTENSIONS[-1]}, got {path.name!r}")
    if path.is_dir():
        raise IsADirectoryError(f"out {path} is a folder: give the name of a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"out {path} lies in a folder that does not exist: make {path.parent} first")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise PermissionError(
            f"out {path} can't be written ({error.strerror}): choose a folder that you may write to"
        ) from error
    if path.suffix.lower() == ".mp4":
        ffmpeg()
    return path


def ffmpeg() -> str:
    """The path of ffmpeg: imageio-ffmpeg's own, or the system's.

    Raises ValueError where there is none.
    """
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            "an mp4 needs ffmpeg, and none is found: pip install imageio-ffmpeg, or give out as .gif or .png"
        ) from error


def write_video(
    path: str | os.PathLike[str], frames: np.ndarray, fps: float = 16.0, *, record: Mapping[str, Any] | None = None
) -> Path:
    """Write frames as mp4 (H.264), GIF or PNG (animated if there are several), and `record` as JSON beside them.

    Both appear whole or, on any error or Ctrl-C, not at all. GIF and animated PNG show equal frames as one long one.

    Args:
        path: its extension says the format; a file of that name is replaced.
        frames: uint8 [frames, height, width, 3].
        record: see `record_of`; written to `record_path(path)`.

    Raises ValueError for frames of another kind, OSError where the disk is full or refuses.
    """
    path = check_output(path)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames must be uint8 [frames, height, width, 3], got {frames.dtype} {list(frames.shape)}")
    with whole(path) as part:
        _encode(part, path.suffix.lower(), frames, fps)
        if record is not None:
            with whole(record_path(path)) as text:
                text.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, renamed to `path` in the end, removed on any error."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        yield Path(name)
        # mkstemp makes the file private; a video is an ordinary file.
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno, f"{path} could not be written whole and was removed: free some space and run again"
            ) from error
        raise


def _encode(part: Path, extension: str, frames: np.ndarray, fps: float) -> None:
    if extension == ".mp4":
        _encode_mp4(part, frames, fps)
        return
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    held = io.BytesIO()
    more: dict[str, Any] = {"save_all": True, "append_images": images[1:], "duration": 1000 / fps, "loop": 0}
    images[0].save(held, format=extension[1:].upper(), **(more if len(images) > 1 else {}))
    part.write_bytes(held.getvalue())


def _encode_mp4(part: Path, frames: np.ndarray, fps: float) -> None:
    # H.264 in 4:2:0 wants even sizes.
    odd = [(0, size % 2) for size in frames.shape[1:3]]
    height, width = (size + extra for size, (_, extra) in zip(frames.shape[1:3], odd, strict=True))
    rate = Fraction(fps).limit_denominator(1001)
    command = [
        *(ffmpeg(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"),
        *("-r", str(rate), "-i", "-", "-an", "-c:v", "libx264", "-crf", "16", "-pix_fmt", "yuv420p"),
        *("-movflags", "+faststart", "-f", "mp4", str(part)),
    ]
    # A session of its own: the terminal's Ctrl-C is for us, who then end it and remove its file.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    assert process.stderr is not None
    try:
        # Where ffmpeg gave up, it says why below.
        with suppress(BrokenPipeError):
            for frame in frames:
                process.stdin.write(np.pad(frame, (*odd, (0, 0)), mode="edge").tobytes())
            process.stdin.close()
        said = process.stderr.read().decode(errors="replace").strip()
        code = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stderr.close()
    if code == 0:
        return
    # ffmpeg has no exit code for a full disk; under a limit of file size a signal ends it.
    if "No space left" in said or "quota" in said or "File too large" in said or code < 0:
        raise OSError(errno.ENOSPC, f"ffmpeg could not write all of it: {said or f'ended by signal {-code}'}")
    raise OSError(errno.EIO, f"ffmpeg could not write the video: {said.splitlines()[-1] if said else code}")


def side_by_side(videos: Mapping[str, np.ndarray]) -> np.ndarray:
    """Videos of one shape, each under its label, left to right: uint8 [frames, height + 16, widths, 3]."""
    return np.concatenate([_labelled(label, frames) for label, frames in videos.items()], axis=2)


def _labelled(label: str, frames: np.ndarray) -> np.ndarray:
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (frames.shape[2], LABEL_HEIGHT), (24, 24, 24))
    ImageDraw.Draw(strip).text((4, 2), label, fill=(240, 240, 240))
    above = np.broadcast_to(np.asarray(strip), (len(frames), LABEL_HEIGHT, frames.shape[2], 3))
    return np.concatenate([above, frames], axis=1)
