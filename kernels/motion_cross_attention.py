"""Folded motion-cross-attention: out = residual * h + scale * concat_n softmax(h A_n) V_n.

h [B, L, D] hidden states; A [B or 1, D, N*M] folded query-key matrices, A_n = Wq_n^T K_n^T / sqrt(d); V [B or 1, N, M, d]
values; N heads, M motion tokens, d head width. Scores and softmax are kept in fp32 (fp64 for fp64 input), because rounding
them to bf16 doubles the error once the logits are sharp. Source: MotionRAG (arXiv 2509.26391) Motion-Adapter, with
(h Wq^T) K^T reassociated to h (Wq^T K^T).

Here are the reference, the op and the choice between this form and the plain one (a projection, attention, a sum),
which stays what the graph has. The kernel and its launcher are in motion_cross_attention_triton.py, which is imported when
CUDA tensors arrive and at no other time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from motionrt.kernels.motion_cross_attention_limits import MAX_TOKENS, MAX_WIDTH, check


def reference(hidden: Tensor, folded: Tensor, values: Tensor, scale: Tensor, residual: bool) -> Tensor:
    """Plain torch form; arguments as in the module's docstring, `scale` [] -> `[B, L, N*d]` in h's dtype."""
    heads, tokens = values.shape[1], values.shape[2]
    wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
    scores = torch.matmul(hidden.to(wide), folded.to(wide)).unflatten(-1, (heads, tokens))
    weights = scores.softmax(dim=-1).to(hidden.dtype).transpose(1, 2)
    out = scale.to(hidden.dtype) * torch.matmul(weights, values).transpose(1, 2).flatten(2)
    return hidden + out if residual else out


def choose_form(length: int, inner: int, heads: int, tokens: int, width: int) -> tuple[str, int, int]:
    """("folded" or "plain", FLOPs of the plain form, FLOPs of the folded form) over `length` rows of h.

    The plain form costs 2 L (N d) D for the query projection and 2 L (N d) M for its scores; the folded one 2 L D (N M).
    The product with the values is the same in both. Folded is chosen where it is cheaper and inside the kernel's limits.
    """
    plain = 2 * length * heads * width * (inner + tokens)
    folded = 2 * length * inner * heads * tokens
    fits = tokens <= MAX_TOKENS and width <= MAX_WIDTH
    return ("folded" if fits and folded < plain else "plain"), plain, folded


@torch.library.custom_op("motionrt::motion_cross_attention", mutates_args=(), device_types="cpu")
def motion_cross_attention(hidden: Tensor, folded: Tensor, values: Tensor, scale: Tensor, residual: bool) -> Tensor:
    """The named op that the compiler pass ends in: `reference` on the CPU, the Triton kernel on CUDA.

    Returns a new tensor. ValueError as `check` says. On CUDA `folded` should be K-major, stride(1) == 1, as the pass makes
    it: another layout is copied at every call.
    """
    check(hidden, folded, values, scale, residual)
    return reference(hidden, folded, values, scale, residual)


@motion_cross_attention.register_kernel("cuda")
def _(hidden: Tensor, folded: Tensor, values: Tensor, scale: Tensor, residual: bool) -> Tensor:
    from motionrt.kernels.motion_cross_attention_triton import launch

    return launch(hidden, folded, values, scale, residual)


@motion_cross_attention.register_fake
def _(hidden: Tensor, folded: Tensor, values: Tensor, scale: Tensor, residual: bool) -> Tensor:
    return hidden.new_empty(hidden.shape[0], hidden.shape[1], values.shape[1] * values.shape[3])
