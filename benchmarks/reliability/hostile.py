"""Hostile arguments to every public function and method: a MotionRTError, or an ordinary answer, and all is sound afterwards.

Each call is one that works, with one or two of its arguments replaced by what Hypothesis draws. A TypeError is allowed nowhere:
names and numbers of arguments are right here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from motionrt.benchmarks.harness import helper_module
from motionrt.benchmarks.reliability.tries import Attempt, Outcome
from motionrt.runtime.backends.auto import choose
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.backends.open import RunOptions, open_backend
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import MotionRTError
from motionrt.runtime.indexing.clips import ClipEncoders, index_clips
from motionrt.runtime.indexing.sources import Item, open_sources
from motionrt.runtime.job import Request
from motionrt.runtime.media.limits import LIMITS, Limits
from motionrt.runtime.media.video import decode_clip, read_clip, read_image, span_start, write_video
from motionrt.runtime.memory.memory import Clip, MotionMemory, Search
from motionrt.runtime.memory.set import MemorySet
from motionrt.runtime.pipeline import MotionPipeline
from motionrt.runtime.scheduler import Scheduler

CALLS = 10  # of one number
CAPTIONS = ("a red ball moves right", "a blue star moves up", "the circle moves down", "the ball moves left")
_TEXT = st.text(st.characters(exclude_characters="/", exclude_categories=()), max_size=8)  # no path out of the folder
_STRANGE: list[Any] = [
    object(), lambda *some: None, ..., NotImplemented, 1j, Decimal("NaN"), Fraction(1, 3), datetime(2026, 1, 1), 2**70,
    -(2**63), 10**400, float("nan"), float("inf"), 1e308, -0.0, "\ud800", "a\0b", "x" * 10_000, "../x", b"\xff", Path("gone"),
    Path("."), [[]], [None], (), {}, {1: 2}, {"a": object()}, range(5), {1, 2}, np.zeros((2, 2)), np.array(["x"]),
    np.array(None, object), np.float32("nan"), np.array(5), np.int64(3), np.bool_(True), np.zeros(0),
    np.datetime64("2026-01-01"), memoryview(b"x"), bytearray(b"x"),
]  # fmt: skip
_PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 70), st.floats(), _TEXT, st.binary(max_size=8),
    st.sampled_from(_STRANGE),
)  # fmt: skip
JUNK = st.one_of(_PLAIN, st.lists(_PLAIN, max_size=3), st.dictionaries(_TEXT, _PLAIN, max_size=2))


def near(value: Any) -> st.SearchStrategy[Any]:
    """Something strange, or something that is almost `value`."""
    some: list[st.SearchStrategy[Any]] = [JUNK]
    if isinstance(value, np.ndarray):
        some.append(
            st.sampled_from([
                value.astype(np.float64), value.astype(np.int64), value[..., None], value[:0], value * np.nan,
                value.astype(object), value.astype("S4"), value.tolist(), np.full(value.shape, np.inf, np.float32),
                value[::-1], value.astype(np.complex64),
            ])  # fmt: skip
        )
    elif isinstance(value, (list, tuple)) and value:
        some.append(st.lists(st.one_of(st.sampled_from(value), JUNK), max_size=4))
        some.append(JUNK.map(lambda junk: [*value, junk]))
    elif isinstance(value, Mapping) and value:
        some.append(st.dictionaries(st.one_of(st.sampled_from(list(value)), _TEXT), JUNK, max_size=3))
        some.append(st.tuples(st.sampled_from(list(value)), JUNK).map(lambda pair: {**value, pair[0]: pair[1]}))
    return st.one_of(*some)


class World:
    """A bundle, a memory that is read and one that is written, clips: what calls need. Everything is made in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.fake, self.folder = helper_module("fake_bundle"), folder
        inside = folder / "a" / "b" / "c"  # where "../x" is still inside
        inside.mkdir(parents=True)
        os.chdir(inside)
        self.path: Path = self.fake.write_bundle(folder / "bundle")
        self.bundle, self.backend = Bundle.open(self.path), OnnxRuntimeBackend(1)
        self.encoders = ClipEncoders.from_bundle(self.bundle, self.backend)
        self.clips = [folder / f"{number}.mp4" for number in range(len(CAPTIONS))]
        for number, file in enumerate(self.clips):
            course = np.linspace(40 * number, 255 - 50 * number, self.fake.FRAMES).astype(np.uint8)
            write_video(file, np.broadcast_to(course[:, None, None, None], (self.fake.FRAMES, 32, 32, 3)), self.fake.FPS)
        self.memory, self.written = (self._filled(folder / name) for name in ("memory", "written"))
        self.pipeline = MotionPipeline(self.bundle, self.backend, self.memory)
        self.still = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
        self.wanted = self.answer()

    def _filled(self, path: Path) -> MotionMemory:
        memory = MotionMemory.for_bundle(path, self.bundle)
        index_clips(memory, self.encoders, [(file, text, None) for file, text in zip(self.clips, CAPTIONS, strict=True)])
        return memory

    def answer(self) -> bytes:
        return self.pipeline(self.still, CAPTIONS[0], seed=1).frames.tobytes()

    def clip(self, **changes: Any) -> Clip:
        record = {part.name: np.ones(part.dims, np.float32) for part in self.written.layout.record}
        given: dict[str, Any] = {
            "caption": "a star", "source": "a.mp4", "start": 0.0, "duration": 1.0, "fps": 8.0, "source_sha256": "0" * 64,
            "embedding": np.ones(self.written.layout.embedding, np.float32), "record": record, "metadata": {"licence": "CC0"},
            "dataset": "mine",
        }  # fmt: skip
        return Clip(**(given | changes))


def calls(world: World) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each public function: how it is called by name, and arguments that it takes."""
    memory, written, pipeline, bundle = world.memory, world.written, world.pipeline, world.bundle
    vector = np.ones(memory.layout.embedding, np.float32)
    search = {option.name: option.default for option in fields(Search)} | {"where": {"dataset": ["", "mine"]}}
    request = {
        "seed": 1, "solver": "ddim", "steps": 2, "references": [1, 2],
        "given": {"motion": np.zeros((1, *world.fake.TOKENS), np.float32)},
    }  # fmt: skip
    inputs = {"image": world.still, "prompt": CAPTIONS[0], "negative_prompt": "", "motion_scale": 1.0, "guidance": 2.0}
    clip = {field.name: getattr(world.clip(), field.name) for field in fields(Clip)}
    size = {"height": 12, "width": 16}
    part = memory.layout.record[0]
    new = world.folder / "new"
    number = iter(range(10**9))

    def fresh() -> Path:
        return new / str(next(number))

    def opened(made: Any) -> None:
        made.close()

    def started(**some: Any) -> Any:
        return pipeline.start(Request(**some))

    def searched(k: Any, embedding: Any, **some: Any) -> Any:
        return memory.search(embedding, k, Search(**some))

    def set_of(memories: Any, weights: Any) -> Any:
        return MemorySet(memories, weights).search(vector, 2)

    def limited(**some: Any) -> Any:
        return read_clip(world.clips[0], 3, **size, fps=8, limits=Limits(**some))

    def indexed(**some: Any) -> Any:
        before = set(written.ids().tolist())
        try:
            return index_clips(**{"memory": written, "encoders": world.encoders, **some})
        finally:  # what is there is not encoded again
            written.remove(set(written.ids().tolist()) - before)

    def listed(**some: Any) -> Any:
        return list(islice(open_sources(**some).items(), 100))

    found: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "MotionPipeline.from_bundle": (
            lambda **some: opened(MotionPipeline.from_bundle(**some)),
            {"path": world.path, "memory": memory.path, "backend": "onnxruntime", "threads": 1, "device": "cpu",
             "precision": "float32", "low_memory": False},
        ),
        "MotionPipeline.__call__": (pipeline, {**inputs, **request, **search, "callback": None}),
        "MotionPipeline.request": (pipeline.request, {**inputs, **request}),
        "MotionPipeline.start": (pipeline.start, {"request": pipeline.request(**inputs)}),
        "MotionPipeline.result": (pipeline.result, {"job": None}),
        "MotionPipeline.batch": (pipeline.batch, {"requests": [pipeline.request(**inputs, steps=1)], "on_result": None}),
        "MotionPipeline.load": (pipeline.load, {"workers": 1}),
        "MotionPipeline.graph": (pipeline.graph, {"name": "step"}),
        "MotionPipeline.embed": (pipeline.embed, {"text": CAPTIONS[1]}),
        "Request": (started, {"inputs": inputs, **request, "search": Search()}),
        "Search": (searched, {"embedding": vector, "k": 2, **search}),
        "Scheduler": (Scheduler, {"pipeline": pipeline, "batch": 2, "inexact": False, "gain": 1.1}),
        "Scheduler.add": (Scheduler(pipeline).add, {"job": None}),
        "Scheduler.abort": (Scheduler(pipeline).abort, {"job": None}),
        "MotionMemory.create": (
            lambda path=None, **some: opened(MotionMemory.create(fresh() if path is new else path, **some)),
            {"path": new, "embedding": 8, "record": memory.layout.record, "fingerprint": "a" * 64, "tokens": "int8",
             "on_demand": False, "index_threshold": 100},
        ),
        "MotionMemory.for_bundle": (
            lambda path=None, **some: opened(MotionMemory.for_bundle(fresh() if path is new else path, **some)),
            {"path": new, "bundle": bundle, "tokens": None, "on_demand": True},
        ),
        "MotionMemory.open": (
            lambda **some: opened(MotionMemory.open(**some)), {"path": memory.path, "readonly": True, "index_threshold": 100}
        ),
        "MotionMemory.import_file": (
            lambda **some: opened(MotionMemory.import_file(**some)), {"file": memory.path / "memory.sqlite", "path": new / "in"}
        ),
        "MotionMemory.export_file": (memory.export_file, {"path": new / "out.mrtm"}),
        "MotionMemory.check": (memory.check, {"fingerprint": memory.layout.fingerprint}),
        "MotionMemory.contains": (memory.contains, {"source_sha256": "0" * 64, "start": 0.0, "caption": CAPTIONS[0]}),
        "MotionMemory.add": (lambda **some: written.add([Clip(**some)]), clip),
        "MotionMemory.add entries": (written.add, {"entries": [world.clip()]}),
        "MotionMemory.remove": (written.remove, {"ids": [10**6]}),
        "MotionMemory.ids": (memory.ids, {"where": {"dataset": ""}}),
        "MotionMemory.get": (memory.get, {"ids": [1, 2]}),
        "MotionMemory.search": (memory.search, {"embedding": vector, "k": 2, "search": Search()}),
        "MotionMemory.search_record": (
            memory.search_record, {"part": part.name, "array": np.ones(part.dims, np.float32), "k": 2, "search": Search()}
        ),
        "MotionMemory.refresh": (written.refresh, {"threads": 1}),
        "MotionMemory.compact": (written.compact, {"threads": 1}),
        "MemorySet": (set_of, {"memories": {"a": memory, "b": written}, "weights": {"a": 2.0}}),
        "MemorySet.get": (MemorySet({"a": memory}).get, {"ids": [("a", 1), ("a", 2)]}),
        "MemorySet.search": (MemorySet({"a": memory}).search, {"embedding": vector, "k": 2, "search": Search()}),
        "read_image": (read_image, {"source": world.still, **size, "limits": LIMITS}),
        "read_clip": (
            read_clip, {"path": world.clips[0], "frames": 3, **size, "fps": 8.0, "start": 0.0, "limits": LIMITS}
        ),
        "decode_clip": (
            decode_clip, {"path": world.clips[0], "frames": 3, **size, "fps": 8.0, "start": 0.0, "end": 0.3, "limits": LIMITS}
        ),
        "Limits": (limited, {"pixels": 10**6, "frames": 10, "seconds": 10.0, "memory": 10**8}),
        "span_start": (
            span_start, {"path": world.clips[0], "span": "centre", "seconds": 0.2, "start": 0.0, "end": 0.3, "limits": LIMITS}
        ),
        "write_video": (write_video, {"path": Path("w.gif"), "frames": world.still[None].repeat(2, 0), "fps": 8}),
        "index_clips": (
            indexed,
            {"memory": written, "encoders": world.encoders, "items": [(world.clips[0], "the star", 0.0)], "progress": None,
             "span": "start", "reembed": False, "describe": False},
        ),
        "index_clips item": (
            lambda **some: indexed(items=[Item(**some)]),
            {"video": world.clips[0], "caption": "the star", "start": 0.0, "end": 0.4, "dataset": "", "metadata": {"a": "b"},
             "embedding": None, "problem": ""},
        ),
        "open_sources": (
            listed, {"paths": [world.clips[0]], "caption": "a", "captions": None, "start": 0.0, "videos": None, "dataset": "a"}
        ),
        "Bundle.open": (Bundle.open, {"path": world.path}),
        "Bundle.schedule": (bundle.schedule, {"loop": "video", "name": "ddim", "steps": 2}),
        "Bundle.tokenize": (bundle.tokenize, {"name": "text", "text": "a star", "length": 6}),
        "choose": (choose, {"bundle": bundle, "device": "cpu", "threads": 1, "precision": "float32", "graphs": ["step"]}),
        "open_backend": (
            lambda **some: open_backend(RunOptions(**some)),
            {"backend": "onnxruntime", "device": "cpu", "threads": 1, "allow_onnxruntime": False, "allow_cpu": False,
             "precision": "float32", "engines": None},
        ),
        "open_backend options": (open_backend, {"options": RunOptions()}),
    }  # fmt: skip
    return found


def attempts(kind: str, folder: Path) -> Attempt:
    """Calls of one public function, CALLS for each number."""
    world = World(folder)
    function, valid = calls(world)[kind]

    def attempt(number: int) -> Iterator[Outcome]:
        outcomes: list[Outcome] = []

        @seed(number)
        @settings(
            max_examples=CALLS, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
        )
        @given(_changed(valid))
        def hostile(changed: dict[str, Any]) -> None:
            outcomes.append(outcome(partial(function, **{**valid, **changed}), changed))

        hostile()
        if world.answer() != world.wanted:
            outcomes.append(("wrong", "the pipeline answers differently afterwards"))
        if problems := [*world.memory.verify(), *world.written.verify()]:
            outcomes.append(("wrong", f"a memory afterwards: {problems[0]}"))
        yield from outcomes

    return attempt


def _changed(valid: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.lists(st.sampled_from(sorted(valid)), min_size=1, max_size=2, unique=True)
    return names.flatmap(lambda some: st.fixed_dictionaries({name: near(valid[name]) for name in some}))


def outcome(call: Callable[[], Any], changed: object) -> Outcome:
    """What one call comes to."""
    try:
        call()
    except MotionRTError as error:
        return ("error", "") if str(error).strip() else ("raw", f"a {type(error).__name__} that says nothing")
    except Exception as error:
        return "raw", f"{type(error).__name__}: {error} of {changed!r}"[:600]
    return "answer", ""


def names() -> list[str]:
    """The functions that are called."""
    from tempfile import TemporaryDirectory

    here = Path.cwd()
    with TemporaryDirectory() as folder:
        try:
            return list(calls(World(Path(folder))))
        finally:
            os.chdir(here)
