"""The example workflows: both forms of each say the same, ComfyUI's stand-in takes them, and they make videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy_runner import Comfy
from comfy_stand_in import ProgressBar
from serving import serving

from motionrt import MotionPipeline
from motionrt.runtime.media.video import read_clip

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "integrations/comfyui/example_workflows"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))


def read(name: str) -> dict[str, Any]:
    """A workflow in the API format."""
    workflow: dict[str, Any] = json.loads((EXAMPLES / f"api/{name}.json").read_text())
    return workflow


def api_of(drawn: dict[str, Any], comfy: Comfy) -> dict[str, Any]:
    """What ComfyUI's page sends for a workflow as the page saves it: values of widgets stand in the order of the node's inputs,
    those that must be there first, and behind one with `control_after_generate` stands what becomes of it."""
    sources = {link: [str(node), slot] for link, node, slot, *_ in drawn["links"]}
    workflow = {}
    for node in drawn["nodes"]:
        takes = comfy.nodes[node["type"]].define_schema().inputs
        values = iter(node["widgets_values"])
        inputs: dict[str, Any] = {put["name"]: sources[put["link"]] for put in node["inputs"] if put["link"] is not None}
        for put in sorted(takes, key=lambda put: put.optional):
            if put.widget:
                inputs[put.id] = next(values)
                if getattr(put, "control_after_generate", None):
                    assert next(values) == "fixed"
        workflow[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return workflow


def test_each_example_is_there_in_both_forms(demo: Comfy) -> None:
    assert NAMES == sorted(path.stem for path in (EXAMPLES / "api").glob("*.json")) and len(NAMES) == 3
    for name in NAMES:
        drawn = json.loads((EXAMPLES / f"{name}.json").read_text())
        sent = api_of(drawn, demo)
        for key, node in sent.items():
            demo._check(key, node, sent)
        assert sent == read(name), name
        kinds = {node["id"]: demo.nodes[node["type"]].define_schema() for node in drawn["nodes"]}
        slots = {node["id"]: [put["name"] for put in node["inputs"]] for node in drawn["nodes"]}
        for link, source, slot, target, place, kind in drawn["links"]:
            (to,) = (put for put in kinds[target].inputs if put.id == slots[target][place])
            assert kinds[source].outputs[slot].io_type == kind == to.io_type
            assert link in next(node for node in drawn["nodes"] if node["id"] == source)["outputs"][slot]["links"]


def test_image_to_video(demo: Comfy) -> None:
    workflow = read("image_to_video")
    workflow["4"]["inputs"]["steps"] = 2
    gave = demo.run(workflow)
    frames, _, fps, references = gave["4"]
    assert frames.shape == (17, 64, 64, 3) and fps == 8 and references.count("bounces in place") == 4
    assert gave["5"][0].shape == (17, 64, 4 * 64, 3)
    assert any(pictured for _, _, pictured in ProgressBar.shown)  # the demo's preview is calibrated
    assert read_clip(gave["6"][0], 17, 64, 64, 8).shape == (17, 3, 64, 64)


@pytest.mark.slow
def test_drags(demo: Comfy) -> None:
    """The star goes where the drag says, as from the command of the README."""
    frames = demo.run(read("drags"))["3"][0]
    with MotionPipeline.from_bundle(ROOT / "demo/motion_i2v/bundle") as pipeline:
        picture = ROOT / "demo/motion_i2v/inputs/star_circles.png"
        wanted = pipeline(picture, "a red star circles around clockwise", seed=1, drag=["36,28 20,40"])
    np.testing.assert_array_equal(np.rint(frames.numpy() * 255), wanted.frames)


@pytest.mark.slow
def test_remote(demo: Comfy, tmp_path: Path) -> None:
    """A real server makes the video; it has the frames that the pipeline gives, but for what the video format loses."""
    workflow = read("remote")
    with serving(tmp_path / "store", ROOT / "demo/bundle", ROOT / "demo/memory") as served:
        workflow["2"]["inputs"]["server"] = served.url
        frames, _, fps, references = demo.run(workflow)["2"]
    with MotionPipeline.from_bundle(ROOT / "demo/bundle", ROOT / "demo/memory") as pipeline:
        wanted = pipeline(ROOT / "demo/inputs/red_star.png", "a red star bounces in place", seed=1, motion_scale=0.8)
    assert fps == 8 and frames.shape == (17, 64, 64, 3) and len(references.splitlines()) == len(wanted.references)
    assert np.abs(frames.numpy() * 255 - wanted.frames).mean() < 3
