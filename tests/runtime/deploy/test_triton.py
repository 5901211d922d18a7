"""The model repository for Triton, and its model on a stand-in for what Triton gives; test_tritonserver.py has the real one."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from by_path import load_by_path
from numpy.typing import NDArray
from PIL import Image

from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.deploy.tensors import inputs_of, request_of
from motionrt.runtime.deploy.triton import write_repository
from motionrt.runtime.deploy.triton_model import TritonPythonModel
from motionrt.runtime.errors import BundleError, InputError, MediaError, MemoryStoreError
from motionrt.runtime.pipeline import MotionPipeline

Run = Callable[..., tuple[int, str, str]]
DECLARED = re.compile(r'(input|output) \{ name: "(\w+)" data_type: TYPE_(\w+) dims: (\[.*?\])( optional: true)? \}')
HELPERS = Path(__file__).resolve().parents[2] / "helpers"


def text(value: str) -> NDArray[Any]:
    return np.array([value.encode()], np.object_)


# --- the repository


def test_config_declares_what_the_bundle_does(run: Run, fake_bundle: Path, fake_memory: Path, tmp_path: Path) -> None:
    status, out, err = run("deploy", "triton", "-b", fake_bundle, "-m", fake_memory, "-o", tmp_path, "--threads", 2)
    manifest = Bundle.open(fake_bundle).manifest
    model = tmp_path / manifest.name
    assert status == 0 and f"--model-repository={tmp_path}" in out, err
    config = (model / "config.pbtxt").read_text()
    declared = [found.groups() for found in DECLARED.finditer(config)]
    inputs = {name: (kind, json.loads(dims), bool(rest)) for what, name, kind, dims, rest in declared if what == "input"}
    assert set(manifest.inputs) < set(inputs)
    assert inputs["image"] == ("UINT8", [-1, -1, 3], True) and inputs["prompt"] == ("STRING", [1], False)
    assert inputs["seed"] == ("INT64", [1], True) and inputs["guidance"] == ("FP32", [-1], True)
    assert {name for what, name, *_ in declared if what == "output"} == {"stage", "progress", "frames", "video", "fps", "about"}
    assert "decoupled: true" in config and "instance_group { kind: KIND_CPU count: 1 }" in config
    assert f'key: "bundle" value {{ string_value: "{fake_bundle}" }}' in config
    assert r'{\"threads\": 2}' in config  # and nothing that was not asked for
    assert {path.name for path in (model / "warmup").iterdir()} == set(re.findall(r'input_data_file: "(\w+)"', config))
    assert (model / "warmup/prompt").read_bytes() == b"\x06\0\0\0motion"
    assert "triton_model import TritonPythonModel" in (model / "1/model.py").read_text()


def test_an_instance_is_made_for_each_device(fake_bundle: Path, tmp_path: Path) -> None:
    model, _ = write_repository(tmp_path, fake_bundle, devices=["cuda:0", "cuda:2"], instances=2)
    assert "instance_group { kind: KIND_GPU gpus: [0, 2] count: 2 }" in (model / "config.pbtxt").read_text()
    with pytest.raises(InputError, match=r"devices has 'cpu'; allowed are GPUs"):
        write_repository(tmp_path, fake_bundle, devices=["cpu"])


def test_a_copy_can_be_taken_elsewhere(fake_bundle: Path, fake_memory: Path, tmp_path: Path) -> None:
    model, _ = write_repository(tmp_path, fake_bundle, fake_memory, copied=True)
    config = (model / "config.pbtxt").read_text()
    assert str(fake_bundle) not in config and str(fake_memory) not in config
    with MotionPipeline.from_bundle(model / "bundle", model / "memory") as pipeline:
        assert pipeline.memory is not None and len(pipeline.memory) == 4


def test_it_is_written_whole_or_not_at_all(
    fake_bundle: Path, fake_memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = write_repository(tmp_path, fake_bundle)
    before = (model / "config.pbtxt").read_bytes()

    def full(*places: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(OSError, match="No space"):
        write_repository(tmp_path, fake_bundle, fake_memory, copied=True)
    assert list(tmp_path.iterdir()) == [model] and (model / "config.pbtxt").read_bytes() == before


def test_what_is_no_model_is_not_written_over(fake_bundle: Path, guided_memory: Path, tmp_path: Path) -> None:
    mine = tmp_path / Bundle.open(fake_bundle).manifest.name / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years")
    with pytest.raises(InputError, match=r"is no model of Triton\. Remove it, or give another -o"):
        write_repository(tmp_path, fake_bundle)
    assert mine.read_text() == "years"
    with pytest.raises(MemoryStoreError):  # made for another bundle: said here, not when Triton starts
        write_repository(tmp_path / "other", fake_bundle, guided_memory)
    assert not (tmp_path / "other").exists()


def test_a_bundle_for_which_no_request_can_be_made_up_says_so(run: Run, guided_bundle: Path, tmp_path: Path) -> None:
    status, out, err = run("deploy", "triton", "-b", guided_bundle, "-o", tmp_path)
    (model,) = tmp_path.iterdir()
    warm = "model_warmup" in (model / "config.pbtxt").read_text()
    assert status == 0 and warm == (model / "warmup").exists() == ("no warm-up request can be made up" not in out), err


def test_a_name_that_every_model_has_is_refused(edit_bundle: Callable[..., Path]) -> None:
    def rename(manifest: dict[str, Any]) -> None:
        manifest["inputs"]["output"] = {"kind": "number", "default": 0.0}

    edited = edit_bundle(rename)
    with pytest.raises(BundleError, match=r"has an input 'output', a name that"):
        inputs_of(Bundle.open(edited).manifest)


# --- tensors


@pytest.fixture(scope="module")
def drawn(drawn_bundle: Path) -> MotionPipeline:
    return MotionPipeline.from_bundle(drawn_bundle, threads=1)


def test_what_is_drawn_comes_as_tensors(drawn: MotionPipeline) -> None:
    brush = np.zeros((32, 32), np.uint8)
    given = {
        "image": np.zeros((1, 32, 32, 3), np.uint8), "drag": np.array([b"1,2 3,4", b"5,6"], np.object_), "brush": brush,
        "strength": np.float32([[2]]), "seed": np.int64([7]), "solver": text("even"), "output": text("mp4"),
    }  # fmt: skip
    request, output = request_of(drawn, given)
    assert output == "mp4" and request.seed == 7 and request.solver == "even"
    assert request.inputs["drag"] == ["1,2 3,4", "5,6"] and request.inputs["strength"] == 2.0
    assert request.inputs["image"].shape == (32, 32, 3) and request.inputs["brush"] is brush
    drawn.start(request_of(drawn, {"image": given["image"], "field": np.zeros((3, 2, 32, 32), np.float32)})[0])


@pytest.mark.parametrize("coded", [False, True], ids=["bytes", "base64"])
def test_a_picture_may_come_as_a_file(drawn: MotionPipeline, coded: bool) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()) if coded else buffer.getvalue()
    request, _ = request_of(drawn, {"image_file": np.array([data], np.object_)})
    assert request.inputs["image"].size == (20, 10)
    drawn.start(request)


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"image_file": text("/etc/passwd")}, MediaError, "image_file cannot be read as a picture"),
        ({"image_file": text("a"), "image": np.zeros((4, 4, 3), np.uint8)}, InputError, "image is given twice"),
        ({"prompt": np.array([b"\xff"], np.object_)}, InputError, "prompt is not in UTF-8"),
        ({"output": text("avi")}, InputError, "output is 'avi'; allowed are frames, mp4, base64"),
        ({"seed": np.zeros((0,), np.int64)}, InputError, "seed is empty"),
    ],
    ids=["path", "twice", "text", "output", "empty"],
)
def test_tensors_that_cannot_be_read_are_refused(
    drawn: MotionPipeline, given: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        request_of(drawn, given)


def test_a_search_is_narrowed_by_json_and_by_nothing_else(fake_bundle: Path) -> None:
    pipeline = MotionPipeline.from_bundle(fake_bundle, threads=1)
    request, _ = request_of(pipeline, {"search": text('{"minimum_score": 0.5}'), "references": np.int32([2])})
    assert request.search.minimum_score == 0.5 and request.references == 2
    for wrong in ("{", "[1]", '{"references": ["/etc/passwd"]}'):
        with pytest.raises(InputError, match="allowed is a JSON object with any of where"):
            request_of(pipeline, {"search": text(wrong)})


# --- the model


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The stand-in, under the name of what it stands for."""
    module = load_by_path(HELPERS / "fake_triton.py")
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    return module


@pytest.fixture
def model(triton: ModuleType, fake_bundle: Path, fake_memory: Path) -> Iterator[Any]:
    """The model, opened as Triton opens it."""
    places = {"bundle": str(fake_bundle), "memory": str(fake_memory), "options": '{"threads": 1}'}
    config = {"parameters": {name: {"string_value": value} for name, value in places.items()}}
    made = TritonPythonModel()
    kind = {"model_instance_kind": "CPU", "model_instance_device_id": "0"}
    made.initialize({"model_config": json.dumps(config), "model_repository": "/nowhere", **kind})
    yield made
    made.finalize()


def test_progress_comes_before_the_frames_of_the_pipeline(
    model: Any, triton: ModuleType, still: NDArray[np.uint8], fake_bundle: Path, fake_memory: Path
) -> None:
    given = {"image": still, "prompt": text("a red ball"), "seed": np.int64([3])}
    asked, film = triton.Request(given), triton.Request(given | {"output": text("base64")})
    model.execute([asked, film])
    *before, (last, flags) = asked.sent
    assert flags == 1 and not any(flags for _, flags in before) and all(answer.error is None for answer, _ in asked.sent)
    progress = [float(answer.read()["progress"][0]) for answer, _ in before]
    assert progress == sorted(progress) and progress[0] == 0 and progress[-1] == 1 and len({*progress}) > 3
    assert before[0][0].read()["stage"][0] == b"text_query" and before[-1][0].read()["stage"][0] == b"decode"
    with MotionPipeline.from_bundle(fake_bundle, fake_memory, threads=1) as pipeline:
        result = pipeline(still, "a red ball", seed=3)
    np.testing.assert_array_equal(last.read()["frames"], result.frames)
    about = json.loads(last.read()["about"][0])
    assert about["seed"] == 3 and [one["id"] for one in about["references"]] == [one.id for one in result.references]
    answer = film.sent[-1][0].read()
    assert "frames" not in answer and base64.b64decode(answer["video"][0])[4:8] == b"ftyp"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": np.int32([9000])}, "steps is 9000"),
        ({"image": None}, "image is missing; bundle"),
        ({"motion_scale": np.float32([np.nan])}, "motion_scale is nan; it must be a finite number"),
    ],
    ids=["steps", "missing", "nan"],
)
def test_bad_input_is_answered_in_our_words(
    model: Any, triton: ModuleType, still: NDArray[np.uint8], change: dict[str, Any], words: str
) -> None:
    given = {"image": still, "prompt": text("a ball")} | change
    bad = triton.Request({name: value for name, value in given.items() if value is not None})
    good = triton.Request({"image": still, "prompt": text("a ball")})
    model.execute([bad, good])
    ((answer, flags),) = bad.sent
    assert flags == 1 and words in answer.error.message and answer.error.code == "invalid argument"
    assert "frames" in good.sent[-1][0].read()


def test_a_cancelled_request_runs_no_further_call(model: Any, triton: ModuleType, still: NDArray[np.uint8]) -> None:
    calls, run = list[str](), model.pipeline.run

    def counted(call: Any, placed: Any) -> Any:
        calls.append(call.graph)
        return run(call, placed)

    model.pipeline.run = counted
    asked = triton.Request({"image": still, "prompt": text("a ball")}, wanted=4)
    model.execute([asked])
    assert asked.sent[-1][0].error.code == "cancelled" and asked.sent[-1][1] == 1
    assert len(calls) == 5  # the one that ran when it was cancelled, and none behind it


def test_a_fault_of_ours_is_not_told_in_full(
    model: Any, triton: ModuleType, still: NDArray[np.uint8], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("/srv/secret")

    model.pipeline.run = broken
    asked = triton.Request({"image": still, "prompt": text("a ball")})
    model.execute([asked])
    error = asked.sent[-1][0].error
    assert error.code == "internal" and "RuntimeError" in error.message and "secret" not in error.message
    assert "/srv/secret" in caplog.text
