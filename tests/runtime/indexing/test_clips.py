"""Indexing video files: fixed cuts, one bad file does not stop the others, nothing twice."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from motionrt.runtime.bundle.manifest import ClipSize, GraphSpec, MemorySpec, Part, Port
from motionrt.runtime.errors import InputError, MediaError, MemoryStoreError
from motionrt.runtime.indexing import clips as indexing
from motionrt.runtime.indexing.clips import IndexReport, index_clips
from motionrt.runtime.indexing.encoders import ClipEncoders, make_record, reference_calls
from motionrt.runtime.indexing.sources import Item
from motionrt.runtime.media.video import read_clip, write_video
from motionrt.runtime.memory.memory import MotionMemory

F, H, W, FPS = 5, 16, 24, 8
RECORD = (Part("motion", "float16", (2, F)), Part("appearance", "float16", (1, 3)))
KEPT: dict[str, Any] = {"embedding": 4, "record": RECORD, "fingerprint": "f" * 64}
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


def graph(name: str, reads: str, *gives: str) -> GraphSpec:
    inputs, outputs = (tuple(Port(port, "float32", ()) for port in ports) for ports in ((reads,), gives))
    return GraphSpec(name, f"{name}.onnx", "0" * 64, inputs, outputs)


def encoders(record: tuple[Part, ...] = RECORD, **changes: Any) -> ClipEncoders:
    """The three graphs, some of them changed, for a bundle that declares `record`."""
    graphs = {"text_query": text_query, "motion": motion, "appearance": appearance} | changes
    reads = {"text_query": "input_ids", "motion": "video", "appearance": "image"}
    names = tuple(name for name in graphs if name != "text_query")
    spec = MemorySpec("prompt", "text_query", "text", 1, 2, ClipSize(F, H, W, FPS), record, "f" * 64, names)
    return ClipEncoders(
        spec, tokenize, graphs.__getitem__, {name: graph(name, reads.get(name, "pixels"), name) for name in graphs}
    )


ENCODERS = encoders()


@pytest.fixture
def memory(tmp_path: Path) -> MotionMemory:
    calls.clear()
    return MotionMemory.create(tmp_path / "memory", **KEPT)


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
        np.testing.assert_allclose(reference.record["motion"], [want, -want], atol=1e-3)
        np.testing.assert_allclose(reference.record["appearance"], [cut[0].mean((1, 2))], atol=1e-3)
        assert (reference.source, reference.start, reference.duration) == (str(path), start, F / FPS)
    assert np.abs(first.record["motion"] - later.record["motion"]).max() > 0.1


def test_index_clips_works_in_batches_and_tells_progress(
    tmp_path: Path, memory: MotionMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "BATCH", 3)
    items = [(video(tmp_path / f"{i}.mp4", i), f"clip {i}", None) for i in range(7)]
    seen: list[tuple[int, str]] = []
    with memory:
        report = index_clips(memory, ENCODERS, iter(items), lambda done, path: seen.append((done, path)))
        assert report.added == len(memory) == 7
        together = [r.record["motion"] for r in memory.get(range(1, 8))]
    assert [size for _, size in calls] == [3, 3, 1]
    assert seen == [(i + 1, str(items[i][0])) for i in range(7)]
    with MotionMemory.create(tmp_path / "alone", **KEPT) as alone:
        for item in items:
            index_clips(alone, ENCODERS, [item])
        assert np.array_equal(together, [r.record["motion"] for r in alone.get(range(1, 8))])


def test_index_clips_reports_what_it_cannot_take_and_goes_on(tmp_path: Path, memory: MotionMemory) -> None:
    good = video(tmp_path / "good.mp4")
    white = tmp_path / "white.mp4"
    write_video(white, np.concatenate([np.full((1, H, W, 3), 255, np.uint8), np.zeros((F - 1, H, W, 3), np.uint8)]), FPS)
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


def test_what_is_no_motion_is_refused_with_why(tmp_path: Path, memory: MotionMemory) -> None:
    """One picture, whatever the file is called, and a window in which nothing moves; a little noise is no motion."""
    Image.new("RGB", (W, H), (9, 90, 200)).save(tmp_path / "picture.png")
    (tmp_path / "picture.mp4").write_bytes((tmp_path / "picture.png").read_bytes())
    Image.new("RGB", (W, H), (9, 90, 200)).save(tmp_path / "photo.jpg")
    noise = np.random.default_rng(0).integers(0, 2, (3 * F, H, W, 3), np.uint8)
    noise[F + 1 :, 4:8, 4:8] += 60
    write_video(tmp_path / "late.webp", noise, FPS)
    write_video(tmp_path / "one.mp4", noise[:1], FPS)
    write_video(tmp_path / "equal.gif", np.zeros((F, H, W, 3), np.uint8), FPS)
    still = ["picture.png", "picture.mp4", "photo.jpg", "one.mp4", "equal.gif", "late.webp"]
    with memory:
        report = index_clips(memory, ENCODERS, [(tmp_path / name, "left", None) for name in still])
        assert report.added == 0 and [Path(item.video).name for item, _ in report.failed] == still
        for name, (_, why) in zip(still, report.failed, strict=True):
            assert f"{name} shows one picture from 0 to" in why and "no motion" in why
        assert index_clips(memory, ENCODERS, [(tmp_path / "late.webp", "left", 0.5)]).added == 1


def test_index_clips_reads_relative_paths_from_where_it_was_called(
    tmp_path: Path, memory: MotionMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [(video(tmp_path / f"{i}.mp4", i).name, f"clip {i}", None) for i in range(3)]
    monkeypatch.chdir(tmp_path)
    with memory:
        report = index_clips(memory, ENCODERS, items, lambda *_: monkeypatch.chdir("/"))
        assert report.added == 3 and not report.failed and memory.get([3])[0].source == "2.mp4"


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
    wrong = encoders(motion=lambda inputs: appearance({"image": inputs["video"][:, 0]}))
    narrow = encoders(motion=lambda inputs: {"motion": motion(inputs)["motion"][:, :1]})
    other = encoders((Part("motion", "float16", (1, F)), RECORD[1]))
    longer = encoders(text_query=lambda inputs: {"embedding": np.ones((1, 5), np.float32)})
    with memory:
        assert index_clips(memory, ENCODERS, []) == IndexReport()
        with pytest.raises(InputError, match="no graph of the memory gives `motion` of the record"):
            index_clips(memory, wrong, [(path, "x", None)])
        with pytest.raises(InputError, match=r"`motion` of a clip came out as float32 \[1, 5\]; .* declares float16 \[2, 5\]"):
            index_clips(memory, narrow, [(path, "x", None)])
        with pytest.raises(
            MemoryStoreError, match=r"encoders give .*motion float16 \[1, 5\].* keeps .*motion float16 \[2, 5\]"
        ):
            index_clips(memory, other, [(path, "x", None)])
        with pytest.raises(MemoryStoreError, match=r"encoders give an embedding of 5 .* keeps an embedding of 4"):
            index_clips(memory, longer, [(path, "x", None)])
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
        with pytest.raises(
            MemoryStoreError, match=r"disk is full.*The \d+ clips that this run added before are there"
        ) as error:
            index_clips(memory, ENCODERS, many)
        assert f"The {len(memory) - 2} clips" in str(error.value) and "Nothing was changed" not in str(error.value)
        with pytest.raises(MemoryStoreError, match="Free space on the disk and try again.$"):  # and none were added before
            index_clips(memory, ENCODERS, many[len(memory) :])
        kept = [r.caption for r in memory.get(range(1, len(memory) + 1))]
        assert 2 < len(kept) < 101 and len(kept) % 2 == 0  # whole batches
        assert kept == [f"clip {i}" for i in range(2)] + [f"more {i}" for i in range(len(kept) - 2)]


def test_index_clips_leaves_an_index_where_one_is_wanted(tmp_path: Path, memory: MotionMemory) -> None:
    memory.index_threshold = 2
    with memory:
        index_clips(memory, ENCODERS, [(video(tmp_path / f"{i}.mp4", i), f"{i} clip", None) for i in range(3)])
    index, *rest = sorted(os.listdir(tmp_path / "memory"))
    assert index.startswith("index-") and rest == ["index.json", "memory.sqlite"]  # no journal is left


# Other systems, and records on demand


PIXELS = (Part("pixels", "uint8", (F, H, W, 3)), Part("course", "float32", (F,)))


def course(inputs: Mapping[str, Any]) -> dict[str, Any]:
    pixels = inputs["pixels"]
    assert pixels.dtype == np.uint8 and pixels.shape[1:] == (F, H, W, 3) and pixels.flags.c_contiguous
    return {"course": pixels.mean((2, 3, 4), dtype=np.float32)}


def general(**changes: Any) -> ClipEncoders:
    """A system whose record is what its clips look like, and what one graph makes of that."""
    made = encoders(PIXELS, course=course)
    return replace(made, spec=msgspec.structs.replace(made.spec, graphs=("course",), **changes))


def test_a_record_of_pixels_and_of_a_graph_that_reads_them(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4")
    with MotionMemory.create(tmp_path / "m", embedding=4, record=PIXELS, fingerprint="f") as memory:
        assert index_clips(memory, general(), [(path, "rises", 0.25)]).added == 1
        record = memory.get([1])[0].record
    cut = read_clip(path, F, H, W, FPS, 0.25)
    assert record["pixels"].dtype == np.uint8 and record["course"].dtype == np.float32
    assert np.array_equal(record["pixels"].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1, cut)
    np.testing.assert_array_equal(record["course"], record["pixels"].mean((1, 2, 3), dtype=np.float32))


@pytest.mark.parametrize("value, words", [
    (np.zeros((1, F), np.float32), r"`course` of a clip came out as float32 \[5\]; the bundle declares int64 \[5\]"),
    (np.zeros((1, F), np.uint8), "came out as uint8"),
])  # fmt: skip
def test_nothing_becomes_a_whole_number_without_a_word(tmp_path: Path, value: Any, words: str) -> None:
    made = replace(general(record=(Part("course", "int64", (F,)),)), load=lambda name: lambda inputs: {"course": value})
    with pytest.raises(InputError, match=words):
        made.records(np.zeros((1, F, 3, H, W), np.float32))
    whole = replace(made, load=lambda name: lambda inputs: {"course": value.astype(np.int64)})
    assert whole.records(np.zeros((1, F, 3, H, W), np.float32))[0]["course"].dtype == np.int64
    lost = replace(made, graphs={"course": graph("course", "depth", "course")})
    with pytest.raises(InputError, match="graph 'course' reads `depth`; there are only video, image"):
        lost.records(np.zeros((1, F, 3, H, W), np.float32))


def test_what_a_still_and_a_video_are_searched_by() -> None:
    still, moving = np.zeros((3, H, W), np.float32), np.zeros((F, 3, H, W), np.float32)
    assert [ENCODERS.part_of_image(still)[0], ENCODERS.part_of_video(moving)[0]] == ["appearance", "motion"]
    assert ENCODERS.part_of_image(still)[1].shape == (1, 3) and ENCODERS.part_of_video(moving)[1].shape == (2, F)
    assert general().part_of_video(moving)[0] == "course"
    with pytest.raises(InputError, match="no float part that is made of a still; search by a prompt"):
        general().part_of_image(still)
    with pytest.raises(InputError, match="made of a video and of no still"):
        encoders(RECORD[1:]).part_of_video(moving)


@pytest.fixture
def bundle() -> Any:
    return SimpleNamespace(path="B", graphs=ENCODERS.graphs, manifest=SimpleNamespace(memory=ENCODERS.spec))


def test_a_record_on_demand_is_the_one_that_would_have_been_kept(tmp_path: Path, bundle: Any) -> None:
    items = [
        Item(video(tmp_path / f"{i}.mp4", i), f"clip {i}", i / 3 or None, 0.5 + i / 3, "", {"end_sec": "x"} if i == 0 else {})
        for i in range(3)
    ]
    items += [items[1]._replace(caption="no end", end=None), items[1]._replace(caption="centre", start=0.1 + 0.2)]
    calls.clear()
    with MotionMemory.create(tmp_path / "d", **KEPT, on_demand=True) as memory:
        for span in ("start", "centre"):
            assert not index_clips(memory, ENCODERS, items, span=span).failed
        assert not calls  # captions are embedded, nothing else
        bare = memory.get(memory.ids().tolist())
    with MotionMemory.create(tmp_path / "k", **KEPT) as memory:
        for span in ("start", "centre"):
            index_clips(memory, ENCODERS, items, span=span)
        stored = memory.get(memory.ids().tolist())
    assert len(bare) == len(stored) == 6
    asked = reference_calls(bundle, bare[0])  # as a job does it, call by call
    name, inputs = next(asked)
    assert (name, list(inputs)) == ("motion", ["video"])
    name, inputs = asked.send(motion(inputs))
    assert (name, list(inputs)) == ("appearance", ["image"])
    with pytest.raises(StopIteration) as done:
        asked.send(appearance(inputs))
    assert np.array_equal(done.value.value["motion"], stored[0].record["motion"])
    for one, other in zip(bare, stored, strict=True):
        made = make_record(bundle, ENCODERS.load, one)
        assert one.record == {} and list(made) == list(other.record)
        for name, array in other.record.items():
            assert made[name].dtype == array.dtype and np.array_equal(made[name], array), (one.caption, name)


def test_a_record_on_demand_of_a_file_that_is_gone_or_changed_is_refused(tmp_path: Path, bundle: Any) -> None:
    path = video(tmp_path / "a.mp4")
    with MotionMemory.create(tmp_path / "m", **KEPT, on_demand=True) as memory:
        index_clips(memory, ENCODERS, [(path, "rises", None)])
        reference = memory.get([1])[0]
    moved = replace(reference, source="a.mp4")
    assert np.array_equal(
        make_record(bundle, ENCODERS.load, moved, tmp_path)["motion"], make_record(bundle, ENCODERS.load, reference)["motion"]
    )
    with pytest.raises(InputError, match="`end_sec` of clip 1 is 'late'"):
        make_record(bundle, ENCODERS.load, replace(reference, metadata={"end_sec": "late"}))
    video(path, shift=3)
    with pytest.raises(MediaError, match=r"a.mp4 is not the one that clip 1 \('rises'\) was indexed from.*Restore it"):
        make_record(bundle, ENCODERS.load, reference)
    path.unlink()
    with pytest.raises(MediaError, match="a.mp4 cannot be read: No such file"):
        make_record(bundle, ENCODERS.load, reference)


def test_encoders_from_a_bundle(fake_bundle: Path, fake_memory: Path, fake_clips: dict[str, Path]) -> None:
    from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
    from motionrt.runtime.bundle.bundle import Bundle

    opened = Bundle.open(fake_bundle)
    made = ClipEncoders.from_bundle(opened, OnnxRuntimeBackend(1))
    with MotionMemory.open(fake_memory, readonly=True) as stored:
        assert opened.manifest.memory is not None
        stored.check(opened.manifest.memory.fingerprint)
        for caption, path in fake_clips.items():
            found = stored.search(made.embed(caption), 1)[0]
            assert found.source == str(path)
            again = make_record(opened, made.load, found)
            assert all(np.array_equal(again[name], array) for name, array in found.record.items())
