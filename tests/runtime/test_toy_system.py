"""A system that nobody ever published, in one file: one graph, two loops, a record of one uint8 array. Nothing in runtime/
knows it.

It mixes noise with the mean of the retrieved clips' pictures (loop `mix`), and then brings the result towards the first
picture of the request (loop `settle`), with the same step graph: x' = x + pull (aim - x).
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.manifest import Part
from motionrt.runtime.errors import InputError
from motionrt.runtime.memory.memory import Clip, MotionMemory
from motionrt.runtime.noise import noise
from motionrt.runtime.pipeline import MotionPipeline

FRAMES, SIZE = 3, 16
VIDEO, PIXELS = [FRAMES, 3, SIZE, SIZE], [FRAMES, SIZE, SIZE, 3]
STEP = """<ir_version: 10, opset_import: ["" : 20]> step (
    float[batch,3,3,16,16] x, float[batch,2] pull, uint8[batch,K,3,16,16,3] reference_pixels, float[batch,3,16,16] image
) => (float[batch,3,3,16,16] next_x) {
    clips = Cast<to=1>(reference_pixels)
    mean = ReduceMean<keepdims=0>(clips, axis1)
    planes = Transpose<perm=[0,1,4,2,3]>(mean)
    small = Div(planes, scale)
    moved = Sub(small, one)
    still = Unsqueeze(image, axis1)
    spread = Unsqueeze(pull, axes234)
    by_clips, by_still = Split<axis=1, num_outputs=2>(spread)
    to_clips = Sub(moved, x)
    to_still = Sub(still, x)
    a = Mul(by_clips, to_clips)
    b = Mul(by_still, to_still)
    ab = Add(a, b)
    next_x = Add(x, ab)
}"""


def step_graph() -> bytes:
    model = onnx.parser.parse_model(STEP)
    values = {
        "axis1": np.array([1]), "axes234": np.array([2, 3, 4]), "scale": np.float32(127.5), "one": np.float32(1),
    }  # fmt: skip
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(value), key) for key, value in values.items())
    return model.SerializeToString()


def rows(clips: float, still: float, steps: int) -> NDArray[np.float32]:
    return np.tile(np.array([0, clips, still], np.float32), (steps, 1))


@pytest.fixture(scope="module")
def toy(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle. Its graph of words, by which clips are found, is the fake bundle's."""
    batch = {"name": "batch", "min": 1, "opt": 1, "max": 2}
    some = {"name": "K", "min": 1, "opt": 2, "max": 4}
    inputs = [
        fake.port("x", [batch, *VIDEO]), fake.port("pull", [batch, 2]),
        fake.port("reference_pixels", [batch, some, *PIXELS], "uint8"), fake.port("image", [batch, 3, SIZE, SIZE]),
    ]  # fmt: skip
    loop = {
        "graphs": ["step"], "columns": ["graph", "clips", "still"], "feeds": {"pull": ["clips", "still"]},
        "carry": {"next_x": "x"},
    }  # fmt: skip
    manifest = {
        "format": 2, "name": "toy", "motionrt": "0.1.0",
        "inputs": {
            "image": {"kind": "image", "height": SIZE, "width": SIZE, "gives": {"image": [-1, 1]}},
            "words": {"kind": "text", "default": "a red ball"},
            "hold": {"kind": "column", "loop": "settle", "column": "still", "default": 0.25},
        },
        "memory": {
            "text": "words", "query": "text_query", "tokenizer": "text_query", "default": 2, "max": 4,
            "clip": {"frames": FRAMES, "height": SIZE, "width": SIZE, "fps": 8},
            "record": [{"name": "pixels", "dtype": "uint8", "dims": PIXELS}], "fingerprint": fake.digest(b"toy"),
        },
        "plan": ["mix", "settle"],
        "loops": {
            "mix": {
                **loop, "schedules": {"even": [2, 4]}, "default": ["even", 4], "start": {"x": "noise"}, "gives": {"x": "mixed"},
            },
            "settle": {
                **loop, "schedules": {"even": [2]}, "default": ["even", 2], "start": {"x": "mixed"}, "gives": {"x": "video"},
            },
        },
        "output": {"value": "video", "frames": FRAMES, "height": SIZE, "width": SIZE, "fps": 8},
    }  # fmt: skip
    graphs = {
        "step": (inputs, [fake.port("next_x", [batch, *VIDEO])], step_graph()),
        "text_query": (*fake.GRAPHS["text_query"][:2], fake.onnx_graph("text_query")),
    }
    tables = {f"mix/even/{n}": rows(0.5, 0, n) for n in (2, 4)} | {"settle/even/2": rows(0, 0.25, 2)}
    path: Path = fake.write_files(tmp_path_factory.mktemp("toy") / "bundle", manifest, graphs, tables)
    return path


def test_a_system_is_data(toy: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, FRAMES, SIZE, SIZE, 3), np.uint8)
    still = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    spec = Bundle.open(toy).manifest.memory
    assert spec is not None and spec.record == (Part("pixels", "uint8", (FRAMES, SIZE, SIZE, 3)),)
    with MotionMemory.create(tmp_path / "m", embedding=8, record=spec.record, fingerprint=spec.fingerprint) as memory:
        with MotionPipeline.from_bundle(toy, memory, threads=1) as pipeline:
            vector = pipeline.embed("a red ball")
            memory.add([Clip("a red ball", "s", i, 1, 8, "0", vector, {"pixels": clip}) for i, clip in enumerate(pixels)])
            result = pipeline(still, seed=5, steps={"mix": 2}, hold=[0.5, 1.0])
            assert [found.id for found in result.references] == [1, 2] and len(result.step_seconds) == 4
            np.testing.assert_array_equal(result.references[1].record["pixels"], pixels[1])  # as it was kept, to the byte

            aim = pixels.astype(np.float64).mean(axis=0).transpose(0, 3, 1, 2) / 127.5 - 1
            image = still.astype(np.float64).transpose(2, 0, 1) / 127.5 - 1
            x = noise(5, 0, 0, (1, *VIDEO))[0].astype(np.float64)
            for pull, goal in ((0.5, aim), (0.5, aim), (0.5, image), (1.0, image)):
                x = x + pull * (goal - x)
            wanted = np.rint((np.clip(x, -1, 1) + 1) * 127.5).transpose(0, 2, 3, 1)
            assert np.abs(result.frames - wanted).max() <= 1

            with pytest.raises(InputError, match="'motion_scale' is nothing that bundle 'toy' takes; it takes image, words"):
                pipeline(still, motion_scale=1)
            with pytest.raises(InputError, match="this pipeline has no motion memory"):
                MotionPipeline.from_bundle(toy, threads=1)(still)
