"""The fusions of the release without CAMA: each against its formula in plain torch, and in SVD bundles, up to the video."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from by_path import load_by_path  # noqa: E402
from PIL import Image  # noqa: E402

from motionrt.export.checkpoints.files import CheckpointError  # noqa: E402
from motionrt.export.exporter import export_system  # noqa: E402
from motionrt.export.systems.cogvideox import cogvideox_system  # noqa: E402
from motionrt.export.systems.fusion import RULES, Fusion, fused, weights_of_scores  # noqa: E402
from motionrt.export.systems.motionrag import Resampler  # noqa: E402
from motionrt.export.systems.motionrag_system import Sources  # noqa: E402
from motionrt.export.systems.svd import adapter_blocks, svd_system  # noqa: E402
from motionrt.runtime.cli.main import main  # noqa: E402
from motionrt.runtime.errors import InputError, MemoryStoreError  # noqa: E402
from motionrt.runtime.job import noise_stream  # noqa: E402
from motionrt.runtime.media.video import read_clip, write_video  # noqa: E402
from motionrt.runtime.noise import noise  # noqa: E402
from motionrt.runtime.pipeline import MotionPipeline  # noqa: E402

models = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/tiny_models.py")
plainly = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/diffusers_reference.py")
shared = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/shared_graphs.py")
release = models.release
SIZE, FRAMES, STEPS, SEED, PROMPT = (16, 32), 9, 3, 7, "clip number 1 moves"
slow = pytest.mark.slow


def plain(rule: str, features: Any, cosines: Any) -> Any:
    """The release's fusion (A10) of `features [K, n, E]`, a clip after the other; the distance is 1 - cosine."""
    if rule == "top1":
        return features[0]
    if rule == "concat":
        return torch.cat(list(features))
    near = [1 - (1 - float(cosine)) if rule == "weight" else 1.0 for cosine in cosines]
    return sum(weight / sum(near) * one for weight, one in zip(near, features, strict=True))


# --- the formulas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_fusion_is_the_formula_of_the_release_and_gives_as_many_tokens_whatever_k(rule: str, count: int) -> None:
    draw = torch.Generator().manual_seed(count)
    features = torch.randn(2, 3, 5, 24, generator=draw).transpose(1, 2).contiguous().transpose(1, 2)[:, :count]
    scores = torch.tensor([[0.9, 0.5, 0.2], [0.7, 0.69, 0.01]])[:, :count]
    torch.manual_seed(0)
    proj = Resampler(64, 2, 64, 1, 4, 24, 32, 2)
    if rule == "top1":  # what is kept of a clip is behind the Resampler
        got = Fusion(rule, (4, 32))(proj(features.flatten(0, 1)).unflatten(0, (2, count)))
    else:
        fusion = Fusion(rule, (5, 24), proj)
        got = fusion(features, *([scores] if rule == "weight" else []))
    want = torch.stack([proj(plain(rule, one, near)[None])[0] for one, near in zip(features, scores, strict=True)])
    assert got.shape == (2, 4, 32)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_weights_rise_with_the_cosine_and_sum_to_one() -> None:
    weights = weights_of_scores(torch.tensor([[0.8, 0.4, 0.2], [0.9, 0.9, 0.0], [0.3, -0.2, -1.0]]))
    want = torch.tensor([[4 / 7, 2 / 7, 1 / 7], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(weights, want)


@pytest.mark.parametrize("score", [1.0, 0.3, 1e-30, 0.0, -0.5])
def test_weight_of_equal_scores_is_the_mean(score: float) -> None:
    features = torch.randn(1, 3, 5, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(fused("weight", features, torch.full((1, 3), score)), fused("mean", features))


def test_distances_as_the_release_takes_them_turn_the_weights_round() -> None:
    """A query that is not of unit length, and squared L2: 1 - d is negative, and what is nearer weighs less (A1, A14.12)."""
    clips = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, 1.0], [0.1, 1.0]]), dim=1)
    query = torch.tensor([20.0, 0.0])
    far = 1 - (query - clips).square().sum(dim=1)
    released = far / far.sum()
    assert released[0] < released[1] < released[2]
    ours = weights_of_scores((clips @ query / query.norm())[None])[0]
    assert ours[0] > ours[1] > ours[2]


def test_unknown_fusion_is_refused() -> None:
    with pytest.raises(ValueError, match="fusion is 'median'; allowed: mean, concat, top1, weight"):
        Fusion("median", (5, 24))


# --- the systems ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Downloads of SVD and CogVideoX with neither DINOv2 nor CAMA's file, and the modules and files of SVD's."""
    folder = tmp_path_factory.mktemp("fusions")
    encoders = models.write_encoders(folder)
    shutil.rmtree(folder / "dinov2")
    blocks = {f"transformer.transformer_blocks.{i}.attn1": 64 for i in range(2)}
    parts = models.write_svd(folder / "svd" / "base")
    models.write_cogvideox(folder / "cogvideox" / "base")
    files = release.motionrag_states(adapter_blocks(models.UNET), overlay=False)
    for name, states in (("svd", files), ("cogvideox", release.motionrag_states(blocks, overlay=True))):
        del states["motion_transformer.ckpt"]
        release.save(folder / name / "rag", states)
    return {"folder": folder, "parts": parts | encoders, "files": files}


def sources(folder: Path, model: str, fusion: str) -> Sources:
    return Sources(folder / model / "base", folder / model / "rag", folder / "videomae", fusion=fusion, steps=(2, STEPS))


@pytest.mark.parametrize(("model", "fusion"), [("svd", "weight"), ("cogvideox", "concat"), ("svd", "top1")])
def test_system_has_no_cama_no_appearance_and_a_record_that_the_fusion_reads(
    model: str, fusion: str, downloads: dict[str, Any]
) -> None:
    files = sources(downloads["folder"], model, fusion)
    system = cogvideox_system(files, frames=17) if model == "cogvideox" else svd_system(files, frames=9, height=16, width=32)
    assert system.memory is not None and system.provenance["fusion"] == fusion and "sos_token" not in system.provenance
    part, dims = ("motion", (3, 64)) if fusion == "top1" else ("features", (32, 24))
    assert [(p.name, p.dims) for p in system.memory.record] == [(part, dims)] and system.memory.graphs == (part,)
    assert (system.memory.default, system.memory.max) == ((1, 1) if fusion == "top1" else (9, 9))
    names = ["fusion", "encode", "request", "video"]
    assert list(system.plan)[-5:-1] == names and not {"cama", "appearance"} & {*system.graphs}
    reads = {f"reference_{part}", *(["reference_scores"] if fusion == "weight" else [])}
    assert {*system.graphs["fusion"].inputs} == reads
    assert system.steps[0].inputs["motion"].dims == ("batch", 3, 64)  # as many tokens as with CAMA, whatever K
    assert system.graphs["fusion"].network.weights is None or system.graphs["fusion"].network.weights.keys() == {
        f"proj.{name}" for name in downloads["files"]["motion_proj.ckpt"]
    }


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"fusion": "median"}, "fusion is 'median'; allowed: cama, mean, concat, top1, weight"),
        ({"fusion": "cama"}, "dinov2 is None, and CAMA reads what it sees"),
        ({"fusion": "mean", "dinov2": Path("x"), "target_range": "released"}, "dinov2, target_range: for fusion cama"),
    ],
    ids=["unknown", "cama without dinov2", "what is of cama alone"],
)
def test_sources_that_do_not_go_together_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        Sources(Path("base"), Path("rag"), Path("videomae"), **options)


# --- bundles --------------------------------------------------------------------------------------------------------


def command(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert not stopped.value.code, arguments


@pytest.fixture(scope="module")
def world(downloads: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """SVD bundles of every fusion, memories for them, three clips and a still. One bundle is written by the commands, with a
    call for each branch of guidance."""
    folder: Path = downloads["folder"]
    draw = np.random.default_rng(3)
    still = draw.integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(still).save(folder / "still.png")
    (folder / "clips").mkdir()
    for index in range(3):
        ramp = np.linspace(20 * index, 200, 3 * FRAMES).astype(np.uint8)[:, None, None, None]
        pictures = np.broadcast_to(ramp, (3 * FRAMES, *SIZE, 3)) + draw.integers(0, 40, (1, *SIZE, 3), np.uint8)
        write_video(folder / "clips" / f"{index}.mp4", np.ascontiguousarray(pictures.astype(np.uint8)), 24)
        (folder / "clips" / f"{index}.txt").write_text(f"clip number {index} moves")
    with shared.shared_graphs(shared.store(tmp_path_factory)):
        command(
            "export", "svd", "--base", folder / "svd/base", "--motionrag", folder / "svd/rag", "--videomae",
            folder / "videomae", "--fusion", "weight", "--frames", FRAMES, "--height", SIZE[0], "--width", SIZE[1],
            "--without-torch", "--split-guidance", "-o", folder / "weight",
        )  # fmt: skip
        for fusion in ("mean", "concat", "top1"):
            system = svd_system(sources(folder, "svd", fusion), frames=FRAMES, height=SIZE[0], width=SIZE[1])
            export_system(system, folder / fusion, programs=False)
    for name, bundle in (("memory", "weight"), ("memory-top1", "top1")):
        command("memory", "create", folder / name, "--bundle", folder / bundle)
        command("memory", "add", folder / name, folder / "clips", "--bundle", folder / bundle)
    return {**downloads, "still": still}


@slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fusion", RULES)
def test_bundle_gives_the_video_of_diffusers_pipeline_with_the_fused_motion(fusion: str, world: dict[str, Any]) -> None:
    folder, parts, files = world["folder"], world["parts"], world["files"]
    memory = folder / ("memory-top1" if fusion == "top1" else "memory")  # one memory is for all that fuse features
    with MotionPipeline.from_bundle(folder / fusion, memory, threads=1) as pipeline:
        manifest = pipeline.bundle.manifest
        for count in (1,) if fusion == "top1" else (1, 3):
            job = pipeline.start(pipeline.request(world["still"], PROMPT, references=count, seed=SEED, steps=STEPS))
            job.keep = True
            result = pipeline.result(job)
            assert len(result.references) == count and result.references[0].caption == PROMPT
            kept = torch.stack([torch.from_numpy(next(iter(r.record.values()))) for r in result.references])
            one = plain(fusion, kept, [r.score for r in result.references])[None]
            motion = one if fusion == "top1" else plainly.projected(files, one)
            np.testing.assert_allclose(job.values["motion"], motion, atol=1e-5)

        def draw(name: str, step: int, shape: tuple[int, ...]) -> Any:
            return noise(SEED, noise_stream(manifest, name), step, shape)

        latents, _ = plainly.svd_video(
            models.UNET, models.EULER, parts, files, still=world["still"], motion=motion, frames=FRAMES, steps=STEPS,
            unconditional=plainly.motion_tokens(parts, files, torch.zeros(1, FRAMES, 3, *SIZE)), draw=draw,
        )  # fmt: skip
        np.testing.assert_allclose(job.values["latents"], latents, atol=2e-4 * max(1.0, float(latents.abs().max())))


@slow
@pytest.mark.timeout(900)
def test_memory_keeps_the_features_that_the_motion_encoder_gives(world: dict[str, Any]) -> None:
    folder, parts = world["folder"], world["parts"]
    with MotionPipeline.from_bundle(folder / "mean", folder / "memory", threads=1) as pipeline:
        (found,) = pipeline(world["still"], PROMPT, references=1, steps=2).references
        clip = torch.from_numpy(read_clip(folder / "clips" / "1.mp4", FRAMES, *SIZE, pipeline.bundle.manifest.output.fps))
    want = plainly.video_features(parts, clip[None])[0]
    np.testing.assert_allclose(found.record["features"], want, atol=2e-3 * float(want.abs().max()))


@slow
@pytest.mark.timeout(900)
def test_nearer_clip_weighs_more_and_clips_by_hand_weigh_the_same(world: dict[str, Any]) -> None:
    folder, motion = world["folder"], {}
    for fusion in ("weight", "mean"):
        with MotionPipeline.from_bundle(folder / fusion, folder / "memory", threads=1) as pipeline:
            (first, second) = pipeline(world["still"], PROMPT, references=2, steps=2).references
            for name, near in (("equal", (0.4, 0.4)), ("first", (0.9, 1e-6)), ("by hand", (float("nan"),) * 2)):
                given = [replace(first, score=near[0]), replace(second, score=near[1])]
                job = pipeline.start(pipeline.request(world["still"], PROMPT, references=given, steps=2))
                job.keep = True
                pipeline.result(job)
                motion[fusion, name] = np.asarray(job.values["motion"])
            job = pipeline.start(pipeline.request(world["still"], PROMPT, references=[first], steps=2))
            job.keep = True
            pipeline.result(job)
            motion[fusion, "alone"] = np.asarray(job.values["motion"])
    for name in ("equal", "by hand"):
        np.testing.assert_allclose(motion["weight", name], motion["mean", name], atol=1e-5)
    np.testing.assert_allclose(motion["weight", "first"], motion["weight", "alone"], atol=1e-4)
    assert np.abs(motion["weight", "first"] - motion["mean", "first"]).max() > 1e-3


@slow
@pytest.mark.timeout(900)
def test_top1_refuses_another_number_of_clips_and_a_memory_of_features_before_any_graph(world: dict[str, Any]) -> None:
    folder = world["folder"]
    with MotionPipeline.from_bundle(folder / "top1", folder / "memory-top1", threads=1) as pipeline:
        with pytest.raises(InputError, match="references is 3; this bundle takes 1 to 1"):
            pipeline.start(pipeline.request(world["still"], PROMPT, references=3))
    with pytest.raises(MemoryStoreError, match="was made by other encoders"):
        MotionPipeline.from_bundle(folder / "top1", folder / "memory", threads=1)


@slow
@pytest.mark.timeout(900)
def test_commands_export_inspect_and_generate_without_cama(world: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder = world["folder"]
    command("inspect", folder / "weight")
    assert "fusion" in capsys.readouterr().out
    command(
        "generate", "-b", folder / "weight", "-m", folder / "memory", "-i", folder / "still.png", "-p", PROMPT, "-k", 3,
        "--steps", 2, "-o", folder / "video.mp4",
    )  # fmt: skip
    assert read_clip(folder / "video.mp4", FRAMES, *SIZE, 7.0).shape == (FRAMES, 3, *SIZE)
