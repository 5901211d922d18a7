"""What the launchers share: small facts about tensors and devices. Needs no Triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

OPTIONS = {"enable_fp_fusion": True}  # said aloud: its default changes between Triton releases


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: fp32 exactly, as torch does with TF32 off; it makes no difference to 16-bit operands."""
    return "ieee" if dtype == torch.float32 else "tf32"


def capability(tensor: Tensor) -> int:
    """90 for sm_90; the interpreter, which has no device, takes the largest one's tiles."""
    if not tensor.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def k_major(folded: Tensor) -> Tensor:
    """A as [B or 1, N*M, D] with D contiguous: a view of what the compiler pass makes, a copy of anything else."""
    rows = folded.transpose(1, 2)
    return rows if rows.stride(2) == 1 or rows.shape[2] == 1 else rows.contiguous()


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments live on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def batch_stride(tensor: Tensor) -> int:
    return 0 if tensor.shape[0] == 1 else tensor.stride(0)
