"""The nodes of integrations/comfyui on small bundles, in the stand-in for ComfyUI."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from comfy_runner import Comfy
from comfy_stand_in import InterruptProcessingException, ProgressBar
from numpy.typing import NDArray
from PIL import Image

from motionrt import MotionMemory, MotionPipeline
from motionrt.runtime.errors import InputError
from motionrt.runtime.media.video import write_video

ROOT = Path(__file__).resolve().parents[3]
NODES = ROOT / "integrations/comfyui"
Still = NDArray[np.uint8]


def place(comfy: Comfy, **folders: Path) -> Comfy:
    """Our nodes, with links to these folders in models/motionrt."""
    home = comfy.folder / "models/motionrt"
    home.mkdir()
    for name, path in folders.items():
        (home / name).symlink_to(path)
    comfy.load(NODES)
    return comfy


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def opened(bundle: str, memory: str = "none", more: str = "") -> dict[str, Any]:
    return node("MotionRTBundle", bundle=bundle, memory=memory, more_memories=more, backend="onnxruntime")


@pytest.fixture
def fake_comfy(comfy: Comfy, fake_bundle: Path, fake_memory: Path, still: Still) -> Comfy:
    Image.fromarray(still).save(comfy.folder / "input/still.png")
    return place(comfy, bundle=fake_bundle, memory=fake_memory)


def generate(**changed: Any) -> dict[str, Any]:
    """A workflow of the fake bundle: the node "made" generates."""
    inputs: dict[str, Any] = {
        "bundle": ["opened", 0], "image": ["still", 0], "prompt": "the star", "negative_prompt": "", "motion_scale": 1.0,
        "guidance": 2.0, "seed": 3, "steps": 3, "solver": "as the bundle",
    }  # fmt: skip
    return {
        "still": node("LoadImage", image="still.png"), "opened": opened("bundle", "memory"),
        "made": node("MotionRTGenerate_fake", **{**inputs, **changed}),
    }  # fmt: skip


def test_generate_takes_what_the_bundle_declares_and_gives_the_pipelines_frames(
    fake_comfy: Comfy, fake_bundle: Path, fake_memory: Path, still: Still
) -> None:
    frames, video, fps, references = fake_comfy.run(generate(motion_scale=0.5, guidance=1.5, negative_prompt="red"))["made"]
    with MotionPipeline.from_bundle(fake_bundle, fake_memory) as pipeline:
        wanted = pipeline(still, "the star", "red", motion_scale=0.5, guidance=1.5, seed=3, steps=3)
    assert frames.dtype == torch.float32 and frames.shape == (3, 16, 16, 3)
    assert (fps, float(video.get_components().frame_rate)) == (8, 8)
    np.testing.assert_array_equal(frames.numpy(), wanted.frames.astype(np.float32) / np.float32(255))
    assert torch.equal(video.get_components().images, frames)
    assert [line.split("  ")[1] for line in references.splitlines()] == [found.caption for found in wanted.references]


def test_a_number_that_is_left_as_it_is_leaves_the_rows_as_they_are(fake_comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    request = MotionPipeline.request
    monkeypatch.setattr(MotionPipeline, "request", lambda self, **named: asked.append(named) or request(self, **named))
    fake_comfy.run(generate(steps=0))
    fake_comfy.run(generate(guidance=1.0, solver="dpm"))
    assert [(one["guidance"], one["steps"], one["solver"]) for one in asked] == [(None, None, None), (1.0, 3, "dpm")]


def test_bundle_is_opened_once_until_something_changes_on_disk(
    comfy: Comfy, edit_bundle: Any, fake_memory: Path, still: Still
) -> None:
    Image.fromarray(still).save(comfy.folder / "input/still.png")
    path = edit_bundle()
    place(comfy, bundle=path, memory=fake_memory)
    first = comfy.run(generate())["opened"][0]
    assert comfy.run(generate(seed=4))["opened"][0] is first and comfy.ran.count("MotionRTBundle") == 1
    comfy._cache.clear()  # ComfyUI forgets results that the last workflow did not use
    assert comfy.run(generate())["opened"][0] is first
    (path / "bundle.json").write_text((path / "bundle.json").read_text() + "\n")
    second = comfy.run(generate())["opened"][0]
    assert second is not first and comfy.ran.count("MotionRTBundle") == 3


def test_motion_search_gives_references_and_a_strip_of_moving_clips(fake_comfy: Comfy, fake_clips: dict[str, Path]) -> None:
    workflow = generate(references=["found", 0]) | {
        "found": node("MotionRTMotionSearch", bundle=["opened", 0], prompt="the star moves up", k=2, where=""),
        "shown": node("PreviewImage", images=["found", 1]),
    }
    gave = fake_comfy.run(workflow)
    references, strip, text = gave["found"]
    assert [one.caption for one in references][0] == "the star moves up" and len(references) == 2
    assert strip.shape == (3, 16, 32, 3) and text.splitlines()[0].split("  ")[1] == "the star moves up"
    courses = strip.reshape(3, 16, 2, 16, 3).mean((1, 3, 4)).T.numpy()  # each clip gets brighter or darker in its own way
    assert not np.allclose(courses[0], courses[1], atol=0.02) and np.abs(np.diff(courses)).min() > 0.02
    assert gave["made"][3] == text
    with pytest.raises(InputError, match="where is 'dataset'; allowed is key=value on each line"):
        workflow["found"]["inputs"]["where"] = "dataset"
        fake_comfy.run(workflow)
    with pytest.raises(InputError, match="opened without a memory"):
        fake_comfy.run({"opened": opened("bundle"), "found": workflow["found"]})


def test_clips_whose_files_are_gone_are_grey(fake_comfy: Comfy, fake_memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = MotionMemory.search

    def gone(self: MotionMemory, *arguments: Any) -> list[Any]:
        first, *others = search(self, *arguments)
        return [type(first)(**{**vars(first), "source": "nowhere.mp4"}), *others]

    monkeypatch.setattr(MotionMemory, "search", gone)
    found = node("MotionRTMotionSearch", bundle=["opened", 0], prompt="the star", k=2, where="")
    strip = fake_comfy.run({"opened": opened("bundle", "memory"), "found": found})["found"][1]
    assert (strip[:, :, :16] == 0.5).all() and not (strip[:, :, 16:] == 0.5).all()


def test_several_memories_are_searched_together(comfy: Comfy, fake_bundle: Path, fake_memory: Path) -> None:
    place(comfy, bundle=fake_bundle, memory=fake_memory, other=fake_memory)
    found = node("MotionRTMotionSearch", bundle=["opened", 0], prompt="the star moves up", k=2, where="")
    references, strip, _ = comfy.run({"opened": opened("bundle", "memory", "other\n"), "found": found})["found"]
    assert {one.memory for one in references} == {"memory", "other"} and strip.shape == (3, 16, 32, 3)


def test_a_clip_by_hand_takes_the_place_of_what_is_found(
    fake_comfy: Comfy, fake_clips: dict[str, Path], fake_bundle: Path, still: Still
) -> None:
    clip = next(iter(fake_clips.values()))
    (fake_comfy.folder / "input/clip.mp4").write_bytes(clip.read_bytes())
    workflow = generate(reference_video=["clip", 0]) | {"clip": node("LoadVideo", file="clip.mp4")}
    frames, _, _, references = fake_comfy.run({**workflow, "opened": opened("bundle")})["made"]
    with MotionPipeline.from_bundle(fake_bundle) as pipeline:
        wanted = pipeline(still, "the star", seed=3, steps=3, references=[clip])
    np.testing.assert_array_equal(frames.numpy(), wanted.frames.astype(np.float32) / np.float32(255))
    assert references == "by hand    (reference_video.mp4)"


def test_progress_is_shown_and_a_stop_ends_within_a_step(fake_comfy: Comfy, watching: ModuleType) -> None:
    fake_comfy.run(generate())
    done, totals, _ = zip(*ProgressBar.shown, strict=True)
    assert done == tuple(range(1, done[-1] + 1)) and {*totals} == {done[-1]}
    ProgressBar.shown.clear()
    fake_comfy.stop_after = 5  # asked once before the first call, and after each
    with pytest.raises(InterruptProcessingException):
        fake_comfy.run(generate(seed=9))
    assert [shown[0] for shown in ProgressBar.shown] == [1, 2, 3, 4, 5]
    assert fake_comfy.run(generate(seed=9))["made"][0].shape == (3, 16, 16, 3)  # the handle still works


def test_what_is_drawn_comes_as_tracks_mask_and_video(comfy: Comfy, drawn_bundle: Path, still: Still) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    brush = np.zeros((32, 32), np.uint8)
    brush[8:24, 8:] = 255
    Image.fromarray(np.dstack([picture, 255 - brush])).save(comfy.folder / "input/still.png")  # what the mask editor writes
    place(comfy, drawn=drawn_bundle)
    with MotionPipeline.from_bundle(drawn_bundle) as pipeline:
        name = pipeline.bundle.name
        wanted = pipeline(picture, drag=[[(16, 16), (22, 13)]], brush=brush, strength=5)
    takes = {put.id: put for put in comfy.nodes[f"MotionRTGenerate_{name}"].define_schema().inputs}
    kinds = {"image": "IMAGE", "drag": "STRING", "brush": "MASK", "field": "VIDEO", "strength": "FLOAT"}
    assert {key: takes[key].io_type for key in kinds} == kinds
    assert {key: takes[key].optional for key in ("image", "drag", "brush", "field")} == {
        "image": False, "drag": True, "brush": True, "field": True,
    }  # fmt: skip
    assert "references" not in takes  # it finds nothing in a memory
    for drag in ("16,16 22,13", "\n 16,16 22,13\n\n", "[[[16, 16], [22, 13]]]", '[{"x": 16, "y": 16}, {"x": 22, "y": 13}]'):
        inputs = {"bundle": ["opened", 0], "image": ["still", 0], "drag": drag, "brush": ["still", 1], "strength": 5.0}
        made = node(f"MotionRTGenerate_{name}", **inputs, prompt="", seed=0, steps=0, solver="as the bundle")
        workflow = {"still": node("LoadImage", image="still.png"), "opened": opened("drawn"), "made": made}
        gave = comfy.run(workflow)
        np.testing.assert_array_equal(gave["made"][0].numpy(), wanted.frames.astype(np.float32) / np.float32(255))
    # A field is made of a video that moves.
    moving = np.stack([np.roll(picture, 2 * step, 1) for step in range(4)])
    write_video(comfy.folder / "input/moving.mp4", moving, 8)
    with MotionPipeline.from_bundle(drawn_bundle) as pipeline:
        wanted = pipeline(picture, field=comfy.folder / "input/moving.mp4", strength=5)
    del made["inputs"]["drag"], made["inputs"]["brush"]
    made["inputs"]["field"], workflow["moving"] = ["moving", 0], node("LoadVideo", file="moving.mp4")
    gave = comfy.run(workflow)
    np.testing.assert_array_equal(gave["made"][0].numpy(), wanted.frames.astype(np.float32) / np.float32(255))
    with pytest.raises(InputError, match='drag is \'\\[1\'; allowed is a line "x,y x,y" for each drag'):
        made["inputs"]["drag"] = "[1"
        comfy.run(workflow)


def test_choices_are_lists_and_texts_have_their_defaults(comfy: Comfy, recalling_bundle: Path) -> None:
    place(comfy, recalling=recalling_bundle)
    (made,) = (kind for name, kind in comfy.nodes.items() if name.startswith("MotionRTGenerate"))
    takes: dict[str, Any] = {put.id: put for put in made.define_schema().inputs}
    assert takes["retrieval"].io_type == "COMBO" and takes["retrieval"].default in takes["retrieval"].options
    assert takes["seed"].control_after_generate and takes["seed"].max == 2**64 - 1
    assert takes["references"].optional and takes["reference_video"].io_type == "VIDEO"


def test_names_that_are_not_there_are_said_with_those_that_are(comfy: Comfy, fake_bundle: Path, tmp_path: Path) -> None:
    place(comfy, bundle=fake_bundle, **{".hidden": fake_bundle})
    bundle = comfy.nodes["MotionRTBundle"]
    assert bundle.define_schema().inputs[0].options == ["bundle"]  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="the motion memory is 'gone'; there are: none. Put its folder"):
        bundle.execute(bundle="bundle", memory="gone", backend="onnxruntime")


def test_damaged_bundles_and_empty_folders_do_not_keep_the_nodes_from_loading(comfy: Comfy, tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/bundle.json").write_text("{")
    place(comfy, damaged=tmp_path / "damaged")
    ours = {name for name in comfy.nodes if name.startswith("MotionRT")}
    assert ours == {"MotionRTBundle", "MotionRTMotionSearch", "MotionRTRemote"}


def test_metadata_is_what_the_registry_asks_for() -> None:
    about = tomllib.loads((NODES / "pyproject.toml").read_text())
    project, comfy = about["project"], about["tool"]["comfy"]
    assert "comfyui" not in project["name"].lower() and project["version"].count(".") == 2
    assert project["license"] == {"text": "Apache-2.0"} and {"Repository"} <= project["urls"].keys()
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= comfy.keys()
    assert project["requires-python"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
