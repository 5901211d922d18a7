"""The tiny DynamiCrafter of tests/golden/dynamicrafter, and files of the released layout with small widths.

Loaded by path: the tests are not a package.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from motionrt.export.checkpoints.renaming import compvis_names
from motionrt.export.systems.dynamicrafter.unet import DynamiCrafterUNet, Size, sizes_of

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "dynamicrafter"
NETWORK, ALPHA = "model.diffusion_model.", "alpha_variant.model.diffusion_model."


@cache
def golden(name: str) -> dict[str, Tensor]:
    """Tensors of a golden file; weights, which it holds in float16 exactly, in float32."""
    return {key: value.float() if value.dtype == torch.float16 else value for key, value in stored(name).items()}


def part(name: str, prefix: str) -> dict[str, Tensor]:
    """Tensors of a golden file that have `prefix` before their names, without it."""
    return {key.removeprefix(prefix): value for key, value in golden(name).items() if key.startswith(prefix)}


def golden_size(**changes: Any) -> Size:
    """The size of the golden network, without adapters unless `changes` says so."""
    weights = part("weights_unet_imageproj", NETWORK)
    return replace(sizes_of({key: tuple(value.shape) for key, value in weights.items()}), **changes)


def fitted(module: torch.nn.Module, weights: dict[str, Tensor]) -> Any:
    """`module` with `weights`, axes of one element left out where it has none."""
    shapes = {key: value.shape for key, value in module.state_dict().items()}
    module.load_state_dict({key: weights[key].reshape(shape) for key, shape in shapes.items()})
    return module.eval()


def network(**changes: Any) -> DynamiCrafterUNet:
    """The golden network; `changes` of its size."""
    weights = part("weights_unet_imageproj", NETWORK) | part("weights_unet_imageproj", ALPHA)
    found: DynamiCrafterUNet = fitted(DynamiCrafterUNet(golden_size(**changes)), weights)
    return found


def turned(x: Tensor) -> Tensor:
    """`[B, C, F, h, w]` as the release has it to `[B, F, C, h, w]`, or back."""
    return x.transpose(1, 2)


def stored(name: str) -> dict[str, Tensor]:
    """Tensors of a golden file as they are stored."""
    found: dict[str, Tensor] = load_file(GOLDEN / f"{name}.safetensors")
    return found


def golden_vae() -> Any:
    """The golden autoencoder as diffusers' class."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(32, 32),
        layers_per_block=1, latent_channels=4, norm_num_groups=32,
    )  # fmt: skip
    names = compvis_names(vae.state_dict(), 2, "")
    return fitted(vae, {ours: part("vae", "first_stage_model.")[place.key] for ours, place in names.items()})
