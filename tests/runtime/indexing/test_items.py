"""Indexing of items from tables and folders: spans, vectors, odd files, and runs that are killed and resumed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from motionrt.runtime import files as digests
from motionrt.runtime.bundle.manifest import ClipSize, GraphSpec, MemorySpec, Part, Port
from motionrt.runtime.errors import InputError, MediaError, MemoryStoreError
from motionrt.runtime.indexing import clips as indexing
from motionrt.runtime.indexing.clips import ClipEncoders, IndexReport, index_clips
from motionrt.runtime.indexing.hashes import FileHashes
from motionrt.runtime.indexing.sources import Item
from motionrt.runtime.media.video import write_video
from motionrt.runtime.memory.memory import Clip, MotionMemory

F, H, W, FPS = 5, 16, 24, 8
RECORD = (Part("motion", "float16", (2, F)), Part("appearance", "float16", (1, 3)))
KEPT: dict[str, Any] = {"embedding": 4, "record": RECORD, "fingerprint": "f" * 64}
ROOT = Path(__file__).resolve().parents[3]


def tokenize(text: str) -> dict[str, np.ndarray]:
    if len(text) > 200_000:
        raise InputError("the prompt is too long")
    codes = np.frombuffer(text.encode(), np.uint8)
    return {"input_ids": np.array([[len(codes), codes.sum(), codes[0], codes[-1]]], np.int64)}


def appearance(image: np.ndarray) -> np.ndarray:
    """The brightness of the left half, of the upper half, and of everything."""
    return np.stack([x.mean((1, 2, 3)) for x in (image[..., : W // 2], image[:, :, : H // 2], image)], 1)[:, None]


GRAPHS: dict[str, Any] = {
    "text_query": lambda inputs: {"embedding": np.sin(inputs["input_ids"].astype(np.float32))},
    "motion": lambda inputs: {"motion": np.stack([inputs["video"].mean((2, 3, 4))] * 2, 1)},
    "appearance": lambda inputs: {"appearance": appearance(inputs["image"])},
}
PORTS = {"text_query": "input_ids", "motion": "video", "appearance": "image"}
ENCODERS = ClipEncoders(
    MemorySpec("prompt", "text_query", "t", 1, 2, ClipSize(F, H, W, FPS), RECORD, "f" * 64, ("motion", "appearance")),
    tokenize, GRAPHS.__getitem__,
    {name: GraphSpec(name, "f", "0" * 64, (Port(port, "float32", ()),), ()) for name, port in PORTS.items()},
)  # fmt: skip


@pytest.fixture
def memory(tmp_path: Path) -> MotionMemory:
    return MotionMemory.create(tmp_path / "memory", **KEPT)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[Clip]:
    """What is given to the memory."""
    clips: list[Clip] = []
    whole = MotionMemory.add

    def add(self: MotionMemory, entries: Any) -> list[int]:
        entries = list(entries)
        ids = whole(self, entries)
        clips.extend(entries)
        return ids

    monkeypatch.setattr(MotionMemory, "add", add)
    return clips


def counting(path: Path, frames: int = 80, shift: int = 0) -> Path:
    """A video whose frame i is grey of level 2 i + shift."""
    greys = (2 * np.arange(frames) + shift).astype(np.uint8)
    write_video(path, np.ascontiguousarray(np.broadcast_to(greys[:, None, None, None], (frames, H, W, 3))), FPS)
    return path


def first_frame(clip: Clip) -> int:
    return round(float((clip.record["motion"][0, 0] + 1) * 127.5 / 2))


# Spans and what a clip keeps


def test_clips_keep_dataset_metadata_rule_and_limits(tmp_path: Path, memory: MotionMemory, added: list[Clip]) -> None:
    path = counting(tmp_path / "a.mp4")
    items = [
        Item(path, "one"),
        Item(path, "two", 4, 6, "mine", {"camera": "still", "span": "x"}),
        Item(path, "three", None, 0.5),
    ]
    with memory:
        assert index_clips(memory, ENCODERS, items) == IndexReport(added=3)
    assert [(clip.start, first_frame(clip), clip.dataset) for clip in added] == [(0, 0, ""), (4, 32, "mine"), (0, 0, "")]
    assert added[0].metadata == {"span": "start"} and added[2].metadata == {"span": "start", "end_sec": "0.5"}
    assert added[1].metadata == {"camera": "still", "start_sec": "4", "end_sec": "6", "span": "explicit"}
    assert [round(clip.duration, 3) for clip in added] == [0.625, 0.625, 0.5]


def test_the_centre_rule_cuts_in_the_middle_of_the_limits(tmp_path: Path, memory: MotionMemory, added: list[Clip]) -> None:
    path = counting(tmp_path / "a.mp4")
    items = [Item(path, "whole"), Item(path, "part", 4, 6)]
    with memory:
        assert index_clips(memory, ENCODERS, items, span="centre").added == 2
        assert index_clips(memory, ENCODERS, items, span="centre").skipped == 2
    assert [(clip.start, first_frame(clip)) for clip in added] == [(4.6875, 37), (4.6875, 37)]
    assert added[0].metadata == {"span": "centre"} and added[1].metadata["span"] == "centre"
    with pytest.raises(InputError, match="span rule is 'end'"):
        index_clips(memory, ENCODERS, items, span="end")


# Vectors that come with the captions


def vector(caption: str) -> np.ndarray:
    return ENCODERS.embed(caption)


def test_vectors_of_the_same_encoder_are_kept(tmp_path: Path, memory: MotionMemory, added: list[Clip]) -> None:
    path = counting(tmp_path / "a.mp4")
    unit = vector("one") / np.linalg.norm(vector("one"))
    other = np.float32([1, 2, 3, 4])  # only the first is compared: the table may have been made with a truncated caption
    wide = Item(path, "wide", embedding=np.ones(768, np.float32))
    with memory:
        report = index_clips(memory, ENCODERS, [Item(path, "one", embedding=unit), Item(path, "two", embedding=other), wide])
    assert (report.added, report.vectors) == (3, 2)
    for clip, want in zip(added, (unit, other, vector("wide")), strict=True):
        np.testing.assert_array_equal(clip.embedding, want)


def test_vectors_of_another_encoder_stop_the_run_unless_made_anew(
    tmp_path: Path, memory: MotionMemory, added: list[Clip]
) -> None:
    path = counting(tmp_path / "a.mp4")
    items = [Item(path, "one", embedding=-vector("one")), Item(path, "two", embedding=vector("two"))]
    with memory:
        with pytest.raises(MemoryStoreError, match=r"'one' has a cosine of -1.000 .*: --reembed"):
            index_clips(memory, ENCODERS, items)
        assert len(memory) == 0
        assert index_clips(memory, ENCODERS, items, reembed=True) == IndexReport(added=2)
    np.testing.assert_array_equal(added[0].embedding, vector("one"))


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_an_impossible_vector_is_reported(tmp_path: Path, memory: MotionMemory, value: float) -> None:
    path = counting(tmp_path / "a.mp4")
    items = [Item(path, "bad", embedding=np.full(4, value, np.float32)), Item(path, "good", embedding=vector("good"))]
    with memory:
        report = index_clips(memory, ENCODERS, items)
    assert report.added == 1 and "all zeros or not finite" in report.failed[0][1]


# Odd files


def encode(path: Path, times: list[int], rotate: int | None = None) -> Path:
    """Frames at `times` (ms): the left half black, the right half as bright as the frame's time is late."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = H, W, "yuv444p"
        stream.options = {"crf": "1"}
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotate is not None:
            stream.set_display_rotation(rotate)
        for time_ms in times:
            pixels = np.zeros((H, W, 3), np.uint8)
            pixels[:, W // 2 :] = 50 + time_ms // 10
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("span", ["start", "centre"])
def test_odd_videos_are_taken_or_reported_and_stop_nothing(
    tmp_path: Path, memory: MotionMemory, added: list[Clip], span: str
) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    whole = encode(tmp_path / "whole.mp4", list(range(0, 1000, 40)))
    (tmp_path / "half.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "secret.mp4").symlink_to(tmp_path / "gone.mp4")
    bad = ["empty.mp4", "garbage.mp4", "half.mp4", "secret.mp4", "sound.mp4", ".", "one.mp4"]
    sound(tmp_path / "sound.mp4")
    encode(tmp_path / "one.mp4", [0])
    encode(tmp_path / "variable.mp4", [0, 40, 80, 1000, 1040])
    encode(tmp_path / "turned.mp4", [0, 125, 250, 375, 500], rotate=90)
    encode(tmp_path / "ü 東京 'x'; --.mp4", [0, 125, 250, 375, 500])
    good = ["variable.mp4", "turned.mp4", "ü 東京 'x'; --.mp4"]
    caption = "x" * 100_000
    mixed = [name for pair in zip(bad, [*good, *good], strict=False) for name in pair] + bad + good
    with memory:
        report = index_clips(memory, ENCODERS, [Item(tmp_path / name, caption) for name in dict.fromkeys(mixed)], span=span)
        assert report.added == len(memory) == len(good)
    assert [Path(item.video).name for item, _ in report.failed] == [Path(tmp_path / name).name for name in bad]
    for (item, reason), want in zip(
        report.failed, ("decoded|frame", "decoded", "decoded", "", "no video stream", "", "one picture"), strict=True
    ):
        assert str(item.video) in reason and __import__("re").search(want, reason), reason
    clips = {Path(clip.source).name: clip for clip in added}
    assert set(clips) == set(good) and {clip.caption for clip in added} == {caption}
    assert [clips[name].duration for name in good[:2]] == pytest.approx([0.625, 0.625])
    left, upper, _ = clips[good[2]].record["appearance"][0]
    assert left < -0.95 and upper > left + 0.1  # the left half is black, and shown where it was
    left, upper, whole = clips["turned.mp4"].record["appearance"][0]
    assert upper > whole + 0.1 and left == pytest.approx(whole, abs=0.02)  # a quarter turn: the bright half is on top


def test_a_caption_that_is_too_long_is_reported(tmp_path: Path, memory: MotionMemory) -> None:
    path = counting(tmp_path / "a.mp4")
    with memory:
        report = index_clips(memory, ENCODERS, [(path, "x" * 200_001, None), (path, "good", None)])
    assert report.added == 1 and "too long" in report.failed[0][1]


def test_one_clip_that_the_memory_refuses_does_not_take_its_batch_along(tmp_path: Path, memory: MotionMemory) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")  # a file name that is no text
    path = counting(tmp_path / "a.mp4")
    Path(odd).write_bytes(path.read_bytes())
    items = [Item(path, "one"), Item(odd, "two"), Item(path, "\ud800", embedding=vector("one")), Item(path, "three")]
    with memory:
        report = index_clips(memory, ENCODERS, items)
        assert report.added == 2 and [clip.caption for clip in memory.get([1, 2])] == ["one", "three"]
    assert [item.video for item, _ in report.failed] == [odd, path]
    assert all("must be valid text" in reason for _, reason in report.failed)


def test_an_item_with_a_problem_is_reported_as_it_is(tmp_path: Path, memory: MotionMemory) -> None:
    item = Item("", "", problem="row 7 of t.csv: its `video` is empty.")
    with memory:
        assert index_clips(memory, ENCODERS, [item]).failed == [(item, item.problem)]


# Killed and resumed


def test_a_resumed_run_reads_no_file_again_that_did_not_change(
    tmp_path: Path, memory: MotionMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "BATCH", 1)
    monkeypatch.setattr(digests, "_SETTLED", 0)
    read: list[str] = []
    whole = digests.sha256_of
    monkeypatch.setattr(digests, "sha256_of", lambda path: (read.append(path.name), whole(path))[1])
    items = [Item(counting(tmp_path / f"{i}.mp4", shift=i), f"clip {i}") for i in range(4)]
    time.sleep(0.02)

    def stop(done: int, path: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with memory:
        with pytest.raises(KeyboardInterrupt):
            index_clips(memory, ENCODERS, items, stop)
        assert read == ["0.mp4", "1.mp4", "2.mp4"] and len(memory) == 3
        journal = memory.path / "resume.jsonl"
        journal.write_text(journal.read_text() + '\n["cut sho')
        # The same bytes, written again; not encoded again, for libx264 may code the same frames in other bits.
        (tmp_path / "1.mp4").write_bytes((tmp_path / "1.mp4").read_bytes())
        read.clear()
        assert index_clips(memory, ENCODERS, items) == IndexReport(added=1, skipped=3)
        assert read == ["1.mp4", "3.mp4"] and not journal.exists()


def test_file_hashes_trust_no_file_that_was_just_written(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    hashes = FileHashes(tmp_path / "journal")
    first = hashes.sha256(path)
    stamp = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert hashes.sha256(path) != first
    with pytest.raises(MediaError, match="cannot be read: No such file"):
        hashes.sha256(tmp_path / "missing")
    with pytest.raises(MediaError, match="cannot be read"):
        hashes.sha256(Path("nul\0"))


CHILD = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("items", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from motionrt.runtime.indexing import clips as indexing
indexing.BATCH = 3
with module.MotionMemory.open(Path(sys.argv[2])) as memory:
    items = [(path, f"clip {i % 7}", None) for path in sorted(Path(sys.argv[3]).iterdir()) for i in range(2)]
    report = indexing.index_clips(memory, module.ENCODERS, items, lambda done, path: print(done, flush=True))
    print(report.added, report.skipped, len(report.failed), "end", flush=True)
"""


def test_a_killed_run_goes_on_and_every_clip_is_there_once(tmp_path: Path, memory: MotionMemory) -> None:
    memory.close()
    (tmp_path / "clips").mkdir()
    for i in range(12):
        counting(tmp_path / "clips" / f"{i:02}.mp4", 12, shift=i)
    command = [sys.executable, "-P", "-c", CHILD, __file__, str(tmp_path / "memory"), str(tmp_path / "clips")]
    random, kills, counts = np.random.default_rng(0), 0, []
    for target in (2, 5, 8, 11, 14, 20):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line.split()[0] == str(target):
                    time.sleep(random.uniform(0, 0.02))
                    child.kill()
        kills += child.returncode < 0
        with MotionMemory.open(tmp_path / "memory", readonly=True) as opened:
            counts.append(len(opened))
    assert kills == 6 and counts == sorted(counts) and counts[-1] >= 15
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    added, skipped, failed, _ = done.stdout.splitlines()[-1].split()
    assert (int(added), int(skipped), int(failed)) == (24 - counts[-1], counts[-1], 0), done.stderr
    with MotionMemory.open(tmp_path / "memory", readonly=True) as opened:
        clips = Counter((Path(r.source).name, r.caption) for r in opened.get(range(1, 25)))
    assert clips == Counter((f"{i:02}.mp4", f"clip {j}") for i in range(12) for j in range(2))
    assert sorted(os.listdir(tmp_path / "memory")) == ["memory.sqlite"]
