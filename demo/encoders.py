"""Stages `motion`, `appearance`, `text` and `cama`: what reads videos, stills and prompts. See train.py."""

from __future__ import annotations

from typing import Any

import domain
import model as demo
import numpy as np
import torch
import torch.nn.functional as F
from recipe import log
from torch import Tensor, nn
from training import WORK, Pool, ids, tokenizer, work

PICKS = [*range(8), *range(9, 17)]  # the frames VideoMAE sees


def supervised(net: Any, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A Resampler's tokens, and the cross-entropy of its attention from `target [B, M, n]` (rows sum to 1)."""
    loss = features.new_zeros(())
    features = net.proj_in(features)
    latents = net.latents.expand(features.shape[0], -1, -1)
    for attention, feed_forward in net.layers:
        query = attention.to_q(attention.norm2(latents)).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        key = (
            attention.to_kv(attention.norm1(features)).chunk(2, dim=-1)[0].unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        )
        score = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).log_softmax(dim=-1)
        loss = loss - (target[:, None] * score).sum(dim=-1).mean() / len(net.layers)
        latents = latents + attention(features, latents)
        latents = latents + feed_forward(latents)
    return net.norm_out(net.proj_out(latents)), loss


def token_masks(mask: Tensor) -> Tensor:
    """`[B, 17, 16, 16]` -> what each of VideoMAE's 128 tokens covers: `[B, 128, 32]` (2 frames of 4 x 4)."""
    x = mask[:, PICKS].unflatten(1, (8, 2)).unflatten(3, (4, 4)).unflatten(5, (4, 4))  # B t 2 h 4 w 4
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)


def stage_motion(steps: int) -> None:
    """VideoMAE on dense targets (what a token covers, where the sprite is), then the Resampler on cached features."""
    pool = Pool()
    torch.manual_seed(3)
    net, dense = demo.MotionEncoder(), nn.Linear(96, 36)
    both = nn.ModuleList([net, dense])
    for step in work.training("motion_dense", both, [{"params": both.parameters(), "lr": 1.5e-3}], steps):
        index = step.rng.choice(pool.train, 16)
        mask, centres = token_masks(pool.mask(index)), (pool.centres[index][:, PICKS] - 32) / 32
        out = dense(net(pool.video(index)))
        where = centres.unflatten(1, (8, 2)).flatten(2).repeat_interleave(16, dim=1)
        cover = mask.mean(dim=-1, keepdim=True)
        loss = F.binary_cross_entropy_with_logits(out[..., :32], mask)
        step.advance(loss + ((cover + 0.02) * (out[..., 32:] - where).abs()).mean() / (cover + 0.02).mean())
    net.eval()
    work.keep(net, "motion_encoder")
    everything = np.arange(len(pool.frames))
    with torch.no_grad():
        features = torch.cat([net(pool.video(part)) for part in np.array_split(everything, len(everything) // 32)])
    log("cached VideoMAE features", tuple(features.shape))
    proj, head = demo.resampler(), nn.Linear(demo.WIDTH, 4)
    both = nn.ModuleList([proj, head])
    for step in work.training("motion_resampler", both, [{"params": both.parameters(), "lr": 3e-3}], steps):
        index = step.rng.choice(pool.train, 48)
        cover = token_masks(pool.mask(index)).mean(dim=-1).unflatten(1, (8, 16)) + 1e-6
        target = torch.diag_embed((cover / cover.sum(dim=-1, keepdim=True)).transpose(1, 2)).permute(
            0, 2, 3, 1
        )  # B, query 8, tubelet 8, 16
        tokens, attention = supervised(proj, features[index], target.flatten(2))
        where = ((pool.centres[index][:, PICKS] - 32) / 32).unflatten(1, (8, 2)).flatten(2)
        step.advance(4 * (head(tokens) - where).abs().mean() + 0.05 * attention)
    proj.eval()
    work.keep(proj, "motion_proj")
    work.keep(head, "motion_head")
    with torch.no_grad():
        tokens = torch.cat([proj(part) for part in features.split(256)])
        where = head(tokens).unflatten(-1, (2, 2)).flatten(1, 2) * 32 + 32
    error = (where - pool.centres[:, PICKS]).norm(dim=-1).mean(dim=1)
    log(
        f"motion tokens hold the path to {float(error[pool.check].mean()):.2f} px,",
        f"unseen kinds {float(error[pool.held].mean()):.2f} px",
    )
    work.keep_data(tokens, "motion_tokens")


def stage_appearance(steps: int) -> None:
    """Dinov2 and its Resampler on the stills: where the sprite is, its colour and its shape."""
    pool = Pool()
    torch.manual_seed(4)
    net, proj, dense = demo.AppearanceEncoder(), demo.resampler(), nn.Linear(96, 6)
    head, kind = nn.Linear(demo.WIDTH, 2), nn.Linear(demo.WIDTH, len(domain.COLOURS) + len(domain.SHAPES))
    modules = nn.ModuleList([net, proj, dense, head, kind])
    for step in work.training("appearance", modules, [{"params": modules.parameters(), "lr": 1.5e-3}], steps):
        index = step.rng.choice(pool.train, 24)
        image = torch.from_numpy(pool.frames[index, 0]).permute(0, 3, 1, 2).float() / 127.5 - 1
        mask = (
            pool.mask(index)[:, 0].unflatten(1, (8, 2)).unflatten(3, (8, 2)).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
        )  # B 64 4
        where = (pool.centres[index, 0] - 32) / 32
        features = net(image)
        out = dense(features[:, 1:])
        cover = mask.mean(dim=-1, keepdim=True) + 0.01
        loss = F.binary_cross_entropy_with_logits(out[..., :4], mask)
        loss = loss + (cover * (out[..., 4:] - where[:, None]).abs()).mean() / cover.mean()
        target = F.pad((cover / cover.sum(dim=1, keepdim=True)).transpose(1, 2), (1, 0)).expand(-1, demo.TOKENS, -1)
        tokens, attention = supervised(proj, features, target)
        logits = kind(tokens.mean(dim=1))
        loss = loss + 4 * (head(tokens) - where[:, None]).abs().mean() + 0.05 * attention
        loss = loss + 0.2 * F.cross_entropy(logits[:, : len(domain.COLOURS)], pool.colour[index])
        step.advance(loss + 0.2 * F.cross_entropy(logits[:, len(domain.COLOURS) :], pool.shape[index]))
    modules.eval()
    work.keep(net, "appearance_encoder")
    work.keep(proj, "appearance_proj")
    with torch.no_grad():
        images = torch.from_numpy(pool.frames[:, 0].copy()).permute(0, 3, 1, 2)
        tokens = torch.cat([proj(net(part.float() / 127.5 - 1)) for part in images.split(64)])
        error = ((head(tokens).mean(dim=1) * 32 + 32) - pool.centres[:, 0]).norm(dim=-1)
    log(f"appearance tokens hold the place to {float(error[pool.check].mean()):.2f} px")
    work.keep_data(tokens, "appearance_tokens")


def text_of(pool: Pool, index: int, motion: bool) -> str:
    """The caption of a clip, with or without its motion words."""
    subject = f"a {list(domain.COLOURS)[pool.colour[index]]} {domain.SHAPES[pool.shape[index]]}"
    family = pool.family[index]
    return f"{subject} {domain.FAMILIES[family].phrase}" if motion and family != "free" else f"{subject} moves"


def blur(rng: np.random.Generator, tokens: Tensor, chance: float = 0.1) -> Tensor:
    """Some words become unknown, as in prompts that are not captions."""
    lost = torch.from_numpy(rng.random(tuple(tokens.shape)) < chance) & (tokens != demo.PAD)
    return tokens.masked_fill(lost, demo.UNKNOWN)


def stage_text(steps: int) -> None:
    """The text encoder names colour, shape and motion."""
    torch.manual_seed(5)
    words, net = tokenizer(), demo.TextEncoder()
    colours = list(domain.COLOURS)
    motions = [domain.FAMILIES[name].phrase for name in domain.SEEN] + ["moves"]
    counts = (len(colours), len(domain.SHAPES), len(motions))
    both = nn.ModuleList([net, nn.Linear(demo.TEXT_WIDTH, sum(counts))])
    for step in work.training("text", both, [{"params": both.parameters(), "lr": 3e-3}], steps):
        pick = torch.from_numpy(np.stack([step.rng.integers(n, size=64) for n in counts]))
        texts = [f"a {colours[c]} {domain.SHAPES[s]} {motions[m]}" for c, s, m in pick.T.tolist()]
        out = net(blur(step.rng, ids(words, texts)))
        logits = both[1](out.mean(dim=1)).split(counts, dim=-1)
        step.advance(sum((F.cross_entropy(part, true) for part, true in zip(logits, pick, strict=True)), torch.zeros(())))
    work.keep(net, "text")


def siblings(pool: Pool) -> dict[int, np.ndarray]:
    """Group number -> its training clips."""
    order = pool.train[np.argsort(pool.group[pool.train], kind="stable")]
    numbers, starts = np.unique(pool.group[order], return_index=True)
    return dict(zip(numbers.tolist(), np.split(order, starts[1:]), strict=True))


def references(
    rng: np.random.Generator, pool: Pool, groups: dict[int, np.ndarray], index: np.ndarray, count: int, stray: float
) -> np.ndarray:
    """For each clip `count` others of its motion, int [B, count].

    With chance `stray` the last one is of any motion, as retrieval errs.
    """
    rows = []
    for clip in index:
        others = groups[int(pool.group[clip])]
        others = others[others != clip]
        row = rng.choice(others, count, replace=len(others) < count)
        if count > 1 and rng.random() < stray:
            row[-1] = rng.choice(pool.train)
        rows.append(row)
    return np.stack(rows)


def tokens_of_pool() -> tuple[Tensor, Tensor]:
    return torch.load(WORK / "motion_tokens.pt", weights_only=True), torch.load(
        WORK / "appearance_tokens.pt", weights_only=True
    )


def stage_cama(steps: int) -> None:
    """Predict each clip's motion tokens from others of its motion and its own still; groups are drawn anew each step."""
    pool = Pool()
    torch.manual_seed(6)
    motion, appearance = tokens_of_pool()
    groups = siblings(pool)
    net, head = demo.build().cama, nn.Linear(demo.WIDTH, 4)
    work.restore(head, "motion_head")
    head.requires_grad_(False)
    for step in work.training("cama", net, [{"params": net.parameters(), "lr": 1.5e-3}], steps):
        count = int(step.rng.choice([1, 2, 3, 4, 4, 4, 5, 8]))
        index = step.rng.choice(pool.train, 64)
        refs = references(step.rng, pool, groups, index, count, 0.15)
        noise = torch.randn(64, count, demo.TOKENS, demo.WIDTH) * 0.05
        out = net.forward_all(motion[refs] + noise, appearance[refs], appearance[index])
        true = torch.cat([motion[refs].flip(1), motion[index][:, None]], dim=1)
        weight = torch.full((1, count + 1, 1, 1), 0.3)
        weight[:, 0] = 0.02  # the first block has seen no motion
        weight[:, -1] = 1.0
        loss = (weight * (out - true).square()).mean() + 3 * (weight * (head(out) - head(true)).abs()).mean()
        step.advance(loss)
    net.eval()
    work.keep(net, "cama")
    with torch.no_grad():
        made = cama_for(pool, net, motion, appearance, pool.check, np.random.default_rng(0))
        error = ((head(made) - head(motion[pool.check])) * 32).unflatten(-1, (2, 2)).norm(dim=-1).mean()
        copied = motion[references(np.random.default_rng(0), pool, groups, pool.check, 1, 0.0)[:, 0]]
        other = ((head(copied) - head(motion[pool.check])) * 32).unflatten(-1, (2, 2)).norm(dim=-1).mean()
    log(f"CAMA K=4 predicts the path to {float(error):.2f} px; a reference's own tokens {float(other):.2f} px")


@torch.no_grad()
def cama_for(pool: Pool, net: Any, motion: Tensor, appearance: Tensor, index: np.ndarray, rng: np.random.Generator) -> Tensor:
    """CAMA's prediction for clips of the pool from 4 others of their motion: `[B, M, D]`."""
    refs = references(rng, pool, siblings(pool), index, 4, 0.0)
    return torch.cat(
        [
            net(motion[r], appearance[r], appearance[i])
            for r, i in zip(
                np.array_split(refs, max(1, len(refs) // 256)),
                np.array_split(index, max(1, len(refs) // 256)),
                strict=True,
            )
        ]
    )
