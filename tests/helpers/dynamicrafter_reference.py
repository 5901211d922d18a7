"""DynamiCrafter's pipeline in plain torch, as its released code goes, on noise that is handed to it: what a bundle must give.

Every pass of guidance is a forward of its own, every frame is encoded, and the sampler is written as released (with the number
under its root held at 0). Loaded by path: the tests are not a package.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from by_path import load_by_path
from torch import Tensor

from motionrt.export.systems.dynamicrafter.unet import Conditions, DynamiCrafterUNet

models = load_by_path(Path(__file__).resolve().parents[2] / "tests/helpers/dynamicrafter_models.py")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Draw = Callable[[str, int, tuple[int, ...]], np.ndarray]


def seen(image: Tensor, side: int = 224) -> Tensor:
    """What CLIP sees of `[B, 3, H, W]` in [-1, 1]: kornia's resize with blur, then bicubic with aligned corners."""
    factors = [length / side for length in image.shape[-2:]]
    if max(factors) > 1:
        for axis, factor in zip((-2, -1), factors, strict=True):
            sigma = max((factor - 1) / 2, 0.001)
            size = int(max(4 * sigma, 3))
            size += 1 - size % 2
            x = torch.arange(size, dtype=torch.float64) - size // 2
            kernel = torch.exp(-(x**2) / (2 * sigma**2))
            kernel = (kernel / kernel.sum()).to(image.dtype)
            pad = (0, 0, size // 2, size // 2) if axis == -2 else (size // 2, size // 2, 0, 0)
            weight = kernel.reshape((1, 1, -1, 1) if axis == -2 else (1, 1, 1, -1)).expand(3, 1, -1, -1)
            image = F.conv2d(F.pad(image, pad, mode="reflect"), weight, groups=3)
    image = F.interpolate(image, size=(side, side), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(value, dtype=image.dtype)[:, None, None] for value in (MEAN, STD))
    return ((image + 1) / 2 - mean) / std


def alphas(model: str) -> np.ndarray:
    """alpha bar, `[1000]` float64."""
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    found = np.cumprod(1 - betas)
    if model != "256":
        root = np.sqrt(found)
        found = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return found


def visited(asked: int, spacing: str) -> list[int]:
    """Timesteps, ascending, of `asked` steps."""
    if spacing == "uniform":
        return [t + 1 for t in range(0, 1000, 1000 // asked)]
    return [int(t) - 1 for t in np.round(np.arange(1000, 0, -1000 / asked))][::-1]


def sampled(
    passes: Callable[[Tensor, int], list[Tensor]], latents: Tensor, noises: Callable[[int], Tensor], model: str, asked: int,
    spacing: str, guidance: float, rescale: float, image_guidance: float | None,
) -> Tensor:  # fmt: skip
    """Latents at the end of the released sampler, eta 1. `passes(x, t)`: outputs without conditions, (with the image,) with
    all."""
    bar, times, base = alphas(model), visited(asked, spacing), models.SCALE_ARR[model]
    scale = np.ones(1000)
    if base is not None:
        scale = np.concatenate([np.linspace(1, base, 400), np.full(600, base)])
    for index in reversed(range(len(times))):
        t, before = times[index], times[index - 1] if index else 0
        without, *half, full = passes(latents, t)
        output = without + guidance * (full - without)
        if image_guidance is not None:
            output = without + image_guidance * (half[0] - without) + guidance * (full - half[0])
        if rescale:
            axes = tuple(range(1, output.ndim))
            ratio = full.std(axes, keepdim=True) / output.std(axes, keepdim=True)
            output = rescale * (output * ratio) + (1 - rescale) * output
        a, after = bar[t], bar[before]
        sigma = math.sqrt((1 - after) / (1 - a) * max(0.0, 1 - a / after))
        if model == "256":
            eps, x0 = output, (latents - math.sqrt(1 - a) * output) / math.sqrt(a)
        else:
            eps = math.sqrt(a) * output + math.sqrt(1 - a) * latents
            x0 = math.sqrt(a) * latents - math.sqrt(1 - a) * output
        if index:
            x0 = x0 * (scale[before] / scale[t])
        direction = math.sqrt(max(0.0, 1 - after - sigma**2))
        latents = math.sqrt(after) * x0 + direction * eps + sigma * noises(len(times) - index)
    return latents


@torch.no_grad()
def plain_video(
    parts: Any, files: Mapping[str, Any] | None, model: str, *, image: Tensor, ids: Tensor, empty: Tensor, frames: int,
    asked: int, spacing: str, guidance: float, rescale: float, fs: float, draw: Draw, motion: Tensor | None = None,
    unconditional: Tensor | None = None, scale: float = 1.0, image_guidance: float | None = None, frame_tokens: str = "split",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(latents `[1, F, 4, h, w]`, frames `[F, 3, H, W]` in [0, 1]). `image [1, 3, H, W]` in [-1, 1]; `ids`, `empty` `[1, L]`:
    the prompt and none; `files`: MotionRAG's; `motion`, `unconditional` `[1, M, D]`. All is computed in `dtype`, as the release
    does, but for the sampler's numbers."""
    moved = motion is not None and scale != 0
    size = replace(parts.size, frame_tokens=frame_tokens, motion=motion.shape[-1] if moved and motion is not None else None)
    unet = DynamiCrafterUNet(size)
    state = dict(parts.unet.state_dict())
    if moved and files is not None:
        inside = "model.diffusion_model."
        adapters = files["Motion-Adapter.ckpt"]["state_dict"]
        state |= {key.removeprefix(inside): value for key, value in adapters.items() if key.startswith(inside)}
    unet.load_state_dict(state)
    unet, text, clip, projector, vae = (
        copy.deepcopy(module).to(dtype).eval() for module in (unet, parts.text, parts.clip, parts.projector, parts.vae)
    )
    image = image.to(dtype)

    def context(words: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
        shown = seen(picture if dtype == torch.float64 else picture.float()).to(dtype)
        return text(input_ids=words).last_hidden_state, projector(clip(pixel_values=shown).last_hidden_state)

    prompt, nothing = context(ids, image), context(empty, torch.zeros_like(image))
    branches = [(*nothing, unconditional), (nothing[0], prompt[1], motion), (*prompt, motion)]
    if image_guidance is None:
        del branches[1]
    every = image.expand(frames, -1, -1, -1)
    mean, log_variance = vae.quant_conv(vae.encoder(every)).chunk(2, dim=1)
    shape = (1, frames, *mean.shape[1:])
    noise = torch.from_numpy(draw("encode", 0, (1, *mean.shape[1:]))).to(dtype)
    still = (0.18215 * (mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise))[None, :1].expand(shape)

    def passes(x: Tensor, t: int) -> list[Tensor]:
        time = unet.embedded(torch.tensor([t]), torch.tensor([fs]))
        sample = torch.cat([x, still], dim=2)
        found = []
        for words, picture, tokens in branches:
            moving = tokens.to(dtype) if moved and tokens is not None else None
            found.append(unet(sample, time, Conditions(words, picture, moving, scale)))
        return found

    def noises(step: int) -> Tensor:
        return torch.from_numpy(draw("video", step, shape)).to(dtype)

    latents = sampled(passes, noises(0), noises, model, asked, spacing, guidance, rescale, image_guidance)
    pictures = vae.decoder(vae.post_quant_conv(latents[0] / 0.18215))
    return latents, (pictures.clamp(-1, 1) + 1) / 2
