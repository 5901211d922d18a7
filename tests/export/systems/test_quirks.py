"""The quirks that change numbers, in torch: our denoiser is diffusers' pipeline's, and is not once any one of them is broken.

Without an export, so it is quick; the bundles' own tests do the same through ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from by_path import load_by_path  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from motionrt.export.systems import cogvideox_step as cogvideox  # noqa: E402
from motionrt.export.systems import svd_step as svd  # noqa: E402
from motionrt.export.systems.cogvideox import EncodeCausal  # noqa: E402
from motionrt.export.systems.steps import cogvideox_step, svd_step  # noqa: E402
from motionrt.export.systems.svd import EncodeStill  # noqa: E402
from motionrt.runtime.loop import dynamic_guidance  # noqa: E402
from motionrt.runtime.noise import noise  # noqa: E402

models = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/tiny_models.py")
plainly = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/diffusers_reference.py")
SEED, STEPS, SIZE, LAYERS = 3, 4, (16, 32), 3
Change = Callable[[Any], Any]


def same(value: Any) -> Any:
    return value


def apart(ours: Any, theirs: Any) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(ours - theirs.numpy()).max() / theirs.abs().max())


def draw(name: str, step: int, shape: tuple[int, ...]) -> Any:
    """What both sides draw: another stream for the loop than for the encoder."""
    return noise(SEED, 0 if name == "video" else 1, step, shape)


def denoise(step: Any, shape: tuple[int, ...], state: Any, timesteps: Any, rows: Any, guidance: Any, noisy: Any) -> Any:
    """The latents `[1, F, C, H, W]` after all rows of a torch step; `noisy(t)`: what is drawn in step t."""
    x, previous = draw("video", 0, (1, *shape)), np.zeros((1, *shape), np.float32)
    scales = np.broadcast_to(np.asarray(guidance, np.float32), len(rows))
    for t, row in enumerate(rows):
        given = {
            **state, "latents": x, "previous_x0": previous, "noise": noisy(t), "timestep": timesteps[t : t + 1],
            "coefficients": row[None], "guidance": scales[t : t + 1],
        }  # fmt: skip
        with torch.no_grad():
            x, previous = (value.numpy() for value in step(**{key: torch.tensor(value) for key, value in given.items()}))
    return x


def tokens(seed: int) -> Any:
    return torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(seed))


def released(folder: Path, layers: int) -> dict[Any, Any]:
    """A CogVideoX model's files, its modules, and a request."""
    config = models.cogvideox_config(layers)
    parts = models.write_cogvideox(folder, config)
    files = models.release.motionrag_states(
        {f"transformer.transformer_blocks.{i}.attn1": 64 for i in range(layers)}, overlay=True
    )
    image = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids = [torch.tensor([[5, 9, 30, 1, 0, 0]]), torch.tensor([[7, 1, 0, 0, 0, 0]])]
    return {"folder": folder, "config": config, "parts": parts, "files": files, "image": image, "ids": ids}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return released(tmp_path_factory.mktemp("cogvideox"), LAYERS)


def theirs(video: dict[str, Any], frames: int = 17, **choices: Any) -> Any:
    key = (frames, *sorted(choices.items()))
    if key in video:
        return video[key]
    latents, _, draws = plainly.cogvideox_video(
        video["folder"], video["config"], models.SCHEDULER, video["parts"], video["files"], image=video["image"],
        ids=video["ids"], motion=tokens(1), unconditional=tokens(2), frames=frames, steps=STEPS, draw=draw, **choices,
    )  # fmt: skip
    # what diffusers draws: two noises between the ends, the first of which never reaches the latents
    assert draws == ([0] * STEPS if choices.get("kind") == "ddim" else [1, 2, 2, 1])
    video[key] = latents
    return latents


def ours(
    video: dict[str, Any], frames: int = 17, *, kind: str = "dpm", guidance: float = 3.0, dynamic: bool = False,
    scale: float = 1.0, positions: str = "released", overlay: bool | None = None, named: Change = same, rows: Change = same,
    swapped: bool = False, late: int = 0,
) -> Any:  # fmt: skip
    """Latents of our step in torch; the arguments from `overlay` on break it."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    count, config, files = (frames - 1) // 4 + 1, video["config"], video["files"]
    shape = (count, config["out_channels"], config["sample_height"], config["sample_width"])
    state = {f"transformer.{k}": v for k, v in load_file(next((video["folder"] / "transformer").glob("*.safetensors"))).items()}
    if (frames != 49) if overlay is None else overlay:
        state |= files["17_frames.ckpt"]["state_dict"]
    adapters = {k: v for k, v in files["Motion-Adapter.ckpt"]["state_dict"].items() if k.startswith("transformer.")}
    state |= {name: adapters[named(name)] for name in adapters}
    step = cogvideox_step(config, latents=shape, motion=(3, 64), positions=positions)
    step.load_state_dict(state, strict=False, assign=True)
    motion, step.unconditional_motion = (tokens(2), tokens(1)) if swapped else (tokens(1), tokens(2))
    scheduler = (CogVideoXDPMScheduler if kind == "dpm" else CogVideoXDDIMScheduler)(**models.SCHEDULER)
    timesteps, coefficients = cogvideox.solver_rows(scheduler, STEPS)
    with torch.no_grad():
        text, negative = (video["parts"]["text_encoder"](one)[0] for one in video["ids"])
        encode = EncodeCausal(video["parts"]["vae"], count)
        still = encode(video["image"], torch.from_numpy(draw("encode", 0, (1, *shape[1:]))))
    state = {
        "text": text, "negative_text": negative, "motion": motion, "image_latents": still,
        "motion_scale": torch.tensor([scale]),
    }  # fmt: skip
    scales = dynamic_guidance(guidance, timesteps) if dynamic else guidance
    numbers = {name: value.numpy() for name, value in state.items()}
    noisy = lambda index: draw("video", index + 1 - late, (1, *shape))  # noqa: E731
    return denoise(step, shape, numbers, timesteps, rows(coefficients), scales, noisy)


@pytest.mark.parametrize(
    "choices",
    [
        {"kind": "dpm"}, {"kind": "ddim", "scale": 0.0}, {"kind": "dpm", "guidance": 1.0, "scale": 0.5},
        {"kind": "ddim", "dynamic": True}, {"kind": "dpm", "frames": 49},
    ],
    ids=["dpm", "ddim, no adapters", "no guidance, motion 0.5", "dynamic guidance", "49 frames"],
)  # fmt: skip
def test_denoiser_is_that_of_diffusers_pipeline(choices: dict[str, Any], video: dict[str, Any]) -> None:
    assert apart(ours(video, **choices), theirs(video, **choices)) < 1e-5


def test_denoiser_of_all_42_blocks_is_that_of_diffusers_pipeline(tmp_path: Path) -> None:
    whole = released(tmp_path, 42)
    for frames in (17, 49):
        assert apart(ours(whole, frames), theirs(whole, frames)) < 1e-5


def without_earlier(rows: Any) -> Any:
    return np.where(np.arange(6) == 4, np.float32(0), rows)


@pytest.mark.parametrize(
    ("broken", "choices"),
    [
        ({"positions": "learned"}, {}), ({"overlay": False}, {}), ({"overlay": True}, {"frames": 49}),
        ({"guidance": 1.0}, {}), ({"dynamic": True}, {}), ({"scale": 0.5}, {}), ({"scale": 0.0}, {}), ({"swapped": True}, {}),
        ({"named": lambda name: name.replace("blocks.0.", "blocks.1.")}, {}),
        ({"named": lambda name: name.replace("to_k_ip", "to_v_ip")}, {}), ({"late": 1}, {}), ({"rows": without_earlier}, {}),
    ],
    ids=[
        "learned positions at 17", "17_frames left out", "17_frames taken at 49", "no guidance", "dynamic guidance",
        "half the motion", "no motion", "unconditional motion for the predicted", "another block's adapter",
        "the values' projection for the keys'", "noise of the step before", "solver without the earlier prediction",
    ],
)  # fmt: skip
def test_every_broken_quirk_shows(broken: dict[str, Any], choices: dict[str, Any], video: dict[str, Any]) -> None:
    assert apart(ours(video, **choices, **broken), theirs(video, **choices)) > 0.01


def test_49_frames_with_recomputed_positions_show(video: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cogvideox.fix_positions

    def recomputed(embed: Any, *grid: Any) -> None:
        embed.sample_frames = 17  # so that 49 is not the model's own
        plain(embed, *grid)

    monkeypatch.setattr(cogvideox, "fix_positions", recomputed)
    assert apart(ours(video, 49), theirs(video, 49)) > 0.01


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An SVD model's modules and files, a still, and what diffusers' pipeline makes of it."""
    config, frames = models.WHOLE_UNET, 5
    parts = models.write_svd(tmp_path_factory.mktemp("svd"), config)
    blocks = {f"unet.{path}": a.to_q.in_features for path, a in svd.spatial_attentions(parts["unet"])}
    assert len(blocks) == len(list(svd.temporal_attentions(parts["unet"]))) == 16
    files = models.release.motionrag_states(blocks, overlay=False)
    still = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    want, _ = plainly.svd_video(
        config, models.EULER, parts, files, still=still, motion=tokens(1), unconditional=tokens(2), frames=frames, steps=3,
        draw=draw,
    )  # fmt: skip
    return {"config": config, "frames": frames, "parts": parts, "files": files, "still": still, "want": want}


@pytest.mark.parametrize("broken", [None, "first guidance", "motion", "noise level", "frames per second"])
def test_svd_denoiser_is_that_of_diffusers_pipeline_until_it_is_broken(broken: str | None, film: dict[str, Any]) -> None:
    from diffusers import EulerDiscreteScheduler

    config, frames, parts, files, still, want = film.values()
    level = 0.2 if broken == "noise level" else 0.02
    step = svd_step(
        config, latents=(frames, 4, 8, 16), motion=(3, 64), unconditional=tokens(2),
        time_ids=(7.0 if broken == "frames per second" else 6.0, 127.0, level),
        first_guidance=3.0 if broken == "first guidance" else 1.0,
    )  # fmt: skip
    state = {f"unet.{k}": v for k, v in parts["unet"].state_dict().items()}
    adapters = {k: v for k, v in files["Motion-Adapter.ckpt"]["state_dict"].items() if k.startswith("unet.")}
    step.load_state_dict(state | adapters, strict=False, assign=True)
    timesteps, rows = svd.euler_rows(EulerDiscreteScheduler(**models.EULER), 3)
    image = torch.from_numpy(still).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        encode = EncodeStill(parts["image_encoder"], parts["vae"], SIZE)
        context, latents = encode(image, torch.from_numpy(draw("encode", 0, (1, 3, *SIZE))))
    state = {
        "image_context": context.numpy(), "image_latents": latents.numpy(), "motion_scale": np.ones(1, np.float32),
        "motion": tokens(3 if broken == "motion" else 1).numpy(),
    }  # fmt: skip
    shape = (frames, 4, 8, 16)
    got = denoise(step, shape, state, timesteps, rows, 3.0, lambda index: np.zeros((1, *shape), np.float32))
    assert apart(got, want) < 1e-5 if broken is None else apart(got, want) > 1e-3
