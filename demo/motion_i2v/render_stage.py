"""The stage `render`: Motion-I2V's second stage learns to make frames along a field. See train.py."""

from __future__ import annotations

import model as demo
import numpy as np
import torch
import torch.nn.functional as F
from clips import BASE, Clips, work
from networks import RENDER, VideoUNet, matrices, quick
from stages import near
from torch import Tensor, nn

STILL = 0.1  # of the clips stand still, as the field that says so asks


def begun() -> VideoUNet:
    """Stage 2 with the weights of MotionClone's demo, where that has such: it has no motion module in the middle."""
    net = VideoUNet(RENDER)
    missing, unknown = net.unet.load_state_dict(demo.load(BASE).unet.state_dict(), strict=False)
    if unknown or any("mid_block.motion_modules" not in name for name in missing):
        raise SystemExit(f"{BASE.name} does not fit stage 2: missing {missing}, unknown {unknown}.")
    last = net.unet.mid_block.motion_modules[0].proj_out
    for value in last.parameters():
        nn.init.zeros_(value)
    return net.train()


def disturbed(fields: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the fields with errors of up to 0.8 px, as predicted ones have them."""
    size = torch.from_numpy(rng.uniform(0, 0.8, len(fields)) * (rng.random(len(fields)) < 0.5)).float()
    noise = torch.randn(*fields.shape[:3], 16, 16) * size[:, None, None, None, None]
    return fields + F.interpolate(noise.flatten(0, 1), scale_factor=4.0, mode="bilinear").unflatten(0, fields.shape[:2])


def groups(net: nn.Module, moving: float, spatial: float) -> list[dict[str, object]]:
    """The rates of the motion modules and of the rest."""
    named = list(net.named_parameters())
    return [
        {"params": [p for name, p in named if "motion_modules" in name], "lr": moving},
        {"params": [p for name, p in named if "motion_modules" not in name], "lr": spatial},
    ]


def stage_render(steps: int) -> None:
    """The motion modules have most to learn: to tell 31 keys apart, and that half of them are frame 0."""
    torch.manual_seed(4)
    work.keep(demo.load(BASE).text_encoder, "words")
    _along("render", begun(), 8e-4, 3e-4, steps, 0.99)


def stage_longer(steps: int) -> None:
    """The same again, from higher rates of the rest."""
    net = VideoUNet(RENDER).train()
    work.restore(net, "render")
    _along("longer", net, 8e-4, 5e-4, steps, 0.995)


def stage_render_on(steps: int) -> None:
    """And again."""
    net = VideoUNet(RENDER).train()
    work.restore(net, "longer")
    _along("render_on", net, 8e-4, 5e-4, steps, 0.995)


def _along(name: str, net: VideoUNet, moving: float, rate: float, steps: int, average: float, batch: int = 8) -> None:
    """v-prediction of frames 1 to 15 beside a clean frame 0; captions often name another motion, so that the field decides."""
    clips, text = Clips(), demo.build_text()
    work.restore(text, "words")
    text.eval().requires_grad_(False)
    for step in work.training(name, net, groups(net, moving, rate), steps, average=average):
        rng = step.rng
        index = rng.choice(len(clips.latents), batch, replace=False)
        latents, fields, centres = clips.latents[index].float(), clips.fields(index), clips.centres[index].clone()
        still = torch.from_numpy(rng.random(batch) < STILL)
        latents[still], fields[still], centres[still] = latents[still, :1], 0.0, centres[still, :1]
        hidden = text(clips.text(rng, index, named=0.3, wrong=0.2)).last_hidden_state
        t, noisy, target = noised(latents[:, 1:], rng, early=0.3)
        with quick(), torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(latents[:, 0], noisy, t, hidden, matrices(disturbed(fields, rng), net.grids(8, 8)))
        weight = near(centres) + near(centres[:, :1])  # where the object is, and what it leaves behind
        step.advance(((out.float() - target).square() * weight[:, 1:]).mean())
    work.keep(net, name)


def noised(latents: Tensor, rng: np.random.Generator, early: float) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps `[B]`, `early` of them from the noisy half alone; latents `[B, n, 4, h, w]` with that much noise; and v."""
    count = len(latents)
    t = torch.from_numpy(np.where(rng.random(count) < early, rng.integers(500, 1000, count), rng.integers(0, 1000, count)))
    a = demo.LEVELS[t][:, None, None, None, None]
    noise = torch.randn_like(latents)
    return t, a.sqrt() * latents + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * latents
