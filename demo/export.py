"""The demo checkpoint as a bundle: `python demo/export.py [checkpoint] [out]`. The compiler does not know this model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import model as demo
import torch
from diffusers import CogVideoXDPMScheduler
from torch import Tensor, nn

from motionrt.export.checkpoints.text_query import packaged_encoder
from motionrt.export.compiler.partition import Partition, partition
from motionrt.export.exporter import export_system
from motionrt.export.systems.cogvideox_step import INPUTS, CogVideoXStep, solver_rows
from motionrt.export.systems.decoding import Decoding
from motionrt.export.systems.motionrag_system import BATCH, Base, motionrag_system, solver_table
from motionrt.export.systems.system import Array, Graph, Network, System, TokenizerText
from motionrt.runtime.files import sha256_of

HERE = Path(__file__).resolve().parent
STEP_OUTPUTS = ("next_latents", "x0")
GUIDANCE = 2.0


class Method(nn.Module):
    """One function of a model as a module of its own, holding only the parts it uses."""

    def __init__(self, parts: Mapping[str, nn.Module], function: Callable[..., Any]) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def step_module(checkpoint: Path) -> CogVideoXStep:
    """The plain denoising step of the checkpoint, fp32."""
    model = demo.load(checkpoint)
    return CogVideoXStep(model.denoiser, model.uncond_motion, demo.LATENTS).eval()


def step_inputs() -> dict[str, Array]:
    """Inputs of the step in the order of `INPUTS`."""
    frames, text = Array(("batch", *demo.LATENTS)), Array(("batch", demo.TEXT_TOKENS, demo.TEXT_WIDTH))
    arrays = dict.fromkeys(("latents", "previous_x0", "noise", "image_latents"), frames)
    arrays |= {"coefficients": Array(("batch", 6)), "guidance": Array(("batch",)), "motion_scale": Array(("batch",))}
    arrays |= {"timestep": Array(("batch",), torch.int64, 1000), "text": text, "negative_text": text}
    arrays["motion"] = Array(("batch", demo.TOKENS, demo.WIDTH))
    return {name: arrays[name] for name in INPUTS}


def step_feed(batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of the step, each request at a step of its own, the first at 500 with guidance 2.5 and all motion."""
    draw, rows = torch.Generator().manual_seed(seed), torch.arange(batch)
    chosen = {"guidance": 2.5 + rows / 4, "timestep": 500 - 100 * rows, "motion_scale": 1 - rows / 4}
    shapes = {name: [batch, *array.dims[1:]] for name, array in step_inputs().items()}
    return {name: chosen[name] if name in chosen else torch.randn(shapes[name], generator=draw) for name in INPUTS}  # type: ignore[arg-type]


def partition_step(step: CogVideoXStep) -> Partition:
    """The step cut by what changes when."""
    batch, feed = torch.export.Dim("batch", min=1, max=BATCH.max), step_feed(2)
    shapes = tuple({0: batch} for _ in feed)
    return partition(step, tuple(feed.values()), INPUTS, outputs=STEP_OUTPUTS, dynamic_shapes=shapes)


def eager_step(checkpoint: Path) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """The plain step in torch eager behind the backend seam: named numpy arrays in and out."""
    step = step_module(checkpoint)

    def run(arrays: Mapping[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            results = step(**{name: torch.tensor(arrays[name]) for name in INPUTS})
        return {name: value.numpy() for name, value in zip(STEP_OUTPUTS, results, strict=True)}

    return run


def demo_system(checkpoint: Path) -> System:
    """The system of a checkpoint; all of it is in memory, and so every graph is checked against its module."""
    model = demo.load(checkpoint)

    def graph(module: nn.Module, inputs: dict[str, Array], output: str) -> Graph:
        return Graph(Network(module.eval()), inputs, (output,), {"batch": BATCH})

    motion = Method(
        {"encoder": model.motion_encoder, "proj": model.motion_proj}, lambda self, video: self.proj(self.encoder(video))
    )
    appearance = Method(
        {"encoder": model.appearance_encoder, "proj": model.appearance_proj}, lambda self, image: self.proj(self.encoder(image))
    )
    encode = Method({"autoencoder": model.autoencoder}, lambda self, image: self.autoencoder.encode_image(image))
    decode = Method({"autoencoder": model.autoencoder}, lambda self, latents: self.autoencoder.decode(latents))
    networks = {name: Network(m.eval()) for name, m in {"motion": motion, "appearance": appearance, "cama": model.cama}.items()}
    ddim = demo.scheduler()
    dpm = CogVideoXDPMScheduler.from_config(ddim.config)
    words = (HERE / "tokenizer.json").read_text(encoding="utf-8")
    return motionrag_system(
        Base(
            name="demo",
            clip=(demo.FRAMES, demo.SIZE, demo.SIZE),
            fps=demo.FPS,
            encode=graph(encode, {"image": Array(("batch", 3, demo.SIZE, demo.SIZE))}, "image_latents"),
            decoding=Decoding({"decode": graph(decode, {"latents": Array(("batch", *demo.LATENTS))}, "video")}),
            step=Network(CogVideoXStep(model.denoiser, model.uncond_motion, demo.LATENTS).eval()),
            changes=INPUTS,
            inputs=step_inputs(),
            solvers={
                "ddim": {n: solver_table(*solver_rows(ddim, n), GUIDANCE) for n in range(1, 51)},
                "dpm": {n: solver_table(*solver_rows(dpm, n), GUIDANCE) for n in range(2, 51)},
            },
            text=graph(model.text, {"input_ids": Array(("batch", demo.TEXT_TOKENS), torch.int64, demo.VOCABULARY)}, "text"),
            tokenizer=TokenizerText(words, demo.TEXT_TOKENS, demo.PAD),
        ),
        networks,
        packaged_encoder(),
        (demo.TOKENS, demo.WIDTH),
        guidance=GUIDANCE,
        steps=8,
        references=4,
        most=8,
        plain=True,
        provenance={"checkpoint": sha256_of(checkpoint)},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=HERE / "checkpoint.safetensors")
    parser.add_argument("out", type=Path, nargs="?", default=HERE / "bundle")
    arguments = parser.parse_args()
    export_system(demo_system(arguments.checkpoint), arguments.out, say=print)
