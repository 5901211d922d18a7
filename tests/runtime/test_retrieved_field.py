"""A motion field that is found in a memory, and what it is used for: in a system of tests/helpers, by the command and from
Python."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.manifest import parse_manifest
from motionrt.runtime.errors import BundleError, InputError
from motionrt.runtime.indexing.clips import ClipEncoders, index_clips
from motionrt.runtime.indexing.sources import open_sources
from motionrt.runtime.media import flow
from motionrt.runtime.media.video import write_video
from motionrt.runtime.memory.memory import MotionMemory
from motionrt.runtime.pipeline import MotionPipeline

SIZE, TARGETS = 32, 3
Run = Callable[..., tuple[int, str, str]]
Field = NDArray[np.float32]


@pytest.fixture(scope="module")
def still() -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def sliding(right: bool) -> tuple[NDArray[np.uint8], Field]:
    """A square that goes 4 px a picture over noise, and its field."""
    rng = np.random.default_rng(2)
    frames = np.repeat(rng.integers(0, 60, (1, SIZE, SIZE, 3), np.uint8), TARGETS + 1, 0)
    square, field = rng.integers(120, 256, (12, 12, 3), np.uint8), np.zeros((TARGETS, 2, SIZE, SIZE), np.float32)
    for t in range(TARGETS + 1):
        left = 4 + 4 * t if right else 16 - 4 * t
        frames[t, 10:22, left : left + 12] = square
        if t:
            begin = 4 if right else 16
            field[t - 1, 0, 10:22, begin : begin + 12] = 4 * t if right else -4 * t
    return frames, field


@pytest.fixture(scope="module")
def memory(recalling_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips with captions and fields beside them."""
    folder = tmp_path_factory.mktemp("clips")
    for name, caption in (("right", "a red star moves right"), ("left", "a blue wave waves left")):
        frames, field = sliding(name == "right")
        write_video(folder / f"{name}.mp4", frames, 4)
        np.save(folder / f"{name}.npy", field)
        (folder / f"{name}.txt").write_text(caption)
    source = open_sources([folder])
    assert source.left_out == []
    bundle, made = Bundle.open(recalling_bundle), folder / "memory"
    with MotionMemory.for_bundle(made, bundle) as memory:
        assert index_clips(memory, ClipEncoders.from_bundle(bundle, OnnxRuntimeBackend(1)), source.items()).added == 2
    return made


@pytest.fixture(scope="module")
def pipeline(recalling_bundle: Path, memory: Path) -> MotionPipeline:
    return MotionPipeline.from_bundle(recalling_bundle, memory, threads=1)


PROMPT = "a red star moves right"


def ran(pipeline: MotionPipeline, still: Any, **inputs: Any) -> tuple[list[str], Any]:
    job = pipeline.start(pipeline.request(still, PROMPT, **inputs))
    planned = job.calls()
    calls = [call.graph for call in job]
    result = pipeline.result(job)
    if result.fallback is None:
        assert {name: calls.count(name) for name in calls} == planned
    return calls, result


def test_a_found_field_is_the_field_a_start_or_hints(pipeline: MotionPipeline, still: NDArray[np.uint8]) -> None:
    field = sliding(True)[1]
    plain = ["step_free", "step_free", "held", "warp", "paint", "paint"]
    calls, none = ran(pipeline, still)
    assert calls == plain and none.references == [] and none.field is not None and not none.field.any()

    calls, direct = ran(pipeline, still, retrieval="direct")
    assert calls == ["text_query", "found", "held", "warp", "paint", "paint"]
    assert direct.references[0].caption == PROMPT and direct.fallback is None and direct.notes == ()
    np.testing.assert_array_equal(direct.field[1:], field)

    # Half of what is found is left by the only step, and half of the noise, which the seed makes.
    calls, late = ran(pipeline, still, retrieval="start", seed=3)
    assert calls == ["text_query", "found", "late", "step_free", "held", "warp", "paint", "paint"]
    noise = late.field[1:] - field / 2
    assert abs(noise.std() - 0.125) < 0.01 and abs(noise.mean()) < 0.01
    np.testing.assert_array_equal(ran(pipeline, still, retrieval="start", seed=3)[1].frames, late.frames)
    assert not np.array_equal(ran(pipeline, still, retrieval="start", seed=4)[1].field, late.field)

    # Known where it moves, beside what is drawn; pushed elsewhere.
    calls, hints = ran(pipeline, still, retrieval="hints", strength=2, drag=["28,4 28,8"])
    assert calls == ["text_query", "found", "drawn", "hint", "step_drawn", "step_drawn", *plain[2:]]
    moves = field[-1, 0] != 0
    np.testing.assert_array_equal(hints.field[3, 0][moves], 12)
    np.testing.assert_array_equal(hints.field[3, :, 4, 28], [0, 4])
    moves[0:8, 24:32] = True
    np.testing.assert_array_equal(hints.field[3, 0][~moves], 2)
    assert [call for call in ran(pipeline, still, retrieval="hints")[0] if "step" in call] == ["step_drawn"] * 2


def test_without_a_clip_the_field_is_made_and_the_result_says_so(
    pipeline: MotionPipeline, recalling_bundle: Path, still: NDArray[np.uint8]
) -> None:
    made = pipeline(still, PROMPT, strength=2, seed=1)
    for way in ("direct", "start", "hints"):
        calls, result = ran(pipeline, still, retrieval=way, strength=2, seed=1, minimum_score=1.0, where={"dataset": "no"})
        assert calls == ["text_query", "step_free", "step_free", "held", "warp", "paint", "paint"]
        why = "no motion: no clip of the motion memory passes minimum_score 1.0, where {'dataset': 'no'}"
        assert result.fallback == f"{why}; retrieval is none instead"
        np.testing.assert_array_equal(result.frames, made.frames)
    alone = MotionPipeline.from_bundle(recalling_bundle, threads=1)
    result = alone(still, PROMPT, retrieval="start", strength=2, seed=1)
    assert result.fallback == "no motion: there is no motion memory to find clips in; retrieval is none instead"
    np.testing.assert_array_equal(result.frames, made.frames)
    with pytest.raises(InputError, match="references is 0; this bundle takes 1 to 2"):
        pipeline(still, PROMPT, retrieval="start", references=0)


def test_what_is_asked_for_in_vain_is_said(pipeline: MotionPipeline, still: NDArray[np.uint8]) -> None:
    with pytest.raises(InputError, match="retrieval is 'dierct'; allowed are none, direct, start, hints"):
        pipeline(still, retrieval="dierct")
    with pytest.raises(InputError, match="with retrieval none nothing reads them. Use retrieval direct or start or hints"):
        pipeline(still, references=1)
    with pytest.raises(InputError, match="strength"):
        pipeline(still, retrieval="start", strength=99)
    said = "has no effect: what would follow it is not run, because something else takes its place."
    field = np.zeros((TARGETS, 2, SIZE, SIZE), np.float32)
    for name, value in (("drag", ["8,8"]), ("field", field)):
        assert pipeline(still, PROMPT, retrieval="direct", **{name: value}).notes == (f"{name} {said}",)
    assert pipeline(still, PROMPT, drag=["8,8"], field=field).notes == (f"drag {said}",)
    assert pipeline(still, PROMPT, retrieval="start", steps={"flow": 2}).notes == (
        "loop 'flow' runs 1 steps of late: what is chosen needs these.",
    )
    # A field that is given leaves nothing to find.
    result = pipeline(still, PROMPT, retrieval="start", field=field)
    assert result.references == [] and result.fallback is None and not result.field.any()


def test_the_command_takes_the_way(
    run: Run, recalling_bundle: Path, memory: Path, pipeline: MotionPipeline, still: NDArray[np.uint8], tmp_path: Path
) -> None:
    Image.fromarray(still).save(tmp_path / "still.png")
    command = ("generate", "-b", recalling_bundle, "-i", tmp_path / "still.png", "--prompt", "a blue wave waves left")
    field = tmp_path / "field.npy"
    status, said, _ = run(*command, "-m", memory, "--retrieval", "direct", "--save-field", field, "-o", tmp_path / "a.png")
    assert status == 0 and "a blue wave waves left" in said
    np.testing.assert_array_equal(np.load(field)[1:], sliding(False)[1])
    status, said, _ = run(*command, "--retrieval", "hints", "-o", tmp_path / "b.png")
    assert status == 0 and "there is no motion memory to find clips in; retrieval is none instead" in said
    status, _, err = run(*command, "--retrieval", "all", "-o", tmp_path / "c.png")
    assert status == 2 and "retrieval is 'all'; allowed are none, direct, start, hints." in err
    words = " ".join(run("generate", "-b", recalling_bundle, "--help")[1].split())
    assert "--retrieval none|direct|start|hints" in words
    assert "none or direct or start or hints; none if not given, and none without a clip" in run("inspect", recalling_bundle)[1]


def test_a_field_of_another_size_is_scaled_and_a_clip_by_hand_has_one(
    recalling_bundle: Path, still: NDArray[np.uint8], tmp_path: Path
) -> None:
    frames, field = sliding(True)
    write_video(tmp_path / "wave.mp4", frames, 4)
    np.save(tmp_path / "wave.npy", 2 * field.repeat(2, 2).repeat(2, 3))
    alone = MotionPipeline.from_bundle(recalling_bundle, threads=1)
    result = alone(still, PROMPT, retrieval="direct", references=[tmp_path / "wave.mp4"])
    np.testing.assert_allclose(result.field[1:, :, 12:20, 6:14], field[:, :, 12:20, 6:14], atol=1e-3)
    np.save(tmp_path / "wave.npy", field[:2])
    says = r"the field .*wave.npy is float32 \[2, 2, 32, 32\]; allowed are floats \[3 or 4, 2, h, w\]"
    with pytest.raises(InputError, match=says):
        alone(still, PROMPT, retrieval="direct", references=[tmp_path / "wave.mp4"])


def test_where_no_field_can_come_from_both_ways_to_one_are_named(
    run: Run, recalling_bundle: Path, still: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow.importlib.util, "find_spec", lambda name: None)
    write_video(tmp_path / "wave.mp4", sliding(True)[0], 4)
    alone = MotionPipeline.from_bundle(recalling_bundle, threads=1)
    says = r"has no motion field. Put it beside the clip as wave.npy .*; or install OpenCV, .*: `pip install motionrt\[flow\]`"
    with pytest.raises(InputError, match=says):
        alone.start(alone.request(still, PROMPT, retrieval="direct", references=[tmp_path / "wave.mp4"]))
    with pytest.raises(InputError, match="Give the field itself, an .npy file of floats; or install OpenCV"):
        alone(still, PROMPT, field=tmp_path / "wave.mp4")
    memory = tmp_path / "memory"
    assert run("memory", "create", memory, "--bundle", recalling_bundle)[0] == 0
    status, said, err = run("memory", "add", memory, tmp_path / "wave.mp4", "--bundle", recalling_bundle, "--caption", "a")
    assert status and "install OpenCV" in said + err and "beside the clip as wave.npy" in said + err


def test_flow_finds_where_things_go_and_drives_a_video(
    recalling_bundle: Path, still: NDArray[np.uint8], tmp_path: Path
) -> None:
    pytest.importorskip("cv2", reason="OpenCV, the extra `flow`, is not installed")
    frames, field = sliding(True)
    found = flow.dense_flow(np.float32(frames.transpose(0, 3, 1, 2)) / np.float32(127.5) - 1)
    assert found.shape == field.shape and found.dtype == np.float32
    inside = np.s_[:, :, 12:20, 6:14]
    assert np.abs(found[inside] - field[inside]).max() < 1 and np.abs(found[:, :, :4]).mean() < 0.2
    write_video(tmp_path / "wave.mp4", frames, 4)
    alone = MotionPipeline.from_bundle(recalling_bundle, threads=1)
    for inputs in ({"field": tmp_path / "wave.mp4"}, {"retrieval": "direct", "references": [tmp_path / "wave.mp4"]}):
        result = alone(still, PROMPT, **inputs)
        assert np.abs(result.field[1:][inside] - field[inside]).max() < 1.5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(default="all"), "'all' is chosen and is none of the options none, direct, start, hints"),
        (lambda c: c["options"]["direct"]["reads"].update(other={}), "'direct' of input 'retrieval' changes how `other`"),
        (lambda c: c["options"]["start"]["schedules"].update(flow=["late", 2]), "runs 2 steps of 'late' in loop 'flow'"),
        (lambda c: c["options"]["hints"].update(drawn=["prompt"]), "counts 'prompt' as drawn"),
        (lambda c: c["options"]["direct"]["reads"]["moved"].update(field="far"), "'held' of the plan reads `far`"),
        (lambda c: c.update(absent="hints"), "reads a reference also where there is none"),
    ],
    ids=["default", "graph", "steps", "drawn", "value", "absent"],
)
def test_a_choice_that_does_not_fit_is_refused(recalling_bundle: Path, change: Callable[[Any], object], says: str) -> None:
    raw = copy.deepcopy(json.loads((recalling_bundle / "bundle.json").read_text()))
    change(raw["inputs"]["retrieval"])
    with pytest.raises(BundleError, match=says):
        parse_manifest(raw)
