"""The shipped bundle against the shipped checkpoint, end to end and graph by graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from by_path import load_by_path

from motionrt.export.onnx.from_torch import Example, Range
from motionrt.export.onnx.streamed import stream_real
from motionrt.export.systems.cogvideox_step import INPUTS
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.files import sha256_of
from motionrt.runtime.pipeline import MotionPipeline

DEMO = Path(__file__).resolve().parents[2] / "demo"
CHECKPOINT = DEMO / "checkpoint.safetensors"
plain_run = load_by_path(DEMO.parent / "tests/helpers/plain_run.py")


@pytest.fixture(scope="module")
def export() -> ModuleType:
    return load_by_path(DEMO / "export.py")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(DEMO / "bundle")


@pytest.fixture(scope="module")
def run(bundle: Bundle) -> Any:
    return plain_run.PlainRun(bundle)


def values_of(run: Any, feed: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A step's inputs for one request, and what the graph `request` makes of them."""
    values = {name: value.numpy() for name, value in feed.items()}
    return values | run.call("request", {port.name: values[port.name] for port in run.bundle.graph("request").inputs})


def test_bundle_was_exported_from_the_shipped_checkpoint(bundle: Bundle) -> None:
    assert bundle.manifest.provenance["checkpoint"] == sha256_of(CHECKPOINT)


@pytest.mark.parametrize("seed", [0, 1])
def test_rewritten_step_equals_the_plain_one_over_all_steps(run: Any, export: ModuleType, seed: int) -> None:
    """Same noise, all steps, fp32: the shipped graphs against torch eager of the plain module, to 1e-4."""
    eager, draw = export.eager_step(CHECKPOINT), plain_run.drawn(seed)
    loop, rows = run.bundle.manifest.loops["video"], run.bundle.schedule("video", "dpm", 8).rows
    values = values_of(run, export.step_feed(1, seed))
    ours = plain_run.run_loop("video", loop, rows, values, run.ports, run.call, draw)["latents"]
    plainly = msgspec.structs.replace(loop, graphs=(loop.plain,), tables=())
    plain = plain_run.run_loop("video", plainly, rows, values, run.ports, lambda _, inputs: eager(inputs), draw)["latents"]
    assert np.abs(plain).max() > 0.5  # the run did something
    np.testing.assert_allclose(ours, plain, atol=1e-4)


def test_motion_scale_zero_is_the_base_model(run: Any, export: ModuleType) -> None:
    """With scale 0 the motion tokens have no say at all: bit for bit the same video."""
    loop, rows = run.bundle.manifest.loops["video"], run.bundle.schedule("video", "ddim", 2).rows
    feed = export.step_feed(1) | {"motion_scale": torch.zeros(1)}
    results = []
    for factor in (1.0, -3.0):
        values = values_of(run, feed | {"motion": feed["motion"] * factor})
        results.append(plain_run.run_loop("video", loop, rows, values, run.ports, run.call, plain_run.drawn(0))["latents"])
    assert np.array_equal(*results)


def test_manifest_says_what_the_system_is(bundle: Bundle) -> None:
    manifest = bundle.manifest
    nodes = [node.graph for node in manifest.nodes]
    assert nodes == ["text", "text", "appearance", "cama", "encode", "request", "video", "decode"]
    assert manifest.loops["video"].plain == "step_plain" and manifest.loops["video"].default == ("ddim", 8)
    assert manifest.loops["video"].schedules == {"ddim": tuple(range(1, 51)), "dpm": tuple(range(2, 51))}
    assert manifest.inputs["guidance"].default == 2.0 and manifest.memory.default == 4 and manifest.memory.max == 8
    sizes = {port.dims[0].name for spec in manifest.graphs.values() for port in spec.inputs}
    assert sizes == {"steps", "batch", "2*batch"}  # guidance needs two rows of a request, which lie together


def test_step_holds_no_schedule_and_no_adapter_projections(bundle: Bundle) -> None:
    """What the pass is for: the loop carries fewer weights and FLOPs than the released form, for the right reasons."""
    report = bundle.manifest.partition
    assert report["classes"]["step"]["flops"] < report["original"]["flops"]
    assert report["classes"]["schedule"]["parameters"] > 0.2 * report["original"]["parameters"]
    assert sum(rule["rule"] == "reassociate" for rule in report["rules"]) == 4  # one Motion-Adapter per block
    assert {port.name for port in bundle.graph("step").inputs}.isdisjoint({"timestep", "text", "motion"})


def test_reexport_reproduces_the_shipped_graph(bundle: Bundle, export: ModuleType, tmp_path: Path) -> None:
    """The decoder and the motion encoder exported anew from the checkpoint give the shipped bundle's outputs."""
    demo = export.demo
    model = demo.load(CHECKPOINT)
    decode = export.Method({"autoencoder": model.autoencoder}, lambda self, x: self.autoencoder.decode(x))
    examples = [Example({"batch": b}, {"latents": torch.randn(b, *demo.LATENTS)}) for b in (2, 3)]
    stream_real(tmp_path / "decode.onnx", decode, examples, ("video",), {"batch": Range(1, 1, 4)})
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "decode.onnx"), providers=["CPUExecutionProvider"])
    latents = examples[0].feed["latents"].numpy()
    shipped = OnnxRuntimeBackend(threads=1).load(bundle, "decode")({"latents": latents})["video"]
    np.testing.assert_allclose(session.run(None, {"latents": latents})[0], shipped, atol=1e-6)


def test_every_plain_input_is_declared(bundle: Bundle) -> None:
    assert {port.name for port in bundle.graph("step_plain").inputs} == set(INPUTS)


def test_retrieved_motion_moves_the_same_image_differently() -> None:
    """From one still: a prompt's references decide the path, motion_scale 0 does not follow it, a seed repeats itself."""
    domain = load_by_path(DEMO / "domain.py")
    image = DEMO / "inputs" / "red_star.png"
    with MotionPipeline.from_bundle(DEMO / "bundle", DEMO / "memory", threads=1) as pipeline:
        drift = {}
        for way in ("to the left", "to the right"):
            result = pipeline(image, f"a red star slides straight {way}", seed=3)
            assert result.frames.dtype == np.uint8 and result.frames.shape == (17, 64, 64, 3)
            assert all(way in reference.caption for reference in result.references[:1])
            path = domain.track(result.frames)
            drift[way] = float(path[-1, 0] - path[0, 0])
        again = pipeline(image, "a red star slides straight to the right", seed=3)
    assert np.array_equal(again.frames, result.frames)
    assert drift["to the left"] < -5 < 5 < drift["to the right"]


@pytest.mark.parametrize("length", [1, 5, 60])
def test_text_query_embeds_as_its_package_does(bundle: Bundle, length: int) -> None:
    from motionrt.export.checkpoints.text_query import packaged_encoder

    encoder = packaged_encoder()
    ids = bundle.tokenize("text_query", " ".join(["motion"] * length))
    ours = OnnxRuntimeBackend(threads=1).load(bundle, "text_query")(ids)["embedding"]
    hidden = encoder.network.module.model(**{key: torch.from_numpy(value) for key, value in ids.items()}).last_hidden_state
    want = torch.nn.functional.normalize(hidden.mean(dim=1), dim=-1).detach().numpy()
    np.testing.assert_allclose(ours, want, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)


def test_a_prompt_in_other_words_finds_the_motion_and_an_unlikely_one_uses_none() -> None:
    still = np.zeros((64, 64, 3), np.uint8)
    with MotionPipeline.from_bundle(DEMO / "bundle", DEMO / "memory", threads=1) as pipeline:

        def sources(prompt: str, **options: Any) -> list[str]:
            return [Path(found.source).stem[4:] for found in pipeline(still, prompt, steps=1, **options).references]

        for prompt in ("a red star moves to the left in a straight line", "a blue circle goes leftwards, not right, straight"):
            assert sources(prompt) == ["slide_left"] * 4
            # Two of the best seven, and seven slides to the left are left.
            alike = sources(prompt, looks=True, references=2, exclude_source=["clips/000_slide_left.mp4"])
            assert alike == ["slide_left"] * 2
        none = pipeline(still, "a dog reads a newspaper", steps=1)
        assert none.references == [] and "no motion: the likeliest clip of the motion memory" in (none.fallback or "")
        assert "and minimum_probability is 10%" in (none.fallback or "")
        assert len(sources("a dog reads a newspaper", references=4)) == 4
        found = pipeline(still, "a red star slides straight up", steps=1, looks=True).references[0]
        assert found.probability > 0.5 and found.words > 0.5 and -1 <= found.looks <= 1
