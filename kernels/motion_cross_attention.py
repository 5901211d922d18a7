"""Folded motion-cross-attention: out = residual * h + scale * concat_n softmax(h A_n) V_n.

h [B, L, D] hidden states; A [B or 1, D, N*M] folded query-key matrices, A_n = Wq_n^T K_n^T / sqrt(d); V [B or 1, N, M, d]
values; N heads, M motion tokens, d head width. Scores and softmax are kept in fp32 (fp64 for fp64 input), because rounding
them to bf16 doubles the error once the logits are sharp. Source: MotionRAG (arXiv 2509.26391) Motion-Adapter, with
(h Wq^T) K^T reassociated to h (Wq^T K^T). The Triton kernel is not written yet; this is its reference.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference(hidden: Tensor, folded: Tensor, values: Tensor, scale: Tensor, residual: bool) -> Tensor:
    """Plain torch form; arguments as in the module's docstring, `scale` [] -> `[B, L, N*d]` in h's dtype."""
    heads, tokens = values.shape[1], values.shape[2]
    wide = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
    scores = torch.matmul(hidden.to(wide), folded.to(wide)).unflatten(-1, (heads, tokens))
    weights = scores.softmax(dim=-1).to(hidden.dtype).transpose(1, 2)
    out = scale.to(hidden.dtype) * torch.matmul(weights, values).transpose(1, 2).flatten(2)
    return hidden + out if residual else out


@torch.library.custom_op("motionrt::motion_cross_attention", mutates_args=())
def motion_cross_attention(hidden: Tensor, folded: Tensor, values: Tensor, scale: Tensor, residual: bool) -> Tensor:
    """The named op that the compiler pass ends in; see `reference`. Raises ValueError where the shapes disagree."""
    if hidden.ndim != 3 or folded.ndim != 3 or values.ndim != 4:
        raise ValueError(
            f"motion_cross_attention takes hidden [B, L, D], folded [B or 1, D, N*M] and values [B or 1, N, M, d]; got "
            f"{tuple(hidden.shape)}, {tuple(folded.shape)}, {tuple(values.shape)}."
        )
    heads, tokens, width = values.shape[1:]
    if folded.shape[1:] != (hidden.shape[2], heads * tokens):
        raise ValueError(
            f"motion_cross_attention: `folded` is {tuple(folded.shape)}; hidden {tuple(hidden.shape)} and values "
            f"{tuple(values.shape)} need [B or 1, {hidden.shape[2]}, {heads * tokens}]."
        )
    if residual and heads * width != hidden.shape[2]:
        raise ValueError(
            f"motion_cross_attention: the residual needs N*d = D, got {heads} x {width} against {hidden.shape[2]}; "
            "call with residual=False."
        )
    return reference(hidden, folded, values, scale, residual)


@motion_cross_attention.register_fake
def _(hidden: Tensor, folded: Tensor, values: Tensor, scale: Tensor, residual: bool) -> Tensor:
    return hidden.new_empty(hidden.shape[0], hidden.shape[1], values.shape[1] * values.shape[3])
