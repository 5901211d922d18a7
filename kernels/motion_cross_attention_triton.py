"""The kernel and launcher of motion_cross_attention.py, whose docstring has formula and shapes. Imported only where Triton is.

One program makes a tile of L rows by a group of heads: scores in fp32 over all of D, softmax per head, product with V, and
the residual, so that scores and weights never leave the chip. Programs of one row tile follow each other in the grid: h comes
from memory once and is served to the other groups by the L2 cache; out is written once. A is read K-major, [N*M, D]: a row
is one token of one head, so padding M to a tile's slot happens on the way in and takes no memory.

Two layouts of a tile's columns, the same kernel with other constants:
- padded: a power of two of tokens per head (25 -> 32); the tile is cut into heads, softmax runs along an axis.
- packed: heads follow each other without a gap (5 x 25 of 128 columns); softmax is segmented by masks, and every head's
  product with V runs over the whole tile. Fewer score columns, more arithmetic behind them.

Prefixes: b_ block value, o_ offset, m_ mask, p_ pointer, s_ stride.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from motionrt.kernels.launching import OPTIONS, batch_stride, capability, k_major, on_device, precision
from motionrt.kernels.motion_cross_attention_limits import check
from motionrt.kernels.tiles import Tile, choose_tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores(
    p_hidden, p_folded, o_l, length, inner, s_hidden_l, s_folded_c, o_row, m_row,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of h A^T in fp32, over all of D; `o_row` are rows of A, of which those outside `m_row` give 0."""
    o_k = tl.arange(0, BLOCK_K)
    # Rows beyond L repeat the last one: a load needs no mask then, and the store has one.
    p_h = p_hidden + tl.minimum(o_l, length - 1)[:, None] * s_hidden_l + o_k[None, :]
    p_a = p_folded + o_row[:, None] * s_folded_c + o_k[None, :]
    b_s = tl.zeros((BLOCK_L, BLOCK_N), dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        if EVEN_K:
            b_h = tl.load(p_h)
            b_a = tl.load(p_a, mask=m_row[:, None], other=0.0)
        else:
            m_k = (start + o_k)[None, :] < inner
            b_h = tl.load(p_h, mask=m_k, other=0.0)
            b_a = tl.load(p_a, mask=m_row[:, None] & m_k, other=0.0)
        b_s = tl.dot(b_h, tl.trans(b_a), b_s, input_precision=PRECISION)
        p_h += BLOCK_K
        p_a += BLOCK_K
    return b_s


@triton.jit
def _softmax_padded(b_s, BLOCK_L: tl.constexpr, HEADS: tl.constexpr, SLOT: tl.constexpr):
    """Softmax in base 2 over each head's slot. A head beyond N is all -inf: it gives NaN, which no one stores."""
    b_s = tl.reshape(b_s, (BLOCK_L, HEADS, SLOT))
    b_p = tl.exp2(b_s - tl.max(b_s, 2)[:, :, None])
    b_p = b_p * (1.0 / tl.sum(b_p, 2))[:, :, None]
    return tl.reshape(b_p, (BLOCK_L, HEADS * SLOT))


@triton.jit
def _softmax_packed(b_s, o_slot, HEADS: tl.constexpr):
    """Softmax in base 2 over each head's columns, picked by masks: a head's own maximum, or sharp heads would lose others."""
    b_shift = tl.zeros_like(b_s)
    for slot in tl.static_range(HEADS):
        m_head = (o_slot == slot)[None, :]
        b_max = tl.max(tl.where(m_head, b_s, float("-inf")), 1)
        b_shift = tl.where(m_head, tl.where(b_max == float("-inf"), 0.0, b_max)[:, None], b_shift)
    b_p = tl.exp2(b_s - b_shift)
    b_norm = tl.zeros_like(b_s)
    for slot in tl.static_range(HEADS):
        m_head = (o_slot == slot)[None, :]
        b_sum = tl.sum(tl.where(m_head, b_p, 0.0), 1)
        b_norm = tl.where(m_head, (1.0 / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None], b_norm)
    return b_p * b_norm


@triton.jit
def _write_head(
    b_w, p_v, m_v, head, heads, scale, p_hidden, p_out, o_l, length, s_hidden_l, s_out_l,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = residual * h + scale * weights V for one head, in chunks of its width."""
    for chunk in tl.static_range((WIDTH + BLOCK_D - 1) // BLOCK_D):
        o_d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = (o_d < WIDTH)[None, :]
        b_v = tl.load(p_v[:, None] + o_d[None, :], mask=m_v[:, None] & m_d, other=0.0)
        b_o = tl.dot(b_w, b_v, input_precision=PRECISION) * scale
        o_column = head * WIDTH + o_d
        m_o = (o_l < length)[:, None] & m_d & (o_column < heads * WIDTH)[None, :]
        if RESIDUAL:
            b_o += tl.load(p_hidden + o_l[:, None] * s_hidden_l + o_column[None, :], mask=m_o, other=0.0).to(tl.float32)
        tl.store(p_out + o_l[:, None] * s_out_l + o_column[None, :], b_o.to(p_out.dtype.element_ty), mask=m_o)


@triton.jit
def _write_padded(
    b_w, p_values, head, heads, scale, p_hidden, p_out, o_l, length, s_hidden_l, s_out_l, s_values_n, s_values_m,
    BLOCK_L: tl.constexpr, HEADS: tl.constexpr, SLOT: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Halve the tile of weights until one head is left. HEADS falls at every level: each is a function of its own."""
    if HEADS == 1:
        o_m = tl.arange(0, SLOT)
        m_m = (o_m < TOKENS) & (o_m + head * TOKENS < heads * TOKENS)
        _write_head(
            b_w, p_values + head * s_values_n + o_m * s_values_m, m_m, head, heads, scale, p_hidden, p_out, o_l, length,
            s_hidden_l, s_out_l, WIDTH, BLOCK_D, RESIDUAL, PRECISION,
        )  # fmt: skip
    else:
        b_pair = tl.permute(tl.reshape(b_w, (BLOCK_L, 2, HEADS * SLOT // 2)), (0, 2, 1))
        b_first, b_second = tl.split(b_pair)
        _write_padded(
            b_first, p_values, head, heads, scale, p_hidden, p_out, o_l, length, s_hidden_l, s_out_l, s_values_n, s_values_m,
            BLOCK_L, HEADS // 2, SLOT, TOKENS, WIDTH, BLOCK_D, RESIDUAL, PRECISION,
        )  # fmt: skip
        _write_padded(
            b_second, p_values, head + HEADS // 2, heads, scale, p_hidden, p_out, o_l, length, s_hidden_l, s_out_l,
            s_values_n, s_values_m, BLOCK_L, HEADS // 2, SLOT, TOKENS, WIDTH, BLOCK_D, RESIDUAL, PRECISION,
        )  # fmt: skip


@triton.jit
def motion_cross_attention_kernel(
    p_hidden, p_folded, p_values, p_scale, length, inner, heads, groups,
    s_hidden_b, s_hidden_l, s_folded_b, s_folded_c, s_values_b, s_values_n, s_values_m, s_out_b, s_out_l, p_out,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr, HEADS: tl.constexpr, SLOT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_K: tl.constexpr,
    RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (row tile, group of heads; batch). Arguments in TensorRT's order: inputs, numbers, the output."""
    group = tl.program_id(0) % groups
    first = (tl.program_id(0) // groups).to(tl.int64) * BLOCK_L  # 64 bits: long videos pass 2^31 elements
    batch = tl.program_id(1).to(tl.int64)
    p_hidden += batch * s_hidden_b + first * s_hidden_l
    p_folded += batch * s_folded_b
    p_values += batch * s_values_b
    p_out += batch * s_out_b + first * s_out_l
    length = (length - first).to(tl.int32)  # rows left
    o_l = tl.arange(0, BLOCK_L)
    o_column = tl.arange(0, BLOCK_N)
    o_slot = o_column // SLOT
    o_token = o_column % SLOT
    o_head = group * HEADS + o_slot
    m_row = (o_slot < HEADS) & (o_token < TOKENS) & (o_head < heads)
    b_s = _scores(
        p_hidden, p_folded, o_l, length, inner, s_hidden_l, s_folded_c, o_head * TOKENS + o_token, m_row,
        BLOCK_L, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    b_s = tl.where(m_row[None, :], b_s * LOG2E, float("-inf"))
    if PACKED:
        b_p = _softmax_packed(b_s, o_slot, HEADS)
    else:
        b_p = _softmax_padded(b_s, BLOCK_L, HEADS, SLOT)
    b_w = b_p.to(p_hidden.dtype.element_ty)
    scale = tl.load(p_scale).to(tl.float32)
    if PACKED:
        p_v = p_values + o_head * s_values_n + o_token * s_values_m
        for slot in tl.static_range(HEADS):
            _write_head(
                tl.where((o_slot == slot)[None, :], b_w, 0.0).to(b_w.dtype), p_v, m_row, group * HEADS + slot, heads,
                scale, p_hidden, p_out, o_l, length, s_hidden_l, s_out_l, WIDTH, BLOCK_D, RESIDUAL, PRECISION,
            )  # fmt: skip
    else:
        _write_padded(
            b_w, p_values, group * HEADS, heads, scale, p_hidden, p_out, o_l, length, s_hidden_l, s_out_l,
            s_values_n, s_values_m, BLOCK_L, HEADS, SLOT, TOKENS, WIDTH, BLOCK_D, RESIDUAL, PRECISION,
        )  # fmt: skip


def constants(tile: Tile, tokens: int, width: int, inner: int, dtype: torch.dtype, residual: bool) -> dict[str, Any]:
    """The kernel's compile-time constants for a tile and a shape; shared with aot.py."""
    return {
        "TOKENS": tokens, "WIDTH": width, "PACKED": tile.packed, "HEADS": tile.heads, "SLOT": tile.slot,
        "BLOCK_L": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth, "BLOCK_D": tile.chunk,
        "EVEN_K": inner % tile.depth == 0, "RESIDUAL": residual, "PRECISION": precision(dtype),
    }  # fmt: skip


def launch(
    hidden: Tensor,
    folded: Tensor,
    values: Tensor,
    scale: Tensor,
    residual: bool,
    *,
    layout: str | None = None,
) -> Tensor:
    """Run the kernel -> a new tensor [B, L, N*d]; `layout` "padded", "packed", or None for the rule's choice.

    ValueError as `check` says: it is called first.
    """
    check(hidden, folded, values, scale, residual)
    batch, length, inner = hidden.shape
    heads, tokens, width = values.shape[1:]
    out = hidden.new_empty(batch, length, heads * width)
    if batch and length:
        tile = choose_tile(capability(hidden), hidden.dtype, inner, heads, tokens, width, layout)
        rows = k_major(folded)
        groups = triton.cdiv(heads, tile.heads)
        with on_device(hidden):
            motion_cross_attention_kernel[(triton.cdiv(length, tile.rows) * groups, batch)](
                hidden, rows, values, scale, length, inner, heads, groups,
                hidden.stride(0), hidden.stride(1), batch_stride(rows), rows.stride(1),
                batch_stride(values), values.stride(1), values.stride(2), out.stride(0), out.stride(1), out,
                **constants(tile, tokens, width, inner, hidden.dtype, residual),
                num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
            )  # fmt: skip
    return out
