"""MotionClone's sampling in PyTorch, by the modules that the export makes graphs of: for the stage `refine`, and to choose
settings by. What the demo shows and measures comes from the exported bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import model as demo
import numpy as np
import torch
from torch import Tensor
from training import ids, tokenizer

from motionrt.export.systems.motionclone.rows import Recipe, noise_schedule, rows
from motionrt.export.systems.motionclone.step import Extract, GuidedStep, PlainStep
from motionrt.export.systems.motionclone.system import EXTRACTED
from motionrt.export.systems.motionclone.unet import TappedUNet, prepared

Motion = tuple[Tensor, Tensor]


class Cloner:
    """A model's guided and plain sampling, batched over clips; bfloat16 where `quick`."""

    def __init__(self, model: demo.DemoModel, quick: bool = False) -> None:
        self.model, self.quick, self.words = model, quick, tokenizer()
        self.net = TappedUNet(prepared(model.unet), block=1)
        self.alphas, self.prediction = noise_schedule(demo.SCHEDULER)
        level = float(self.alphas[EXTRACTED])
        self.extract = Extract(self.net, self.text([""]), EXTRACTED, level, temperature=1.0)
        self.guided, self.plain = GuidedStep(self.net), PlainStep(self.net)

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """`[B, 12, 64]`."""
        hidden: Tensor = self.model.text_encoder(ids(self.words, list(prompts))).last_hidden_state
        return hidden

    def _cast(self) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.quick)

    @torch.no_grad()
    def motion(self, latents: Tensor, noise: Tensor) -> Motion:
        """The motion of reference latents `[B, F, 4, 8, 8]`, read with the noise that the generation starts from."""
        with self._cast():
            weights, targets = self.extract(latents[:, None].float(), torch.zeros(len(latents), 1), noise)
        return weights.float(), targets.float()

    def sample(self, prompts: Sequence[str], start: Tensor, recipe: Recipe, guidance: float, motion: Motion | None) -> Tensor:
        """Latents `[B, F, 4, 8, 8]` from noise `start`; without `motion`, every step is plain."""
        return self.run(start, prompts, rows(recipe, self.alphas, self.prediction, guidance), motion)

    def run(self, latents: Tensor, prompts: Sequence[str], table: np.ndarray, motion: Motion | None = None) -> Tensor:
        """The steps of `table` (see `motionclone/rows.py`) from `latents`, which have the noise of its first row."""
        count = len(latents)
        text, empty = self.text(prompts), self.text([""] * count)
        for row in torch.from_numpy(table):
            shared = (row[5:].expand(count, -1), row[2].expand(count), row[1].expand(count), text, empty)
            with self._cast():
                if motion is not None and row[0] == 0:
                    latents, _ = self.guided(latents, *shared, row[4].expand(count), row[3].expand(count), *motion)
                else:
                    with torch.no_grad():
                        latents = self.plain(latents, *shared)
            latents = latents.float().detach()
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Frames uint8 `[B, F, 64, 64, 3]`."""
        frames = torch.cat([self.model.vae.decode(part) for part in latents.split(4)])
        return ((frames.movedim(-3, -1) + 1) * 127.5).round().byte().numpy()
