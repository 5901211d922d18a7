"""The stage `flow`: an autoencoder of displacement fields. See train.py."""

from __future__ import annotations

from dataclasses import replace

import domain
import numpy as np
import torch
import torch.nn.functional as F
from clips import work
from fields import as_unit, covered, spread
from networks import NOISE, FieldAutoencoder
from recipe import log, noised
from torch import Tensor
from world import FRAMES

PX = 128.0  # of a picture of 64: one unit of what the autoencoder reads


def a_field(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One field `[2, 64, 64]` px, of a sprite or of some blocks of it (a control); its pixels `[64, 64]`; the camera's `[2]`.

    A camera moves in one of eight: no clip of the demo has that, but a field may come from anywhere.
    """
    path = domain.free_path(rng, FRAMES) if rng.random() < 0.3 else None
    spec = domain.sample_spec(rng, path=path, frames=FRAMES)
    moved = np.asarray(spec.path)[rng.integers(1, FRAMES)]
    if rng.random() < 0.3:  # a drag goes where no clip did
        moved = rng.uniform(-40, 40, 2)
    start = rng.uniform(8, 56, 2) if rng.random() < 0.5 else spec.start
    cover = covered(replace(spec, start=(float(start[0]), float(start[1]))))
    if rng.random() < 0.15:
        cover &= (rng.random((8, 8)) < rng.uniform(0, 0.5)).repeat(8, 0).repeat(8, 1)
    camera = rng.normal(size=2) * 8 * (rng.random() < 0.125)
    whole = np.ones_like(cover)
    return spread(np.stack([camera * 0, camera]), whole)[0] + spread(np.stack([camera, moved]), cover)[0], cover, camera


def some_fields(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fields as shares of the picture `[count, 2, 64, 64]`, pixels `[count, 1, 64, 64]` and cameras `[count, 2, 1, 1]` px."""
    field, cover, camera = zip(*(a_field(rng) for _ in range(count)), strict=True)
    return (
        torch.from_numpy(as_unit(np.stack(field))),
        torch.from_numpy(np.stack(cover)).float()[:, None],
        torch.from_numpy(np.stack(camera)).float()[..., None, None],
    )


def stage_flow(steps: int, batch: int = 48) -> None:
    """Fields in, fields out, most closely at the sprite; the layers that they are made of are targets too."""
    torch.manual_seed(1)
    net = FieldAutoencoder()
    for step in work.training("flow", net, [{"params": net.parameters(), "lr": 2e-3}], steps, average=0.99):
        fields, cover, camera = some_fields(step.rng, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            raw = net.encode_raw(fields)
        latents = noised(net, raw.float(), NOISE * step.rng.choice([0.3, 1.0, 1.7]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layers = net.layers(latents)
        moved, behind, logits = (layer.float() for layer in layers)
        error = behind + torch.sigmoid(logits) * (moved - behind) - (fields * 2 - 1) * domain.SIZE
        weight = 1 + 8 * F.max_pool2d(cover, 5, stride=1, padding=2)
        loss = (weight * F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none")).mean()
        loss = loss + 2 * (weight * F.binary_cross_entropy_with_logits(logits, cover, reduction="none")).mean()
        step.advance(loss + 0.3 * F.smooth_l1_loss(behind, camera.expand_as(behind)))
    net.eval().requires_grad_(False)
    check(net)
    work.keep(net, "flow")


@torch.no_grad()
def check(net: FieldAutoencoder) -> None:
    """Set the latents' mean and spread, and log how far fields are off after a round trip, in px."""
    raw = torch.cat([net.encode_raw(part) for part in some_fields(np.random.default_rng(2), 768)[0].split(64)])
    net.mean.copy_(raw.mean(dim=(0, 2, 3), keepdim=True))
    net.std.copy_(raw.std(dim=(0, 2, 3), keepdim=True))
    fields, cover, _ = some_fields(np.random.default_rng(3), 256)
    for noise in (0.0, NOISE, 2 * NOISE):
        latents = net.encode(fields)
        back = net.decode(latents + noise * torch.randn_like(latents))
        error = ((back - fields) * PX).square().sum(dim=1, keepdim=True).sqrt()
        inside = cover > 0.5
        log(f"noise {noise}: {error.mean():.2f} px, on the sprite {error[inside].mean():.2f}, else {error[~inside].mean():.2f}")
    still = net.decode(net.encode(torch.full((1, 2, 64, 64), 0.5)))
    log(f"no motion comes back as {float((still - 0.5).abs().mean()) * PX:.2f} px")
