"""The process that reads one uploaded video for a memory: whatever a stranger's file does to a decoder, it does it here.

`python -m motionrt.runtime.serve.work.adding` takes an `Adding` as a line of JSON on standard input and says `Said`, a line
each: its stages, then what came of it. It gives way to those who make videos (nice 10; graphs on the CPU), may be killed at any
moment (a clip is added in one transaction), and ends when its input does: the server is gone then.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from motionrt.runtime.backends.open import RunOptions, open_backend
from motionrt.runtime.backends.seam import Graph
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import MediaError
from motionrt.runtime.indexing.clips import index_clips
from motionrt.runtime.indexing.describe import CAPTIONED
from motionrt.runtime.indexing.encoders import ClipEncoders
from motionrt.runtime.indexing.sources import Item
from motionrt.runtime.media.limits import Limits
from motionrt.runtime.media.video import span_start
from motionrt.runtime.memory.file import memory_spec
from motionrt.runtime.memory.memory import MotionMemory
from motionrt.runtime.serve.messages import Adding, Said

PIXELS = 40_000_000  # of a frame: 8K has 33 million
LONGEST = 3600.0  # seconds that a video may play
# What FFmpeg may take a file for, and from where it may read: neither playlists nor lists of files, which name others.
_OPTIONS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm", "protocol_whitelist": "file"}
_PAGE = os.sysconf("SC_PAGE_SIZE")


def add(task: Adding, tell: Callable[[str], None]) -> Said:
    """Do it. tell: called with each stage. Raises `MotionRTError`, for what is wrong with the memory or the bundle."""
    tell("opening")
    bundle, video = Bundle.open(task.bundle), Path(task.video)
    spec = memory_spec(bundle)
    with MotionMemory.open(task.memory) as memory:
        memory.check(spec.fingerprint)
        backend = open_backend(RunOptions(threads=task.threads))
        names = [spec.query, *([] if memory.layout.on_demand else spec.graphs)]
        graphs = {name: backend.load(bundle, name) for name in names}
        with _memory_bound(task.decoding) as lift:
            tell("reading")

            def load(name: str) -> Graph:  # that a graph is wanted says that the video was read
                if lift():
                    tell("encoding")
                return graphs[name]

            check_video(video)
            item = Item(video, task.caption, task.start, task.end, task.dataset, task.metadata)
            limits, encoders = Limits(pixels=PIXELS, seconds=LONGEST, memory=task.decoding), ClipEncoders.of(bundle, load)
            report = index_clips(memory, encoders, [item], span=task.span, describe=task.describe, limits=limits)
        if report.failed:
            return Said(error={"code": "invalid_clip", "message": report.failed[0][1].replace(task.video, "video")})
        clips = memory.get(memory.find(task.sha256, caption=task.caption or None))
        # Its own from a try that was cut short counts as added too.
        if (own := next((clip for clip in clips if clip.source == task.video), None)) is not None:
            return Said(clip=own.id, added=True)
        start = span_start(video, task.span, spec.clip.frames / spec.clip.fps, task.start, task.end)
        there = [clip for clip in clips if clip.start == start]
        return Said(clip=max(there, key=lambda clip: CAPTIONED.items() <= clip.metadata.items()).id)


def check_video(path: Path) -> None:
    """MediaError unless the file itself is an mp4, mov or webm of a size and length that are taken; nothing is decoded.

    What opens it later takes it for the same: FFmpeg goes by its bytes.
    """
    import av

    try:
        with av.open(str(path.absolute()), options=dict(_OPTIONS)) as container:
            if not container.streams.video:
                raise MediaError("video has no track of pictures; upload an mp4, mov or webm with one.")
            for stream in container.streams.video:
                if stream.width * stream.height > PIXELS:
                    raise MediaError(
                        f"video has frames of {stream.width} x {stream.height}; allowed are {PIXELS // 10**6} million pixels."
                        " Make it smaller."
                    )
                track = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
                if (seconds := max((container.duration or 0) / 1_000_000, track)) > LONGEST:
                    raise MediaError(f"video plays for {seconds:.0f} s; allowed are {LONGEST:.0f}. Cut out what moves.")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise MediaError(f"video cannot be read as an mp4, mov or webm: {why}. Upload an intact one.") from None


@contextlib.contextmanager
def _memory_bound(most: int) -> Iterator[Callable[[], bool]]:
    """Let this process take no more than `most` bytes of address space beyond what it has, until the block ends or what is
    given is called, which says whether it was the first call."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        bound = int(file.read().split()[0]) * _PAGE + most
    for other in (soft, hard):
        bound = bound if other == resource.RLIM_INFINITY else min(bound, other)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
    bounded = True

    def lift() -> bool:
        nonlocal bounded
        first, bounded = bounded, False
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        return first

    try:
        yield lift
    finally:
        lift()


def main() -> None:
    from motionrt.runtime.serve.logs import to_standard_error
    from motionrt.runtime.serve.work.engine import failure

    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no message
    os.nice(10)
    for name in (signal.SIGINT, signal.SIGTERM):  # sent to all processes: the server decides
        signal.signal(name, signal.SIG_IGN)
    to_standard_error()
    task = msgspec.json.decode(sys.stdin.buffer.readline(), type=Adding)

    def leave() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    def say(said: Said) -> None:
        os.write(out, msgspec.json.encode(said) + b"\n")

    threading.Thread(target=leave, daemon=True).start()
    try:
        said = add(task, lambda stage: say(Said(stage=stage)))
    except Exception as error:
        said = Said(error=failure(error))
    say(said)
    os._exit(0)  # threads inside libraries must not keep it


if __name__ == "__main__":
    main()
