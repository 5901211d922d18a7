"""The published base models at their released sizes: the public `config.json` files, and cuts of their steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from motionrt.export.compiler.partition import Partition
from motionrt.export.compiler.weightless import fake_partition, meta
from motionrt.export.systems import cogvideox_step as cogvideox
from motionrt.export.systems import svd_step as svd
from motionrt.export.systems.dynamicrafter.step import MotionStep
from motionrt.export.systems.dynamicrafter.unet import DynamiCrafterUNet, Size
from motionrt.export.systems.steps import OUTPUTS, cogvideox_step, step_args, svd_step

# THUDM/CogVideoX-5b-I2V, transformer
COGVIDEOX_5B_I2V: Mapping[str, Any] = MappingProxyType(
    {
        "num_attention_heads": 48, "attention_head_dim": 64, "in_channels": 32, "out_channels": 16, "num_layers": 42,
        "time_embed_dim": 512, "text_embed_dim": 4096, "max_text_seq_length": 226, "sample_width": 90, "sample_height": 60,
        "sample_frames": 49, "patch_size": 2, "temporal_compression_ratio": 4, "flip_sin_to_cos": True, "freq_shift": 0,
        "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True,
    }
)  # fmt: skip

# stabilityai/stable-video-diffusion-img2vid, unet
SVD_UNET: Mapping[str, Any] = MappingProxyType(
    {
        "in_channels": 8, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
        "down_block_types": (*(("CrossAttnDownBlockSpatioTemporal",) * 3), "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", *(("CrossAttnUpBlockSpatioTemporal",) * 3)),
        "num_attention_heads": (5, 10, 20, 20), "cross_attention_dim": 1024, "transformer_layers_per_block": 1,
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 768, "num_frames": 14,
    }
)  # fmt: skip


DYNAMICRAFTER = Size()  # Doubiiu/DynamiCrafter_1024, read off its tensors
CRAFTER_LATENTS = (16, 4, 72, 128)


def dynamicrafter_step(
    size: Size, motion: tuple[int, int], tokens: tuple[int, int] = (77, 256), *, adapters: bool = True,
    dtype: torch.dtype = torch.float32,
) -> MotionStep:  # fmt: skip
    """DynamiCrafter's step with an adapter in every spatial cross-attention, or in none; parameters on the meta device, zeros
    where the pass without conditions reads tokens. `motion` M, D; `tokens` of the text and of the image."""
    with meta(dtype):
        unet = DynamiCrafterUNet(replace(size, motion=motion[1] if adapters else None))
    empty, grey = (torch.zeros(1, count, size.context, dtype=dtype) for count in tokens)
    return MotionStep(unet, empty, grey, torch.zeros(1, *motion, dtype=dtype)).eval()


def crafter_args(step: MotionStep, latents: tuple[int, int, int, int]) -> dict[str, torch.Tensor]:
    """Inputs of a step by name, of one request, on the meta device."""
    return {name: array.drawn({"batch": 1}, None) for name, array in step.inputs(latents).items()}


def released_partition(model: str, *, frames: int, layers: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Partition:
    """The partition of a published model at its released size: `model` cogvideox-5b-i2v (17 or 49 frames), svd or
    dynamicrafter-1024 (16).

    `layers` fewer blocks of CogVideoX, for a quick look. Nothing of the size of the weights is allocated.
    """
    motion = (25, 1024)
    if model == "dynamicrafter-1024":
        crafter = dynamicrafter_step(DYNAMICRAFTER, motion, dtype=dtype)
        given = crafter_args(crafter, (frames, *CRAFTER_LATENTS[1:]))
        return fake_partition(crafter, tuple(given.values()), crafter.changes, outputs=OUTPUTS)
    if model == "cogvideox-5b-i2v":
        config = {**COGVIDEOX_5B_I2V, "num_layers": layers or COGVIDEOX_5B_I2V["num_layers"]}
        latents, inputs = ((frames - 1) // 4 + 1, 16, 60, 90), cogvideox.INPUTS
        step: torch.nn.Module = cogvideox_step(config, latents=latents, motion=motion, dtype=dtype)
    elif model == "svd":
        config, latents, inputs = dict(SVD_UNET), (frames, 4, 72, 128), svd.INPUTS
        step = svd_step(config, latents=latents, motion=motion, dtype=dtype)
    else:
        raise ValueError(f"model is {model!r}; allowed: cogvideox-5b-i2v, svd, dynamicrafter-1024.")
    args = step_args(inputs, config, latents, motion)
    return fake_partition(step, tuple(args.values()), inputs, outputs=OUTPUTS)
