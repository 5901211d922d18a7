"""DynamiCrafter's network, sampler and parts against numbers of the released modules (tests/golden/dynamicrafter).

Tolerances as its README suggests: 2e-5 for a pass, 1e-3 for the large values inside the network, 2e-5 for the first step of a
run and 3e-3 for its end: a random network amplifies rounding from step to step.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from by_path import load_by_path  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from motionrt.export.systems.dynamicrafter.parts import EncodeStill, ImageTokens  # noqa: E402
from motionrt.export.systems.dynamicrafter.rows import rows, scales, signal, timesteps  # noqa: E402
from motionrt.export.systems.dynamicrafter.step import DynamiCrafterStep, MotionStep  # noqa: E402
from motionrt.export.systems.dynamicrafter.unet import Conditions, DynamiCrafterUNet  # noqa: E402
from motionrt.export.systems.motionclone.frames import DecodeFrames  # noqa: E402
from motionrt.export.systems.motionrag import Resampler  # noqa: E402

models = load_by_path(Path(__file__).resolve().parents[4] / "tests/helpers/dynamicrafter_models.py")
golden, turned = models.golden, models.turned
AB = signal(zero_terminal=True)
SPACING = {"uniform": "uniform", "uniform_trailing": "trailing"}  # as released, and ours


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Within an absolute `tolerance`."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance


@pytest.fixture(scope="module")
def adapted() -> DynamiCrafterUNet:
    return models.network(motion=24)


@pytest.fixture(scope="module")
def base() -> DynamiCrafterUNet:
    return models.network()


# --- the network ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def passed(net: DynamiCrafterUNet, fs: Tensor | None = None, motion: bool = False) -> Tensor:
    """The golden pass, as the release lays it out."""
    io = golden("unet_forward")
    sample = turned(torch.cat([io["x"], io["c_concat"]], dim=1))
    conditions = Conditions(io["text"], io["image_tokens"], io["motion"] if motion else None)
    return turned(net(sample, net.embedded(io["t"], io["fs"] if fs is None else fs), conditions))


def test_the_network_is_the_released_one(base: DynamiCrafterUNet, adapted: DynamiCrafterUNet) -> None:
    io = golden("unet_forward")
    close(passed(adapted, motion=True), io["y_adapter"], 2e-5)
    close(passed(base), io["y_base"], 2e-5)
    close(passed(base, torch.tensor([10, 10])), io["y_base_default_fs"], 2e-5)
    close(passed(models.network(learned=True)), io["y_base_learned_alpha"], 2e-5)
    for name in ("y_base", "y_base_default_fs", "y_base_learned_alpha"):
        assert (io[name] - io["y_adapter"]).abs().max() > 1e-2  # the variants can be told apart


def test_every_block_is_the_released_one(adapted: DynamiCrafterUNet) -> None:
    io, seen = golden("unet_forward"), dict[str, Tensor]()
    frame = 1  # of sample 0: what the file holds

    def keep(name: str) -> Any:
        return lambda module, given, made: seen.__setitem__(name, made[frame : frame + 1])

    every: list[tuple[str, Any]] = [("init_attn", adapted.init_attn), ("middle_block", adapted.middle_block)]
    for name in ("input_blocks", "output_blocks"):
        every += [(f"{name}.{index}", block) for index, block in enumerate(getattr(adapted, name))]
    hooks = [block[-1].register_forward_hook(keep(f"block.{name}")) for name, block in every]
    inside: Any = adapted.input_blocks[1]
    hooks += [inside[i].register_forward_hook(keep(f"sub.input_blocks.1.{i}")) for i in range(2)]
    cross = inside[1].transformer_blocks[0].attn2
    hooks.append(cross.register_forward_hook(keep("sub.input_blocks.1.1.attn2_out")))
    given: list[Tensor] = []
    hooks.append(cross.register_forward_hook(lambda module, x, made: given.append(x[0][frame : frame + 1])))
    passed(adapted, motion=True)
    for hook in hooks:
        hook.remove()
    close(given[0], io["sub.input_blocks.1.1.attn2_in"], 2e-5)
    assert len(seen) == 29
    for name, value in seen.items():
        close(value, io[name], 1e-3 if name.startswith("block.") else 2e-5)
    for name in ("time_embed", "fps_embedding"):
        numbers = io["t" if name == "time_embed" else "fs"]
        close(getattr(adapted, name)(adapted.sinusoid(numbers)), io[f"sub.{name}"], 2e-5)


def test_norms_have_the_released_eps(adapted: DynamiCrafterUNet) -> None:
    """A very small input: elsewhere a wrong eps is invisible."""
    io, block = golden("eps_probe"), adapted.input_blocks[1]
    x, conditions = io["x"], Conditions(io["text"], io["image_tokens"], io["motion"])
    parts: Any = {
        "spatial.input_blocks.1.1": lambda: block[1](x, conditions, 4),
        "temporal.input_blocks.1.2": lambda: block[2](x, 4),
        "temporal.init_attn.0": lambda: adapted.init_attn[0](x, 4),
        "resblock.input_blocks.1.0": lambda: block[0](x, io["emb"].expand(4, -1), 4),
        "temporal_conv.input_blocks.1.0": lambda: block[0].temopral_conv(x, 4),
        "out": lambda: adapted.out(x),
    }
    with torch.no_grad():
        for name, run in parts.items():
            close(run(), io[name], 1e-5)


def test_passes_of_guidance_share_what_cross_attention_has_not_reached(adapted: DynamiCrafterUNet) -> None:
    io = golden("unet_forward")
    sample = turned(torch.cat([io["x"], io["c_concat"]], dim=1))[:1]
    conditions = Conditions(io["text"], io["image_tokens"], io["motion"])
    with torch.no_grad():
        time = adapted.embedded(io["t"][:1], io["fs"][:1])
        found = adapted(sample, time, conditions, passes=2)
        close(found, adapted(sample.expand(2, -1, -1, -1, -1), time.expand(2, -1), conditions), 2e-5)


@torch.no_grad()
def test_image_tokens_are_split_among_any_frames_or_all_seen_by_all(base: DynamiCrafterUNet) -> None:
    io = golden("unet_forward")
    sample = turned(torch.cat([io["x"], io["c_concat"]], dim=1))[:1]
    found, nets = {}, {"split": base, "all": models.network(frame_tokens="all")}
    for kind, frames in itertools.product(("split", "all"), (2, 4)):
        net = nets[kind]
        conditions = Conditions(io["text"][:1], io["image_tokens"][:1])
        found[kind, frames] = net(sample[:, :frames], net.embedded(io["t"][:1], io["fs"][:1]), conditions)
    close(turned(found["split", 4]), io["y_base"][:1], 2e-5)
    assert (found["all", 2] - found["split", 2]).abs().max() > 1e-3
    assert (found["all", 4] - found["split", 4]).abs().max() > 1e-3


# --- the sampler ----------------------------------------------------------------------------------------------------


def test_the_noise_schedule_is_the_released_one() -> None:
    io = models.stored("schedule")
    np.testing.assert_allclose(AB, io["alphas_cumprod_f64"], atol=1e-15)
    assert AB[-1] == 0 and np.array_equal(AB.astype(np.float32), io["alphas_cumprod"].numpy())
    np.testing.assert_allclose(signal(zero_terminal=False), np.cumprod(1 - io["betas_unrescaled_f64"].numpy()), rtol=1e-12)
    np.testing.assert_allclose(scales(0.3), io["scale_arr"][:1000], atol=1e-7)
    for name in (key for key in io if key.startswith("timesteps.")):
        _, spacing, steps = name.split(".")
        assert timesteps(int(steps), SPACING[spacing]).tolist()[::-1] == io[name].tolist()
    assert len(timesteps(30, "uniform")) == 31


@pytest.mark.parametrize("width", [32, 320])
def test_timesteps_are_embedded_as_released(width: int) -> None:
    net = SimpleNamespace(
        size=replace(models.golden_size(), channels=width), time_embed=[SimpleNamespace(weight=torch.zeros(1))]
    )
    found = DynamiCrafterUNet.sinusoid(net, torch.tensor([0.0, 1, 10, 15, 999]))  # type: ignore[arg-type]
    close(found, models.stored("schedule")[f"timestep_embedding_{width}"], 1e-4)


@pytest.mark.parametrize("name", ["adapter_uniform", "adapter_trailing", "base_uniform"])
def test_rows_hold_the_released_numbers(name: str) -> None:
    io = {key.removeprefix(f"{name}."): value.numpy() for key, value in golden("ddim").items() if key.startswith(f"{name}.")}
    times = io["timesteps"][::-1]
    assert timesteps(5, name.split("_")[1]).tolist() == times.tolist()
    table = rows(times, AB, "v_prediction", 1.0, scales(0.3))
    now, after, sigma = (io[key][::-1].astype(np.float64) for key in ("alphas", "alphas_prev", "sigmas"))
    np.testing.assert_allclose(table[:, 5], sigma, atol=1e-6)
    ratio = (io["scale_arr_prev"] / io["scale_arr"])[::-1]
    draw = np.random.default_rng(0)
    x, v = draw.standard_normal((2, 5))
    x0 = np.sqrt(now) * x - np.sqrt(1 - now) * v
    eps = np.sqrt(now) * v + np.sqrt(1 - now) * x
    following = np.sqrt(after) * ratio * x0 + np.sqrt(np.maximum(0, 1 - after - sigma**2)) * eps
    p0, p1, c0, c1, c2, _ = table.astype(np.float64).T
    ours = p0 * x + p1 * v
    np.testing.assert_allclose(ours, x0, atol=1e-6)
    np.testing.assert_allclose(c0 * x + c1 * ours, following, atol=1e-3 if "trailing" in name else 1e-5)
    assert (c2 == 0).all()


@pytest.mark.parametrize("steps", [7, 11, 14, 15, 20, 25, 30, 50], ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0], ids=str)
def test_rows_are_finite_where_the_released_sampler_is_not(steps: int, eta: float) -> None:
    times = timesteps(steps, "trailing")
    table = rows(times, AB, "v_prediction", eta, scales(0.3))
    assert times[0] == 999 and len(times) == steps and np.isfinite(table).all()
    if eta == 1:
        assert table[0, 2] == 0  # at no signal, full noise: nothing of the old direction is kept


def test_numbers_of_steps_that_end_with_a_crash_in_the_release_are_refused() -> None:
    for steps in (3, 9, 27, 36, 37, 101):
        with pytest.raises(ValueError, match=f"{steps} uniform steps begin at timestep 1000"):
            timesteps(steps, "uniform")
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="allowed: 1 to 1000"):
            timesteps(steps, "trailing")
    with pytest.raises(ValueError, match="allowed: uniform, trailing"):
        timesteps(5, "leading")
    with pytest.raises(ValueError, match="eta is 2; allowed: 0 to 1"):
        rows(timesteps(5, "trailing"), AB, "v_prediction", 2, scales(None))


RUNS = {  # spacing, guidance, guidance_rescale, image_guidance
    "adapter_uniform": ("uniform", 2.0, 0.0, None), "adapter_trailing": ("trailing", 2.0, 0.0, None),
    "base_uniform": ("uniform", 7.5, 0.0, None), "base_trailing_rescale": ("trailing", 7.5, 0.7, None),
    "base_multicond_trailing": ("trailing", 7.5, 0.7, 5.0),
}  # fmt: skip


QUICK = ("adapter_trailing", "base_multicond_trailing")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RUNS])
def test_a_run_gives_the_latents_of_the_released_sampler(
    name: str, base: DynamiCrafterUNet, adapted: DynamiCrafterUNet
) -> None:
    io, (spacing, guidance, rescale, image) = golden("ddim"), RUNS[name]
    motion = name.startswith("adapter")
    nothing, three = (io["text_uncond"], io["image_tokens_uncond"]), image is not None
    step = MotionStep(adapted, *nothing, io["motion_uncond"]) if motion else DynamiCrafterStep(base, *nothing, three=three)
    times, scaled = timesteps(5, spacing), scales(0.3)
    table = torch.from_numpy(rows(times, AB, "v_prediction", 1.0, scaled))
    more = [io["motion_cond"], torch.ones(1)] if motion else [torch.tensor([image])] if image else []
    latents = turned(io["x_T"])
    for index, time in enumerate(times):
        with torch.no_grad():
            latents, x0 = step(
                latents, torch.zeros_like(latents), turned(io["noises"][index]), table[index : index + 1],
                torch.tensor([guidance]), torch.tensor([float(time)]), io["fs"].float(), torch.tensor([rescale]),
                io["text_cond"], io["image_tokens_cond"], io["c_concat"][:, :, 0], *more,
            )  # fmt: skip
        close(turned(latents), io[f"{name}.latents"][index + 1], 2e-5 if not index else 3e-3)
        if f"{name}.pred_x0" in io:
            ratio = scaled[times[index + 1] if index < 4 else time] / scaled[time]
            close(turned(x0) * ratio, io[f"{name}.pred_x0"][index], 2e-5 if not index else 3e-3)


# --- parts ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_image_projector_is_motionrag_s_resampler() -> None:
    io = golden("image_projector")
    projector = Resampler(32, 2, 16, 3, 64, 20, 24, 4)
    projector.load_state_dict(models.part("weights_unet_imageproj", "image_proj_model."))
    close(projector(io["features"]), io["tokens"], 1e-5)


class Clip(nn.Module):
    """Gives back what it is shown."""

    config = SimpleNamespace(image_size=224)

    def forward(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=pixel_values)


def test_clip_sees_a_picture_as_kornia_resizes_it() -> None:
    io = golden("clip_preprocess")
    found = ImageTokens(Clip(), nn.Identity(), (64, 1024))(io["image_u8"].float() / 127.5 - 1)  # type: ignore[arg-type]
    close(found[:, :, ::4, ::4], io["preprocessed_every_4th"], 1e-4)
    close(found[:, :, -1], io["preprocessed_last_row"], 1e-4)


@torch.no_grad()
def test_the_autoencoder_is_diffusers_and_its_posterior_is_drawn_from() -> None:
    io, vae = golden("vae"), models.golden_vae()
    tokens = ImageTokens(Clip(), nn.Identity(), (16, 24))  # type: ignore[arg-type]
    _, latents = EncodeStill(tokens, vae)(io["image"], io["noise"])
    close(vae.quant_conv(vae.encoder(io["image"])), io["moments"], 2e-5)
    close(latents, io["z_scaled"], 2e-5)
    close(DecodeFrames(vae)(io["z_scaled"][:, None])[:, 0], io["decoded"], 5e-5)
