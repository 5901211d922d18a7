"""An SVD bundle from released files against diffusers' own pipeline with the plain adapters installed, same noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from by_path import load_by_path  # noqa: E402
from safetensors import safe_open  # noqa: E402

from motionrt.export.checkpoints.files import CheckpointError  # noqa: E402
from motionrt.export.exporter import export_system  # noqa: E402
from motionrt.export.systems import svd_step as svd  # noqa: E402
from motionrt.export.systems.svd import svd_system  # noqa: E402
from motionrt.runtime.bundle.bundle import Bundle  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
models = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/tiny_models.py")
plainly = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/diffusers_reference.py")
plain_run = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/plain_run.py")
shared = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/shared_graphs.py")
FRAMES, HEIGHT, WIDTH, SEED, STEPS = 9, 16, 32, 5, 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Released files, their modules, the bundle that was exported from them, and a request's references."""
    folder = tmp_path_factory.mktemp("svd")
    parts = models.write_svd(folder / "base") | models.write_encoders(folder)
    blocks = {f"unet.{path}": a.to_q.in_features for path, a in svd.spatial_attentions(parts["unet"])}
    files = models.release.motionrag_states(blocks, overlay=False)
    models.release.save(folder / "rag", files)
    sources = models.sources(folder, plainly.SOS_SEED, (2, STEPS))
    with shared.shared_graphs(shared.store(tmp_path_factory)):
        system = svd_system(sources, frames=FRAMES, height=HEIGHT, width=WIDTH)
        export_system(system, folder / "bundle")
    run = plain_run.PlainRun(Bundle.open(folder / "bundle"))

    draw = np.random.default_rng(0)
    still = draw.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    clips = torch.from_numpy(draw.integers(0, 256, (2, FRAMES, 3, HEIGHT, WIDTH), np.uint8)).float() / 127.5 - 1
    image = torch.from_numpy(still).permute(2, 0, 1)[None].float() / 127.5 - 1
    motion = plainly.motion_tokens(parts, files, torch.cat([clips, torch.zeros(1, *clips.shape[1:])]))
    looks = plainly.appearance_tokens(parts, files, torch.cat([clips[:, 0], image]))
    ours = run.call("motion", {"video": clips.numpy()})["motion"]
    theirs = run.call("appearance", {"image": clips[:, 0].numpy()})["appearance"]
    return {
        "folder": folder, "parts": parts, "files": files, "sources": sources, "run": run, "still": still,
        "given": {"image": image.numpy(), "reference_motion": ours[None], "reference_appearance": theirs[None]},
        "predicted": plainly.predicted_motion(files, motion[:2], looks[:2], looks[2:]), "unconditional": motion[2:],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("guidance", "scale"),
    [(3.0, 1.0), (3.0, 0.0), (1.0, 0.5)],
    ids=["guidance 1 to 3", "no adapters", "no guidance, motion 0.5"],
)
def test_bundle_gives_the_video_of_diffusers_pipeline_with_plain_adapters(
    guidance: float, scale: float, world: dict[str, Any]
) -> None:
    run, draw = world["run"], plain_run.drawn(SEED)
    values = {**world["given"], "motion_scale": np.array([scale], np.float32)}
    result = run(values, draw, schedules={"video": ("euler", STEPS)}, columns={"guidance": guidance})
    latents, frames = plainly.svd_video(
        models.UNET, models.EULER, world["parts"], world["files"], still=world["still"], motion=world["predicted"],
        unconditional=world["unconditional"], frames=FRAMES, steps=STEPS, guidance=guidance, scale=scale, draw=draw,
    )  # fmt: skip
    np.testing.assert_allclose(result["latents"], latents, atol=2e-4 * max(1.0, float(latents.abs().max())))
    assert result["video"].shape == (1, FRAMES, 3, HEIGHT, WIDTH)
    np.testing.assert_allclose((result["video"][0].clip(-1, 1) + 1) / 2, frames, atol=1 / 255)  # a step of 8 bits


def test_the_step_has_no_cross_attention_left_and_there_is_no_text_graph(world: dict[str, Any]) -> None:
    manifest = world["run"].bundle.manifest
    assert "text" not in manifest.graphs and manifest.provenance["first_guidance"] == 1.0
    assert [node.graph for node in manifest.nodes] == ["appearance", "cama", "encode", "request", "video", "decode"]
    assert list(manifest.inputs) == ["image", "prompt", "motion_scale", "guidance"]
    assert manifest.inputs["prompt"].tokenizer is None
    assert manifest.graphs["schedule"].inputs[0].dtype == "float32" and list(manifest.loops) == ["video"]
    with safe_open(world["folder"] / "bundle" / "graphs" / "step.safetensors", framework="numpy") as step:
        names = list(step.keys())
    assert any("attn1" in name for name in names)
    assert not [name for name in names if "attn2" in name or "_ip" in name or "time_emb" in name]


def test_adapters_of_another_unet_are_refused(world: dict[str, Any], tmp_path: Path) -> None:
    files = dict(world["files"])
    state = files["Motion-Adapter.ckpt"]["state_dict"]
    name = next(key for key in state if key.endswith("to_q_ip.0.weight"))
    files["Motion-Adapter.ckpt"] = {**state, name: torch.ones(33, 32)}
    models.release.save(tmp_path / "rag", files)
    sources = replace(world["sources"], motionrag=tmp_path / "rag")
    with pytest.raises(CheckpointError, match=r"to_q_ip.0.weight` has the shape \[33, 32\]; \[32, 32\] is expected"):
        export_system(svd_system(sources, frames=FRAMES, height=HEIGHT, width=WIDTH), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"rag"}
