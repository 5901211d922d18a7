"""The training clips: the stage `drawn` draws them and encodes their frames, `fields` their true fields. See train.py."""

from __future__ import annotations

from pathlib import Path

import domain
import model as demo
import numpy as np
import torch
from fields import as_unit, covered, spread, training_clip
from networks import FieldAutoencoder
from recipe import Work, log
from torch import Tensor
from training import ids, pixels, tokenizer

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
work = Work(WORK)
# Has the image autoencoder, stage 2's text encoder, and what stage 2 and stage 1's text encoder begin with.
BASE = HERE.parent / "motionclone" / "checkpoint.safetensors"
CLIPS = 4500
NAMED = 0.65  # of the clips: the others are on free paths, and their captions say no more than "moves"


def stage_drawn() -> None:
    """Latents of the frames, what frame 0's sprite covers, its path, strides and captions with and without the motion."""
    vae = demo.load(BASE).vae
    rng = np.random.default_rng(61)
    specs, strides, latents = [], [], []
    for number in range(CLIPS):
        spec, stride = training_clip(rng, NAMED)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            raw = vae.encode_raw(pixels(domain.render(spec)[0]))
        latents.append(((raw.float() - vae.mean) / vae.std).half())
        specs.append(spec)
        strides.append(stride)
        if number % 1000 == 999:
            log("encoded", number + 1, "of", CLIPS)
    words = tokenizer()
    work.keep_data(
        {
            "latents": torch.stack(latents),
            "cover": torch.from_numpy(np.stack([covered(spec) for spec in specs])),
            "centres": torch.from_numpy(np.stack([spec.centres for spec in specs])).float(),
            "strides": torch.tensor(strides),
            "plain": ids(words, [domain.caption(spec, motion=False) for spec in specs]),
            "full": ids(words, [domain.caption(spec) for spec in specs]),
        },
        "drawn",
    )


@torch.no_grad()
def stage_fields() -> None:
    """The flow latents of the clips' true fields."""
    clips, vae = Clips(), FieldAutoencoder()
    work.restore(vae, "flow")
    vae.eval()
    made = []
    for number in range(len(clips.latents)):
        field = spread(clips.centres[number].numpy().astype(np.float64), clips.cover[number].numpy())
        made.append(vae.encode(torch.from_numpy(as_unit(field))).half())
    work.keep_data(torch.stack(made), "fields")


class Clips:
    """What stage `drawn` left: latents `[N, 16, 4, 8, 8]`, cover `[N, 64, 64]`, centres `[N, 16, 2]` px, strides, tokens."""

    def __init__(self) -> None:
        data = torch.load(WORK / "drawn.pt", weights_only=True)
        self.latents: Tensor = data["latents"]
        self.cover: Tensor = data["cover"]
        self.centres: Tensor = data["centres"]
        self.plain: Tensor = data["plain"]
        self.full: Tensor = data["full"]
        self.strides: Tensor = data["strides"]

    def some(self, rng: np.random.Generator, count: int, named: float) -> np.ndarray:
        """Clips without repetition, `named` of them such as have words for their motion."""
        has = (self.full != self.plain).any(dim=1).numpy()
        wanted = rng.random(count) < named
        parts = [rng.choice(np.flatnonzero(has == kind), int((wanted == kind).sum()), replace=False) for kind in (True, False)]
        return np.concatenate(parts)

    def fields(self, index: np.ndarray) -> Tensor:
        """The true fields `[B, 15, 2, 64, 64]` px."""
        moved = self.centres[index, 1:] - self.centres[index, :1]
        return moved[..., None, None] * self.cover[index][:, None, None]

    def text(self, rng: np.random.Generator, index: np.ndarray, named: float, wrong: float = 0.0, empty: float = 0.1) -> Tensor:
        """Tokens `[B, 12]`: captions with the motion (`named`) or without it; another clip's (`wrong`); none (`empty`)."""

        def some(share: float) -> Tensor:
            return torch.from_numpy(rng.random(len(index)) < share)[:, None]

        tokens = torch.where(some(named), self.full[index], self.plain[index])
        motion = torch.cat([tokens[:, :4], self.full[rng.permutation(len(self.full))[: len(index)], 4:]], dim=1)
        tokens = torch.where(some(wrong), motion, tokens)
        nothing = torch.tensor([demo.BOS, demo.EOS] + [demo.PAD] * (demo.TEXT_TOKENS - 2))
        return torch.where(some(empty), nothing, tokens)
