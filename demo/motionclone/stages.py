"""The stages that train. See train.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import domain
import model as demo
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from recipe import log, noised
from torch import Tensor, nn
from training import HERE, WORK, ids, pixels, tokenizer, work
from world import FRAMES, a_paint, allowed, training_clip

OBJECT = 13.0  # px from its centre, an object's edge and a little more
NOISE = 0.12  # on latents, in the autoencoder's training: generated ones will not be exact either
KEPT = 0.1  # of the loss of stage `painted`: how far known frames' latents move
CLIPS = 9000
EMPTY = 0.12  # share of prompts left out, for guidance
REFINED = 320  # clips that the UNet makes anew for the decoder


def pictures(rng: np.random.Generator, count: int, painted: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Random single frames: pixels, coverage and the background alone, `[N, 3 | 1 | 3, 64, 64]`.

    `painted`: the share of those whose object has any colour, or two; they come first.
    """
    frames, covers, behind = [], [], []
    for number in range(count):
        start = tuple(float(v) for v in rng.uniform(8, 56, 2))
        spec = domain.sample_spec(rng, path=np.zeros((1, 2)), start=(start[0], start[1]))
        paint = a_paint(rng, spec) if number < count * painted else None
        spec = allowed(rng, spec) if paint is None else spec
        frame, cover = domain.render(spec, paint=paint)
        frames.append(frame[0])
        covers.append(cover[0])
        behind.append(domain.background(spec.background))
    return pixels(np.stack(frames)), torch.from_numpy(np.stack(covers))[:, None], _behind(behind)


def _behind(backgrounds: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(backgrounds)).permute(0, 3, 1, 2) * 2 - 1


def layer_loss(layers: tuple[Tensor, Tensor, Tensor], frames: Tensor, cover: Tensor, behind: Tensor) -> Tensor:
    """How far the decoder's layers are off: pixels (most near the sprite), coverage, background."""
    colour, background, logits = (layer.float() for layer in layers)
    error = background + torch.sigmoid(logits) * (colour - background) - frames
    around = (F.max_pool2d(cover, 9, stride=1, padding=4) > 0.02).float()
    loss = ((1 + 6 * around) * (2 * error.square() + 0.5 * error.abs())).mean()
    loss = loss + 0.3 * F.binary_cross_entropy_with_logits(logits, cover)
    return loss + 4 * (background - behind).square().mean()


def stage_autoencoder(steps: int, batch: int = 32) -> None:
    """Single frames, with the layers that the renderer knows as extra targets and noise on the latents."""
    torch.manual_seed(1)
    net = demo.FrameAutoencoder()
    for step in work.training("autoencoder", net, [{"params": net.parameters(), "lr": 2e-3}], steps):
        frames, cover, behind = pictures(step.rng, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            raw = net.encode_raw(frames)
        latents = noised(net, raw.float(), NOISE * step.rng.choice([0.3, 1.0, 1.7]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layers = net.layers(latents[:, None])
        step.advance(layer_loss(layers, frames, cover, behind))
    net.eval()
    with torch.no_grad():
        raw = net.encode_raw(pictures(np.random.default_rng(2), 512)[0])
        net.mean.copy_(raw.mean(dim=(0, 2, 3), keepdim=True))
        net.std.copy_(raw.std(dim=(0, 2, 3), keepdim=True))
        frames, cover, _ = pictures(np.random.default_rng(3), 256)
        inside = (cover > 0.5).expand_as(frames)
        for noise in (0.0, NOISE, 2 * NOISE):
            latents = net.encode(frames)
            square = (net.decode(latents + noise * torch.randn_like(latents)) - frames).square() / 4
            whole, sprite = (-10 * math.log10(float(x.mean())) for x in (square, square[inside]))
            log(f"noise {noise}: {whole:.2f} dB, on the sprite {sprite:.2f} dB")
    work.keep(net, "autoencoder")


def stage_painted(steps: int, batch: int = 32, painted: float = 0.75) -> None:
    """Objects of any colour, or of two: what a shape looks like in latents must not hang on its colour, or pairs never seen
    come out as others. Frames of the colours that have names keep their latents, as far as they can: the UNet knows those.
    """
    before, net = demo.FrameAutoencoder(), demo.FrameAutoencoder()
    work.restore(before, "autoencoder")
    work.restore(net, "autoencoder")
    before.eval().requires_grad_(False)
    for step in work.training("painted", net, [{"params": net.parameters(), "lr": 1e-3}], steps, average=0.99):
        frames, cover, behind = pictures(step.rng, batch, painted)
        named = frames[int(batch * painted) :]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            raw, known = net.encode_raw(frames), before.encode_raw(named)
        latents = (raw.float() - net.mean) / net.std
        moved = (latents[-len(named) :] - (known.float() - net.mean) / net.std).square().mean()
        latents = latents + torch.randn_like(latents) * NOISE * float(step.rng.choice([0.3, 1.0, 1.7]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layers = net.layers(latents[:, None])
        step.advance(layer_loss(layers, frames, cover, behind) + KEPT * moved)
    work.keep(net, "painted")


def stage_latents() -> None:
    """The latents of the training clips, and their captions with and without the motion."""
    net = demo.FrameAutoencoder()
    work.restore(net, "autoencoder")
    net.eval().requires_grad_(False)
    rng = np.random.default_rng(21)
    parts, plain, full, centres = [], [], [], []
    for number in range(CLIPS):
        spec = training_clip(rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            raw = net.encode_raw(pixels(domain.render(spec)[0]))
        parts.append(((raw.float() - net.mean) / net.std).half())
        plain.append(domain.caption(spec, motion=False))
        full.append(domain.caption(spec))
        centres.append(torch.from_numpy(spec.centres).float())
        if number % 2000 == 1999:
            log("encoded", number + 1, "of", CLIPS)
    work.keep_data({"latents": torch.stack(parts), "plain": plain, "full": full, "centres": torch.stack(centres)}, "latents")


class Explicit:
    """Attention as two matrix products: with bfloat16 on a CPU its backward is quicker than the fused operator's."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        seen = torch.softmax((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2), -1)
        return attn.to_out[0]((seen @ value).transpose(1, 2).flatten(2))


@contextmanager
def pictures_only(unet: nn.Module) -> Iterator[None]:
    """Motion modules are passed by."""
    modules = [module for module in unet.modules() if isinstance(module, AnimateDiffTransformer3D)]
    for module in modules:
        module.forward = lambda hidden_states, num_frames=1: hidden_states
    yield
    for module in modules:
        del module.forward


def near(centres: Tensor) -> Tensor:
    """Weights of latent cells `[..., 1, 8, 8]`, mean 1: those at an object (centres `[..., 2]` px) count five times.

    An object covers a seventh of a frame, and most of the rest is a texture that nobody asked for.
    """
    axis = (torch.arange(8) + 0.5) * (domain.SIZE / 8)
    x, y = axis - centres[..., 0, None], axis - centres[..., 1, None]
    inside = x[..., None, :].square() + y[..., :, None].square() < OBJECT**2
    weight = 1 + 4 * inside[..., None, :, :].float()
    return weight / weight.mean()


def denoiser_loss(
    both: nn.ModuleList, latents: Tensor, tokens: Tensor, rng: np.random.Generator, weight: Tensor | None = None
) -> Tensor:
    """v-prediction, `latents [B, F, 4, 8, 8]`; three steps in ten are drawn from the noisy half alone."""
    count, frames = latents.shape[:2]
    early = rng.random(count) < 0.3
    t = torch.from_numpy(np.where(early, rng.integers(500, 1000, count), rng.integers(0, 1000, count)))
    a = demo.LEVELS[t][:, None, None, None, None]
    noise = torch.randn_like(latents)
    noisy, target = a.sqrt() * latents + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * latents
    with torch.autocast("cpu", dtype=torch.bfloat16):
        text = both[1](tokens).last_hidden_state.repeat_interleave(frames, 0)
        out = both[0](noisy.transpose(1, 2), t, encoder_hidden_states=text, return_dict=False)[0].transpose(1, 2)
    error = (out.float() - target).square()
    return error.mean() if weight is None else (error * weight).mean()


def captions(rng: np.random.Generator, count: int, plain: Tensor, full: Tensor, named: float, apart: float = 0.0) -> Tensor:
    """Tokens `[count, 12]`: `named` of them with the motion, EMPTY of them nothing. In some, words of the motion are unknown,
    as those of kinds of motion that no training text names will be; in `apart`, the colour or the shape is: what a shape is
    must not hang on its colour, or pairs never seen together come out as others.
    """

    def some(share: float) -> Tensor:
        return torch.from_numpy(rng.random(count) < share)[:, None]

    tokens = torch.where(some(named), full, plain)
    word = (tokens != demo.PAD) & (tokens != demo.EOS)
    word[:, :4] = False  # the beginning, and "a COLOUR SHAPE"
    hidden = torch.from_numpy(rng.random(tuple(tokens.shape)) < 0.6) & word & some(0.3)
    if apart:
        choice = torch.from_numpy(rng.random(count))
        hidden[:, 2] |= choice < apart / 2
        hidden[:, 3] |= choice > 1 - apart / 2
    nothing = torch.tensor([demo.BOS, demo.EOS] + [demo.PAD] * (demo.TEXT_TOKENS - 2))
    return torch.where(some(EMPTY), nothing, torch.where(hidden, demo.UNKNOWN, tokens))


class Clips:
    """UNet and text encoder (`both`), and the training clips as latents, tokens and centres."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        self.both = nn.ModuleList([demo.build_unet(), demo.build_text()])
        self.both[0].set_attn_processor(Explicit())
        data, words = torch.load(WORK / "latents.pt", weights_only=True), tokenizer()
        self.latents, self.centres = data["latents"], data["centres"]
        self.plain, self.full = ids(words, data["plain"]), ids(words, data["full"])

    def pictures(self, rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Single frames: latents `[B, 1, 4, 8, 8]`, tokens, centres `[B, 1, 2]`."""
        index, frame = rng.integers(len(self.latents), size=batch), rng.integers(FRAMES, size=batch)
        tokens = captions(rng, batch, self.plain[index], self.full[index], named=0.25)
        return self.latents[index, frame][:, None].float(), tokens, self.centres[index, frame][:, None]


def _split(both: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights of the motion modules, and all others."""
    named = list(both.named_parameters())
    return [p for name, p in named if "motion_modules" in name], [p for name, p in named if "motion_modules" not in name]


def stage_images(steps: int, batch: int = 64) -> None:
    """Single frames and their captions teach what things look like: many more of them fit into a step than with clips."""
    clips = Clips()
    with pictures_only(clips.both[0]):
        groups = [{"params": _split(clips.both)[1], "lr": 1.2e-3}]
        for step in work.training("images", clips.both, groups, steps, average=0.995):
            latents, tokens, _ = clips.pictures(step.rng, batch)
            step.advance(denoiser_loss(clips.both, latents, tokens, step.rng))
    work.keep(clips.both, "images")


def stage_objects(steps: int, batch: int = 64) -> None:
    """The same once more, looking mostly at the objects: shapes are what a small model learns last."""
    clips = Clips()
    work.restore(clips.both, "images")
    with pictures_only(clips.both[0]):
        groups = [{"params": _split(clips.both)[1], "lr": 1e-3}]
        for step in work.training("objects", clips.both, groups, steps, average=0.995):
            latents, tokens, centres = clips.pictures(step.rng, batch)
            step.advance(denoiser_loss(clips.both, latents, tokens, step.rng, near(centres)))
    work.keep(clips.both, "objects")


def _moving(name: str, begin: str, moving_rate: float, rate: float, steps: int, batch: int = 8) -> None:
    """Clips; half the captions name the motion."""
    clips = Clips()
    work.restore(clips.both, begin)
    moving, spatial = _split(clips.both)
    groups: list[dict[str, Any]] = [{"params": moving, "lr": moving_rate}, {"params": spatial, "lr": rate}]
    for step in work.training(name, clips.both, groups, steps, average=0.995):
        index = step.rng.choice(len(clips.latents), batch, replace=False)
        tokens = captions(step.rng, batch, clips.plain[index], clips.full[index], named=0.5, apart=0.3)
        weight = near(clips.centres[index])
        step.advance(denoiser_loss(clips.both, clips.latents[index].float(), tokens, step.rng, weight))
    work.keep(clips.both, name)


def stage_video(steps: int) -> None:
    """The motion modules start from nothing and learn twice as fast as the rest."""
    _moving("video", "objects", 1.2e-3, 6e-4, steps)


def stage_longer(steps: int) -> None:
    """The same again from higher rates: shapes and colours go on getting better for a long time."""
    _moving("longer", "video", 8e-4, 5e-4, steps)


def made_again(count: int) -> tuple[list[Any], Tensor, Tensor]:
    """Training clips, their own latents, and those latents as the UNet makes them; the latter are made once.

    Noise of a random level keeps where a clip's object is, and so the frames that the decoder has to give; what the UNet
    puts in place of the rest has the errors that the decoder meets in use.
    """
    from sampler import Cloner

    from motionrt.export.systems.motionclone.rows import Recipe, rows

    rng = np.random.default_rng(31)
    specs = [training_clip(rng) for _ in range(count)]
    path = WORK / "made_again.pt"
    if not path.exists():
        model = demo.DemoModel()
        work.restore(nn.ModuleList([model.unet, model.text_encoder]), "longer")
        work.restore(model.vae, "painted")
        cloner = Cloner(model.eval().requires_grad_(False), quick=True)
        torch.manual_seed(31)
        clean, made = [], []
        for first in range(0, count, 8):
            part = specs[first : first + 8]
            with torch.no_grad():
                latents = torch.stack([model.vae.encode(pixels(domain.render(spec)[0])) for spec in part])
            share = float(rng.uniform(0.25, 0.55))
            table = rows(Recipe(4, 0, 1 - share), cloner.alphas, cloner.prediction, float(rng.uniform(1.0, 2.5)))
            level = demo.LEVELS[int(table[0, 1])]
            noisy = level.sqrt() * latents + (1 - level).sqrt() * torch.randn_like(latents)
            clean.append(latents.half())
            made.append(cloner.run(noisy, [domain.caption(spec, motion=False) for spec in part], table).half())
        work.keep_data({"clean": torch.cat(clean), "made": torch.cat(made)}, "made_again")
        log("made", count, "clips again")
    data = torch.load(path, weights_only=True)
    return specs, data["clean"].float(), data["made"].float()


def stage_refine(steps: int, batch: int = 3) -> None:
    """The decoder learns what the UNet's latents look like, a clip at a time. The encoder stays."""
    specs, clean, made = made_again(REFINED)
    net = demo.FrameAutoencoder()
    work.restore(net, "painted")
    frozen = {"patch", "down", "mix", "to_latent"}
    trained = [p for name, p in net.named_parameters() if name.split(".")[0] not in frozen]
    for step in work.training("refine", net, [{"params": trained, "lr": 8e-4}], steps, average=0.99):
        rng = step.rng
        index = rng.choice(len(specs), batch, replace=False)
        latents = torch.where(torch.from_numpy(rng.random(batch) < 0.8)[:, None, None, None, None], made[index], clean[index])
        latents = latents + torch.randn_like(latents) * float(rng.uniform(0, 0.15))
        drawn = [domain.render(specs[i]) for i in index]
        frames = pixels(np.concatenate([frames for frames, _ in drawn]))
        cover = torch.from_numpy(np.concatenate([cover for _, cover in drawn]))[:, None]
        behind = _behind([domain.background(specs[i].background) for i in index]).repeat_interleave(FRAMES, 0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layers = net.layers(latents)
        step.advance(layer_loss(layers, frames, cover, behind))
    work.keep(net, "refined")


def stage_pack() -> None:
    """All parts into checkpoint.safetensors, and the tokenizer beside it."""
    model = demo.DemoModel()
    work.restore(nn.ModuleList([model.unet, model.text_encoder]), "longer")
    work.restore(model.vae, "refined")
    path = HERE / "checkpoint.safetensors"
    demo.save(model, path)
    tokenizer().save(str(HERE / "tokenizer.json"))
    log("wrote", path.name, path.stat().st_size, "bytes")


def stage_unpack() -> None:
    """The shipped checkpoint as the work files of the stages before `painted`: its decoder is the refined one."""
    model = demo.load(HERE / "checkpoint.safetensors")
    work.keep(model.vae, "autoencoder")
    work.keep(nn.ModuleList([model.unet, model.text_encoder]), "longer")
