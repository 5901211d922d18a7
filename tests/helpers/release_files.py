"""Checkpoints as they are released, with random numbers and small widths: diffusers folders and MotionRAG's files.

Loaded by path: the tests are not a package. Heads are 64 wide, as in the real ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionrt.export.checkpoints.motionrag_files import DIFFUSERS, adapter_shapes, overlay_shapes
from motionrt.export.systems.motionrag import Cama, Resampler

TOKENS, WIDTH, VIDEO_WIDTH, IMAGE_WIDTH = 3, 64, 24, 48  # TensorRT-RTX 1.7 cannot build DINOv2 at 40


def motionrag_states(
    blocks: Mapping[str, int], *, overlay: bool, seed: int = 0, names: tuple[str, str, str] = DIFFUSERS
) -> dict[str, Any]:
    """What the released files hold, by file name; change an entry before `save` to damage it."""
    torch.manual_seed(seed)
    motion = Resampler(WIDTH, 2, 64, 1, TOKENS, VIDEO_WIDTH, WIDTH, 2).state_dict()
    image = Resampler(WIDTH, 1, 64, 1, TOKENS, IMAGE_WIDTH, WIDTH, 2).state_dict()
    cama = {key: value for key, value in Cama(TOKENS, WIDTH, 2, 1, 96).state_dict().items() if key != "sos_token"}
    projections = {key: torch.randn(shape) * 0.1 for key, shape in adapter_shapes(blocks, WIDTH, names).items()}
    files: dict[str, Any] = {
        "motion_proj.ckpt": motion,
        "Motion-Adapter.ckpt": lightning(projections | {f"action_proj_model.{key}": v for key, v in motion.items()}),
        "motion_transformer.ckpt": lightning(cama | {f"condition_proj.{key}": value for key, value in image.items()}),
    }
    if overlay:
        retuned = {
            key: torch.randn(shape) * (0.1 if len(shape) == 2 else 0.01) for key, shape in overlay_shapes(blocks).items()
        }
        files["17_frames.ckpt"] = lightning(retuned)
    return files


def lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    """A Lightning checkpoint around `state`, with the optimizer state that it may carry."""
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}
    return {
        "epoch": 1,
        "global_step": 12,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state,
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 5e-5, "params": [0]}]}],
        "loops": {},
    }


def rounded(files: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """`files` with all floating-point tensors in `dtype`."""

    def one(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: one(inner) for key, inner in value.items()}
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: one(value) for name, value in files.items()}


def save(folder: Path, files: Mapping[str, Any]) -> Path:
    """Write `files` (name -> what `torch.save` takes) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        torch.save(value, folder / name)
    return folder
