"""The demo's MotionClone as a bundle: `python demo/motionclone/export.py [checkpoint] [out]`, about 2 minutes."""

from __future__ import annotations

import argparse
from pathlib import Path

import model as demo
import torch
from torch import Tensor, nn
from training import ids, tokenizer

from motionrt.export.checkpoints.encoders import Text
from motionrt.export.checkpoints.text_query import packaged_encoder
from motionrt.export.exporter import export_system
from motionrt.export.systems.decoding import Decoding
from motionrt.export.systems.motionclone.rows import Recipe, noise_schedule, rows
from motionrt.export.systems.motionclone.system import Parts, clone_system
from motionrt.export.systems.motionclone.unet import TappedUNet, prepared
from motionrt.export.systems.system import Array, Graph, Network, System, TokenizerText
from motionrt.runtime.files import sha256_of

HERE = Path(__file__).resolve().parent
GUIDANCE = 2.0
# Chosen with choose.py, on other clips than those that are reported; that of 40 steps as it is known to work from a trial.
RECIPE = Recipe(steps=20, guided=14, share=0.6, weight=8000.0, warm_up=0, cool_down=3)
LONG = Recipe(steps=40, guided=28, share=0.6, weight=10000.0, warm_up=0, cool_down=5)
STEPS = (10, 12, 16, 20, 25, 30, 40, 50)


class Encode(nn.Module):
    """Clips `[K, F, 3, H, W]` to latents `[K, F, 4, h, w]`."""

    def __init__(self, vae: demo.FrameAutoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, video: Tensor) -> Tensor:
        return self.vae.encode(video.flatten(0, 1)).unflatten(0, (-1, demo.FRAMES))


def demo_system(checkpoint: Path) -> System:
    """The system of a checkpoint; all of it is in memory, and so every graph is checked against its module."""
    model, words = demo.load(checkpoint), tokenizer()
    text = Text(model.text_encoder).eval()
    with torch.no_grad():
        null_text = text(ids(words, [""]))
    alphas, prediction = noise_schedule(demo.SCHEDULER)
    decode = Graph(Network(demo.Decode(model.vae).eval()), {"latents": Array((1, *demo.LATENTS))}, ("video",))
    recipes = {n: RECIPE.shortened(n) for n in STEPS} | {recipe.steps: recipe for recipe in (RECIPE, LONG)}
    return clone_system(
        Parts(
            name="motionclone-demo",
            unet=TappedUNet(prepared(model.unet)),
            null_text=null_text,
            text=Network(text),
            text_size=(demo.TEXT_TOKENS, demo.TEXT_WIDTH),
            vocabulary=demo.VOCABULARY,
            tokenizer=TokenizerText(words.to_str(), demo.TEXT_TOKENS, demo.PAD),
            encode=Network(Encode(model.vae).eval()),
            decoding=Decoding({"decode": decode}),
            latents=demo.LATENTS,
            scale=demo.SIZE // demo.LATENTS[-1],
            query=packaged_encoder(),
            schedules={"clone": {n: rows(recipe, alphas, prediction, GUIDANCE) for n, recipe in recipes.items()}},
            alphas=alphas,
            guidance=GUIDANCE,
            default=("clone", RECIPE.steps),
            provenance={"checkpoint": sha256_of(checkpoint)},
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=HERE / "checkpoint.safetensors")
    parser.add_argument("out", type=Path, nargs="?", default=HERE / "bundle")
    arguments = parser.parse_args()
    export_system(demo_system(arguments.checkpoint), arguments.out, say=print)
