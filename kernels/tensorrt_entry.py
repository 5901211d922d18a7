"""Entries of the motion-cross-attention kernel in the order in which TensorRT passes arguments: inputs, scalars, outputs.

Imported only where Triton is. The kernel itself, its shapes and its constants are in motion_cross_attention_triton.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from motionrt.kernels.motion_cross_attention_triton import motion_cross_attention_kernel


@triton.jit
def motion_cross_attention_tensorrt(
    p_hidden, p_folded, p_values, p_scale, length, inner, heads, groups,
    s_hidden_b, s_hidden_l, s_folded_b, s_folded_c, s_values_b, s_values_n, s_values_m, s_out_b, s_out_l, p_out,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr, HEADS: tl.constexpr, SLOT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_K: tl.constexpr,
    RESIDUAL: tl.constexpr, WEIGHTS_ONLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """motion_cross_attention_kernel with its output last."""
    motion_cross_attention_kernel(
        p_hidden, p_folded, p_values, p_scale, p_out, length, inner, heads, groups,
        s_hidden_b, s_hidden_l, s_folded_b, s_folded_c, s_values_b, s_values_n, s_values_m, s_out_b, s_out_l,
        TOKENS, WIDTH, PACKED, HEADS, SLOT, BLOCK_L, BLOCK_N, BLOCK_K, BLOCK_D, EVEN_K,
        RESIDUAL, WEIGHTS_ONLY, PRECISION,
    )  # fmt: skip
