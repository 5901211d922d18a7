"""The demo checkpoint as a bundle: `python demo/export.py [checkpoint] [out]`. The compiler does not know this model."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import CogVideoXDPMScheduler
from torch import Tensor, nn

from motionrt.export.checkpoints.packaged_text import packaged_encoder
from motionrt.export.compiler.partition import Partition, partition
from motionrt.export.onnx.from_torch import Example, Range
from motionrt.export.onnx.streamed import stream_real
from motionrt.export.onnx.torch_programs import FOLDER as PROGRAMS
from motionrt.export.systems.cogvideox_step import INPUTS, CogVideoXStep, solver_rows
from motionrt.export.write import digest_of, staged, write_manifest
from motionrt.runtime.bundle.manifest import sha256_of
from motionrt.runtime.by_path import load_by_path

HERE = Path(__file__).resolve().parent
RANGES = {
    "batch": Range(1, 1, 4),
    "clips": Range(1, 4, 32),
    "references": Range(1, 4, 8),
    "tokens": Range(1, 16, 256),
    "steps": Range(1, 8, 1000),
}
STEP_OUTPUTS = ("next_latents", "x0")
GUIDANCE = 2.0


@functools.cache
def sibling(name: str) -> ModuleType:
    """A module beside this file, loaded once."""
    return load_by_path(HERE / f"{name}.py")


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
    demo = sibling("model")
    model = demo.load(checkpoint)
    return CogVideoXStep(model.denoiser, model.uncond_motion, demo.LATENTS).eval()


def step_feed(batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of the step in the order of `INPUTS`."""
    demo = sibling("model")
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    frames = (batch, *demo.LATENTS)
    text = (batch, demo.TEXT_TOKENS, demo.TEXT_WIDTH)
    return {
        "latents": normal(*frames),
        "previous_x0": normal(*frames),
        "noise": normal(*frames),
        "coefficients": normal(batch, 6),
        "guidance": 2.5 + torch.arange(batch) / 4,
        "timestep": 500 - 100 * torch.arange(batch),
        "text": normal(*text),
        "negative_text": normal(*text),
        "motion": normal(batch, demo.TOKENS, demo.WIDTH),
        "image_latents": normal(*frames),
        "motion_scale": 1 - torch.arange(batch) / 4,
    }


def partition_step(step: CogVideoXStep) -> Partition:
    """The step cut into schedule, request and step programs."""
    batch = torch.export.Dim("batch", min=1, max=RANGES["batch"].max)
    feed = step_feed(2)
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


def export_demo(checkpoint: Path, out: Path) -> None:
    """Write the bundle of `checkpoint` to the directory `out`, whole or not at all; every graph is checked."""
    demo = sibling("model")
    model = demo.load(checkpoint)
    step = CogVideoXStep(model.denoiser, model.uncond_motion, demo.LATENTS).eval()
    draw = torch.Generator().manual_seed(1)

    def sized(name: str, *values: int, **inputs: tuple[Any, ...]) -> list[Example]:
        """Examples whose shapes hold `name` where the size goes."""
        return [
            Example(
                {name: value},
                {
                    key: torch.rand(*(value if s == name else s for s in shape), generator=draw) * 2 - 1
                    for key, shape in inputs.items()
                },
            )
            for value in values
        ]

    def tokens(batch: int, length: int) -> dict[str, Tensor]:
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[-1, (length + 1) // 2 :] = 0
        return {"input_ids": torch.randint(1, 30000, (batch, length), generator=draw), "attention_mask": mask}

    frames = (demo.FRAMES, 3, demo.SIZE, demo.SIZE)
    pair = (demo.TOKENS, demo.WIDTH)
    encoder = packaged_encoder()
    cut = partition_step(step)

    states = []
    for batch in (2, 3, 1):
        feed = step_feed(batch, seed=batch)
        for program in (cut.schedule, cut.request):
            with torch.no_grad():
                values = program.module(*(feed[name] for name in program.inputs))
            feed.update(zip(program.outputs, values, strict=True))
        states.append(feed)

    def program_examples(inputs: tuple[str, ...]) -> list[Example]:
        return [
            Example({"batch": batch}, {name: feed[name] for name in inputs})
            for batch, feed in zip((2, 3, 1), states, strict=True)
        ]

    with staged(out) as stage:
        graphs: dict[str, Any] = {}
        programs: dict[str, Any] = {}

        def add(name: str, module: nn.Module, examples: list[Example], outputs: tuple[str, ...], loop: bool = False) -> None:
            """`loop`: of what every step needs, and so a torch program too."""
            path, program = stage / "graphs" / f"{name}.onnx", stage / PROGRAMS / f"{name}.pt2" if loop else None
            entry = stream_real(path, module, examples, outputs, RANGES, torch_program=program)
            if program is not None:
                programs[name] = entry.pop("program")
            graphs[name] = entry

        queries = [Example({"batch": b, "tokens": n}, tokens(b, n)) for b, n in ((2, 12), (3, 7), (1, 40), (1, 1))]
        path = stage / "graphs" / "text_query.onnx"
        entry = stream_real(path, encoder.module, queries, ("embedding",), RANGES, external=encoder.tensors)
        graphs["text_query"] = {**entry, "weights": encoder.weights}
        words = [
            Example({"batch": b}, {"input_ids": torch.randint(0, demo.VOCABULARY, (b, demo.TEXT_TOKENS))})
            for b in (2, 3, 1)
        ]
        add("text", model.text, words, ("text",))
        parts = {"encoder": model.motion_encoder, "proj": model.motion_proj}
        motion = Method(parts, lambda self, video: self.proj(self.encoder(video)))
        add("motion", motion, sized("clips", 2, 3, 1, video=("clips", *frames)), ("motion",))
        parts = {"encoder": model.appearance_encoder, "proj": model.appearance_proj}
        appearance = Method(parts, lambda self, image: self.proj(self.encoder(image)))
        add("appearance", appearance, sized("clips", 2, 3, 1, image=("clips", *frames[1:])), ("appearance",))
        references = ("references", *pair)
        stacked = [
            Example(
                {"batch": batch, "references": count},
                {
                    key: torch.randn(batch, *(count if s == "references" else s for s in shape), generator=draw)
                    for key, shape in (
                        ("reference_motion", references), ("reference_appearance", references), ("appearance", pair)
                    )
                },
            )
            for batch, count in ((2, 4), (3, 8), (1, 1), (1, 2))
        ]  # fmt: skip
        add("cama", model.cama, stacked, ("motion",))
        encode = Method({"autoencoder": model.autoencoder}, lambda self, image: self.autoencoder.encode_image(image))
        add("encode", encode, sized("batch", 2, 3, 1, image=("batch", *frames[1:])), ("image_latents",))
        decode = Method({"autoencoder": model.autoencoder}, lambda self, latents: self.autoencoder.decode(latents))
        add("decode", decode, sized("batch", 2, 3, 1, latents=("batch", *demo.LATENTS)), ("video",))
        timesteps = [Example({"steps": n}, {"timestep": torch.arange(n) * 13}) for n in (5, 8, 1)]
        add("schedule", cut.schedule.module, timesteps, cut.schedule.outputs, loop=True)
        add("request", cut.request.module, program_examples(cut.request.inputs), cut.request.outputs, loop=True)
        add("step", cut.step.module, program_examples(cut.step.inputs), STEP_OUTPUTS, loop=True)
        add("step_plain", step, program_examples(tuple(INPUTS)), STEP_OUTPUTS)

        ddim = demo.scheduler()
        dpm = CogVideoXDPMScheduler.from_config(ddim.config)
        write_manifest(
            stage,
            name="demo",
            model={
                "frames": demo.FRAMES, "height": demo.SIZE, "width": demo.SIZE, "fps": demo.FPS,
                "latents": list(demo.LATENTS), "motion_tokens": list(pair), "max_references": 8, "default_references": 4,
            },
            graphs=graphs,
            programs=programs,
            solvers={
                "ddim": {n: solver_rows(ddim, n) for n in range(1, 51)},
                "dpm": {n: solver_rows(dpm, n) for n in range(2, 51)},
            },
            default_solver=("ddim", 8),
            tokenizers={
                "text": ((HERE / "tokenizer.json").read_text(encoding="utf-8"), demo.TEXT_TOKENS, demo.PAD),
                "text_query": (encoder.tokenizer, 256, 0),
            },
            guidance=GUIDANCE,
            digests={
                "text_query": encoder.weights["sha256"],
                "motion": digest_of(model.motion_encoder, model.motion_proj),
                "appearance": digest_of(model.appearance_encoder, model.appearance_proj),
            },
            partition=cut.report(),
            provenance={"checkpoint": sha256_of(checkpoint), "torch": torch.__version__},
        )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=HERE / "checkpoint.safetensors")
    parser.add_argument("out", type=Path, nargs="?", default=HERE / "bundle")
    arguments = parser.parse_args()
    export_demo(arguments.checkpoint, arguments.out)
