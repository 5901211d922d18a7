"""The denoising steps of the base models with MotionRAG's adapters, built of their configs without weights.

    step = cogvideox_step(config, latents=(5, 16, 60, 90), motion=(25, 1024), dtype=torch.bfloat16)
    cut = fake_partition(step, tuple(step_args(INPUTS, config, latents, motion).values()), INPUTS, outputs=OUTPUTS)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from motionrt.export.compiler.weightless import meta
from motionrt.export.systems import cogvideox_step as cogvideox
from motionrt.export.systems import svd_step as svd
from motionrt.export.systems.motionrag import install_cogvideox_adapter
from motionrt.export.systems.system import Array

OUTPUTS = ("next_latents", "x0")

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
    branch: bool = False,
) -> cogvideox.CogVideoXStep:
    """The CogVideoX step with an adapter in every block; parameters on the meta device, small tables real.

    `latents` F, C, H, W; `motion` M, D; `unconditional [1, M, D]`, zeros if not given; `positions`: `fix_positions`; `branch`:
    its network alone, for one branch of guidance.
    """
    from diffusers import CogVideoXTransformer3DModel

    with meta(dtype):
        transformer = CogVideoXTransformer3DModel(**plain(config))
        install_cogvideox_adapter(transformer, motion[1])
    tokens = torch.zeros(1, *motion) if unconditional is None else unconditional
    kind = cogvideox.CogVideoXBranch if branch else cogvideox.CogVideoXStep
    return kind(transformer, tokens.to(dtype), latents, positions).eval()


def svd_step(
    config: Mapping[str, Any],
    *,
    latents: Latents,
    motion: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    unconditional: Tensor | None = None,
    time_ids: tuple[float, float, float] = (6.0, 127.0, 0.02),
    first_guidance: float = 1.0,
    branch: bool = False,
) -> svd.SvdStep:
    """The SVD step with adapters in the spatial cross-attentions; arguments as in `cogvideox_step` and `SvdStep`."""
    from diffusers import UNetSpatioTemporalConditionModel

    with meta(dtype):
        unet = UNetSpatioTemporalConditionModel(**plain(config))
        svd.install_svd_adapter(unet, motion[1])
    tokens = torch.zeros(1, *motion) if unconditional is None else unconditional
    kind = svd.SvdBranch if branch else svd.SvdStep
    return kind(unet, tokens.to(dtype), latents[0], time_ids, first_guidance).eval()


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
