"""Indexing video files: fixed cuts, one bad file does not stop the others, nothing twice."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motionrt.runtime.errors import InputError, MemoryStoreError
from motionrt.runtime.indexing import clips as indexing
from motionrt.runtime.indexing.clips import ClipEncoders, IndexReport, index_clips
from motionrt.runtime.media.video import read_clip, write_video
from motionrt.runtime.memory.memory import MotionMemory

F, H, W, FPS = 5, 16, 24, 8
DIMS = {"embedding": 4, "motion": [2, F], "appearance": [1, 3]}
DIGESTS = {"text_query": "a", "motion": "b", "appearance": "c"}
calls: list[tuple[str, int]] = []


def tokenize(text: str) -> dict[str, np.ndarray]:
    if len(text) > 40:
        raise InputError("the prompt is too long")
    return {"input_ids": np.frombuffer(text.encode()[:4].ljust(4), np.uint8).astype(np.int64)[None]}


def text_query(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {"embedding": inputs["input_ids"].astype(np.float32)}


def motion(inputs: Mapping[str, Any]) -> dict[str, Any]:
    video = inputs["video"]
    assert video.dtype == np.float32 and video.shape[1:] == (F, 3, H, W) and video.flags.c_contiguous
    calls.append(("motion", len(video)))
    course = video.mean((2, 3, 4))
    course[course[:, 0] > 0.99] = np.nan  # as an encoder that breaks on one kind of clip
    return {"motion": np.stack([course, -course], 1)}


def appearance(inputs: Mapping[str, Any]) -> dict[str, Any]:
    image = inputs["image"]
    assert image.shape[1:] == (3, H, W) and image.flags.c_contiguous
    return {"appearance": image.mean((2, 3))[:, None]}


ENCODERS = ClipEncoders(tokenize, text_query, motion, appearance, F, H, W, FPS)


@pytest.fixture
def memory(tmp_path: Path) -> MotionMemory:
    calls.clear()
    return MotionMemory.create(tmp_path / "memory", digests=DIGESTS, dims=DIMS)


def video(path: Path, shift: int = 0, frames: int = 3 * F) -> Path:
    levels = (np.arange(frames) * 5 + shift).astype(np.uint8)
    write_video(path, np.ascontiguousarray(np.broadcast_to(levels[:, None, None, None], (frames, H, W, 3))), FPS)
    return path


def test_index_clips_stores_the_tokens_of_the_fixed_cut(tmp_path: Path, memory: MotionMemory) -> None:
    path = video(tmp_path / "a.mp4")
    with memory:
        report = index_clips(memory, ENCODERS, [(path, "rises", None), (str(path), "later", 0.75)])
        assert report == IndexReport(added=2, skipped=0, failed=[])
        first, later = memory.get([1, 2])
        assert memory.search(text_query(tokenize("later"))["embedding"][0], 1)[0].id == 2
        assert memory.contains(hashlib.sha256(path.read_bytes()).hexdigest(), 0.75, "later")
    for reference, start in ((first, 0.0), (later, 0.75)):
        cut = read_clip(path, F, H, W, FPS, start)
        want = cut.mean((1, 2, 3))
        np.testing.assert_allclose(reference.motion, [want, -want], atol=1e-3)
        np.testing.assert_allclose(reference.appearance, [cut[0].mean((1, 2))], atol=1e-3)
        assert (reference.source, reference.start, reference.duration) == (str(path), start, F / FPS)
    assert np.abs(first.motion - later.motion).max() > 0.1


def test_index_clips_works_in_batches_and_tells_progress(
    tmp_path: Path, memory: MotionMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "BATCH", 3)
    items = [(video(tmp_path / f"{i}.mp4", i), f"clip {i}", None) for i in range(7)]
    seen: list[tuple[int, str]] = []
    with memory:
        report = index_clips(memory, ENCODERS, iter(items), lambda done, path: seen.append((done, path)))
        assert report.added == len(memory) == 7
        together = [r.motion for r in memory.get(range(1, 8))]
    assert [size for _, size in calls] == [3, 3, 1]
    assert seen == [(i + 1, str(items[i][0])) for i in range(7)]
    with MotionMemory.create(tmp_path / "alone", digests=DIGESTS, dims=DIMS) as alone:
        for item in items:
            index_clips(alone, ENCODERS, [item])
        assert np.array_equal(together, [r.motion for r in alone.get(range(1, 8))])


def test_index_clips_reports_what_it_cannot_take_and_goes_on(tmp_path: Path, memory: MotionMemory) -> None:
    good = video(tmp_path / "good.mp4")
    white = tmp_path / "white.mp4"
    write_video(white, np.full((F, H, W, 3), 255, np.uint8), FPS)
    (tmp_path / "garbage.mp4").write_bytes(b"garbage")
    items: list[tuple[Path, str, float | None]] = [
        (tmp_path / "missing.mp4", "x", None), (tmp_path / "garbage.mp4", "x", None), (tmp_path, "x", None),
        (good, " ", None),
        (good, "long " * 20, None), (good, "x", 99.0), (good, "x", -1.0), (white, "x", None), (good, "good one", None),
    ]  # fmt: skip
    with memory:
        report = index_clips(memory, ENCODERS, items)
        assert report.added == len(memory) == 1 and memory.get([1])[0].caption == "good one"
    reasons = ["be read", "be decoded", "be read", "caption", "too long", "ends at", "start", "NaN"]
    assert [item[:3] for item, _ in report.failed] == items[:8]
    for (_, got), want in zip(report.failed, reasons, strict=True):
        assert want in got


def test_index_clips_adds_nothing_twice(tmp_path: Path, memory: MotionMemory) -> None:
    path = video(tmp_path / "a.mp4")
    (tmp_path / "copy.mp4").write_bytes(path.read_bytes())
    items = [(path, "one", None), (tmp_path / "copy.mp4", "one", 0.0), (path, "two", None), (path, "one", 0.5)]
    with memory:
        assert index_clips(memory, ENCODERS, items) == IndexReport(added=3, skipped=1)
        calls.clear()
        assert index_clips(memory, ENCODERS, items) == IndexReport(added=0, skipped=4)
        assert not calls and len(memory) == 3


def test_index_clips_with_no_items_and_with_wrong_encoders(tmp_path: Path, memory: MotionMemory) -> None:
    path = video(tmp_path / "a.mp4")
    wrong = ClipEncoders(tokenize, text_query, appearance, appearance, F, H, W, FPS)
    narrow = ClipEncoders(
        tokenize, text_query, lambda inputs: {"motion": motion(inputs)["motion"][:, :1]}, appearance, F, H, W, FPS
    )
    with memory:
        assert index_clips(memory, ENCODERS, []) == IndexReport()
        with pytest.raises((InputError, KeyError)):
            index_clips(memory, wrong, [(path, "x", None)])
        with pytest.raises(MemoryStoreError, match=r"the encoders give .*'motion': \[1, 5\].* keeps .*'motion': \[2, 5\]"):
            index_clips(memory, narrow, [(path, "x", None)])
        assert len(memory) == 0


def test_index_clips_stops_on_a_full_disk_and_keeps_the_earlier_batches(
    tmp_path: Path, memory: MotionMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "BATCH", 2)
    items = [(video(tmp_path / f"{i}.mp4", i), f"clip {i}", None) for i in range(4)]
    with memory:
        assert memory._db is not None
        index_clips(memory, ENCODERS, items[:2])
        pages = memory._db.execute("PRAGMA page_count").fetchone()[0]
        memory._db.execute(f"PRAGMA max_page_count={pages}")  # what is left of the last pages holds some clips more
        many = [(items[0][0], f"more {number}", None) for number in range(99)]
        with pytest.raises(MemoryStoreError, match="disk is full"):
            index_clips(memory, ENCODERS, many)
        kept = [r.caption for r in memory.get(range(1, len(memory) + 1))]
        assert 2 < len(kept) < 101 and len(kept) % 2 == 0  # whole batches
        assert kept == [f"clip {i}" for i in range(2)] + [f"more {i}" for i in range(len(kept) - 2)]


def test_index_clips_leaves_an_index_where_one_is_wanted(tmp_path: Path, memory: MotionMemory) -> None:
    memory.index_threshold = 2
    with memory:
        index_clips(memory, ENCODERS, [(video(tmp_path / f"{i}.mp4", i), f"{i} clip", None) for i in range(3)])
    index, *rest = sorted(os.listdir(tmp_path / "memory"))
    assert index.startswith("index-") and rest == ["index.json", "memory.sqlite"]  # no journal is left


def test_encoders_from_a_bundle(fake_bundle: Path, fake_memory: Path, fake_clips: dict[str, Path]) -> None:
    from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
    from motionrt.runtime.bundle.bundle import Bundle

    bundle = Bundle.open(fake_bundle)
    encoders = ClipEncoders.from_bundle(bundle, OnnxRuntimeBackend(1))
    with MotionMemory.open(fake_memory, readonly=True) as stored:
        stored.check(bundle.digests)
        for caption, path in fake_clips.items():
            embedding = encoders.text_query(encoders.tokenize(caption))["embedding"][0]
            assert stored.search(embedding, 1)[0].source == str(path)
