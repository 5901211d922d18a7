"""The kernel and launcher of plain_cross_attention.py, whose docstring has formula and shapes. Imported only where Triton is.

One program projects a tile of L rows to the queries of a group of heads, over all of D, and lets each head attend to all M
tokens, in blocks with a running maximum: queries and scores never leave the chip. Columns of a head are padded to a power of
two. Prefixes: b_ block value, o_ offset, m_ mask, p_ pointer, s_ stride.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from motionrt.kernels.launching import OPTIONS, batch_stride, capability, on_device, precision
from motionrt.kernels.motion_cross_attention_triton import LOG2E, product
from motionrt.kernels.plain_cross_attention import check
from motionrt.kernels.tiles import Tile, choose_plain_tile


@triton.jit
def _attend(
    b_q, p_keys, p_values, head, heads, tokens, factor, scale, p_hidden, p_out, length, s_hidden_l, s_out_l, s_keys_n, s_keys_m,
    s_values_n, s_values_m, BLOCK_L: tl.constexpr, HEADS: tl.constexpr, SLOT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Halve the tile of queries until one head is left; attend, and write it."""
    if HEADS == 1:
        o_l = tl.arange(0, BLOCK_L)
        o_d = tl.arange(0, SLOT)
        o_m = tl.arange(0, BLOCK_M)
        read = tl.minimum(head, heads - 1)  # a head beyond N reads the last one's tokens, and is not stored
        b_max = tl.full((BLOCK_L,), float("-inf"), tl.float32)
        b_sum = tl.zeros((BLOCK_L,), tl.float32)
        b_o = tl.zeros((BLOCK_L, SLOT), tl.float32)
        for start in range(0, tokens, BLOCK_M):
            m_kv = ((start + o_m) < tokens)[:, None] & (o_d < WIDTH)[None, :]
            b_k = tl.load(p_keys + read * s_keys_n + (start + o_m)[:, None] * s_keys_m + o_d[None, :], mask=m_kv, other=0.0)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * factor
            b_s = tl.where(((start + o_m) < tokens)[None, :], b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            b_p = tl.exp2(b_s - b_new[:, None])
            b_old = tl.exp2(b_max - b_new)
            b_v = tl.load(
                p_values + read * s_values_n + (start + o_m)[:, None] * s_values_m + o_d[None, :], mask=m_kv, other=0.0
            )
            b_sum = b_sum * b_old + tl.sum(b_p, 1)
            b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_old[:, None], input_precision=PRECISION)
            b_max = b_new
        b_o *= (scale / b_sum)[:, None]
        o_column = head * WIDTH + o_d
        m_o = (o_l < length)[:, None] & ((o_d < WIDTH) & (o_column < heads * WIDTH))[None, :]
        if RESIDUAL:
            b_o += tl.load(p_hidden + o_l[:, None] * s_hidden_l + o_column[None, :], mask=m_o, other=0.0).to(tl.float32)
        tl.store(p_out + o_l[:, None] * s_out_l + o_column[None, :], b_o.to(p_out.dtype.element_ty), mask=m_o)
    else:
        b_first, b_second = tl.split(tl.permute(tl.reshape(b_q, (BLOCK_L, 2, HEADS * SLOT // 2)), (0, 2, 1)))
        _attend(
            b_first, p_keys, p_values, head, heads, tokens, factor, scale, p_hidden, p_out, length, s_hidden_l, s_out_l,
            s_keys_n, s_keys_m, s_values_n, s_values_m, BLOCK_L, HEADS // 2, SLOT, WIDTH, BLOCK_M, RESIDUAL, PRECISION,
        )  # fmt: skip
        _attend(
            b_second, p_keys, p_values, head + HEADS // 2, heads, tokens, factor, scale, p_hidden, p_out, length, s_hidden_l,
            s_out_l, s_keys_n, s_keys_m, s_values_n, s_values_m, BLOCK_L, HEADS // 2, SLOT, WIDTH, BLOCK_M, RESIDUAL, PRECISION,
        )  # fmt: skip


@triton.jit
def plain_cross_attention_kernel(
    p_hidden, p_query, p_keys, p_values, p_scale, p_out, length, inner, heads, tokens, groups, factor,
    s_hidden_b, s_hidden_l, s_query_c, s_keys_b, s_keys_n, s_keys_m, s_values_b, s_values_n, s_values_m, s_out_b, s_out_l,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, SLOT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, EVEN_K: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (row tile, group of heads; batch)."""
    group = tl.program_id(0) % groups
    first = (tl.program_id(0) // groups).to(tl.int64) * BLOCK_L  # 64 bits: long videos pass 2^31 elements
    batch = tl.program_id(1).to(tl.int64)
    p_hidden += batch * s_hidden_b + first * s_hidden_l
    p_out += batch * s_out_b + first * s_out_l
    length = (length - first).to(tl.int32)  # rows left
    o_column = tl.arange(0, BLOCK_N)
    o_head = group * HEADS + o_column // SLOT
    o_d = o_column % SLOT
    b_q = product(
        p_hidden, p_query, tl.arange(0, BLOCK_L), length, inner, s_hidden_l, s_query_c, o_head * WIDTH + o_d,
        (o_d < WIDTH) & (o_head < heads), BLOCK_L, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    _attend(
        b_q.to(p_hidden.dtype.element_ty), p_keys + batch * s_keys_b, p_values + batch * s_values_b, group * HEADS, heads,
        tokens, factor * LOG2E, tl.load(p_scale).to(tl.float32), p_hidden, p_out, length, s_hidden_l, s_out_l, s_keys_n,
        s_keys_m, s_values_n, s_values_m, BLOCK_L, HEADS, SLOT, WIDTH, BLOCK_M, RESIDUAL, PRECISION,
    )  # fmt: skip


def constants(tile: Tile, width: int, inner: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time constants that the kernel takes from a tile and a shape; shared with aot.py."""
    return {
        "WIDTH": width, "HEADS": tile.heads, "SLOT": tile.slot, "BLOCK_L": tile.rows, "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth, "BLOCK_M": tile.chunk, "EVEN_K": inner % tile.depth == 0, "PRECISION": precision(dtype),
    }  # fmt: skip


def launch(hidden: Tensor, query: Tensor, keys: Tensor, values: Tensor, scale: Tensor, factor: float, residual: bool) -> Tensor:
    """Run the kernel on checked arguments -> a new tensor [B, L, N*d]."""
    check(hidden, query, keys, values, scale, factor, residual)
    batch, length, inner = hidden.shape
    heads, tokens, width = keys.shape[1:]
    out = hidden.new_empty(batch, length, heads * width)
    if not batch or not length:
        return out
    tile = choose_plain_tile(capability(hidden), hidden.dtype, heads, width)
    groups = triton.cdiv(heads, tile.heads)
    with on_device(hidden):
        plain_cross_attention_kernel[(triton.cdiv(length, tile.rows) * groups, batch)](
            hidden, query, keys, values, scale, out, length, inner, heads, tokens, groups, factor,
            hidden.stride(0), hidden.stride(1), query.stride(0), batch_stride(keys), keys.stride(1), keys.stride(2),
            batch_stride(values), values.stride(1), values.stride(2), out.stride(0), out.stride(1),
            **constants(tile, width, inner, hidden.dtype), RESIDUAL=residual,
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
    return out
