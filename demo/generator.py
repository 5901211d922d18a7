"""Stages `autoencoder`, `denoiser` and `refine`: what makes the pixels. See train.py."""

from __future__ import annotations

import math
from typing import Any

import domain
import model as demo
import numpy as np
import torch
import torch.nn.functional as F
from recipe import log
from torch import Tensor
from training import WORK, Pool, ids, tokenizer, work

# The denoiser's latents will not be exact either: noise on frame 0's latent, and on the groups'.
NOISE = torch.tensor([0.06, 0.25, 0.25, 0.25, 0.25])[:, None, None, None]


def field_loss(field: Tensor, centres: Tensor, mask: Tensor) -> Tensor:
    """How far a motion field is off, in patches, most where the sprite is.

    field `[B, T - 1, 2, 8, 8]` px; centres `[B, T, 2]` px and coverage `[B, T, 16, 16]` of a clip whose first frame is frame 0.
    """
    true = (centres[:, :1] - centres)[:, 1:, :, None, None]
    here = F.max_pool2d((mask[:, 1:] > 0.02).float(), 4, stride=2, padding=1)[:, :, None]  # 8 x 8, a patch wider
    return ((0.2 + here) * (field - true).abs()).mean() / 8


def stage_autoencoder(steps: int) -> None:
    """Reconstruction, with the layers and the motion that the renderer knows as extra targets."""
    pool, batch = Pool(), 16
    torch.manual_seed(2)
    net = demo.Autoencoder()
    for step in work.training("autoencoder", net, [{"params": net.parameters(), "lr": 1.5e-3}], steps):
        index = step.rng.choice(pool.train, batch)
        group = step.rng.integers(4, size=batch)
        window = np.stack([np.concatenate([[0], 1 + 4 * g + np.arange(4)]) for g in group])  # all that a group depends on
        pick, times = torch.arange(batch)[:, None], torch.from_numpy(window)
        video, mask = pool.video(index)[pick, times], pool.mask(index)[pick, times]
        cover = torch.from_numpy(pool.covers[index])[:, None].float() / 255
        behind = np.stack([domain.background(pool.background[i]) for i in index]).transpose(0, 3, 1, 2) * 2 - 1
        raw = net.encode_raw(video)
        parts = [raw[:, :1], raw[:, 1:]]  # standardise as batch norm does, and keep the running statistics as the scale
        mean = torch.cat([x.mean(dim=(0, 1, 3, 4), keepdim=True) for x in parts], dim=1)
        std = torch.cat([x.std(dim=(0, 1, 3, 4), keepdim=True) + 1e-4 for x in parts], dim=1)
        net.mean.lerp_(mean.detach(), 0.02)
        net.std.lerp_(std.detach(), 0.02)
        latents = (raw - mean) / std
        latents = latents + torch.randn_like(latents) * NOISE[:2]
        look, field = net.look(latents[:, 0]), net.field(latents)  # field: B 4 2 8 8
        _, background, logits = look
        loss = field_loss(field, pool.centres[index][pick, times], mask)
        loss = loss + 0.3 * F.binary_cross_entropy_with_logits(logits, cover)
        loss = loss + (background - torch.from_numpy(behind)).square().mean() * 4
        shown = torch.from_numpy(step.rng.permuted(np.tile(np.arange(1, 5), (batch, 1)), axis=1)[:, :2])  # pixels of 2 frames
        made = net.draw(look, torch.cat([torch.zeros_like(field[:, :1]), field[pick, shown - 1]], dim=1))
        chosen = torch.cat([torch.zeros_like(shown[:, :1]), shown], dim=1)
        near = F.max_pool2d((mask[pick, chosen] > 0.02).float(), 3, stride=1, padding=1)
        weight = 1 + 6 * F.interpolate(near, scale_factor=4, mode="nearest")[:, :, None]
        error = made - video[pick, chosen]
        step.advance(loss + (weight * (2 * error.square() + 0.5 * error.abs())).mean())
    net.eval()
    with torch.no_grad():
        some = np.random.default_rng(2).choice(pool.train, 256)
        raw = torch.cat([net.encode_raw(pool.video(part)) for part in np.array_split(some, 16)])
        for row, part in enumerate((raw[:, :1], raw[:, 1:])):
            net.mean[:, row] = part.mean(dim=(0, 1, 3, 4), keepdim=True)[:, 0]
            net.std[:, row] = part.std(dim=(0, 1, 3, 4), keepdim=True)[:, 0]
        for name, checked in (("check", pool.check[:64]), ("unseen kinds", pool.held[:64])):
            video, mask = pool.video(checked), pool.mask(checked)
            made = torch.cat([net.decode(net.encode(part)) for part in video.split(8)])
            noisy = torch.cat([net.encode(part) for part in video.split(8)])
            noisy = net.decode(noisy + torch.randn_like(noisy) * NOISE)
            inside = F.interpolate((mask > 0.5).float(), scale_factor=4)[:, :, None].expand_as(video) > 0.5
            for kind, result in (("clean", made), ("noisy", noisy)):
                square = (result - video).square() / 4
                whole, sprite = (-10 * math.log10(float(x.mean())) for x in (square, square[inside]))
                log(f"{name}: {kind} latents give {whole:.2f} dB, on the sprite {sprite:.2f} dB")
    work.keep(net, "autoencoder")
    with torch.no_grad():
        everything = np.array_split(np.arange(len(pool.frames)), len(pool.frames) // 32)
        work.keep_data(torch.cat([net.encode(pool.video(part)) for part in everything]), "latents")


def stage_denoiser(steps: int, batch: int = 16) -> None:
    """v-prediction on latents, and the motion field of the predicted clip; adapters start larger and learn twice as fast.

    One step in 16 runs at motion_scale 0 and 8 % of the clips have their motion dropped, most with full captions where
    their motion has a name: the model without retrieval is a fair baseline.
    """
    from encoders import blur, cama_for, text_of, tokens_of_pool

    from motionrt.export.systems.cogvideox_step import rotary_tables

    pool = Pool()
    torch.manual_seed(8)
    motion, appearance = tokens_of_pool()
    latents = torch.load(WORK / "latents.pt", weights_only=True)
    model, words = demo.build(), tokenizer()
    for part in ("autoencoder", "text", "motion_encoder", "motion_proj", "cama"):
        work.restore(getattr(model, part), part)
    model.eval().requires_grad_(False).refresh_uncond()
    net = model.denoiser.requires_grad_(True)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(4 if "to_v_ip" in name else 2 if "to_k_ip" in name else 1)
    predicted = motion.clone()  # learn to live with CAMA's errors too
    predicted[pool.train] = cama_for(pool, model.cama, motion, appearance, pool.train, np.random.default_rng(8))
    adapters = [p for name, p in net.named_parameters() if "_ip." in name]
    others = [p for name, p in net.named_parameters() if "_ip." not in name]
    groups: list[dict[str, Any]] = [{"params": others, "lr": 1e-3}, {"params": adapters, "lr": 2e-3}]
    rotary = rotary_tables(net.config, demo.LATENTS[0], demo.LATENTS[2], demo.LATENTS[3])
    alphas = demo.scheduler().alphas_cumprod.float()
    named = pool.train[[pool.family[i] != "free" for i in pool.train]]
    for step in work.training("denoiser", net, groups, steps):
        rng, off = step.rng, step.number % 16 == 15
        index = rng.choice(named if off and rng.random() < 0.7 else pool.train, batch)
        clean = latents[index]
        t = torch.from_numpy(np.where(rng.random(batch) < 0.4, rng.integers(700, 1000, batch), rng.integers(0, 1000, batch)))
        noise = torch.randn_like(clean)
        a = alphas[t][:, None, None, None, None]
        noisy, target = a.sqrt() * clean + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * clean
        still = F.pad(clean[:, :1], (0, 0, 0, 0, 0, 0, 0, 4))
        nothing, dropped = rng.random(batch) < 0.06, rng.random(batch) < 0.08
        full = rng.random(batch) < np.where(dropped | off, 0.8, 0.4)
        texts = ["" if n else text_of(pool, int(i), f) for n, f, i in zip(nothing, full, index, strict=True)]
        tokens = torch.where(torch.from_numpy(rng.random(batch) < 0.35)[:, None, None], predicted[index], motion[index])
        tokens = tokens + torch.randn_like(tokens) * 0.05
        tokens = torch.where(torch.from_numpy(nothing | dropped)[:, None, None], model.uncond_motion, tokens)
        with torch.no_grad():
            context = model.text(blur(rng, ids(words, texts), 0.05))
        out = net(
            hidden_states=torch.cat([noisy, still], dim=2), encoder_hidden_states=context, timestep=t,
            image_rotary_emb=rotary, attention_kwargs={"motion": tokens, "motion_scale": 0.0 if off else 1.0},
            return_dict=False,
        )[0]  # fmt: skip
        guess = a.sqrt() * noisy - (1 - a).sqrt() * out
        moved = field_loss(model.autoencoder.field(guess), pool.centres[index], pool.mask(index))
        step.advance((out - target).square().mean() + 0.5 * moved)
    work.keep(net, "denoiser")


@torch.no_grad()
def sample(model: Any, still: Tensor, text: Tensor, motion: Tensor, steps: int = 8, guidance: float = 2.0) -> Tensor:
    """Plain DDIM with guidance: image latents `[B, 5, 16, 8, 8]`, text of "" and of the prompts `[2B, 12, 64]` -> latents."""
    from motionrt.export.systems.cogvideox_step import rotary_tables

    solver, batch = demo.scheduler(), len(still)
    solver.set_timesteps(steps)
    rotary = rotary_tables(model.denoiser.config, demo.LATENTS[0], demo.LATENTS[2], demo.LATENTS[3])
    tokens = torch.cat([model.uncond_motion.expand(batch, -1, -1), motion])
    x = torch.randn(batch, *demo.LATENTS)
    for t in solver.timesteps:
        without, conditioned = model.denoiser(
            hidden_states=torch.cat([torch.cat([x, still], dim=2)] * 2), encoder_hidden_states=text,
            timestep=t.expand(2 * batch), image_rotary_emb=rotary, attention_kwargs={"motion": tokens}, return_dict=False,
        )[0].chunk(2)  # fmt: skip
        x = solver.step(without + guidance * (conditioned - without), t, x, return_dict=False)[0]
    return x


def generated_latents(model: demo.DemoModel, pool: Pool, index: np.ndarray) -> Tensor:
    """What the denoiser makes of clips of the pool from their own motion tokens, `[B, 5, 16, 8, 8]`; made once."""
    from encoders import text_of, tokens_of_pool

    path = WORK / "generated.pt"
    if not path.exists():
        motion, latents, words, parts = tokens_of_pool()[0], torch.load(WORK / "latents.pt", weights_only=True), tokenizer(), []
        torch.manual_seed(9)
        for part in np.array_split(index, len(index) // 16):
            texts = [""] * len(part) + [text_of(pool, int(i), True) for i in part]
            with torch.no_grad():
                text = model.text(ids(words, texts))
            still = F.pad(latents[part][:, :1], (0, 0, 0, 0, 0, 0, 0, 4))
            parts.append(sample(model, still, text, motion[part]))
        work.keep_data(torch.cat(parts), "generated")
        log("generated", len(index), "clips")
    generated: Tensor = torch.load(path, weights_only=True)
    return generated


def stage_refine(steps: int, batch: int = 32) -> None:
    """The decoder learns what the denoiser's latents look like: its errors, which noise only imitates. The encoder stays."""
    pool = Pool()
    model = demo.build()
    for part in ("autoencoder", "text", "motion_encoder", "motion_proj", "denoiser"):
        work.restore(getattr(model, part), part)
    model.eval().requires_grad_(False).refresh_uncond()
    net = model.autoencoder
    decoder = [
        net.from_first, net.look_mix, net.split, net.fine_mix, net.to_colours, net.to_cover,
        net.from_group, net.motion_mix, net.to_field,
    ]  # fmt: skip
    trained = [p for part in decoder for p in part.requires_grad_(True).parameters()]
    chosen = np.random.default_rng(9).choice(pool.train, 640, replace=False)
    clean, made = torch.load(WORK / "latents.pt", weights_only=True), generated_latents(model, pool, chosen)
    for step in work.training("refine", net, [{"params": trained, "lr": 7e-4}], steps):
        pick = step.rng.choice(len(chosen), batch // 2)
        index = np.concatenate([chosen[pick], step.rng.choice(pool.train, batch // 2)])
        noisy = clean[index[batch // 2 :]]
        latents = torch.cat([made[pick], noisy + torch.randn_like(noisy) * NOISE * 0.7])
        cover = torch.from_numpy(pool.covers[index])[:, None].float() / 255
        still = torch.from_numpy(pool.frames[index, 0]).permute(0, 3, 1, 2).float() / 127.5 - 1
        behind = np.stack([domain.background(pool.background[i]) for i in index]).transpose(0, 3, 1, 2) * 2 - 1
        look, field = net.look(latents[:, 0]), net.field(latents)
        drawn = look[1] + torch.sigmoid(look[2]) * (look[0] - look[1])
        near = F.max_pool2d((cover > 0.02).float(), 9, stride=1, padding=4)
        loss = ((1 + 6 * near) * (2 * (drawn - still).square() + 0.5 * (drawn - still).abs())).mean()
        loss = loss + 0.3 * F.binary_cross_entropy_with_logits(look[2], cover)
        loss = loss + (look[1] - torch.from_numpy(behind)).square().mean() * 4
        step.advance(loss + field_loss(field, pool.centres[index], pool.mask(index)))
    work.keep(net, "refined")
