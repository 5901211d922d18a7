"""Plain (unfolded) motion-cross-attention: out = residual * h + scale * concat_n softmax(f (h Wq_n^T) K_n^T) V_n.

h [B, L, D]; Wq [N*d, D] the query projection; K, V [B or 1, N, M, d], any M; f a number, usually 1/sqrt(d). For M > 64, or
where folding Wq into K costs more than it saves: motion_cross_attention.choose_form counts. Queries are rounded to h's dtype,
as a projection of its own would; scores and softmax are fp32. Source: MotionRAG (arXiv 2509.26391) Motion-Adapter, as released.

The compiler pass leaves this form as the graph has it (a projection, attention, a sum), which every backend knows; the op is
what a GPU session measures against that. The kernel is in plain_cross_attention_triton.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from motionrt.kernels.motion_cross_attention import DTYPES, MAX_WIDTH

NAME = "plain_cross_attention"


def reference(
    hidden: Tensor, query: Tensor, keys: Tensor, values: Tensor, scale: Tensor, factor: float, residual: bool
) -> Tensor:
    """Plain torch form; arguments as in the module's docstring, `scale` [] -> `[B, L, N*d]` in h's dtype."""
    heads = keys.shape[1]
    wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
    queries = torch.matmul(hidden, query.T).unflatten(-1, (heads, -1)).transpose(1, 2)
    weights = (factor * torch.matmul(queries.to(wide), keys.to(wide).transpose(2, 3))).softmax(dim=-1).to(hidden.dtype)
    out = scale.to(hidden.dtype) * torch.matmul(weights, values).transpose(1, 2).flatten(2)
    return hidden + out if residual else out


def check(hidden: Tensor, query: Tensor, keys: Tensor, values: Tensor, scale: Tensor, factor: float, residual: bool) -> None:
    """Raise ValueError, naming the argument, what it got and what is allowed, unless the kernel can take these."""

    def refuse(name: str, got: object, allowed: str) -> None:
        raise ValueError(f"{NAME}: `{name}` is {got}; allowed: {allowed}.")

    tensors = {"hidden": hidden, "query": query, "keys": keys, "values": values, "scale": scale}
    ranks = {"hidden": "[B, L, D]", "query": "[N*d, D]", "keys": "[B or 1, N, M, d]", "values": "[B or 1, N, M, d]"}
    for name, tensor in tensors.items():
        allowed = ranks.get(name, "[], one number")
        if tensor.ndim != (0 if name == "scale" else allowed.count(",") + 1):
            refuse(name, tuple(tensor.shape), allowed)
        if tensor.device != hidden.device:
            refuse(name, f"on {tensor.device}", f"{hidden.device}, where `hidden` is")
        if name != "scale" and tensor.dtype != hidden.dtype:
            refuse(name, tensor.dtype, f"{hidden.dtype}, as `hidden`")
        if tensor.ndim and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            refuse(name, f"of strides {tensor.stride()}", "a last stride of 1; call .contiguous()")
    if hidden.dtype not in DTYPES or (hidden.is_cuda and hidden.dtype == torch.float64):
        refuse("hidden", hidden.dtype, "float16, bfloat16, float32, and on the CPU float64")
    if not scale.dtype.is_floating_point:
        refuse("scale", scale.dtype, "a floating-point dtype")
    heads, tokens, width = keys.shape[1:]
    if heads < 1 or tokens < 1 or not 1 <= width <= MAX_WIDTH:
        refuse("keys", tuple(keys.shape), f"N and M of at least 1, d from 1 to {MAX_WIDTH}")
    if values.shape[1:] != keys.shape[1:]:
        refuse("values", tuple(values.shape), f"N, M and d of `keys`, {tuple(keys.shape)}")
    if tuple(query.shape) != (heads * width, hidden.shape[2]):
        refuse("query", tuple(query.shape), f"[N*d, D] = {(heads * width, hidden.shape[2])}")
    for name in ("keys", "values"):
        if tensors[name].shape[0] not in (1, hidden.shape[0]):
            refuse(name, f"{tuple(tensors[name].shape)}, batch {tensors[name].shape[0]}", f"batch 1 or {hidden.shape[0]}")
    if residual and heads * width != hidden.shape[2]:
        refuse("residual", f"True with N*d = {heads} x {width}, D = {hidden.shape[2]}", "N*d = D; call with residual=False")
    if not math.isfinite(factor):
        refuse("factor", factor, "a finite number")
    if scale.device.type == "cpu" and not math.isfinite(scale.item()):
        refuse("scale", scale.item(), "a finite number")


@torch.library.custom_op("motionrt::plain_cross_attention", mutates_args=(), device_types="cpu")
def plain_cross_attention(
    hidden: Tensor, query: Tensor, keys: Tensor, values: Tensor, scale: Tensor, factor: float, residual: bool
) -> Tensor:
    """`reference` on the CPU, the Triton kernel on CUDA; a new tensor. ValueError as `check` says."""
    check(hidden, query, keys, values, scale, factor, residual)
    return reference(hidden, query, keys, values, scale, factor, residual)


@plain_cross_attention.register_kernel("cuda")
def _(hidden: Tensor, query: Tensor, keys: Tensor, values: Tensor, scale: Tensor, factor: float, residual: bool) -> Tensor:
    from motionrt.kernels.plain_cross_attention_triton import launch

    return launch(hidden, query, keys, values, scale, factor, residual)


@plain_cross_attention.register_fake
def _(hidden: Tensor, query: Tensor, keys: Tensor, values: Tensor, scale: Tensor, factor: float, residual: bool) -> Tensor:
    return hidden.new_empty(hidden.shape[0], hidden.shape[1], query.shape[0])
