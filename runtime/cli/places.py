"""What a command is told to read and write: stills through pipes, and outputs that are tried before the work."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

from motionrt.runtime.bundle.manifest import Output
from motionrt.runtime.errors import InputError, MediaError, MotionRTError
from motionrt.runtime.media.pictures import open_picture

MOST = 512 << 20  # bytes of a still that comes through a pipe
_PER_PIXEL = {".mp4": 1 / 8, ".webp": 1 / 4}  # bytes of a written video, about; of other kinds 1


def still(name: str, path: str) -> Any:
    """What the image option `name` is to be: `path` as it is, or the Pillow image that comes through a pipe.

    "-" is standard input; a named pipe, `<(...)` and /dev/stdin are read to their end. `InputError`, `MediaError`.
    """
    if path == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise InputError(f"{name} is '-', and nothing is piped in; give a file, or: cat still.png | motionrt ...")
        data = sys.stdin.buffer.read(MOST + 1)
    else:
        try:
            mode = os.stat(path).st_mode
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                return path
            with open(path, "rb") as pipe:
                data = pipe.read(MOST + 1)
        except (OSError, ValueError):
            return path  # whoever reads images says what is wrong with it
    if not 0 < len(data) <= MOST:
        got = f"more than {MOST >> 20} MiB came" if data else "nothing came"
        raise InputError(f"{name} is {path!r}, and {got} through that pipe; pipe one image in.")
    try:
        return open_picture(io.BytesIO(data), path)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise MediaError(f"{name}: what came through {path!r} cannot be read as an image: {error}. Use png or jpeg.") from None


def video_size(out: Path, spec: Output) -> int:
    """Bytes that a video of a bundle will take as the file `out`, about."""
    return int(spec.frames * spec.height * spec.width * _PER_PIXEL.get(out.suffix.lower(), 1))


def check_output(path: Path, size: int = 0, error: type[MotionRTError] = MediaError) -> None:
    """Raise `error` unless a file of about `size` bytes can be written to `path`: tried beside it, before the work.

    Nothing is left behind, and folders above it that are missing are not made yet. Only what changes until the file is
    written can go wrong then.
    """

    def refused(why: str) -> MotionRTError:
        return error(f"cannot write {path}: {why}. Choose another place.")

    try:
        if path.is_dir():
            raise refused("it is a folder")
        folder = path.absolute().parent
        missing = [path.name]
        while not folder.exists():
            missing.append(folder.name)
            folder = folder.parent
        if not folder.is_dir():
            raise refused(f"{folder} is no folder")
        for name in missing:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(folder / name)  # refuses a name that is too long for the file system
                if name != path.name:
                    raise refused(f"{folder / name} is a link to nothing")
    except (OSError, ValueError) as cause:
        raise refused(getattr(cause, "strerror", None) or str(cause)) from None
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as cause:
        raise refused(cause.strerror or str(cause)) from None
    if free < size:
        raise refused(f"it will take about {size / 2**20:,.1f} MiB, and {free / 2**20:,.1f} MiB are free there")
