from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray
from PIL import Image

from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.backends.seam import Checked, Executor
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.manifest import File
from motionrt.runtime.errors import BackendError, BatchError, Cancelled, InputError, MediaError, MemoryStoreError, MotionRTError
from motionrt.runtime.indexing.clips import index_clips
from motionrt.runtime.indexing.encoders import ClipEncoders
from motionrt.runtime.job import to_frames
from motionrt.runtime.media.limits import Limits
from motionrt.runtime.memory.memory import Clip, MotionMemory, Reference
from motionrt.runtime.memory.search import Search
from motionrt.runtime.memory.set import MemorySet
from motionrt.runtime.pipeline import MotionPipeline, Request

GRAPHS = ("text", "appearance", "cama", "encode", "request", "schedule", "step", "decode")
Edit = Callable[..., Path]
Still = NDArray[np.uint8]


@pytest.fixture(scope="module")
def pipeline(fake_bundle: Path, fake_memory: Path) -> Iterator[MotionPipeline]:
    with MotionPipeline.from_bundle(fake_bundle, fake_memory, threads=1) as opened:
        yield opened


def reference(seed: int, tokens: tuple[int, int] = (2, 4)) -> Reference:
    motion, appearance = np.random.default_rng(seed).standard_normal((2, *tokens)).astype(np.float32)
    return Reference(seed, 0.5, "by hand", "nowhere", 0.0, 1.0, {"motion": motion, "appearance": appearance})


def test_call_gives_frames_references_and_times(pipeline: MotionPipeline, still: Still) -> None:
    result = pipeline(still, "a red ball moves right", seed=3)
    assert result.frames.shape == (3, 16, 16, 3) and result.frames.dtype == np.uint8
    assert result.frames.flags.c_contiguous
    assert len(result.references) == 3  # the bundle's default
    assert result.references[0].caption == "a red ball moves right"
    scores = [found.score for found in result.references]
    assert scores == sorted(scores, reverse=True) and scores[0] == pytest.approx(1, abs=1e-3)
    assert {"inputs", "text_query", "search", *GRAPHS} == set(result.seconds)
    assert all(value >= 0 for value in result.seconds.values())
    assert len(result.step_seconds) == 4 and result.seconds["step"] == pytest.approx(sum(result.step_seconds))
    assert (result.seed, result.fps) == (3, 8)


def test_call_equals_the_unrewritten_step(fake_bundle: Path, fake_memory: Path, edit_bundle: Edit, still: Still) -> None:
    """The same request through `step_plain`, all steps, with the stochastic solver: the frames agree."""
    path = edit_bundle(lambda manifest: manifest["loops"]["video"].update(graphs=["step_plain"], tables=[]))
    options: dict[str, Any] = {"seed": 5, "solver": "dpm", "steps": 6}
    with MotionPipeline.from_bundle(path, fake_memory, threads=1) as plain:
        wanted = plain(still, "a red ball", **options)
    with MotionPipeline.from_bundle(fake_bundle, fake_memory, threads=1) as rewritten:
        got = rewritten(still, "a red ball", **options)
    assert np.abs(got.frames.astype(int) - wanted.frames).max() <= 1
    assert {"schedule", "step"} <= set(got.seconds) and not {"schedule", "step"} & set(wanted.seconds)


@pytest.mark.parametrize("solver, steps", [("ddim", 1), ("ddim", 10), ("dpm", 2)], ids=str)
def test_same_seed_same_frames_alone_or_in_a_batch(pipeline: MotionPipeline, still: Still, solver: str, steps: int) -> None:
    requests = [Request({"image": still, "prompt": "the star"}, seed, solver, steps) for seed in (7, 8, 7)]
    batch = pipeline.batch(requests)
    alone = pipeline(still, "the star", seed=7, solver=solver, steps=steps)
    np.testing.assert_array_equal(batch[0].frames, alone.frames)
    np.testing.assert_array_equal(batch[2].frames, alone.frames)
    assert not np.array_equal(batch[1].frames, alone.frames)


def test_motion_scale_0_is_the_base_model(pipeline: MotionPipeline, fake_bundle: Path, still: Still) -> None:
    """Whatever the memory holds, and without any memory."""
    with_memory = pipeline(still, "a red ball", motion_scale=0)
    without = MotionPipeline.from_bundle(fake_bundle, threads=1)(still, "a red ball", motion_scale=0)
    np.testing.assert_array_equal(with_memory.frames, without.frames)
    assert with_memory.references == [] and "search" not in with_memory.seconds
    assert not np.array_equal(pipeline(still, "a red ball").frames, with_memory.frames)


def test_motion_follows_the_references(pipeline: MotionPipeline, still: Still) -> None:
    one, other = (pipeline(still, "a", references=[reference(seed)]).frames for seed in (1, 2))
    assert not np.array_equal(one, other)


def test_references_by_id_are_those_of_the_search(pipeline: MotionPipeline, still: Still) -> None:
    found = pipeline(still, "a red ball", references=2)
    again = pipeline(still, "a red ball", references=[item.id for item in found.references])
    np.testing.assert_array_equal(found.frames, again.frames)
    np.testing.assert_array_equal(found.frames, pipeline(still, "a red ball", references=found.references).frames)


def test_default_references_bend_to_a_small_memory(fake_bundle: Path, fake_memory: Path, still: Still, tmp_path: Path) -> None:
    bundle = Bundle.open(fake_bundle)
    with MotionMemory.for_bundle(tmp_path / "empty", bundle) as memory:
        pipeline = MotionPipeline.from_bundle(fake_bundle, memory, threads=1)
        with pytest.raises(MemoryStoreError, match="holds no clips"):
            pipeline(still, "a red ball")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"minimum_score": 1.0, "prompt": "and very"}, "passes minimum_score 1.0"),
        ({"where": {"dataset": "other"}}, "passes where {'dataset': 'other'}"),
        ({"minimum_score": 1.0, "prompt": "and very", "where": {"dataset": ""}, "references": 2}, "1.0, where {'dataset': ''}"),
    ],
    ids=["score", "where", "both"],
)
def test_without_a_clip_that_passes_it_is_the_base_model_and_says_so(
    pipeline: MotionPipeline, still: Still, change: dict[str, Any], words: str
) -> None:
    request = {"image": still, "prompt": "a red ball", **change}
    result = pipeline(**request)
    base = pipeline(still, request["prompt"], motion_scale=0)
    np.testing.assert_array_equal(result.frames, base.frames)
    assert result.references == [] and result.fallback is not None and words in result.fallback
    assert base.fallback is None and pipeline(still, "a red ball").fallback is None
    assert pipeline.batch([pipeline.request(**request)])[0].fallback == result.fallback


def test_a_minimum_score_leaves_the_clips_above_it(pipeline: MotionPipeline, still: Still) -> None:
    plain = {"words": 0, "agreement": 0}
    scores = [found.score for found in pipeline(still, "a red ball", references=4, **plain).references]
    for references in (None, 4):
        found = pipeline(still, "a red ball", references=references, minimum_score=scores[1], **plain).references
        assert [item.score for item in found] == scores[:2]


def test_requests_choose_among_clips_by_metadata_motion_and_diversity(fake_bundle: Path, still: Still, tmp_path: Path) -> None:
    bundle = Bundle.open(fake_bundle)
    with MotionMemory.for_bundle(tmp_path / "m", bundle) as memory:
        pipeline = MotionPipeline.from_bundle(fake_bundle, memory, threads=1)
        for number, prompt in enumerate(("a red ball", "a red ball", "a blue ball", "the star")):
            record = reference(number).record
            memory.add([Clip(prompt, "s", number, 1, 8, "0", pipeline.embed(prompt), record, {}, "ab"[number % 2])])

        def ids(**keywords: Any) -> list[int]:
            return [found.id for found in pipeline(still, "a red ball", references=2, **keywords).references]

        record = memory.get([1])[0].record
        memory.remove([2])  # the next one moves as the first does
        memory.add([Clip("a red ball", "s", 9, 1, 8, "0", pipeline.embed("a red ball"), record, {}, "b")])
        assert ids() == [1, 5] and ids(distinct=0.99) == [1, 3] and ids(diversity=0.9)[0] == 1 != ids(diversity=0.9)[1] != 5
        assert ids(where={"dataset": "b"}) == [5, 4]
        assert len(pipeline(still, "a red ball", where={"dataset": "b"}).references) == 2  # the default bends to what passes
        with pytest.raises(MemoryStoreError, match="2 of them with"):
            pipeline(still, "a red ball", references=3, where={"dataset": "b"})


def test_a_set_of_memories_is_a_memory(fake_bundle: Path, fake_memory: Path, still: Still, tmp_path: Path) -> None:
    shutil.copytree(fake_memory, tmp_path / "b")
    with MemorySet({"a": MotionMemory.open(fake_memory, True), "b": MotionMemory.open(tmp_path / "b")}, {"b": 2.0}) as both:
        with MotionPipeline.from_bundle(fake_bundle, both, threads=1) as pipeline:
            found = pipeline(still, "a red ball", references=5).references
            assert found[0].memory == "b" and {item.memory for item in found} == {"a", "b"}
            again = pipeline(still, "a red ball", references=both.get([(item.memory, item.id) for item in found]))
            assert [item.id for item in again.references] == [item.id for item in found]
            with pytest.raises(InputError, match="the memory is a set"):
                pipeline(still, "a red ball", references=[1])
        assert len(both) == 8  # still open


def test_records_on_demand_are_made_by_the_job_and_give_the_same_frames(
    pipeline: MotionPipeline, fake_bundle: Path, fake_clips: dict[str, Path], still: Still, tmp_path: Path
) -> None:
    """A clip whose record is not kept is cut again from its file: two calls more for each, and the same video."""
    bundle, encoders = pipeline.bundle, ClipEncoders.from_bundle(pipeline.bundle, pipeline.backend)
    with MotionMemory.for_bundle(tmp_path / "m", bundle, on_demand=True) as memory:
        index_clips(memory, encoders, [(file, caption, None) for caption, file in fake_clips.items()])
        with MotionPipeline.from_bundle(fake_bundle, memory, threads=1) as frugal:
            job = frugal.start(frugal.request(still, "a red ball", references=2, seed=4))
            calls = [call.graph for call in job]
            assert calls[:5] == ["text_query", "motion", "appearance", "motion", "appearance"]
            got = frugal.result(job)
            assert all(set(found.record) == {"motion", "appearance"} for found in got.references)
            again = frugal(still, "a red ball", references=memory.get([found.id for found in got.references]), seed=4)
    np.testing.assert_array_equal(got.frames, pipeline(still, "a red ball", references=2, seed=4).frames)
    np.testing.assert_array_equal(got.frames, again.frames)


def test_limits_of_decoding_hold_for_stills_and_for_clips_that_are_cut_again(
    fake_bundle: Path, fake_clips: dict[str, Path], still: Still, tmp_path: Path
) -> None:
    Image.fromarray(still).save(tmp_path / "still.png")
    pixels, bundle = still.shape[0] * still.shape[1], Bundle.open(fake_bundle)
    with pytest.raises(InputError, match="limits is 5; allowed is Limits"):
        MotionPipeline.from_bundle(fake_bundle, limits=5)  # type: ignore[arg-type]
    with MotionMemory.for_bundle(tmp_path / "m", bundle, on_demand=True) as memory:
        encoders = ClipEncoders.from_bundle(bundle, OnnxRuntimeBackend(1))
        items = [(file, caption, None) for caption, file in fake_clips.items()]
        report = index_clips(memory, encoders, items, limits=Limits(frames=1))
        assert [reason.count("--limit frames=") for _, reason in report.failed] == [1] * 4 and not len(memory)
        index_clips(memory, encoders, items)
        for limits, words in ((Limits(pixels=pixels - 1), "--limit pixels="), (Limits(frames=1), "clip0.mp4 must be")):
            with MotionPipeline.from_bundle(fake_bundle, memory, threads=1, limits=limits) as bounded:
                with pytest.raises(MediaError, match=words):
                    bounded(tmp_path / "still.png", "a red ball moves right", references=1)
        enough = Limits(pixels=max(pixels, 32 * 32))
        with MotionPipeline.from_bundle(fake_bundle, memory, threads=1, limits=enough) as bounded:
            assert bounded(tmp_path / "still.png", "a red ball moves right", references=1).references


@pytest.mark.parametrize("kind", ["path", "pillow", "array", "rgba", "grey", "tiny", "wide"])
def test_call_takes_any_image(pipeline: MotionPipeline, still: Still, tmp_path: Path, kind: str) -> None:
    image: Any = {
        "pillow": Image.fromarray(still),
        "array": still,
        "rgba": Image.fromarray(still).convert("RGBA"),
        "grey": still[..., 0],
        "tiny": still[:1, :1],
        "wide": np.zeros((2, 500, 3), np.uint8),
    }.get(kind)
    if kind == "path":
        image = tmp_path / "still.png"
        Image.fromarray(still).save(image)
    assert pipeline(image, "a").frames.shape == (3, 16, 16, 3)


def test_callback_counts_steps_and_can_stop(pipeline: MotionPipeline, still: Still) -> None:
    seen: list[tuple[int, int]] = []
    pipeline(still, "a", steps=3, callback=lambda step, steps: seen.append((step, steps)))  # None goes on
    assert seen == [(0, 3), (1, 3), (2, 3)]
    seen.clear()

    def stop(step: int, steps: int) -> bool:
        seen.append((step, steps))
        return step < 1

    with pytest.raises(Cancelled, match="after step 2 of 9"):
        pipeline(still, "a", steps=9, callback=stop)
    assert seen == [(0, 9), (1, 9)]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"prompt": "a " * 7}, InputError, "prompt is 7 tokens long"),
        ({"prompt": None}, InputError, "must be a string"),
        ({"negative_prompt": "a " * 7}, InputError, "prompt is 7 tokens long"),
        ({"image": "missing.png"}, MediaError, "missing.png"),
        ({"image": np.zeros((4, 4, 3), np.float32)}, InputError, "uint8"),
        ({"seed": -1}, InputError, "seed is -1"),
        ({"seed": 0.5}, InputError, "seed is 0.5"),
        ({"guidence": 2}, InputError, "'guidence' is nothing that bundle 'fake' takes; it takes image, prompt, neg"),
        ({"steps": {"vidoe": 2}}, InputError, "steps names the loop 'vidoe'; this bundle has video"),
        ({"given": {"token": 1}}, InputError, "`token` is given, and no graph of the plan of bundle 'fake' reads it"),
        ({"steps": 11}, InputError, "steps is 11; solver 'ddim' of this bundle takes 1 to 10"),
        ({"solver": "euler"}, InputError, "solver is 'euler'"),
        ({"guidance": float("nan")}, InputError, "guidance is nan"),
        ({"guidance": "2"}, InputError, "guidance is '2'"),
        ({"motion_scale": float("inf")}, InputError, "motion_scale is inf"),
        ({"motion_scale": True}, InputError, "motion_scale is True"),
        ({"references": 0}, InputError, "references is 0; this bundle takes 1 to 8"),
        ({"references": 9}, InputError, "references is 9"),
        ({"references": True}, InputError, "references is True"),
        ({"references": "best"}, InputError, "references is 'best'"),
        ({"references": 1.5}, InputError, "references is 1.5"),
        ({"references": []}, InputError, "references is 0"),
        ({"references": 5}, MemoryStoreError, "4 clips"),
        ({"references": [12345]}, MemoryStoreError, "12345"),
        ({"references": [reference(1, (3, 4))]}, InputError, r"whose motion is \(3, 4\); .* with motion \(2, 4\)"),
        ({"references": [reference(1), reference(2, (3, 4))]}, InputError, "whose motion is"),
        ({"references": [object()]}, InputError, "references holds"),
        ({"references": [True]}, InputError, "references holds True"),
        ({"references": [2**70]}, InputError, "ids of clips are whole numbers from 0 to"),
        ({"references": [-1]}, InputError, "references holds the id -1"),
        ({"references": 10**5000}, InputError, "references is a int that cannot be shown"),
        ({"references": b"12"}, InputError, "references is b'12'"),
        ({"seed": 10**5000}, InputError, "seed is a int that cannot be shown"),
        ({"steps": 4.0}, InputError, "steps is 4.0, no whole number; solver 'ddim'"),
        ({"steps": np.array([4, 4])}, InputError, "steps is array"),
        ({"steps": "4"}, InputError, "steps is '4'"),
        ({"solver": ["ddim"]}, InputError, r"solver is \['ddim'\]"),
        ({"guidance": 10**400}, InputError, "guidance is 1000.*; it must be a finite number, within float32"),
        ({"guidance": -(10**5000)}, InputError, "guidance is a int that cannot be shown"),
        ({"guidance": np.complex64(1)}, InputError, "guidance is np.complex64"),
        ({"guidance": 1e39}, InputError, "guidance is 1e\\+39; it must be a finite number, within float32"),
        ({"guidance": [1, 2, 3, 1e39]}, InputError, "guidance of step 4 is 1e\\+39"),
        ({"motion_scale": 10**400}, InputError, "motion_scale is 1000"),
        ({"image": Image.new("RGB", (0, 0))}, InputError, "image is 0x0 pixels; allowed is 1x1 or more"),
        ({"image": "https://example.com/a.png"}, InputError, "image is 'https://example.com/a.png'; nothing is fetched"),
        ({"image": [[0]]}, InputError, "image is a list; allowed is the path of a file, a Pillow image, or a uint8 array"),
        ({"search": None}, InputError, "search is None; it must be a Search"),
        ({"given": [1]}, InputError, r"given is \[1\]; it must be a Mapping"),
        ({"given": {"motion": 1}}, InputError, "`motion` is given as a int; allowed is float32"),
        ({"given": {"motion": np.zeros((1, 2), np.float32)}}, InputError, r"given as float32 \[1, 2\]; allowed is float32 \["),
        ({"callback": 3}, InputError, "callback is 3; it must be a function"),
        ({"minimum_score": 2}, InputError, "minimum_score is 2; allowed"),
        ({"where": {"dataset": 3}}, InputError, "where is"),
        ({"diversity": -1}, InputError, "diversity is -1"),
        ({"distinct": "no"}, InputError, "distinct is 'no'"),
    ],
)
def test_call_refuses(
    pipeline: MotionPipeline, still: Still, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pipeline(**{"image": still, "prompt": "a red ball", **change})


@pytest.mark.parametrize(
    "guidance, message",
    [
        ([2.0] * 3, "guidance has 3 numbers for 4 steps; give one number, or one for each step"),
        ([2.0] * 5, "guidance has 5 numbers for 4 steps"),
        ((), "guidance has 0 numbers for 4 steps"),
        (np.ones(3), "guidance has 3 numbers for 4 steps"),
        (np.ones((1, 4)), "guidance has 1 numbers for 4 steps"),
        (np.ones((4, 1)), r"guidance of step 1 is \[1.0\]; it must be a finite number"),
        ([1, 2, float("inf"), 4], "guidance of step 3 is inf; it must be a finite number"),
        ([1, None, 2, 3], "guidance of step 2 is None"),
        (np.array(np.nan), "guidance is nan; it must be a finite number"),
        (float("-inf"), "guidance is -inf"),
        ("2222", "guidance is '2222'"),
        ({1, 2, 3, 4}, "guidance is {1, 2, 3, 4}"),
    ],
    ids=repr,
)
def test_guidance_is_refused_before_any_work(
    fake_bundle: Path, watching: ModuleType, still: Still, guidance: Any, message: str
) -> None:
    def idle(name: str) -> None:
        raise AssertionError(f"graph {name} was loaded")

    pipeline = MotionPipeline.from_bundle(fake_bundle, backend=watching.Watching(on_load=idle))
    with pytest.raises(InputError, match=message):
        pipeline(still, "a", references=[reference(1)], guidance=guidance)
    good, bad = (pipeline.request(still, "a", references=[reference(1)], **more) for more in ({}, {"guidance": guidance}))
    with pytest.raises(BatchError, match=f"1 of 2 requests is refused, and none was run; request 2: {message}") as refused:
        pipeline.batch([good, bad])
    assert refused.value.results == [None, None] and list(refused.value.errors) == [1]


def test_a_batch_keeps_what_was_finished(fake_bundle: Path, watching: ModuleType, still: Still) -> None:
    """One request fails while it runs, of whatever kind its error is: the others' results come with it."""
    requests = 0

    def failing(name: str, inputs: Any, run: Any) -> Any:
        nonlocal requests
        requests += name == "decode"
        if name == "decode" and requests in (2, 3):
            raise (BackendError("the device is gone"), MemoryError())[requests - 2]
        return run(inputs)

    pipeline, kept = MotionPipeline.from_bundle(fake_bundle, backend=watching.Watching(failing)), dict[int, Any]()
    asked = [pipeline.request(still, "a", seed=seed, motion_scale=0) for seed in range(4)]
    with pytest.raises(BatchError, match="2 of 4 requests are without a result; request 2: the device is gone") as failed:
        pipeline.batch(asked, kept.__setitem__)
    first, *none, last = failed.value.results
    assert none == [None, None] and (first.seed, last.seed) == (0, 3) and kept == {0: first, 3: last}
    assert isinstance(failed.value.errors[1], BackendError)
    alone = MotionPipeline.from_bundle(fake_bundle, threads=1)(still, "a", seed=3, motion_scale=0)
    np.testing.assert_array_equal(last.frames, alone.frames)


def test_a_batch_names_all_that_are_refused(pipeline: MotionPipeline, still: Still) -> None:
    good = pipeline.request(still, "a")
    bad: Any = (still, "a")
    odd: Any = "star.png"
    with pytest.raises(BatchError, match="3 of 4 requests are refused, and none was run; request 2: seed is -1") as refused:
        pipeline.batch([good, Request(good.inputs, seed=-1), bad, Request(odd)])
    assert {place: str(error)[:20] for place, error in refused.value.errors.items()} == {
        1: "seed is -1; it must ", 2: "the request is a tup", 3: "inputs is 'star.png'",
    }  # fmt: skip
    assert pipeline.batch([]) == []


def test_the_process_may_change_its_folder(
    fake_bundle: Path, fake_memory: Path, still: Still, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was opened by relative paths stays open: graphs are loaded later, and weights beside them."""
    shutil.copytree(fake_bundle, tmp_path / "bundle")
    shutil.copytree(fake_memory, tmp_path / "memory")
    monkeypatch.chdir(tmp_path)
    with MotionPipeline.from_bundle("bundle", memory="memory", threads=1) as pipeline:
        monkeypatch.chdir("/")
        assert pipeline(still, "a red ball").references
        assert pipeline.bundle.path == tmp_path / "bundle" and pipeline.served()


def test_clips_on_demand_are_found_from_where_the_pipeline_was_opened(
    fake_bundle: Path, fake_clips: dict[str, Path], still: Still, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their memory was told relative paths, and keeps them."""
    bundle, caption = Bundle.open(fake_bundle), next(iter(fake_clips))
    shutil.copy(fake_clips[caption], tmp_path / "a.mp4")
    monkeypatch.chdir(tmp_path)
    with MotionMemory.for_bundle(tmp_path / "m", bundle, on_demand=True) as memory:
        index_clips(memory, ClipEncoders.from_bundle(bundle, OnnxRuntimeBackend(1)), [("a.mp4", caption, None)])
        with MotionPipeline.from_bundle(fake_bundle, memory, threads=1) as pipeline:
            monkeypatch.chdir("/")
            assert pipeline(still, caption, references=1).references[0].source == "a.mp4"


def test_numpys_false_stops_as_well(pipeline: MotionPipeline, still: Still) -> None:
    with pytest.raises(Cancelled):
        pipeline(still, "a", callback=lambda step, steps: np.bool_(False))
    assert pipeline(still, "a", callback=lambda step, steps: 0, references=np.int64(2)).frames.any()


def test_too_few_clips_are_said_before_any_work(
    fake_bundle: Path, fake_memory: Path, watching: ModuleType, still: Still, tmp_path: Path
) -> None:
    def idle(name: str) -> None:
        raise AssertionError(f"graph {name} was loaded")

    with MotionPipeline.from_bundle(fake_bundle, fake_memory, backend=watching.Watching(on_load=idle)) as pipeline:
        with pytest.raises(MemoryStoreError, match="holds 4 clips, and the request asks for 5 of them"):
            pipeline(still, "a", references=5)
    with MotionMemory.for_bundle(tmp_path / "empty", Bundle.open(fake_bundle)) as memory:
        with pytest.raises(MemoryStoreError, match="holds no clips"):
            MotionPipeline.from_bundle(fake_bundle, memory, backend=watching.Watching(on_load=idle))(still, "a")


def test_guidance_may_be_given_step_by_step(pipeline: MotionPipeline, still: Still) -> None:
    once = pipeline(still, "a", guidance=3).frames
    for same in ([3.0] * 4, (3, 3, 3, 3), np.full(4, 3), np.array(3.0), np.float16(3)):
        np.testing.assert_array_equal(pipeline(still, "a", guidance=same).frames, once)
    assert not np.array_equal(pipeline(still, "a", guidance=[3, 3, 3, 9]).frames, once)


def test_call_refuses_nan_tokens(pipeline: MotionPipeline, still: Still) -> None:
    bad = reference(1)
    bad.record["motion"][0, 0] = np.nan
    with pytest.raises(InputError, match="the motion of Reference.* in references has 1 NaN"):
        pipeline(still, "a", references=[bad])


def test_call_without_a_memory_says_what_to_do(fake_bundle: Path, still: Still) -> None:
    pipeline = MotionPipeline.from_bundle(fake_bundle, threads=1)
    for references in (None, 2, [1, 2]):
        with pytest.raises(InputError, match="has no motion memory"):
            pipeline(still, "a", references=references)
    assert pipeline(still, "a", references=[reference(1)]).references[0].caption == "by hand"


def test_from_bundle_refuses_a_memory_of_another_bundle(fake_memory: Path, edit_bundle: Edit) -> None:
    path = edit_bundle(lambda manifest: manifest["memory"].update(fingerprint="0" * 64))
    with pytest.raises(MemoryStoreError):
        MotionPipeline.from_bundle(path, fake_memory)


def test_from_bundle_refuses_a_missing_memory(fake_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(MemoryStoreError, match="no motion memory at"):
        MotionPipeline.from_bundle(fake_bundle, tmp_path / "none")


def test_from_bundle_leaves_a_memory_that_it_was_given_open(fake_bundle: Path, fake_memory: Path) -> None:
    with MotionMemory.open(fake_memory, readonly=True) as memory:
        with MotionPipeline.from_bundle(fake_bundle, memory):
            pass
        assert len(memory) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"path": None}, "the bundle is None; it must be the path"),
        ({"path": 3}, "the bundle is 3"),
        ({"path": b"bundle"}, "the bundle is b'bundle'"),
        ({"path": "a" * 5000}, "is not a directory"),
        ({"path": "a\0b"}, "is not a directory"),
        ({"memory": 3}, "memory is 3; it must be a directory"),
        ({"memory": ["memory"]}, r"memory is \['memory'\]"),
        ({"memory": "a" * 5000}, "there is no motion memory at .*aaa"),
        ({"backend": 3}, "backend is 3; it must be a name"),
    ],
    ids=lambda value: f"{value!r:.30}",
)
def test_from_bundle_refuses(fake_bundle: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MotionRTError, match=message):
        MotionPipeline.from_bundle(**{"path": fake_bundle, **arguments})


def test_batch_refuses_what_is_no_list_of_requests(pipeline: MotionPipeline) -> None:
    odd: Any = 3
    with pytest.raises(InputError, match="requests is 3"):
        pipeline.batch(odd)
    with pytest.raises(InputError, match="on_result is 3"):
        pipeline.batch([], odd)


def test_from_bundle_refuses_threads_beside_a_backend(fake_bundle: Path) -> None:
    with pytest.raises(InputError, match="threads is for the default backend"):
        MotionPipeline.from_bundle(fake_bundle, backend=OnnxRuntimeBackend(1), threads=2)


def test_from_bundle_runs_on_any_backend(fake_bundle: Path, watching: ModuleType, still: Still) -> None:
    """The pipeline sees only names and arrays, and runs each graph as often as the design says."""
    calls: dict[str, int] = {}

    def counted(name: str, inputs: Any, run: Any) -> Any:
        calls[name] = calls.get(name, 0) + 1
        return run(inputs)

    pipeline = MotionPipeline.from_bundle(fake_bundle, backend=watching.Watching(counted))
    for _ in range(2):
        pipeline(still, "a", references=[reference(1)], steps=6)
    assert calls == {
        **dict.fromkeys(("appearance", "cama", "encode", "request", "decode"), 2),
        "text": 4,
        "schedule": 1,
        "step": 12,
    }


def test_low_memory_holds_one_graph_at_a_time_and_gives_the_same(
    pipeline: MotionPipeline, watching: ModuleType, fake_bundle: Path, fake_memory: Path, still: Still
) -> None:
    alive: weakref.WeakSet[Checked] = weakref.WeakSet()
    loaded: list[str] = []

    class Frugal(watching.Watching):  # type: ignore[misc, name-defined]
        def load(self, bundle: Bundle, name: str) -> Checked:
            assert not alive, f"{name} is loaded beside another graph"
            loaded.append(name)
            graph: Checked = super().load(bundle, name)
            alive.add(graph)
            return graph

    want = pipeline(still, "a", seed=1)
    with MotionPipeline.from_bundle(fake_bundle, fake_memory, backend=Frugal(), low_memory=True) as frugal:
        frugal.warm()
        assert not loaded, "nothing of it would stay"
        for _ in range(2):
            loaded.clear()
            got = frugal(still, "a", seed=1)
            assert loaded.index("step") == len(loaded) - 2 and loaded[-1] == "decode"
    assert np.array_equal(got.frames, want.frames)


def test_tables_of_a_few_schedules_are_kept(pipeline: MotionPipeline, still: Still) -> None:
    for steps in range(1, 11):
        pipeline(still, "a", steps=steps, motion_scale=0)
    assert len(pipeline._kept) == 8


def test_a_job_is_one_call_after_the_other(pipeline: MotionPipeline, still: Still) -> None:
    job = pipeline.start(pipeline.request(still, "a red ball", seed=3, steps=3))
    calls = [(call.graph, call.loop, call.step) for call in job]
    assert [name for name, *_ in calls] == [
        "text_query", "text", "text", "appearance", "cama", "encode", "request", "schedule", "step", "step", "step", "decode",
    ]  # fmt: skip
    assert calls[-4:-1] == [("step", "video", step) for step in (1, 2, 3)]
    result = pipeline.result(job)
    np.testing.assert_array_equal(result.frames, pipeline(still, "a red ball", seed=3, steps=3).frames)


def test_a_job_that_is_closed_runs_nothing_more(pipeline: MotionPipeline, still: Still) -> None:
    job = pipeline.start(pipeline.request(still, "a red ball", steps=10))
    for call in job:
        if call.step == 4:
            job.close()
    assert len(job.step_seconds) == 4 and job.frames is None and job.values == {}
    with pytest.raises(Cancelled):
        pipeline.result(job)


def test_a_value_may_be_given_in_place_of_what_would_compute_it(pipeline: MotionPipeline, still: Still) -> None:
    job = pipeline.start(pipeline.request(still, "a red ball", seed=2))
    while job.call is not None and job.call.graph != "request":
        next(job)
    motion = job.values["motion"]
    whole = pipeline.result(job)
    given = pipeline(still, "a red ball", seed=2, given={"motion": motion})
    np.testing.assert_array_equal(given.frames, whole.frames)
    assert not {"cama", "appearance", "search", "text_query"} & set(given.seconds) and given.references == []


def test_an_input_that_is_missing_is_said(pipeline: MotionPipeline, still: Still) -> None:
    with pytest.raises(InputError, match="prompt is missing; bundle 'fake' needs it: What moves, and how."):
        pipeline(still)
    with pytest.raises(InputError, match="6 inputs are given; bundle 'fake' takes image, prompt"):
        pipeline(still, "a", "b", 1, 2, 3)
    with pytest.raises(InputError, match="image is given twice"):
        pipeline(still, "a", image=still)


def test_search_may_be_a_value(pipeline: MotionPipeline, still: Still) -> None:
    request = Request({"image": still, "prompt": "a red ball"}, references=4, search=Search(minimum_score=0.99))
    assert len(pipeline.batch([request])[0].references) < 4


def test_to_frames_rounds_clips_and_refuses_nan() -> None:
    video = np.array([-1.5, -1, 0, 1, 2], np.float32).reshape(1, 5, 1, 1, 1).repeat(3, axis=2)
    assert to_frames(video)[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(BackendError, match="NaN"):
        to_frames(np.full((1, 1, 3, 2, 2), np.nan, np.float32))


@pytest.mark.parametrize("module", ["motionrt.runtime", "motionrt.runtime.pipeline", "motionrt.runtime.cli.main"])
def test_import_pulls_in_no_framework(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print([m for m in ('torch', 'transformers', 'diffusers', 'onnx', 'motionrt.export') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_load_takes_several_graphs_at_once_and_large_ones_in_turn(
    fake_bundle: Path, fake_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From other threads only where the backend allows it, and never those whose weights lie beside them."""
    with MotionPipeline.from_bundle(fake_bundle, fake_memory, threads=1) as pipeline:
        large = replace(pipeline.bundle.graph("decode"), data=File("graphs/decode.safetensors", "0" * 64))
        graph = Bundle.graph
        monkeypatch.setattr(Bundle, "graph", lambda self, name: large if name == "decode" else graph(self, name))
        threads: dict[str, str] = {}

        class Nothing(Executor):
            library = "nothing"

            def execute(self, inputs: Any) -> dict[str, Any]:
                return {}

        class Noting:
            parallel_load = True

            label = precision = ""

            def load(self, bundle: Bundle, name: str) -> Checked:
                threads[name] = threading.current_thread().name
                return Checked(bundle.graphs[name], Nothing())

        pipeline.backend = Noting()
        pipeline.load(workers=2)
        main = threading.current_thread().name
        assert {name for name, thread in threads.items() if thread == main} == {"decode"}
        assert set(threads) == {"text_query", *(name for name in GRAPHS if name in pipeline.bundle.graphs)}
        seen = dict(threads)
        pipeline.load(workers=2)
        assert threads == seen
        for workers, parallel in ((1, True), (2, False)):
            pipeline._graphs.clear()
            Noting.parallel_load = parallel
            pipeline.load(workers=workers)
            assert set(threads.values()) == {main}


def test_load_of_a_damaged_graph_fails_as_it_does_alone(fake_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(fake_bundle, tmp_path / "bundle"))
    pipeline = MotionPipeline.from_bundle(path, threads=1)
    (path / "graphs" / "cama.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match="cannot load graph 'cama'"):
        pipeline.load(workers=2)


def test_warm_reaches_what_the_first_request_would_wait_for(fake_bundle: Path, fake_memory: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(fake_bundle)
    with MotionPipeline.from_bundle(fake_bundle, fake_memory, threads=1) as pipeline:
        searched: list[int] = []
        assert isinstance(pipeline.memory, MotionMemory)
        search = pipeline.memory.search
        pipeline.memory.search = lambda embedding, k: searched.append(k) or search(embedding, k)  # type: ignore
        pipeline.warm()
        assert searched == [1]
    with MotionMemory.for_bundle(tmp_path / "empty", bundle) as memory:
        MotionPipeline.from_bundle(fake_bundle, memory, threads=1).warm()  # an empty one is the request's to refuse
