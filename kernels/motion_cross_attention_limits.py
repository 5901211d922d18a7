"""What the kernel of motion_cross_attention.py takes: its limits, and the check that its launcher and its op make first."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NAME = "motion_cross_attention"
MAX_TOKENS = 64
MAX_WIDTH = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(hidden: Tensor, folded: Tensor, values: Tensor, scale: Tensor, residual: bool) -> None:
    """Raise ValueError, naming the argument, what it got and what is allowed, unless the kernel can take these.

    The value of `scale` is looked at only on the CPU: on a device that would stop the stream, and break a graph capture.
    """

    def refuse(name: str, got: object, allowed: str) -> None:
        raise ValueError(f"{NAME}: `{name}` is {got}; allowed: {allowed}.")

    tensors = {"hidden": hidden, "folded": folded, "values": values, "scale": scale}
    ranks = {"hidden": "[B, L, D]", "folded": "[B or 1, D, N*M]", "values": "[B or 1, N, M, d]", "scale": "[], one number"}
    for name, tensor in tensors.items():
        if tensor.ndim != (0 if name == "scale" else ranks[name].count(",") + 1):
            refuse(name, tuple(tensor.shape), ranks[name])
        if tensor.device != hidden.device:
            refuse(name, f"on {tensor.device}", f"{hidden.device}, where `hidden` is")
        if name != "scale" and tensor.dtype != hidden.dtype:
            refuse(name, tensor.dtype, f"{hidden.dtype}, as `hidden`")
    if hidden.dtype not in DTYPES or (hidden.is_cuda and hidden.dtype == torch.float64):
        refuse("hidden", hidden.dtype, "float16, bfloat16, float32, and on the CPU float64")
    if not scale.dtype.is_floating_point:
        refuse("scale", scale.dtype, "a floating-point dtype")
    batch, _, inner = hidden.shape
    heads, tokens, width = values.shape[1:]
    if not 1 <= tokens <= MAX_TOKENS:
        refuse("values", f"{tuple(values.shape)}, M = {tokens}", f"M from 1 to {MAX_TOKENS}; use the plain form beyond")
    if not 1 <= width <= MAX_WIDTH:
        refuse("values", f"{tuple(values.shape)}, d = {width}", f"d from 1 to {MAX_WIDTH}")
    if inner < 1:
        refuse("hidden", tuple(hidden.shape), "D of at least 1")
    if heads < 1:
        refuse("values", tuple(values.shape), "at least one head")
    if folded.shape[1:] != (inner, heads * tokens):
        others = f"for hidden {tuple(hidden.shape)} and values {tuple(values.shape)}"
        refuse("folded", tuple(folded.shape), f"[B or 1, D, N*M] = [.., {inner}, {heads * tokens}] {others}")
    for name in ("folded", "values"):
        if tensors[name].shape[0] not in (1, batch):
            refuse(name, f"{tuple(tensors[name].shape)}, batch {tensors[name].shape[0]}", f"batch 1 or {batch}")
    for name in ("hidden", "values"):
        if tensors[name].stride(-1) != 1 and tensors[name].shape[-1] > 1:
            refuse(name, f"of strides {tensors[name].stride()}", "a last stride of 1; call .contiguous()")
    if residual and heads * width != inner:
        refuse("residual", f"True with N*d = {heads} x {width}, D = {inner}", "N*d = D; call with residual=False")
    if scale.device.type == "cpu" and not math.isfinite(scale.item()):
        refuse("scale", scale.item(), "a finite number")
