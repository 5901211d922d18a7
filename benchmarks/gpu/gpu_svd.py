"""The SVD step with random weights on a GPU, bf16, 16 frames of 576x1024: the base model, the released adapter, and ours.

    .venv-dev/bin/python benchmarks/gpu/gpu_svd.py                                   # gpu_suite.py runs it too

`released_*` is diffusers' UNet as MotionRAG leaves it: a Motion-Adapter on each spatial cross-attention, its tokens repeated
for every frame. `base_*` is the same UNet without adapters. `ours_*` is the rewritten step: with one token of image context all
cross-attentions, adapters included, leave the loop, so the goal is to be cheaper than the base. Rows go to gpu_step.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from motionrt.benchmarks.counts import MOTION, UNET
from motionrt.benchmarks.gpu import gpu_step
from motionrt.benchmarks.models.full_step import step_inputs
from motionrt.benchmarks.models.released import SVD_UNET
from motionrt.export.compiler.partition import partition
from motionrt.export.systems.motionrag import MotionAdapterCrossAttention
from motionrt.export.systems.steps import OUTPUTS, plain, step_args
from motionrt.export.systems.svd_step import INPUTS, SvdStep, install_svd_adapter

TIME_IDS = (6.0, 127.0, 0.02)  # frames per second - 1, motion bucket, noise level


@dataclass(frozen=True)
class Size:
    """An SVD UNet and its request; `latents` F, C, H, W; `motion` M, D. `layers` is what gpu_step's rows name."""

    name: str = "svd 576x1024x16"
    latents: tuple[int, int, int, int] = (16, 4, 72, 128)
    motion: tuple[int, int] = (25, 1024)
    config: Mapping[str, Any] = field(default_factory=lambda: SVD_UNET, repr=False)
    layers: int = 2


FULL = Size()
TOY = Size("svd toy", (2, 4, 8, 16), MOTION, UNET, 1)


class Handed(MotionAdapterCrossAttention):
    """The released processor, with the tokens of the call: diffusers' UNet has no way for them."""

    handed: dict[str, Any]

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None,
        motion: Tensor | None = None, motion_scale: Tensor | float = 1.0,
    ) -> Tensor:  # fmt: skip
        motion, motion_scale = self.handed["motion"], self.handed["motion_scale"]
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, motion, motion_scale)


class AsReleased(nn.Module):
    """The step around diffusers' own forward: arguments and results of `SvdStep`; motion is ignored without adapters."""

    def __init__(self, unet: Any, unconditional_motion: Tensor, frames: int, *, adapter: bool) -> None:
        super().__init__()
        self.unet, self.adapter = unet, adapter
        self.handed: dict[str, Any] = {}
        self.unconditional_motion: Tensor
        self.time_ids: Tensor
        self.ramp: Tensor
        self.register_buffer("unconditional_motion", unconditional_motion)
        self.register_buffer("time_ids", torch.tensor([TIME_IDS]), persistent=False)
        self.register_buffer("ramp", torch.linspace(0, 1, frames)[None, :, None, None, None], persistent=False)
        adapters = [p for p in unet.attn_processors.values() if isinstance(p, MotionAdapterCrossAttention)]
        for processor in adapters:
            processor.__class__ = Handed
            object.__setattr__(processor, "handed", self.handed)  # a processor is a module; this is no part of it

    def forward(
        self, latents: Tensor, previous_x0: Tensor, noise: Tensor, coefficients: Tensor, guidance: Tensor, timestep: Tensor,
        image_context: Tensor, motion: Tensor, image_latents: Tensor, motion_scale: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `SvdStep.forward`."""
        kind = self.unconditional_motion.dtype
        still = image_latents[:, None].expand(-1, latents.shape[1], -1, -1, -1)
        images = torch.cat([torch.zeros_like(still), still])
        sample = torch.cat([latents.repeat(2, 1, 1, 1, 1), images], dim=2).to(kind)
        context = torch.cat([torch.zeros_like(image_context), image_context]).to(kind)
        if self.adapter:
            self.handed["motion"] = torch.cat([self.unconditional_motion, motion.to(kind)])
            self.handed["motion_scale"] = motion_scale.to(kind)
        output = self.unet(sample, timestep, context, self.time_ids.to(kind).repeat(2, 1), return_dict=False)[0]
        without, with_conditions = output.to(latents.dtype).chunk(2)
        scale = 1 + (guidance - 1) * self.ramp.to(output.dtype)
        guided = without + scale * (with_conditions - without)
        p0, p1, c0, c1, c2, c3 = coefficients[0].unbind()
        x0 = p0 * latents + p1 * guided
        return c0 * latents + c1 * x0 + c2 * previous_x0 + c3 * noise, x0


def build_unet(size: Size, dtype: torch.dtype, device: str, seed: int = 0) -> Any:
    """The UNet with adapters, random weights that all matter: diffusers begins some at zero, which would hide faults."""
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            unet: Any = UNetSpatioTemporalConditionModel(**plain(size.config))
            install_svd_adapter(unet, size.motion[1])
    finally:
        torch.set_default_dtype(before)
    return unet.eval()


def feed(size: Size, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of one request in the middle of its schedule, in the order of `INPUTS`."""
    draw = torch.Generator().manual_seed(seed)
    args = step_args(INPUTS, size.config, size.latents, size.motion)
    values = {name: torch.randn(value.shape, generator=draw).to(device, dtype) for name, value in args.items()}
    values["coefficients"] = torch.tensor([[0.5, -0.4, 0.7, 0.3, 0.0, 0.0]]).to(device, dtype)
    values["guidance"] = torch.tensor([3.0]).to(device, dtype)
    values["motion_scale"] = torch.tensor([1.0]).to(device, dtype)
    values["timestep"] = torch.tensor([0.7], device=device)
    return {name: values[name] for name in INPUTS}


def run(suite: gpu_step.Suite, size: Size) -> None:
    """All stages on one set of weights: released, base, ours."""
    device, dtype = suite.device, suite.dtype
    values, unet = feed(size, dtype, device), build_unet(size, dtype, device)
    tokens = torch.zeros(1, *size.motion, dtype=dtype, device=device)
    released = AsReleased(unet, tokens, size.latents[0], adapter=True).to(device).eval()
    adapted = dict(unet.attn_processors)
    flops = _flops(unet, values, tokens, size)
    suite.stage("released_eager", flops[0], lambda: (gpu_step.plain(released, values, "eager"), "eager"))
    unet.set_attn_processor(AttnProcessor2_0())
    base = AsReleased(unet, tokens, size.latents[0], adapter=False).to(device).eval()
    for mode in ("eager", "compiled", "tuned"):
        suite.stage(f"base_{mode}", flops[1], lambda mode=mode: (gpu_step.plain(base, values, mode), mode))  # type: ignore[misc]
    suite.free()
    unet.set_attn_processor(dict(adapted))  # it empties what it is given
    if any(suite.due(stage) for stage in suite.options.stages if stage.startswith("ours")):
        start = perf_counter()
        step = SvdStep(unet, tokens, size.latents[0], TIME_IDS).to(device).eval()
        cut = partition(step, tuple(values.values()), INPUTS, outputs=OUTPUTS)
        print(f"{size.name}: partitioned in {perf_counter() - start:.0f} s", flush=True)
        inputs = step_inputs(cut, values)
        for mode in ("graph", "eager", "compiled"):
            make = lambda mode=mode: gpu_step.ours(cut, inputs, mode, device)  # noqa: E731
            suite.stage(f"ours_{mode}", cut.classes["step"].flops, make)
            suite.free()
        unet.set_attn_processor(dict(adapted))  # it empties what it is given
    for mode in ("compiled", "tuned"):  # last: their compilers take minutes and say the least
        make = lambda mode=mode: (gpu_step.plain(released, values, mode), mode)  # noqa: E731
        suite.stage(f"released_{mode}", flops[0], make)
        suite.free()


def _flops(unet: Any, values: Mapping[str, Tensor], tokens: Tensor, size: Size) -> tuple[int, int]:
    """FLOPs of the step as released and of the base step; see `gpu_step.counted`."""
    found = []
    adapted = dict(unet.attn_processors)
    for adapter in (True, False):
        if not adapter:
            unet.set_attn_processor(AttnProcessor2_0())
        module = AsReleased(unet, tokens, size.latents[0], adapter=adapter).to(tokens.device).eval()
        found.append(gpu_step.counted(module, values, tokens.device.type))
    unet.set_attn_processor(dict(adapted))  # it empties what it is given
    return found[0], found[1]


def main(arguments: list[str] | None = None, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> None:
    """Run the stages on the GPU; `device` and `dtype` are for the test of this file at toy size."""
    options = gpu_step.read_options(arguments, "SVD step", ("full", "toy"))
    if device == "cuda" and not torch.cuda.is_available():
        print("SVD step: not run: no CUDA device")
        return
    size: Any = TOY if options.size == "toy" else FULL
    run(gpu_step.Suite(size, device, dtype, options), size)


if __name__ == "__main__":
    main()
