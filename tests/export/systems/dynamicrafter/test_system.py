"""DynamiCrafter bundles from released files against its pipeline in plain torch, same noise; and counts of the real sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from by_path import load_by_path  # noqa: E402
from safetensors import safe_open  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from motionrt.export.checkpoints.motionrag_files import DYNAMICRAFTER, ResamplerSize, SosToken  # noqa: E402
from motionrt.export.exporter import export_system  # noqa: E402
from motionrt.export.systems.dynamicrafter.system import DynamiCrafterSources, dynamicrafter_system  # noqa: E402
from motionrt.export.systems.dynamicrafter.unet import Conditions, DynamiCrafterUNet, Size, adapted  # noqa: E402
from motionrt.runtime.bundle.bundle import Bundle  # noqa: E402

HELPERS = Path(__file__).resolve().parents[4] / "tests/helpers"
models = load_by_path(HELPERS / "dynamicrafter_models.py")
reference = load_by_path(HELPERS / "dynamicrafter_reference.py")
plainly = load_by_path(HELPERS / "diffusers_reference.py")
plain_run = load_by_path(HELPERS / "plain_run.py")
shared = load_by_path(Path(__file__).resolve().parents[4] / "tests/helpers/shared_graphs.py")
HEIGHT, WIDTH, SEED, PROMPT = 16, 32, 5, "w5 w9"


# --- counts of the published sizes, from structure alone --------------------------------------------------------------

WEIGHTS = {  # parameters, tensors
    "1024, 512": (Size(), 1_438_854_980, 1516), "256": (Size(learned=True), 1_438_854_996, 1532),
    "MotionRAG": (Size(motion=1024), 1_476_804_420, 1564),
}  # fmt: skip


@pytest.mark.parametrize("model", WEIGHTS)
def test_the_network_has_the_weights_of_the_published_one(model: str) -> None:
    size, parameters, tensors = WEIGHTS[model]
    with torch.device("meta"):
        state = DynamiCrafterUNet(size).state_dict()
    assert (sum(value.numel() for value in state.values()), len(state)) == (parameters, tensors)


def test_the_resampler_and_the_adapters_have_the_weights_of_the_published_ones() -> None:
    with torch.device("meta"):
        projector = ResamplerSize(1024, 4, 12, 256, 1280, 1024, 4).build().state_dict()
    assert (sum(value.numel() for value in projector.values()), len(projector)) == (48_787_456, 51)
    widths = adapted(Size())
    assert sorted(widths.values()) == [320] * 5 + [640] * 5 + [1280] * 6
    queries, keys = sum(width**2 for width in widths.values()), sum(1024 * width for width in widths.values())
    assert (queries, keys) == (12_390_400, 12_779_520)


# TFLOP of one forward as the specification counts the released code, which projects 16 equal copies of the text
FLOPS = {"1024": ((72, 128), 52.336), "512": ((40, 64), 12.603), "256": ((32, 32), 4.904)}


@pytest.mark.slow
@pytest.mark.parametrize("model", FLOPS)
def test_a_forward_takes_the_published_flops_but_for_copies_of_the_text(model: str) -> None:
    latents, wanted = FLOPS[model]
    with torch.device("meta"):
        net = DynamiCrafterUNet(Size())
        sample, one = torch.empty(1, 16, 8, *latents), torch.empty(1)
        conditions = Conditions(torch.empty(1, 77, 1024), torch.empty(1, 256, 1024))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(sample, net.embedded(one, one), conditions)
    copies = 15 * 2 * 2 * 77 * 1024 * sum(adapted(Size()).values())  # of the text: keys and values for 15 frames more
    assert (counter.get_total_flops() + copies) / 1e12 == pytest.approx(wanted, abs=5e-4)


# --- bundles ----------------------------------------------------------------------------------------------------------


class World:
    """Small released files, the bundle that is exported of them, and what a request of it is given."""

    def __init__(self, folder: Path, store: Path, model: str, frames: int, motion: bool, **choices: Any) -> None:
        self.model, self.frames, self.choices = model, frames, choices
        self.parts = models.write(folder / "base", model)
        given: dict[str, Any] = {}
        self.files: dict[str, Any] | None = None
        if motion:
            encoders = models.models.write_encoders(folder)
            self.files = models.models.release.motionrag_states(models.blocks(), overlay=False, names=DYNAMICRAFTER)
            models.models.release.save(folder / "rag", self.files)
            given = {"motionrag": folder / "rag", "videomae": folder / "videomae"}
            if "fusion" not in choices:
                given |= {"dinov2": folder / "dinov2", "sos": SosToken(seed=plainly.SOS_SEED)}
        sources = DynamiCrafterSources(folder / "base", folder / "base" / "tokenizer", model, **given, **choices)
        with shared.shared_graphs(store):
            export_system(
                dynamicrafter_system(sources, frames=frames, height=HEIGHT, width=WIDTH), folder / "bundle", programs=False
            )
        self.run = plain_run.PlainRun(Bundle.open(folder / "bundle"))
        bundle, draw = self.run.bundle, np.random.default_rng(0)
        self.ids, self.empty = (bundle.tokenize("text", text, models.LENGTH)["input_ids"] for text in (PROMPT, ""))
        self.image = torch.from_numpy(draw.integers(0, 256, (1, 3, HEIGHT, WIDTH), np.uint8)).float() / 127.5 - 1
        self.values = {"image": self.image.numpy(), "prompt.input_ids": self.ids}
        self.more: dict[str, Any] = {}
        if motion:
            clips = torch.from_numpy(draw.integers(0, 256, (2, frames, 3, HEIGHT, WIDTH), np.uint8)).float() / 127.5 - 1
            tokens = plainly.motion_tokens(encoders, self.files, torch.cat([clips, torch.zeros(1, *clips.shape[1:])]))
            self.more["unconditional"] = tokens[2:]
            if "fusion" in choices:
                self.more["motion"] = self.weighed(encoders, clips)
                return
            looks = plainly.appearance_tokens(encoders, self.files, torch.cat([clips[:, 0], self.image]))
            ours = self.run.call("motion", {"video": clips.numpy()})["motion"]
            theirs = self.run.call("appearance", {"image": clips[:, 0].numpy()})["appearance"]
            self.values |= {"reference_motion": ours[None], "reference_appearance": theirs[None]}
            self.more["motion"] = plainly.predicted_motion(self.files, tokens[:2], looks[:2], looks[2:])

    def weighed(self, encoders: dict[str, Any], clips: Any) -> Any:
        """Motion of fusion `weight` (A10) in plain torch, of clips whose cosines are 0.6 and 0.2; the request's values too."""
        features = plainly.video_features(encoders, clips)
        ours = self.run.call("features", {"video": clips.numpy()})["features"]
        np.testing.assert_allclose(ours, features, atol=2e-5 * float(features.abs().max()))
        self.values |= {"reference_features": ours[None], "reference_scores": np.array([[0.6, 0.2]], np.float32)}
        return plainly.projected(self.files, (0.75 * features[0] + 0.25 * features[1])[None])

    def compare(self, spacing: str, asked: int, steps: int, guidance: float, fs: float, rescale: float, **more: Any) -> None:
        """A bundle's latents and frames are those of the plain pipeline."""
        draw = plain_run.drawn(SEED)
        numbers = {"fs": fs, "guidance_rescale": rescale}
        if "image_guidance" in more:
            numbers["image_guidance"] = more["image_guidance"]
        if self.files is not None:
            numbers["motion_scale"] = more.get("scale", 1.0)
        values = {**self.values, **{name: np.array([value], np.float32) for name, value in numbers.items()}}
        result = self.run(values, draw, schedules={"video": (spacing, steps)}, columns={"guidance": guidance})
        latents, frames = reference.plain_video(
            self.parts, self.files, self.model, image=self.image, ids=torch.from_numpy(self.ids),
            empty=torch.from_numpy(self.empty), frames=self.frames, asked=asked, spacing=spacing, guidance=guidance,
            rescale=rescale, fs=fs, draw=draw, frame_tokens=self.choices.get("frame_tokens", "split"), **self.more, **more,
        )  # fmt: skip
        np.testing.assert_allclose(result["latents"], latents, atol=5e-4 * max(1.0, float(latents.abs().max())))
        assert result["video"].shape == (1, self.frames, 3, HEIGHT, WIDTH)
        np.testing.assert_allclose((result["video"][0].clip(-1, 1) + 1) / 2, frames, atol=1 / 255)  # a step of 8 bits


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    """By name, made once: "moved" is the 1024 model with MotionRAG at 8 frames, "weighed" the same without CAMA,
    "alone" the 256 model with three passes."""
    made: dict[str, World] = {}
    store = shared.store(tmp_path_factory)

    def get(name: str) -> World:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = {
                "moved": lambda: World(folder, store, "1024", 8, True),
                "weighed": lambda: World(folder, store, "1024", 8, True, fusion="weight"),
                "alone": lambda: World(folder, store, "256", 16, False, passes=3, frame_tokens="all"),
            }[name]()
        return made[name]

    return get


MOVED = {  # spacing, steps that are asked of the release, steps that it makes, guidance, fs, guidance_rescale
    "as MotionRAG runs it": ("uniform", 30, 31, 2.0, 15, 0.0, {}),
    "50 steps where MotionRAG's copy gives NaN": ("trailing", 50, 50, 7.5, 10, 0.7, {}),
    "no adapters": ("trailing", 4, 4, 7.5, 10, 0.7, {"scale": 0.0}),
    "no guidance, half the motion": ("uniform", 5, 5, 1.0, 5, 0.0, {"scale": 0.5}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", MOVED)
def test_bundle_with_motionrag_gives_the_video_of_the_plain_pipeline(case: str, worlds: Callable[[str], World]) -> None:
    *numbers, more = MOVED[case]
    worlds("moved").compare(*numbers, **more)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_bundle_of_a_fusion_without_cama_gives_the_video_of_the_plain_pipeline(worlds: Callable[[str], World]) -> None:
    worlds("weighed").compare("uniform", 5, 5, 2.0, 15, 0.0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("spacing", "asked"), [("uniform", 50), ("trailing", 15)])
def test_bundle_of_the_256_model_with_three_passes_gives_the_video_of_the_plain_pipeline(
    spacing: str, asked: int, worlds: Callable[[str], World]
) -> None:
    worlds("alone").compare(spacing, asked, asked, 7.5, 3, 0.3, image_guidance=5.0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_does_not_change_in_the_loop_is_not_in_the_step(worlds: Callable[[str], World]) -> None:
    world = worlds("moved")
    manifest = world.run.bundle.manifest
    assert list(manifest.inputs) == ["image", "prompt", "motion_scale", "guidance", "fs", "guidance_rescale"]
    assert [node.graph for node in manifest.nodes] == ["text", "appearance", "cama", "encode", "request", "video", "pictures"]
    loop = manifest.loops["video"]
    assert loop.default == ("uniform", 31) and loop.noise == "c3"
    assert 30 in loop.schedules["trailing"] and 30 in loop.schedules["uniform"] and 3 not in loop.schedules["uniform"]
    with safe_open(world.run.bundle.graph_path("step").with_suffix(".safetensors"), framework="numpy") as step:
        names = list(step.keys())
    assert any("attn1" in name for name in names)
    for name in names:
        crossed = "_1_transformer_blocks_0_attn2_" in name or ".1.transformer_blocks.0.attn2." in name
        assert not (crossed and any(part in name for part in ("to_k", "to_v", "to_q_a"))), name
        assert "time_embed" not in name and "fps_embedding" not in name
    alone = worlds("alone").run.bundle.manifest
    assert alone.memory is None and "motion_scale" not in alone.inputs and alone.inputs["image_guidance"].default == 7.5


def test_sources_ask_for_what_they_need(tmp_path: Path) -> None:
    plain = DynamiCrafterSources(tmp_path, tmp_path)
    assert plain.retrieval() is None
    rag = replace(plain, motionrag=tmp_path, videomae=tmp_path, dinov2=tmp_path, steps=(2,)).retrieval()
    assert rag is not None and rag.steps == (2,)
