"""The stages `predict` (where things go, from a picture, words and a stride) and `control` (drags, brushes). See train.py."""

from __future__ import annotations

import model as demo
import numpy as np
import torch
from clips import BASE, HERE, WORK, Clips, work
from fields import a_control, as_unit
from networks import CONTROL, PREDICT, TARGETS, FieldAutoencoder, FlowUNet, MotionI2V, Trajectories, quick, save
from recipe import log
from render_stage import noised
from stages import near
from torch import Tensor, nn

PARTS = {"flow": "flow", "predict": "predict", "motion_text": "text", "control": "control", "render": "longer"}  # work files


class Noisy:
    """A training batch of stage 1: what its networks read but for text and hint, and what is asked of them."""

    def __init__(self, clips: Clips, flows: Tensor, rng: np.random.Generator, batch: int, named: float) -> None:
        self.index = clips.some(rng, batch, named)
        t, noisy, self.target = noised(flows[self.index].float(), rng, early=0.6)  # words decide where things go, and early
        strides = clips.strides[self.index, None] * torch.arange(1, demo.FRAMES)
        self.given = clips.latents[self.index, 0].float(), noisy, t, strides
        self.weight = near(clips.centres[self.index, :1])

    def loss(self, out: Tensor) -> Tensor:
        return ((out.float() - self.target).square() * self.weight).mean()


def data() -> tuple[Clips, Tensor]:
    return Clips(), torch.load(WORK / "fields.pt", weights_only=True)


def stage_predict(steps: int, batch: int = 8) -> None:
    """v-prediction of flow latents `[B, 15, 4, 8, 8]`, beside the image's latent in every frame.

    MotionClone's text encoder learns on, for this stage alone: it tells colours and shapes apart, but hardly any motion.
    """
    torch.manual_seed(5)
    (clips, flows), net, text = data(), FlowUNet(PREDICT).train(), demo.load(BASE).text_encoder.requires_grad_(True)
    both = nn.ModuleList([net, text])
    for step in work.training("predict", both, [{"params": both.parameters(), "lr": 1.2e-3}], steps, average=0.99):
        made = Noisy(clips, flows, step.rng, batch, named=0.9)
        hidden = text(clips.text(step.rng, made.index, named=0.95)).last_hidden_state
        with quick(), torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(*made.given, hidden)
        step.advance(made.loss(out))
    work.keep(net, "predict")
    work.keep(text, "text")


def stage_control(steps: int, batch: int = 8) -> None:
    """The ControlNet alone, from the encoder of a stage 1 that stays. Where drags and words differ, drags are right."""
    torch.manual_seed(6)
    (clips, flows), net, text = data(), FlowUNet(PREDICT), demo.build_text()
    work.restore(net, "predict")
    work.restore(text, "text")
    control, vae = Trajectories(CONTROL).train(), FieldAutoencoder()
    control.load_state_dict(net.state_dict(), strict=False)
    work.restore(vae, "flow")
    net.requires_grad_(False)
    text.eval().requires_grad_(False)
    vae.eval().requires_grad_(False)
    for step in work.training("control", control, [{"params": control.parameters(), "lr": 1e-3}], steps, average=0.99):
        made = Noisy(clips, flows, step.rng, batch, named=0.5)
        hidden = text(clips.text(step.rng, made.index, named=0.5, wrong=0.3)).last_hidden_state
        drawn = [a_control(clips.fields(np.array([i]))[0].numpy(), clips.cover[i].numpy(), step.rng) for i in made.index]
        known = vae.encode(torch.from_numpy(as_unit(np.concatenate([field for field, _ in drawn]))))
        hint = hinted(known.unflatten(0, (batch, TARGETS)), torch.from_numpy(np.stack([mask for _, mask in drawn])))
        with quick(), torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(*made.given, hidden, control(*made.given, hidden, hint))
        step.advance(made.loss(out))
    work.keep(control, "control")


def hinted(known: Tensor, mask: Tensor) -> Tensor:
    """Flow latents of what is known `[B, 15, 4, 8, 8]`, and where `[B, 64, 64]` -> the ControlNet's hint `[B, 15, 5, 8, 8]`."""
    cells = mask[:, None, None, ::8, ::8].float().expand(-1, TARGETS, -1, -1, -1)
    return torch.cat([known, cells], dim=2)


def stage_pack() -> None:
    """All parts into checkpoint.safetensors; those of MotionClone's demo too, as that may get others."""
    model, base = MotionI2V(), demo.load(BASE)
    for part, name in PARTS.items():
        work.restore(getattr(model, part), name)
    model.vae, model.text_encoder = base.vae, base.text_encoder
    path = HERE / "checkpoint.safetensors"
    save(model, path)
    log("wrote", path.name, path.stat().st_size, "bytes")
