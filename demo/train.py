"""Train the demo checkpoint, stage by stage: `PYTHONPATH=src python demo/train.py STAGE [--seconds S] [--resume]`.

Stages (`all` runs them in this order): data, autoencoder, motion, appearance, text, cama, denoiser, refine, pack, clips,
evaluate. Budgets are process seconds of one thread, so a busy machine trains as much. Work files: demo/work (not kept).
`autoencoder` and motion -> appearance -> text -> cama do not depend on each other and may run side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import domain
import model as demo
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
GROUP = 6  # clips of one free path
NAMED, FREE = 90, 640  # clips per seen family; free paths
HELD = 24  # clips per unseen family, for evaluation only
BUDGET = {
    "autoencoder": 400.0, "motion": 200.0, "appearance": 130.0, "text": 15.0, "cama": 220.0,
    "denoiser": 600.0, "refine": 240.0,
}  # fmt: skip


def log(*parts: Any) -> None:
    print(f"[{time.strftime('%H:%M:%S')} cpu {time.process_time():.0f}s]", *parts, flush=True)


class Pool:
    """The rendered clips: frames, 16x16 sprite coverage, centres, and which clips share a motion."""

    def __init__(self) -> None:
        self.frames = np.load(WORK / "frames.npy", mmap_mode="r")  # uint8 [N, 17, 64, 64, 3]
        self.masks = np.load(WORK / "masks.npy", mmap_mode="r")  # uint8 [N, 17, 16, 16], 255 = covered
        self.centres = torch.from_numpy(np.load(WORK / "centres.npy"))  # float32 [N, 17, 2] px
        info = json.loads((WORK / "pool.json").read_text())
        self.group = np.asarray(info["group"])  # clips with the same number share a motion
        self.family: list[str] = info["family"]
        self.colour = torch.tensor(info["colour"])
        self.shape = torch.tensor(info["shape"])
        unseen = np.asarray([name in domain.UNSEEN for name in self.family])
        self.held = np.flatnonzero(unseen)
        train = np.flatnonzero(~unseen)
        # Every 40th training clip is left out as a check; whole free groups would be wasteful.
        self.check, self.train = train[::40], np.delete(train, np.s_[::40])

    def video(self, index: np.ndarray) -> Tensor:
        """float32 `[B, 17, 3, 64, 64]` in [-1, 1]."""
        return torch.from_numpy(self.frames[index]).permute(0, 1, 4, 2, 3).float() / 127.5 - 1

    def mask(self, index: np.ndarray) -> Tensor:
        """float32 `[B, 17, 16, 16]` in [0, 1]."""
        return torch.from_numpy(self.masks[index]).float() / 255


def stage_data() -> None:
    rng = np.random.default_rng(1)
    specs, group = [], []
    for name in domain.SEEN:
        specs += [domain.sample_spec(rng, name) for _ in range(NAMED)]
    for name in domain.UNSEEN:
        specs += [domain.sample_spec(rng, name) for _ in range(HELD)]
    group = [list(domain.FAMILIES).index(spec.family) for spec in specs]
    for index in range(FREE):
        path = domain.free_path(rng)
        specs += [domain.sample_spec(rng, path=path) for _ in range(GROUP)]
        group += [len(domain.FAMILIES) + index] * GROUP
    frames = np.lib.format.open_memmap(WORK / "frames.npy", "w+", np.uint8, (len(specs), 17, 64, 64, 3))
    masks = np.lib.format.open_memmap(WORK / "masks.npy", "w+", np.uint8, (len(specs), 17, 16, 16))
    for index, spec in enumerate(specs):
        frames[index], mask = domain.render(spec)
        masks[index] = np.round(mask.reshape(17, 16, 4, 16, 4).mean(axis=(2, 4)) * 255)
        if index % 1000 == 0:
            log("rendered", index, "of", len(specs))
    np.save(WORK / "centres.npy", np.stack([spec.centres for spec in specs]).astype(np.float32))
    info = {
        "group": group,
        "family": [spec.family for spec in specs],
        "colour": [list(domain.COLOURS).index(spec.colour) for spec in specs],
        "shape": [domain.SHAPES.index(spec.shape) for spec in specs],
    }
    (WORK / "pool.json").write_text(json.dumps(info))


def training(parameters: Any, lr: float, seconds: float, name: str, decay: float = 0.01) -> Iterator[Callable[[Tensor], None]]:
    """Yield, until `seconds` of process time are gone, a function that takes the loss and steps AdamW.

    The rate warms up over 50 steps and falls as a cosine to 2%.
    """
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=decay)
    base = [group["lr"] for group in optimiser.param_groups]
    everything = [p for group in optimiser.param_groups for p in group["params"]]
    start, step, mean = time.process_time(), 0, 0.0
    while (gone := (time.process_time() - start) / seconds) < 1:
        rate = min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * gone)))
        for group, value in zip(optimiser.param_groups, base, strict=True):
            group["lr"] = value * rate

        def advance(loss: Tensor) -> None:
            nonlocal mean
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(everything, 1.0)
            optimiser.step()
            mean = 0.95 * mean + 0.05 * float(loss.detach())

        yield advance
        step += 1
        if step % 50 == 0:
            log(name, "step", step, f"{gone:.0%} loss {mean / (1 - 0.95**step):.4f}")


def keep(module: nn.Module, name: str) -> None:
    save_file({k: v.contiguous().clone() for k, v in module.state_dict().items()}, WORK / f"{name}.safetensors")


def restore(module: nn.Module, name: str) -> None:
    missing, unknown = module.load_state_dict(load_file(WORK / f"{name}.safetensors"), strict=False)
    if unknown or missing:
        raise RuntimeError(
            f"work file {name}.safetensors does not fit: missing {missing}, unknown {unknown}; train the stage again."
        )


def reconstruct_loss(made: Tensor, true: Tensor, mask: Tensor) -> Tensor:
    """Squared and absolute error; pixels on and around the sprite (coverage `mask [B, T, 16, 16]`) weigh 7 times."""
    near = F.max_pool2d((mask > 0.02).float(), 3, stride=1, padding=1)
    weight = 1 + 6 * F.interpolate(near, scale_factor=4, mode="nearest")[:, :, None]
    error = made - true
    return (weight * (2 * error.square() + 0.5 * error.abs())).mean()


def group_window(rng: np.random.Generator, batch: int, pieces: int = 2) -> np.ndarray:
    """Frame 0 and `pieces` of the 4 groups of 4 frames, int [B, 1 + 4 pieces]: all that a group depends on, at half cost."""
    rows = []
    for _ in range(batch):
        groups = np.sort(rng.choice(4, pieces, replace=False))
        rows.append(np.concatenate([[0], *(1 + 4 * g + np.arange(4) for g in groups)]))
    return np.stack(rows)


def stage_autoencoder(seconds: float, refine: bool = False) -> None:
    """`refine` trains the decoder only, so that the latents stay as they are."""
    pool, rng, batch = Pool(), np.random.default_rng(2 + refine), 8
    torch.manual_seed(2)
    net = demo.Autoencoder()
    if refine:
        restore(net, "autoencoder")
        net.requires_grad_(False)
        for part in (net.from_latent, net.decode_mix, net.split_first, net.split_group, net.fine_mix, net.to_pixels):
            part.requires_grad_(True)
    name = "refine" if refine else "autoencoder"
    for advance in training([p for p in net.parameters() if p.requires_grad], 1e-3 if refine else 2e-3, seconds, name):
        index = rng.choice(pool.train, batch)
        window = torch.from_numpy(group_window(rng, batch))
        pick = torch.arange(batch)[:, None]
        video, mask = pool.video(index)[pick, window], pool.mask(index)[pick, window]
        raw = net.encode_raw(video)
        if not refine:  # standardise as batch norm does, and keep the running statistics as the scale
            mean, std = raw.mean(dim=(0, 1, 3, 4), keepdim=True), raw.std(dim=(0, 1, 3, 4), keepdim=True) + 1e-4
            net.mean.lerp_(mean.detach(), 0.05)
            net.std.lerp_(std.detach(), 0.05)
            latents = (raw - mean) / std
        else:
            latents = (raw - net.mean) / net.std
        latents = latents + torch.randn_like(latents) * 0.1  # the denoiser will not be exact either
        advance(reconstruct_loss(net.decode_raw(latents), video, mask))
    net.eval()
    with torch.no_grad():
        if not refine:
            raw = torch.cat([net.encode_raw(pool.video(part)) for part in np.array_split(rng.choice(pool.train, 256), 16)])
            net.mean.copy_(raw.mean(dim=(0, 1, 3, 4), keepdim=True))
            net.std.copy_(raw.std(dim=(0, 1, 3, 4), keepdim=True))
        video, mask = pool.video(pool.check[:64]), pool.mask(pool.check[:64])
        made = torch.cat([net.decode(net.encode(part)) for part in video.split(8)])
        inside = F.interpolate((mask > 0.5).float(), scale_factor=4)[:, :, None].expand_as(video) > 0.5
        square = (made - video).square() / 4
        log(
            "check PSNR",
            f"{-10 * math.log10(float(square.mean())):.2f} dB,",
            f"sprite {-10 * math.log10(float(square[inside].mean())):.2f} dB",
        )
    keep(net, "autoencoder")


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


def stage_motion(seconds: float) -> None:
    """VideoMAE on dense targets (what a token covers, where the sprite is), then the Resampler on cached features."""
    pool, rng = Pool(), np.random.default_rng(3)
    torch.manual_seed(3)
    net, dense = demo.MotionEncoder(), nn.Linear(96, 36)
    for advance in training([*net.parameters(), *dense.parameters()], 1.5e-3, seconds * 0.6, "motion dense"):
        index = rng.choice(pool.train, 16)
        mask, centres = token_masks(pool.mask(index)), (pool.centres[index][:, PICKS] - 32) / 32
        out = dense(net(pool.video(index)))
        where = centres.unflatten(1, (8, 2)).flatten(2).repeat_interleave(16, dim=1)
        cover = mask.mean(dim=-1, keepdim=True)
        loss = F.binary_cross_entropy_with_logits(out[..., :32], mask)
        advance(loss + ((cover + 0.02) * (out[..., 32:] - where).abs()).mean() / (cover + 0.02).mean())
    net.eval()
    keep(net, "motion_encoder")
    everything = np.arange(len(pool.frames))
    with torch.no_grad():
        features = torch.cat([net(pool.video(part)) for part in np.array_split(everything, len(everything) // 32)])
    log("cached VideoMAE features", tuple(features.shape))
    proj, head = demo.resampler(), nn.Linear(demo.WIDTH, 4)
    for advance in training([*proj.parameters(), *head.parameters()], 3e-3, seconds * 0.4, "motion resampler"):
        index = rng.choice(pool.train, 48)
        cover = token_masks(pool.mask(index)).mean(dim=-1).unflatten(1, (8, 16)) + 1e-6
        target = torch.diag_embed((cover / cover.sum(dim=-1, keepdim=True)).transpose(1, 2)).permute(
            0, 2, 3, 1
        )  # B, query 8, tubelet 8, 16
        tokens, attention = supervised(proj, features[index], target.flatten(2))
        where = ((pool.centres[index][:, PICKS] - 32) / 32).unflatten(1, (8, 2)).flatten(2)
        advance(4 * (head(tokens) - where).abs().mean() + 0.05 * attention)
    proj.eval()
    keep(proj, "motion_proj")
    keep(head, "motion_head")
    with torch.no_grad():
        tokens = torch.cat([proj(part) for part in features.split(256)])
        where = head(tokens).unflatten(-1, (2, 2)).flatten(1, 2) * 32 + 32
    error = (where - pool.centres[:, PICKS]).norm(dim=-1).mean(dim=1)
    log(
        f"motion tokens hold the path to {float(error[pool.check].mean()):.2f} px,",
        f"unseen families {float(error[pool.held].mean()):.2f} px",
    )
    torch.save(tokens, WORK / "motion_tokens.pt")


def stage_appearance(seconds: float) -> None:
    """Dinov2 and its Resampler on the stills: where the sprite is, its colour and its shape."""
    pool, rng = Pool(), np.random.default_rng(4)
    torch.manual_seed(4)
    net, proj, dense = demo.AppearanceEncoder(), demo.resampler(), nn.Linear(96, 6)
    head, kind = nn.Linear(demo.WIDTH, 2), nn.Linear(demo.WIDTH, len(domain.COLOURS) + len(domain.SHAPES))
    modules = nn.ModuleList([net, proj, dense, head, kind])
    for advance in training(modules.parameters(), 1.5e-3, seconds, "appearance"):
        index = rng.choice(pool.train, 24)
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
        advance(loss + 0.2 * F.cross_entropy(logits[:, len(domain.COLOURS) :], pool.shape[index]))
    modules.eval()
    keep(net, "appearance_encoder")
    keep(proj, "appearance_proj")
    with torch.no_grad():
        images = torch.from_numpy(pool.frames[:, 0]).permute(0, 3, 1, 2)
        tokens = torch.cat([proj(net(part.float() / 127.5 - 1)) for part in images.split(64)])
        error = ((head(tokens).mean(dim=1) * 32 + 32) - pool.centres[:, 0]).norm(dim=-1)
    log(f"appearance tokens hold the place to {float(error[pool.check].mean()):.2f} px")
    torch.save(tokens, WORK / "appearance_tokens.pt")


def tokenizer() -> Any:
    """The word-level tokenizer of the domain: [PAD] = 0, [UNK] = 1, then the words in order."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *domain.words()])}
    if len(vocabulary) > demo.VOCABULARY:
        raise RuntimeError(
            f"the domain has {len(vocabulary)} words; the text encoder holds {demo.VOCABULARY}. "
            "Raise VOCABULARY in demo/model.py."
        )
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def ids(words: Any, texts: list[str]) -> Tensor:
    """int64 `[B, 12]`, padded with 0."""
    rows = [words.encode(text).ids[: demo.TEXT_TOKENS] for text in texts]
    return torch.tensor([row + [demo.PAD] * (demo.TEXT_TOKENS - len(row)) for row in rows])


def text_of(pool: Pool, index: int, motion: bool) -> str:
    """The caption of a clip, with or without its motion words."""
    subject = f"a {list(domain.COLOURS)[pool.colour[index]]} {domain.SHAPES[pool.shape[index]]}"
    family = pool.family[index]
    return f"{subject} {domain.FAMILIES[family].phrases[0]}" if motion and family != "free" else f"{subject} moves"


def stage_text(seconds: float) -> None:
    """The text encoder names colour, shape and motion."""
    torch.manual_seed(5)
    rng, words, net = np.random.default_rng(5), tokenizer(), demo.TextEncoder()
    colours, motions = (
        list(domain.COLOURS),
        [phrase for name in domain.SEEN for phrase in domain.FAMILIES[name].phrases] + ["moves"],
    )
    head = nn.Linear(demo.TEXT_WIDTH, len(colours) + len(domain.SHAPES) + len(motions))
    parameters = [{"params": [*net.parameters(), *head.parameters()]}]
    for advance in training(parameters, 3e-3, seconds, "text"):
        pick = torch.from_numpy(np.stack([rng.integers(n, size=64) for n in (len(colours), len(domain.SHAPES), len(motions))]))
        out = net(ids(words, [f"a {colours[c]} {domain.SHAPES[s]} {motions[m]}" for c, s, m in pick.T.tolist()]))
        logits = head(out.mean(dim=1)).split([len(colours), len(domain.SHAPES), len(motions)], dim=-1)
        advance(sum((F.cross_entropy(part, true) for part, true in zip(logits, pick, strict=True)), torch.zeros(())))
    keep(net, "text")


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


def stage_cama(seconds: float, resume: bool = False) -> None:
    """Predict each clip's motion tokens from others of its motion and its own still; groups are drawn anew each step."""
    pool, rng = Pool(), np.random.default_rng(6 + resume)
    torch.manual_seed(6)
    motion, appearance = tokens_of_pool()
    groups = siblings(pool)
    net, head = demo.build().cama, nn.Linear(demo.WIDTH, 4)
    restore(head, "motion_head")
    head.requires_grad_(False)
    if resume:
        restore(net, "cama")
    for advance in training(net.parameters(), 1.5e-3, seconds, "cama"):
        count = int(rng.choice([1, 2, 3, 4, 4, 4, 5, 8]))
        index = rng.choice(pool.train, 64)
        refs = references(rng, pool, groups, index, count, 0.15)
        noise = torch.randn(64, count, demo.TOKENS, demo.WIDTH) * 0.05
        out = net.forward_all(motion[refs] + noise, appearance[refs], appearance[index])
        true = torch.cat([motion[refs].flip(1), motion[index][:, None]], dim=1)
        weight = torch.full((1, count + 1, 1, 1), 0.3)
        weight[:, 0] = 0.02  # the first block has seen no motion
        weight[:, -1] = 1.0
        loss = (weight * (out - true).square()).mean() + 3 * (weight * (head(out) - head(true)).abs()).mean()
        advance(loss)
    net.eval()
    keep(net, "cama")
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


def cached_latents(pool: Pool) -> Tensor:
    """The pool's latents `[N, 5, 16, 8, 8]`, encoded once per autoencoder."""
    path = WORK / "latents.pt"
    source = WORK / "autoencoder.safetensors"
    stamp = WORK / "latents.sha"
    net = demo.Autoencoder()
    restore(net, "autoencoder")
    digest = f"{float(net.to_latent.weight.detach().double().sum()):.12f}"  # `refine` leaves the encoder alone
    if path.exists() and stamp.exists() and stamp.read_text() == digest:
        return torch.load(path, weights_only=True)
    log("encoding the pool with", source.name)
    with torch.no_grad():
        everything = np.arange(len(pool.frames))
        latents = torch.cat([net.encode(pool.video(part)) for part in np.array_split(everything, len(everything) // 16)])
    torch.save(latents, path)
    stamp.write_text(digest)
    return latents


def stage_denoiser(seconds: float, resume: bool = False, rate: float = 1e-3) -> None:
    """v-prediction on latents; adapters start larger and learn twice as fast; an auxiliary head finds the sprite."""
    from motionrt.export.cogvideox import rotary_tables

    pool, rng, batch = Pool(), np.random.default_rng(8 + 10 * resume), 16
    torch.manual_seed(8 + resume)
    motion, appearance = tokens_of_pool()
    latents = cached_latents(pool)
    net, text, words = demo.denoiser(), demo.TextEncoder(), tokenizer()
    restore(text, "text")
    found = nn.Linear(128, 64)
    adapters = [p for name, p in net.named_parameters() if "_ip." in name]
    if resume:
        restore(net, "denoiser")
        restore(found, "denoiser_head")
    else:
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.mul_(4 if "to_v_ip" in name else 2 if "to_k_ip" in name else 1)
    model = demo.build()
    for part in ("motion_encoder", "motion_proj"):
        restore(getattr(model, part), part)
    model.eval().refresh_uncond()
    predicted = None
    if (WORK / "cama.safetensors").exists():  # learn to live with CAMA's errors too
        restore(model.cama, "cama")
        predicted = motion.clone()
        predicted[pool.train] = cama_for(pool, model.cama.eval(), motion, appearance, pool.train, rng)
        log("uses CAMA's tokens for a part of the clips")
    hidden: list[Tensor] = []
    net.transformer_blocks[-1].register_forward_hook(lambda module, inputs, output: hidden.append(output[0]))
    cos, sin = rotary_tables(net.config, demo.LATENTS[0], demo.LATENTS[2], demo.LATENTS[3])
    alphas = demo.scheduler().alphas_cumprod.float()
    others = [p for name, p in net.named_parameters() if "_ip." not in name]
    groups = [{"params": [*others, *found.parameters()], "lr": rate}, {"params": adapters, "lr": 2 * rate}]
    steps = 0
    for advance in training(groups, rate, seconds, "denoiser"):
        index = rng.choice(pool.train, batch)
        clean, mask = latents[index], pool.mask(index)
        t = torch.from_numpy(np.where(rng.random(batch) < 0.3, rng.integers(600, 1000, batch), rng.integers(0, 1000, batch)))
        noise = torch.randn_like(clean)
        a = alphas[t][:, None, None, None, None]
        noisy, target = a.sqrt() * clean + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * clean
        still = F.pad(clean[:, :1], (0, 0, 0, 0, 0, 0, 0, 4))
        chance = rng.random(batch)
        captions = ["" if c < 0.08 else text_of(pool, int(i), c > 0.8) for c, i in zip(chance, index, strict=True)]
        tokens = motion[index]
        if predicted is not None:
            tokens = torch.where(torch.from_numpy(rng.random(batch) < 0.35)[:, None, None], predicted[index], tokens)
        tokens = tokens + torch.randn_like(tokens) * 0.05
        drop = torch.from_numpy((chance < 0.06) | (rng.random(batch) < 0.05))[:, None, None]
        tokens = torch.where(drop, model.uncond_motion, tokens)
        with torch.no_grad():
            context = text(ids(words, captions))
        hidden.clear()
        out = net(
            hidden_states=torch.cat([noisy, still], dim=2), encoder_hidden_states=context,
            timestep=t, image_rotary_emb=(cos, sin),
            attention_kwargs={"motion": tokens, "motion_scale": 0.0 if steps % 14 == 13 else 1.0}, return_dict=False,
        )[0]  # fmt: skip
        cover = F.max_pool2d(mask, 2)  # B 17 8 8
        cover = torch.cat([cover[:, :1], cover[:, 1:].unflatten(1, (4, 4)).amax(dim=2)], dim=1)[:, :, None]
        weight = 1 + 4 * (cover > 0.05).float()
        loss = (weight * (out - target).square()).mean() / weight.mean()
        groups16 = torch.cat([mask[:, :1].expand(-1, 4, -1, -1), mask[:, 1:]], dim=1)  # B 20 16 16: 4 frames per latent frame
        where = (
            groups16.unflatten(1, (5, 4))
            .unflatten(3, (4, 4))
            .unflatten(5, (4, 4))
            .permute(0, 1, 3, 5, 2, 4, 6)
            .flatten(4)
            .flatten(1, 3)
        )
        advance(loss + 0.4 * F.binary_cross_entropy_with_logits(found(hidden[0]), where))
        steps += 1
        if steps % 300 == 0:
            keep(net, "denoiser")
            keep(found, "denoiser_head")
    keep(net, "denoiser")
    keep(found, "denoiser_head")


def stage_pack() -> None:
    """All work files into demo/checkpoint.safetensors, and demo/tokenizer.json."""
    net = demo.build()
    for part in demo.PARTS:
        restore(getattr(net, part), part)
    net.eval().refresh_uncond()
    demo.save(net, HERE / "checkpoint.safetensors")
    tokenizer().save(str(HERE / "tokenizer.json"))
    log("wrote", HERE / "checkpoint.safetensors", (HERE / "checkpoint.safetensors").stat().st_size, "bytes")


def write_mp4(path: Path, frames: np.ndarray) -> None:
    """uint8 [F, H, W, 3] -> h264, crf 12."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=domain.FPS, options={"crf": "12", "preset": "slow"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())


PROMPTS = (
    ("star_slides_left", "red_star", "slide_left"), ("star_circles", "red_star", "circle_clockwise"),
    ("star_bounces", "red_star", "bounce"),
    ("star_zigzags_left", "red_star", "zigzag_left"), ("square_slides_up", "blue_square", "slide_up"),
    ("square_hops", "blue_square", "hop_right"),
    ("circle_waves", "yellow_circle", "wave_right"), ("circle_turns", "yellow_circle", "turn_left_up"),
    ("triangle_drifts", "green_triangle", "diagonal_down_right"), ("diamond_swings", "purple_diamond", "swing"),
)  # fmt: skip


def stage_clips() -> None:
    """The memory's clips with captions, the stills and the prompts."""
    from PIL import Image

    (HERE / "clips").mkdir(exist_ok=True)
    (HERE / "inputs").mkdir(exist_ok=True)
    captions = {}  # of the motion alone, as the release embeds `motion_caption`: retrieval must not follow colours
    for number, spec in enumerate(domain.reference_specs()):
        name = f"{number:03d}_{spec.family}.mp4"
        write_mp4(HERE / "clips" / name, domain.render(spec)[0])
        captions[name] = f"a shape {' '.join(domain.caption(spec).split()[3:])}"
    (HERE / "clips" / "captions.json").write_text(json.dumps(captions, indent=1) + "\n")
    for name, spec in domain.input_specs():
        Image.fromarray(domain.render(spec, 256, frames=1)[0][0]).save(HERE / "inputs" / f"{name}.png", optimize=True)
    rows = []
    for name, image, family in PROMPTS:
        colour, shape = image.split("_")
        rows.append(
            {
                "name": name,
                "image": f"{image}.png",
                "prompt": f"a {colour} {shape} {domain.FAMILIES[family].phrases[0]}",
            }
        )
    (HERE / "prompts.json").write_text(json.dumps(rows, indent=1) + "\n")
    log("wrote", len(captions), "clips and", len(rows), "prompts")


@torch.no_grad()
def sample(
    net: Any,
    words: Any,
    image: Tensor,
    texts: list[str],
    motion: Tensor,
    scale: float,
    steps: int = 8,
    guidance: float = 2.0,
    seed: int = 0,
) -> np.ndarray:
    """Plain DDIM with classifier-free guidance: image `[B, 3, 64, 64]` -> uint8 [B, 17, 64, 64, 3]."""
    from motionrt.export.cogvideox import rotary_tables

    batch, solver = len(image), demo.scheduler()
    solver.set_timesteps(steps)
    rotary = rotary_tables(net.denoiser.config, demo.LATENTS[0], demo.LATENTS[2], demo.LATENTS[3])
    still = net.autoencoder.encode_image(image)
    context = net.text(torch.cat([ids(words, [""] * batch), ids(words, texts)]))
    tokens = torch.cat([net.uncond_motion.expand(batch, -1, -1), motion])
    x = torch.randn(batch, *demo.LATENTS, generator=torch.Generator().manual_seed(seed))
    for t in solver.timesteps:
        out = net.denoiser(
            hidden_states=torch.cat([torch.cat([x, still], dim=2)] * 2), encoder_hidden_states=context,
            timestep=t.expand(2 * batch),
            image_rotary_emb=rotary, attention_kwargs={"motion": tokens, "motion_scale": scale}, return_dict=False,
        )[0]  # fmt: skip
        without, with_conditions = out.chunk(2)
        x = solver.step(without + guidance * (with_conditions - without), t, x, return_dict=False)[0]
    video = net.autoencoder.decode(x)
    return ((video + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 1, 3, 4, 2).numpy()


@torch.no_grad()
def stage_evaluate(count: int = 36, guidance: float = 2.0) -> None:
    """End-point error in px of generated clips, for seen and unseen families, by what drives the motion."""
    from PIL import Image

    net = demo.load(HERE / "checkpoint.safetensors")
    words = tokenizer()
    clips = list(domain.reference_specs())
    video = torch.stack([torch.from_numpy(domain.render(spec)[0]) for spec in clips]).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    memory_motion, memory_appearance = net.motion_tokens(video), net.appearance_tokens(video[:, 0])
    result: dict[str, Any] = {"targets_per_set": count, "steps": 8, "guidance": guidance}
    for kind, names in (("seen", domain.SEEN), ("unseen", domain.UNSEEN)):
        rng = np.random.default_rng(99)
        specs = [domain.sample_spec(rng, names[i % len(names)]) for i in range(count)]
        frames = np.stack([domain.render(spec)[0] for spec in specs])
        target = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        image, texts = target[:, 0], [domain.caption(spec) for spec in specs]
        own = [[i for i, clip in enumerate(clips) if clip.family == spec.family] for spec in specs]
        away = [
            rng.choice([i for i, clip in enumerate(clips) if clip.family != spec.family], 4, replace=False).tolist()
            for spec in specs
        ]
        appearance = net.appearance_tokens(image)

        def predict(rows: list[list[int]], appearance: Tensor = appearance) -> Tensor:
            picked = torch.tensor(rows)
            return net.cama(memory_motion[picked], memory_appearance[picked], appearance)

        truth = net.motion_tokens(target)
        runs = {
            "scale 0": (predict(own), 0.0),
            "random references": (predict(away), 1.0),
            "CAMA K=1": (predict([row[:1] for row in own]), 1.0),
            "CAMA K=4": (predict(own), 1.0),
            "ground-truth tokens": (truth, 1.0),
            "copied tokens": (memory_motion[torch.tensor([row[0] for row in own])], 1.0),
        }
        result[kind] = {
            "still (no motion at all)": round(
                float(np.mean([np.linalg.norm(np.asarray(spec.path), axis=1)[1:].mean() for spec in specs])), 2
            )
        }
        for name, (tokens, scale) in runs.items():
            made = sample(net, words, image, texts, tokens, scale, guidance=guidance)
            errors = [domain.end_point_error(clip, spec.centres) for clip, spec in zip(made, specs, strict=True)]
            result[kind][name] = round(float(np.mean(errors)), 2)
            log(kind, name, f"{np.mean(errors):.2f} px")
            if name in ("CAMA K=4", "scale 0"):
                rows = [np.concatenate([*pair[::2]], axis=1) for i in range(8) for pair in (frames[i], made[i])]
                Image.fromarray(np.concatenate(rows)).save(WORK / f"{kind}_{name.replace(' ', '_')}.png")
    (WORK / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def stage_all() -> None:
    """Everything from nothing, in one process."""
    stage_data()
    stage_autoencoder(BUDGET["autoencoder"])
    stage_motion(BUDGET["motion"])
    stage_appearance(BUDGET["appearance"])
    stage_text(BUDGET["text"])
    stage_cama(BUDGET["cama"])
    stage_denoiser(BUDGET["denoiser"])
    stage_autoencoder(BUDGET["refine"], refine=True)
    stage_pack()
    stage_clips()
    stage_evaluate()


def main() -> None:
    timed: dict[str, Callable[..., None]] = {
        "autoencoder": stage_autoencoder, "refine": lambda s: stage_autoencoder(s, refine=True), "motion": stage_motion,
        "appearance": stage_appearance, "text": stage_text, "cama": stage_cama, "denoiser": stage_denoiser,
    }  # fmt: skip
    plain = {"data": stage_data, "pack": stage_pack, "clips": stage_clips, "evaluate": stage_evaluate, "all": stage_all}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*timed, *plain])
    parser.add_argument("--seconds", type=float, help="process seconds of the stage (default: its budget)")
    parser.add_argument("--resume", action="store_true", help="cama, denoiser: go on from the stage's work file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    WORK.mkdir(exist_ok=True)
    if options.stage in plain:
        plain[options.stage]()
    else:
        more = {"resume": True} if options.resume else {}
        timed[options.stage](options.seconds or BUDGET[options.stage], **more)


if __name__ == "__main__":
    main()
