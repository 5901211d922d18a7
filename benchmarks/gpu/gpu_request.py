"""What a request costs around and with its loop, at full size with random weights, on a GPU: conditioning, decoders, the whole.

    .venv-dev/bin/python benchmarks/gpu/gpu_request.py --parts conditioning decode request     # gpu_suite.py runs it too

`conditioning`: `memory`, DINOv2-large on the still, its Resampler, and CAMA over K = 9 stored references that come from the
host; `release`, what the release does at request time: VideoMAE-base on 11 clips and DINOv2 on 10 stills, from decoded pixels
on the host. Reading and decoding the videos is not in it, nor the search in either (bench_conditioning.py and bench_memory.py
have those). `decode`: latents to pixels, CogVideoX's and SVD's decoders. `request`: from text embeddings, motion tokens and
image latents on the host to frames on the host: request program, schedule, all steps behind the runtime's seam, decoder.
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from motionrt.benchmarks import harness
from motionrt.benchmarks.gpu import gpu_step
from motionrt.benchmarks.gpu.gpu_ceilings import facts, waiting
from motionrt.benchmarks.models import full_step
from motionrt.benchmarks.models.full_step import step_inputs
from motionrt.export.checkpoints.encoders import AppearanceTokens, MotionTokens, Preprocess, picked
from motionrt.export.systems.cogvideox_step import INPUTS
from motionrt.export.systems.motionrag import Cama, Resampler
from motionrt.runtime.backends.torch_backend import TorchValue
from motionrt.runtime.loop import Row

PARTS = ("conditioning", "decode", "request")
K = 9
# Relative to the reference (L2): batches of other sizes take other matrix products, whose bf16 roundings differ.
ALLOWED = {torch.bfloat16: 5e-2, torch.float32: 1e-4}
# Stored tokens are float16, and that rounding goes through CAMA: a part in 2000 of a token before it.
ALLOWED_STORED = {torch.bfloat16: 5e-2, torch.float32: 2e-3}
TINY_VIDEOMAE = {"image_size": 28, "patch_size": 14, "num_frames": 4, "hidden_size": 24, "num_hidden_layers": 2}
TINY_VIDEOMAE |= {"num_attention_heads": 2, "intermediate_size": 32}
TINY_DINO = {"image_size": 28, "patch_size": 14, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LARGE_DINO = {"image_size": 224, "patch_size": 14, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


@dataclass(frozen=True)
class Bench:
    """Where and how everything here is measured."""

    device: str
    dtype: torch.dtype
    toy: bool
    options: argparse.Namespace

    def made(self, make: Callable[[], nn.Module]) -> Any:
        """A module with random weights, in the dtype, on the device, never whole in fp32."""
        before = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                return make().to(self.device, self.dtype).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)

    def pixels(self, *shape: int) -> Tensor:
        """Random pictures in [-1, 1] on the host, float32, as the runtime reads them."""
        return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def keep(self, what: str, backend: str, call: Callable[[], Tensor], error: Any = None, **more: Any) -> None:
        """Time `call`, print and append its row."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        options = self.options
        seconds = harness.clock(call, rounds=options.rounds, warmups=options.warmups, wait=waiting(self.device))
        row = {
            "what": what, "backend": backend, **harness.summary(seconds), "warmups": self.options.warmups,
            "dtype": str(self.dtype).removeprefix("torch."), **facts(self.device), "toy": self.toy,
            "error": error,
            "note": "random weights", **more,
        }  # fmt: skip
        harness.append_row("gpu_request", row, folder=self.options.results)
        print(f"{what}, {backend}: p50 {row['p50_ms']:.2f} ms, p95 {row['p95_ms']:.2f} ms, n {row['n']}", flush=True)


def agreed(what: str, got: Tensor, want: Tensor, allowed: float) -> dict[str, float]:
    """The relative difference; ParityError above what is allowed, or where something is not finite."""
    error = gpu_step.relative([got], [want.cpu()])
    if error > allowed:
        raise harness.ParityError(f"{what} differs by {error:.3g}; allowed is {allowed:g}")
    return {"relative_l2": error, "allowed": allowed}


class Encoders:
    """MotionRAG's encoders and CAMA: released sizes (specs of the release: VideoMAE-base, DINOv2-large), or tiny."""

    def __init__(self, bench: Bench) -> None:
        from transformers import Dinov2Config, Dinov2Model, VideoMAEConfig, VideoMAEModel

        toy = bench.toy
        self.size, self.frames = ((30, 44), 5) if toy else ((480, 720), 17)
        self.tokens = (3, 16) if toy else (25, 1024)
        mae = VideoMAEConfig(**TINY_VIDEOMAE) if toy else VideoMAEConfig()
        dino = Dinov2Config(**(TINY_DINO if toy else LARGE_DINO))
        small: dict[str, Any] = {"dim": 16, "depth": 1, "dim_head": 8, "heads": 2} if toy else {}
        outputs: dict[str, Any] = {"num_queries": self.tokens[0], "output_dim": self.tokens[1], **small}
        encoder = bench.made(lambda: VideoMAEModel(mae))
        encoder.embeddings.position_embeddings = encoder.embeddings.position_embeddings.to(bench.device, bench.dtype)
        short = 32 if toy else 256
        self.motion = MotionTokens(
            encoder, bench.made(lambda: Resampler(embedding_dim=mae.hidden_size, **outputs)),
            picked(self.frames, mae.num_frames), self.preprocess(bench, mae.image_size, "bilinear", mae.image_size),
        )  # fmt: skip
        self.appearance = AppearanceTokens(
            bench.made(lambda: Dinov2Model(dino)),
            bench.made(lambda: Resampler(embedding_dim=dino.hidden_size, **outputs)),
            self.preprocess(bench, short, "bicubic", dino.image_size),
        )  # fmt: skip
        sizes: dict[str, Any] = {"layers": 2, "heads": 2, "ff_dim": 32} if toy else {}
        self.cama = bench.made(lambda: Cama(num_queries=self.tokens[0], dim=self.tokens[1], **sizes))

    def preprocess(self, bench: Bench, short: int, mode: str, size: int) -> Preprocess:
        """In float32 on the device, as the bundles have it; what it gives is rounded to what the encoders compute in."""
        made = Preprocess(*self.size, short, mode, size).to(bench.device)
        made.register_forward_hook(lambda module, inputs, pixels: pixels.to(bench.dtype))
        return made


@torch.no_grad()
def conditioning(bench: Bench) -> None:
    """Motion tokens of a request, the release's way and ours: the same function of the same pixels."""
    encoders = Encoders(bench)
    videos = bench.pixels(K, encoders.frames, 3, *encoders.size)
    still = bench.pixels(1, 3, *encoders.size)

    def cama(motion: Tensor, appearance: Tensor, target: Tensor) -> Tensor:
        kind = bench.dtype
        result: Tensor = encoders.cama(motion.to(kind)[None], appearance.to(kind)[None], target.to(kind))
        return result.float().cpu()

    stored = [  # what indexing would have kept, one clip after another, in float16 on the host
        np.concatenate([encode(item[None].to(bench.device)).cpu().numpy().astype(np.float16) for item in items])
        for encode, items in ((encoders.motion, videos), (encoders.appearance, videos[:, 0]))
    ]

    def memory() -> Tensor:
        motion, appearance = (torch.from_numpy(tokens).to(bench.device) for tokens in stored)
        return cama(motion, appearance, encoders.appearance(still.to(bench.device)))

    grey = torch.zeros_like(videos[:1])
    target = still[:, None].expand(-1, encoders.frames, -1, -1, -1)

    def release() -> Tensor:
        clips = torch.cat([videos, target, grey]).to(bench.device)  # 11 clips, of which two are of no use
        motion = torch.cat([encoders.motion(clip[None]) for clip in clips])[:K]
        appearance = encoders.appearance(torch.cat([videos[:, 0], still]).to(bench.device))
        return cama(motion, appearance[:K], appearance[K:])

    error = agreed("conditioning: memory and release", memory(), release(), ALLOWED_STORED[bench.dtype])
    bench.keep("conditioning", "memory", memory, error, k=K)
    bench.keep("conditioning", "release", release, k=K)


@torch.no_grad()
def decode(bench: Bench) -> None:
    """Latents on the device to pixels on the host."""
    for name, make, shape in (
        ("cogvideox", cogvideox_decoder, (1, 2, 4, 4, 6) if bench.toy else (1, 5, 16, 60, 90)),
        ("svd, 4 frames at once", svd_decoder, (2, 4, 8, 8) if bench.toy else (16, 4, 72, 128)),
    ):
        run = make(bench)
        latents = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(bench.device, bench.dtype)
        if not bool(torch.isfinite(run(latents).float()).all()):
            raise harness.ParityError(f"{name}: the decoder's result is not finite")
        bench.keep("decode", name, functools.partial(run, latents), shape=list(shape))
        del run
        gc.collect()


def cogvideox_decoder(bench: Bench) -> Callable[[Tensor], Tensor]:
    """Latents `[1, F, C, H, W]` -> pixels on the host."""
    from diffusers import AutoencoderKLCogVideoX

    tiny: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    sizes = {**tiny, "latent_channels": 4} if bench.toy else {"latent_channels": 16}
    model = bench.made(lambda: AutoencoderKLCogVideoX(**sizes))
    return lambda latents: model.decode(latents.transpose(1, 2), return_dict=False)[0].cpu()


def svd_decoder(bench: Bench) -> Callable[[Tensor], Tensor]:
    """Latents `[F, C, H, W]` -> pixels on the host, a few frames at a time, as SVD's pipeline does to fit into memory."""
    from diffusers import AutoencoderKLTemporalDecoder

    blocks = (32, 64) if bench.toy else (128, 256, 512, 512)
    kinds = ("DownEncoderBlock2D",) * len(blocks)
    layers = 1 if bench.toy else 2
    model = bench.made(
        lambda: AutoencoderKLTemporalDecoder(block_out_channels=blocks, layers_per_block=layers, down_block_types=kinds)
    )
    return lambda latents: torch.cat(
        [model.decode(part, num_frames=part.shape[0], return_dict=False)[0].cpu() for part in torch.split(latents, 4)]
    )


@torch.no_grad()
def request(bench: Bench) -> None:
    """A whole CogVideoX request with our step, and one with the step as it was written: the same latents, then the times."""
    size = full_step.SIZES["toy" if bench.toy else "full"]
    values = full_step.feed(size, bench.dtype, bench.device)
    module = full_step.build_step(size, bench.dtype, bench.device)
    cut = full_step.cut(size, bench.dtype, bench.device, module, batched=True)
    timesteps = torch.linspace(999, 20, bench.options.steps).long()
    schedule, decoder = cut.schedule.module.to(bench.device), cogvideox_decoder(bench)
    given = {name: values[name].cpu() for name, kind in INPUTS.items() if kind == "request"}
    noise = [torch.randn(values["noise"].shape, generator=torch.Generator().manual_seed(i)) for i in range(len(timesteps) + 1)]

    def put(value: Tensor) -> Tensor:
        return value.to(bench.device, bench.dtype)

    inputs = step_inputs(cut, values)
    graph, mode = gpu_step.graph_of(cut, inputs, "graph" if bench.device == "cuda" else "eager", bench.device)
    kinds = {port.name: port.dtype for port in graph.spec.inputs}

    def ours() -> Tensor:
        """Host to latents: what the request does not change once, the schedule in one batch, then the loop."""
        known = {name: put(value) for name, value in given.items()}
        results = cut.request.module(*(known[name] for name in cut.request.inputs))
        known |= dict(zip(cut.request.outputs, results, strict=True))
        fixed = {name: TorchValue(known[name], kinds[name]) for name in cut.step.inputs if name in known}
        tables = {
            name: TorchValue(table, kinds[name])
            for name, table in zip(cut.schedule.outputs, schedule(timesteps.to(bench.device)), strict=True)
        }

        def step(index: int, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            rows = {name: Row(table, index, len(timesteps)).of(table) for name, table in tables.items()}
            moving = {name: TorchValue(value, kinds[name]) for name, value in state.items()}
            found = graph.run({**fixed, **rows, **moving})
            return found["next_latents"].tensor, found["x0"].tensor

        return loop(step)

    def written() -> Tensor:
        """The same, every step from its prompt, image and motion tokens."""
        known = {name: put(value) for name, value in given.items()}

        def step(index: int, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            now = {"timestep": timesteps[index : index + 1].to(bench.device)}
            everything = {**known, **now, **state}
            result: tuple[Tensor, Tensor] = module(**{name: everything[name] for name in INPUTS})
            return result

        return loop(step)

    def loop(step: Callable[[int, Mapping[str, Tensor]], tuple[Tensor, Tensor]]) -> Tensor:
        latents, x0 = put(noise[0]), torch.zeros_like(values["latents"])
        fixed = {name: values[name] for name in ("coefficients", "guidance")}
        for index in range(len(timesteps)):
            state = {**fixed, "latents": latents, "previous_x0": x0, "noise": put(noise[index + 1])}
            latents, x0 = step(index, state)
        return latents

    error = agreed("latents of a request: ours and as written", ours(), written(), ALLOWED[bench.dtype])
    what = f"{size.name} request, {len(timesteps)} steps"
    bench.keep(what, f"ours {mode}", lambda: decoder(ours()), error, steps=len(timesteps))
    bench.keep(what, "as released, eager", lambda: decoder(written()), steps=len(timesteps))


def main(
    arguments: list[str] | None = None, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, toy: bool = False
) -> None:
    """Measure the parts asked for; `device`, `dtype` and `toy` are for the test of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=8, help="of a whole request")
    harness.add_options(parser, rounds=20, warmups=2)
    options = parser.parse_args(arguments)
    if device == "cuda" and not torch.cuda.is_available():
        print("request: not run: no CUDA device")
        return
    bench = Bench(device, dtype, toy, options)
    for part in options.parts:
        {"conditioning": conditioning, "decode": decode, "request": request}[part](bench)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
