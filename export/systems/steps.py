"""The published base models as configs, and their denoising steps with MotionRAG's adapters, without weights.

    step = cogvideox_step(COGVIDEOX_5B_I2V, latents=(5, 16, 60, 90), motion=(25, 1024), dtype=torch.bfloat16)
    cut = fake_partition(step, cogvideox_args(step), COGVIDEOX_INPUTS, outputs=OUTPUTS)

The configs are those of the public `config.json` files; an export reads its own from the folder it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from motionrt.export.compiler.partition import Partition
from motionrt.export.compiler.weightless import fake_partition, meta
from motionrt.export.systems import cogvideox_step as cogvideox
from motionrt.export.systems import svd_step as svd
from motionrt.export.systems.motionrag import install_cogvideox_adapter
from motionrt.export.systems.system import Array

OUTPUTS = ("next_latents", "x0")

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

Latents = tuple[int, int, int, int]


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the notes that diffusers adds to it."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def cogvideox_step(
    config: Mapping[str, Any],
    *,
    latents: Latents,
    motion: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    unconditional: Tensor | None = None,
    positions: str = "released",
) -> cogvideox.CogVideoXStep:
    """The CogVideoX step with an adapter in every block; parameters on the meta device, small tables real.

    `latents` F, C, H, W; `motion` M, D; `unconditional [1, M, D]`, zeros if not given; `positions`: `fix_positions`.
    """
    from diffusers import CogVideoXTransformer3DModel

    with meta(dtype):
        transformer = CogVideoXTransformer3DModel(**plain(config))
        install_cogvideox_adapter(transformer, motion[1])
    tokens = torch.zeros(1, *motion) if unconditional is None else unconditional
    return cogvideox.CogVideoXStep(transformer, tokens.to(dtype), latents, positions).eval()


def svd_step(
    config: Mapping[str, Any],
    *,
    latents: Latents,
    motion: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    unconditional: Tensor | None = None,
    time_ids: tuple[float, float, float] = (6.0, 127.0, 0.02),
    first_guidance: float = 1.0,
) -> svd.SvdStep:
    """The SVD step with adapters in the spatial cross-attentions; arguments as in `cogvideox_step` and `SvdStep`."""
    from diffusers import UNetSpatioTemporalConditionModel

    with meta(dtype):
        unet = UNetSpatioTemporalConditionModel(**plain(config))
        svd.install_svd_adapter(unet, motion[1])
    tokens = torch.zeros(1, *motion) if unconditional is None else unconditional
    return svd.SvdStep(unet, tokens.to(dtype), latents[0], time_ids, first_guidance).eval()


def step_args(
    inputs: Mapping[str, str], config: Mapping[str, Any], latents: Latents, motion: tuple[int, int]
) -> dict[str, Tensor]:
    """Inputs of a step by name, of one request, on the meta device: dtypes and shapes are all that a trace needs.

    They are float32 whatever the weights are: guidance and solver compute in it, as the release does.
    """
    frames = (1, *latents)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("latents", "previous_x0", "noise"), frames)
    shapes |= {"coefficients": (1, 6), "guidance": (1,), "motion_scale": (1,), "motion": (1, *motion)}
    if "image_context" in inputs:
        shapes |= {"image_context": (1, 1, config["cross_attention_dim"]), "image_latents": (1, *latents[1:])}
    else:
        text = (1, config["max_text_seq_length"], config["text_embed_dim"])
        shapes |= {"text": text, "negative_text": text, "image_latents": frames}
    values = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    time = torch.float32 if "image_context" in inputs else torch.int64
    values["timestep"] = torch.empty(1, dtype=time, device="meta")
    return {name: values[name] for name in inputs}


def step_inputs(
    inputs: Mapping[str, str], config: Mapping[str, Any], latents: Latents, motion: tuple[int, int]
) -> dict[str, Array]:
    """`step_args` of any number of requests."""
    args = step_args(inputs, config, latents, motion)
    return {name: Array(("batch", *value.shape[1:]), value.dtype) for name, value in args.items()}


def structure(model: str, *, frames: int, layers: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Partition:
    """The partition of a published model at its released size: `model` cogvideox-5b-i2v (17 or 49 frames) or svd (16).

    `layers` fewer blocks of CogVideoX, for a quick look. Nothing of the size of the weights is allocated.
    """
    motion = (25, 1024)
    if model == "cogvideox-5b-i2v":
        config = {**COGVIDEOX_5B_I2V, "num_layers": layers or COGVIDEOX_5B_I2V["num_layers"]}
        latents, inputs = ((frames - 1) // 4 + 1, 16, 60, 90), cogvideox.INPUTS
        step: torch.nn.Module = cogvideox_step(config, latents=latents, motion=motion, dtype=dtype)
    elif model == "svd":
        config, latents, inputs = dict(SVD_UNET), (frames, 4, 72, 128), svd.INPUTS
        step = svd_step(config, latents=latents, motion=motion, dtype=dtype)
    else:
        raise ValueError(f"model is {model!r}; allowed: cogvideox-5b-i2v, svd.")
    args = step_args(inputs, config, latents, motion)
    return fake_partition(step, tuple(args.values()), inputs, outputs=OUTPUTS)
