"""The stages `predict` (where things go, from a picture, words and a stride) and `control` (drags, brushes). See train.py."""

from __future__ import annotations

import model as demo
import numpy as np
import torch
from clips import BASE, HERE, WORK, Clips, work
from fields import a_control, as_unit
from networks import CONTROL, PREDICT, TARGETS, FieldAutoencoder, FlowUNet, MotionI2V, Trajectories, load, quick, save
from recipe import log
from render_stage import noised
from stages import near
from torch import Tensor, nn

PARTS = {  # of the checkpoint, and their work files when all is done
    "flow": "flow", "predict": "predict_on", "motion_text": "text_on", "control": "control_again", "render": "render_on",
    "text_encoder": "words",
}  # fmt: skip


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


def stage_predict(steps: int) -> None:
    """v-prediction of flow latents `[B, 15, 4, 8, 8]`, beside the image's latent in every frame.

    MotionClone's text encoder learns on, for this stage alone: it tells colours and shapes apart, but hardly any motion.
    """
    torch.manual_seed(5)
    _predicting("", FlowUNet(PREDICT), demo.load(BASE).text_encoder, 1.2e-3, steps, 0.99)


def stage_predict_on(steps: int) -> None:
    """The same again, from a lower rate."""
    net, text = FlowUNet(PREDICT), demo.build_text()
    work.restore(net, "predict")
    work.restore(text, "text")
    _predicting("_on", net, text, 8e-4, steps, 0.995)


def _predicting(on: str, net: FlowUNet, text: nn.Module, rate: float, steps: int, average: float, batch: int = 8) -> None:
    (clips, flows), both = data(), nn.ModuleList([net.train(), text.requires_grad_(True)])
    for step in work.training(f"predict{on}", both, [{"params": both.parameters(), "lr": rate}], steps, average=average):
        made = Noisy(clips, flows, step.rng, batch, named=0.9)
        hidden = text(clips.text(step.rng, made.index, named=0.95)).last_hidden_state
        with quick(), torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(*made.given, hidden)
        step.advance(made.loss(out))
    work.keep(net, f"predict{on}")
    work.keep(text, f"text{on}")


def stage_control(steps: int) -> None:
    """The ControlNet alone, from the encoder of a stage 1 that stays. Where drags and words differ, drags are right."""
    torch.manual_seed(6)
    control, net = Trajectories(CONTROL), FlowUNet(PREDICT)
    work.restore(net, "predict")
    control.load_state_dict(net.state_dict(), strict=False)
    _controlling("", control, 1e-3, steps, 0.99)


def stage_control_on(steps: int) -> None:
    """The same again, beside the stage 1 that `predict_on` left."""
    control = Trajectories(CONTROL)
    work.restore(control, "control")
    _controlling("_on", control, 8e-4, steps, 0.995)


def stage_control_again(steps: int) -> None:
    """And again, for brushes along a way: before, they were discs."""
    control = Trajectories(CONTROL)
    work.restore(control, "control_on")
    _controlling("_again", control, 8e-4, steps, 0.995)


def _controlling(on: str, control: Trajectories, rate: float, steps: int, average: float, batch: int = 8) -> None:
    (clips, flows), net, text, vae = data(), FlowUNet(PREDICT), demo.build_text(), FieldAutoencoder()
    beside = on and "_on"
    work.restore(net, f"predict{beside}")
    work.restore(text, f"text{beside}")
    work.restore(vae, "flow")
    control.train()
    net.requires_grad_(False)
    text.eval().requires_grad_(False)
    vae.eval().requires_grad_(False)
    for step in work.training(f"control{on}", control, [{"params": control.parameters(), "lr": rate}], steps, average=average):
        made = Noisy(clips, flows, step.rng, batch, named=0.5)
        hidden = text(clips.text(step.rng, made.index, named=0.5, wrong=0.3)).last_hidden_state
        drawn = [a_control(clips.fields(np.array([i]))[0].numpy(), clips.cover[i].numpy(), step.rng) for i in made.index]
        known = vae.encode(torch.from_numpy(as_unit(np.concatenate([field for field, _ in drawn]))))
        hint = hinted(known.unflatten(0, (batch, TARGETS)), torch.from_numpy(np.stack([mask for _, mask in drawn])))
        with quick(), torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(*made.given, hidden, control(*made.given, hidden, hint))
        step.advance(made.loss(out))
    work.keep(control, f"control{on}")


def hinted(known: Tensor, mask: Tensor) -> Tensor:
    """Flow latents of what is known `[B, 15, 4, 8, 8]`, and where `[B, 64, 64]` -> the ControlNet's hint `[B, 15, 5, 8, 8]`."""
    cells = mask[:, None, None, ::8, ::8].float().expand(-1, TARGETS, -1, -1, -1)
    return torch.cat([known, cells], dim=2)


def stage_pack() -> None:
    """All parts into checkpoint.safetensors; MotionClone's demo's image autoencoder too, as that may get another."""
    model = MotionI2V()
    for part, name in PARTS.items():
        work.restore(getattr(model, part), name)
    model.vae = demo.load(BASE).vae
    path = HERE / "checkpoint.safetensors"
    save(model, path)
    log("wrote", path.name, path.stat().st_size, "bytes")


def stage_unpack() -> None:
    """The parts of the shipped checkpoint as the work files of the stages before the last ones."""
    model = load(HERE / "checkpoint.safetensors")
    for part, name in PARTS.items():
        before = name.removesuffix("_on").removesuffix("_again")
        work.keep(getattr(model, part), "longer" if part == "render" else before)
