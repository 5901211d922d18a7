"""The CogVideoX step at any size, with random weights: what the roofline, mid_models and the GPU suite measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from motionrt.export.compiler.partition import Partition, partition
from motionrt.export.systems.cogvideox_step import INPUTS, CogVideoXStep
from motionrt.export.systems.motionrag import install_cogvideox_adapter

OUTPUTS = ("next_latents", "x0")


@dataclass(frozen=True)
class Size:
    """A CogVideoX image-to-video transformer and its request; `frames`, `height`, `width` of the latents.

    The defaults are CogVideoX-5B-I2V with MotionRAG's adapter at 480x720 and 17 frames (specs/motionrag.md A7).
    """

    name: str = "cogvideox-5b 480x720x17"
    layers: int = 42
    heads: int = 48
    head_width: int = 64
    frames: int = 5
    height: int = 60
    width: int = 90
    text_tokens: int = 226
    text_width: int = 4096
    time_width: int = 512
    motion_tokens: int = 25
    motion_width: int = 1024
    channels: int = 16

    @property
    def latents(self) -> tuple[int, int, int, int]:
        return self.frames, self.channels, self.height, self.width

    @property
    def model_width(self) -> int:
        return self.heads * self.head_width

    @property
    def tokens(self) -> int:
        """L: text and video tokens of one sample (patches of 2x2)."""
        return self.text_tokens + self.frames * (self.height // 2) * (self.width // 2)


FULL = Size()
FULL_49 = replace(FULL, name="cogvideox-5b 480x720x49", frames=13)
MID = Size("cogvideox mid", 2, 12, 64, 3, 30, 44, 64, 512, 128)
TOY = Size("cogvideox toy", 2, 2, 16, 2, 8, 12, 7, 24, 16, motion_tokens=3, motion_width=12, channels=4)
SIZES = {"full": FULL, "full49": FULL_49, "mid": MID, "toy": TOY}


def build_step(size: Size, dtype: torch.dtype, device: str = "cpu", *, adapter: bool = True, seed: int = 0) -> CogVideoXStep:
    """The step as it is written (`CogVideoXStep`), random weights; without `adapter` it is the base model's."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # 6 billion fp32 weights would be 25 GB
    try:
        with torch.device(device):
            transformer: Any = CogVideoXTransformer3DModel(
                num_attention_heads=size.heads,
                attention_head_dim=size.head_width,
                in_channels=2 * size.channels,
                out_channels=size.channels,
                num_layers=size.layers,
                sample_width=size.width,
                sample_height=size.height,
                sample_frames=4 * size.frames - 3,
                text_embed_dim=size.text_width,
                max_text_seq_length=size.text_tokens,
                time_embed_dim=size.time_width,
                use_rotary_positional_embeddings=True,
                use_learned_positional_embeddings=False,
            )
            if adapter:
                install_cogvideox_adapter(transformer, size.motion_width)
    finally:
        torch.set_default_dtype(before)
    unconditional = torch.zeros(1, size.motion_tokens, size.motion_width, dtype=dtype)
    return CogVideoXStep(transformer, unconditional, size.latents).to(device).eval()


def feed(size: Size, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of one request in the middle of its schedule, in the order of `INPUTS`; batch 1, as served."""
    draw = torch.Generator().manual_seed(seed)
    video, text = (1, *size.latents), (1, size.text_tokens, size.text_width)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("latents", "previous_x0", "noise", "image_latents"), video)
    shapes |= {"text": text, "negative_text": text, "motion": (1, size.motion_tokens, size.motion_width)}
    values = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    values["coefficients"] = torch.tensor([[0.8, -0.6, 0.7, 0.3, 0.0, 0.0]])
    values["guidance"], values["motion_scale"] = torch.tensor([3.0]), torch.tensor([1.0])
    moved = {name: value.to(device, dtype) for name, value in values.items()}
    moved["timestep"] = torch.tensor([500], device=device)
    return {name: moved[name] for name in INPUTS}


def cut(
    size: Size, dtype: torch.dtype, device: str = "cpu", step: CogVideoXStep | None = None, *, batched: bool = False
) -> Partition:
    """The step after the compiler pass, for exactly one request, or `batched`: as in a bundle, for any number of them, and its
    schedule program for any number of timesteps at once."""
    step = build_step(size, dtype, device) if step is None else step
    if not batched:
        return partition(step, tuple(feed(size, dtype, device).values()), INPUTS, outputs=OUTPUTS)
    two = tuple(torch.cat([value, value]) for value in feed(size, dtype, device).values())
    rows = torch.export.Dim("batch", min=1, max=1000)
    return partition(step, two, INPUTS, outputs=OUTPUTS, dynamic_shapes=tuple({0: rows} for _ in two))


def known_values(programs: Partition, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`values` and everything that the programs before the step make of them: the step takes its inputs from here."""
    known = dict(values)
    with torch.no_grad():
        for kind, program in programs.programs.items():
            if kind != "step":
                known.update(zip(program.outputs, program.module(*(known[name] for name in program.inputs)), strict=True))
    return known


def step_inputs(programs: Partition, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the step program reads, by name, from what the step as it is written reads."""
    known = known_values(programs, values)
    return {name: known[name] for name in programs.step.inputs}
