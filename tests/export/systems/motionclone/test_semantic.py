"""Semantic guidance against its formulas written again, plainly, on the golden UNet; off, it is the guided step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from by_path import load_by_path  # noqa: E402
from torch import Tensor  # noqa: E402

from motionrt.export.checkpoints.animatediff_files import released_name  # noqa: E402
from motionrt.export.systems.motionclone.rows import noise_schedule  # noqa: E402
from motionrt.export.systems.motionclone.semantic import (  # noqa: E402
    SEMANTIC,
    SemanticExtract,
    SemanticStep,
    found,
    pooled,
    regions,
)
from motionrt.export.systems.motionclone.step import CHANGES, GUIDED, Extract, GuidedStep, PlainStep  # noqa: E402
from motionrt.export.systems.motionclone.unet import TappedUNet, motion_unet  # noqa: E402

models = load_by_path(Path(__file__).resolve().parents[4] / "tests/helpers/animatediff_models.py")
golden = models.golden
CONFIG: dict[str, Any] = {
    "block_out_channels": (8, 16, 24, 32), "num_attention_heads": 4, "motion_num_attention_heads": 4, "norm_num_groups": 4,
    "cross_attention_dim": 20, "use_motion_mid_block": False,
}  # fmt: skip
LEVEL = float(noise_schedule(models.SCHEDULER)[0][400])
TOKEN, SEMANTIC_WEIGHT = 2.0, 300.0


def tapped(semantic: bool) -> TappedUNet:
    stored, network = golden("unet"), motion_unet(CONFIG)
    state = {name: stored[released_name(name)] for name in network.state_dict() if not name.endswith("pos_embed.pe")}
    network.load_state_dict(state, strict=False)
    return TappedUNet(network.requires_grad_(False), semantic=semantic).eval()


@pytest.fixture(scope="module")
def unets() -> tuple[TappedUNet, TappedUNet]:
    """With the attention to text tapped, and without."""
    return tapped(True), tapped(False)


@pytest.fixture(scope="module")
def inputs(unets: tuple[TappedUNet, TappedUNet]) -> dict[str, Tensor]:
    """What a step reads: golden latents, texts and clip, the masks of the clip, an `app` of its own."""
    step, clip = golden("guided_step"), golden("representation")
    turned = lambda x: x.transpose(1, 2)  # noqa: E731
    extract = SemanticExtract(unets[0], clip["text_null"], 400, LEVEL, 1.0)
    read = (turned(clip["z0"])[:, None], torch.ones(1, 1), turned(clip["noise"]))
    motion = extract(*read, step["text"][1:], torch.tensor([TOKEN]))
    plain = Extract(unets[1], clip["text_null"], 400, LEVEL, 1.0)(*read)
    for one, wanted in zip(motion, plain, strict=False):
        torch.testing.assert_close(one, wanted, atol=1e-5, rtol=1e-5)
    one = torch.ones(1)
    return {
        "latents": turned(step["x_t"]), "coefficients": torch.tensor([[1.9, -1.6, 0, 1, 0.5, 0.86, 0.8]]),
        "guidance": 8.5 * one, "timestep": step["t"].float(),
        "text": step["text"][None, 1], "negative_text": step["text"][None, 0],
        "weight": 100 * one, "motion_scale": 0.5 * one, **dict(zip(("motion_weights", "motion_targets"), motion, strict=False)),
        "app": turned(step["x_t"]).flip(-1), "semantic": SEMANTIC_WEIGHT * one, "object_token": TOKEN * one,
        "foreground": motion[2], "background": motion[3],
    }  # fmt: skip


def watched(unet: TappedUNet, latents: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Attention to `TOKEN` `[F, P]` and keys `[P, F, C]` of one pass, by hooks on the layers that make queries and keys."""
    kept: dict[str, Tensor] = {}
    layers = {name: layer for name, layer in unet.unet.up_blocks[1].named_modules() if name.endswith((".to_q", ".to_k"))}
    hooks = [
        layer.register_forward_hook(lambda _layer, _inputs, output, name=name: kept.__setitem__(name, output))
        for name, layer in layers.items()
    ]
    unet.head(latents, unet.embedded(inputs["timestep"]), inputs["text"])
    for hook in hooks:
        hook.remove()
    words = []
    for i in range(3):
        name = f"attentions.{i}.transformer_blocks.0.attn2"
        query, key = kept[f"{name}.to_q"].reshape(16, 8, 4, 6), kept[f"{name}.to_k"].reshape(7, 4, 6)
        scores = torch.einsum("fphc,nhc->fphn", query, key) / 6**0.5
        words.append(scores.softmax(-1)[..., int(TOKEN)].mean(2))
    keys = [kept[f"motion_modules.{i}.transformer_blocks.0.attn{j}.to_k"] for i in range(3) for j in (1, 2)]
    return sum(words) / 3, keys


def features(keys: Tensor, mask: np.ndarray) -> list[Tensor]:
    """Of each frame, by loops: a mean over places, weighted."""
    made = []
    for frame in range(16):
        weights = mask[frame] / max(mask[frame].sum(), 1e-6)
        made.append(sum(float(weights[place]) * keys[place, frame] for place in range(8)))
    return made


def plain_energy(unet: TappedUNet, inputs: dict[str, Tensor], latents: Tensor, token: bool = True) -> Tensor:
    """The formula of semantic.py, frame by frame and place by place."""
    words, others = watched(unet, inputs["app"], inputs)
    _, keys = watched(unet, latents, inputs)
    low, high = words.amin(1, keepdim=True), words.amax(1, keepdim=True)
    mask = ((words - low) / (high - low) > 0.3).double().numpy()
    assert 0.1 < mask.mean() < 0.9
    foreground, background = (inputs[name][0].double().numpy() for name in ("foreground", "background"))
    pairs = [(foreground, mask), (background, 1 - mask)] if token else [(np.ones((16, 8)), np.ones((16, 8)))]
    total = torch.zeros(())
    for key, other in zip(keys, others, strict=True):
        for own, theirs in pairs:
            two = zip(features(key, own), features(other.detach(), theirs), strict=True)
            total = total + torch.stack([(a - b).square().mean() for a, b in two]).mean()
    return total / len(keys)


def test_masks_are_those_of_the_formula() -> None:
    attention = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(2))
    mask = found(attention, torch.tensor([1.0, 4.0]))
    for row, token in ((0, 1), (1, 4)):
        for frame in range(3):
            seen = attention[row, frame, :, token].numpy()
            assert mask[row, frame].tolist() == [float(v) for v in (seen - seen.min()) / (seen.max() - seen.min()) > 0.3]
    there = torch.tensor([[[0, 1, 0, 0, 1, 0.0]]])  # rows of 3 places: places (0, 1) and (1, 1)
    foreground, background = regions(there, 3)
    for place in range(6):
        near = np.exp(-((place // 3 - 0.5) ** 2 + (place % 3 - 1) ** 2) / 50)
        inside = float(there[0, 0, place])
        assert foreground[0, 0, place].item() == pytest.approx(inside * near, rel=1e-5)
        assert background[0, 0, place].item() == pytest.approx((1 - inside) * (1 - near), rel=1e-4, abs=1e-7)
    assert torch.equal(pooled(torch.rand(1, 6, 1, 4), torch.zeros(1, 1, 6)), torch.zeros(1, 1, 4))


@pytest.mark.parametrize("token", [True, False], ids=["object", "all places"])
def test_step_goes_down_both_gradients_and_app_takes_a_plain_step(
    unets: tuple[TappedUNet, TappedUNet], inputs: dict[str, Tensor], token: bool
) -> None:
    given = dict(inputs)
    if not token:
        given |= {"object_token": torch.zeros(1), "foreground": torch.ones(1, 16, 8), "background": torch.zeros(1, 16, 8)}
    step = SemanticStep(unets[0])
    latents, energy, app = step(*(given[name] for name in SEMANTIC))
    plain, motion = GuidedStep(unets[1])(*(given[name] for name in GUIDED))
    tracked = given["latents"].clone().requires_grad_()
    semantic = SEMANTIC_WEIGHT * 0.5 * plain_energy(unets[1], given, tracked, token)
    (gradient,) = torch.autograd.grad(semantic, tracked)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(energy, motion + semantic.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(latents, plain - given["coefficients"][0, 6] * gradient, atol=1e-4, rtol=1e-4)
    alone = PlainStep(unets[1])(*({**given, "latents": given["app"]}[name] for name in CHANGES))
    torch.testing.assert_close(app, alone, atol=1e-4, rtol=1e-4)


def test_off_it_is_the_guided_step(unets: tuple[TappedUNet, TappedUNet], inputs: dict[str, Tensor]) -> None:
    given = {**inputs, "semantic": torch.zeros(1)}
    latents, energy, _ = SemanticStep(unets[0])(*(given[name] for name in SEMANTIC))
    wanted, motion = GuidedStep(unets[1])(*(given[name] for name in GUIDED))
    torch.testing.assert_close(latents, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(energy, motion)
