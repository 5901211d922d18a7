"""The kernel and launcher of motion_augmented_attention.py, whose docstring has the formula. Imported only where Triton is.

One program makes one head of one place: F queries against F own rows and F - 1 that arrive, which are summed from rows of
frame 0 as they are read, so that no moved row, no score and no weight is ever in memory. Programs of the same place follow each
other in the grid, and places their neighbours: the table's entries, and the rows of frame 0 that neighbours share, come from
the caches. The width is walked in chunks, first for the scores and then for the values, so that a tile stays in registers.

What goes beyond a target's slots is found by a walk down the tree. The chunks of a target follow each other on every level: it
is enough to know the first and the last of level 1, which are then read in turn. Targets without any read nothing of it.

Prefixes: b_ block value, o_ offset, m_ mask, p_ pointer, s_ stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from motionrt.kernels.launching import OPTIONS, capability, on_device, precision
from motionrt.kernels.motion_augmented_attention_limits import MAX_SUMS, SLOTS, check
from motionrt.kernels.tiles import Strip, choose_strip

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _down(b_first, b_last, p_sums, begin, begin_below, SLOTS: tl.constexpr):
    """The first and the last chunk of a target where they are on the level that begins at `begin`: on the level below.

    Chunks are counted through all levels. Slots are filled from the first one on; an empty one names the last chunk below.
    """
    m_here = b_first >= begin
    p_last = p_sums + (b_last - begin) * SLOTS
    b_head = tl.load(p_sums + (b_first - begin) * SLOTS, mask=m_here, other=0)
    b_tail = tl.load(p_last, mask=m_here, other=0)
    for slot in tl.static_range(1, SLOTS):
        b_one = tl.load(p_last + slot, mask=m_here, other=0)
        b_tail = tl.where(b_one == begin - begin_below - 1, b_tail, b_one)
    return tl.where(m_here, begin_below + b_head, b_first), tl.where(m_here, begin_below + b_tail, b_last)


@triton.jit
def _entries(
    b_sum, p_rows, p_sources, p_weights, o_entry, m_entry, o_batch, before, s_rows_p, o_d, m_d, SLOTS: tl.constexpr,
):  # fmt: skip
    """`b_sum` and the rows that the slots of a target or chunk name, weighted; `before`: places of the requests before."""
    for slot in tl.static_range(SLOTS):
        b_weight = tl.load(p_weights + o_entry * SLOTS + slot, mask=m_entry, other=0.0).to(tl.float32)
        b_source = tl.load(p_sources + o_entry * SLOTS + slot, mask=m_entry, other=0).to(tl.int64)
        o_row = o_batch + (b_source - before) * s_rows_p
        m_row = (b_weight != 0.0)[:, None] & m_d[None, :]
        b_sum += b_weight[:, None] * tl.load(p_rows + o_row[:, None] + o_d[None, :], mask=m_row, other=0.0).to(tl.float32)
    return b_sum


@triton.jit
def _arrived(
    p_rows, p_at, p_sources, p_weights, o_target, m_target, b_first, b_count, most, targets, o_batch, before, s_rows_p,
    s_at, o_at, o_d, m_d, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """A chunk of the width of the rows that arrive, with their positions, in fp32; `most` of `b_count` is read by all."""
    b_sum = tl.zeros((BLOCK_F, BLOCK_D), dtype=tl.float32)
    b_sum = _entries(b_sum, p_rows, p_sources, p_weights, o_target, m_target, o_batch, before, s_rows_p, o_d, m_d, SLOTS)
    for chunk in range(most):
        o_chunk = targets + b_first + chunk
        b_sum = _entries(
            b_sum, p_rows, p_sources, p_weights, o_chunk, chunk < b_count, o_batch, before, s_rows_p, o_d, m_d, SLOTS,
        )  # fmt: skip
    m_at = m_target[:, None] & m_d[None, :]
    return b_sum + tl.load(p_at + o_at[:, None] * s_at + o_d[None, :], mask=m_at, other=0.0).to(tl.float32)


@triton.jit
def _own(p_rows, p_at, o_f, m_f, s_rows_f, s_at, o_d, m_d):
    """A chunk of the width of a place's own rows, with their positions, in fp32."""
    m_own = m_f[:, None] & m_d[None, :]
    b_rows = tl.load(p_rows + o_f[:, None] * s_rows_f + o_d[None, :], mask=m_own, other=0.0).to(tl.float32)
    return b_rows + tl.load(p_at + o_f[:, None] * s_at + o_d[None, :], mask=m_own, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["begin_2", "begin_3", "begin_4", "begin_5", "begin_6", "begin_7"])
def motion_augmented_attention_kernel(
    p_query, p_keys, p_values, p_at_query, p_at_keys, p_at_values, p_sources, p_weights, p_beyond,
    p_sums_2, p_sums_3, p_sums_4, p_sums_5, p_sums_6, p_sums_7,
    places, heads, branches, targets, scale, begin_2, begin_3, begin_4, begin_5, begin_6, begin_7,
    s_query_b, s_query_p, s_query_f, s_keys_b, s_keys_p, s_keys_f, s_values_b, s_values_p, s_values_f,
    s_out_b, s_out_p, s_out_f, s_at_query, s_at_keys, s_at_values, p_out,
    FRAMES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr,
    LEVELS: tl.constexpr, CROSSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (head of a place; row of the batch). Inputs, numbers, the output, as TensorRT would pass them."""
    place = (tl.program_id(0) // heads).to(tl.int64)
    o_head = (tl.program_id(0) % heads) * WIDTH
    batch = tl.program_id(1).to(tl.int64)
    request = batch // branches
    p_query += batch * s_query_b + place * s_query_p + o_head
    p_out += batch * s_out_b + place * s_out_p + o_head
    p_keys += o_head
    p_values += o_head
    p_own_keys = p_keys + batch * s_keys_b + place * s_keys_p
    p_own_values = p_values + batch * s_values_b + place * s_values_p
    o_f = tl.arange(0, BLOCK_F)
    m_f = o_f < FRAMES
    m_target = o_f < FRAMES - 1  # column i is frame i + 1
    o_at = FRAMES + o_f

    o_target = (request * places + place) * (FRAMES - 1) + o_f
    b_first = tl.load(p_beyond + o_target, mask=m_target, other=begin_2 - 1).to(tl.int64)
    b_last = b_first
    if LEVELS >= 7:
        b_first, b_last = _down(b_first, b_last, p_sums_7, begin_7, begin_6, SLOTS)
    if LEVELS >= 6:
        b_first, b_last = _down(b_first, b_last, p_sums_6, begin_6, begin_5, SLOTS)
    if LEVELS >= 5:
        b_first, b_last = _down(b_first, b_last, p_sums_5, begin_5, begin_4, SLOTS)
    if LEVELS >= 4:
        b_first, b_last = _down(b_first, b_last, p_sums_4, begin_4, begin_3, SLOTS)
    if LEVELS >= 3:
        b_first, b_last = _down(b_first, b_last, p_sums_3, begin_3, begin_2, SLOTS)
    if LEVELS >= 2:
        b_first, b_last = _down(b_first, b_last, p_sums_2, begin_2, 0, SLOTS)
    b_count = tl.where(b_first == begin_2 - 1, 0, b_last - b_first + 1).to(tl.int32)
    most = tl.max(b_count, 0)

    if CROSSED:
        o_batch = tl.where(o_f % 2 == 1, request * branches + branches - 1 - (batch - request * branches), batch)
    else:
        o_batch = batch + tl.zeros((BLOCK_F,), dtype=tl.int64)
    before = request * places
    kind = p_query.dtype.element_ty
    b_own = tl.zeros((BLOCK_F, BLOCK_F), dtype=tl.float32)
    b_moved = tl.zeros((BLOCK_F, BLOCK_F), dtype=tl.float32)
    for chunk in tl.range((WIDTH + BLOCK_D - 1) // BLOCK_D):
        o_d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = o_d < WIDTH
        b_q = _own(p_query, p_at_query + o_head, o_f, m_f, s_query_f, s_at_query, o_d, m_d).to(kind)
        b_k = _own(p_own_keys, p_at_keys + o_head, o_f, m_f, s_keys_f, s_at_keys, o_d, m_d).to(kind)
        b_own = tl.dot(b_q, tl.trans(b_k), b_own, input_precision=PRECISION)
        b_k = _arrived(
            p_keys, p_at_keys + o_head, p_sources, p_weights, o_target, m_target, b_first, b_count, most, targets,
            o_batch * s_keys_b, before, s_keys_p, s_at_keys, o_at, o_d, m_d, BLOCK_F, BLOCK_D, SLOTS,
        ).to(kind)  # fmt: skip
        b_moved = tl.dot(b_q, tl.trans(b_k), b_moved, input_precision=PRECISION)

    b_own = tl.where(m_f[None, :], b_own * (scale * LOG2E), float("-inf"))
    b_moved = tl.where(m_target[None, :], b_moved * (scale * LOG2E), float("-inf"))
    b_max = tl.maximum(tl.max(b_own, 1), tl.max(b_moved, 1))
    b_own = tl.exp2(b_own - b_max[:, None])
    b_moved = tl.exp2(b_moved - b_max[:, None])
    b_norm = 1.0 / (tl.sum(b_own, 1) + tl.sum(b_moved, 1))
    b_own = (b_own * b_norm[:, None]).to(kind)
    b_moved = (b_moved * b_norm[:, None]).to(kind)

    for chunk in tl.range((WIDTH + BLOCK_D - 1) // BLOCK_D):
        o_d = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = o_d < WIDTH
        b_v = _own(p_own_values, p_at_values + o_head, o_f, m_f, s_values_f, s_at_values, o_d, m_d).to(kind)
        b_o = tl.dot(b_own, b_v, input_precision=PRECISION)
        b_v = _arrived(
            p_values, p_at_values + o_head, p_sources, p_weights, o_target, m_target, b_first, b_count, most, targets,
            o_batch * s_values_b, before, s_values_p, s_at_values, o_at, o_d, m_d, BLOCK_F, BLOCK_D, SLOTS,
        ).to(kind)  # fmt: skip
        b_o = tl.dot(b_moved, b_v, b_o, input_precision=PRECISION)
        tl.store(p_out + o_f[:, None] * s_out_f + o_d[None, :], b_o.to(kind), mask=m_f[:, None] & m_d[None, :])


def constants(strip: Strip, frames: int, width: int, levels: int, dtype: torch.dtype, crossed: bool) -> dict[str, Any]:
    """The kernel's compile-time constants for a strip and a shape; shared with aot.py."""
    return {
        "FRAMES": frames, "WIDTH": width, "BLOCK_F": strip.frames, "BLOCK_D": strip.chunk, "SLOTS": SLOTS,
        "LEVELS": levels, "CROSSED": crossed, "PRECISION": precision(dtype),
    }  # fmt: skip


def launch(
    query: Tensor, keys: Tensor, values: Tensor, at_query: Tensor, at_keys: Tensor, at_values: Tensor,
    sources: Tensor, weights: Tensor, sums: Sequence[Tensor], beyond: Tensor, crossed: bool,
) -> Tensor:  # fmt: skip
    """Run the kernel -> a new tensor `[B, P, F, N, d]`. ValueError as `check` says: it is called first."""
    _, branches = check(query, keys, values, at_query, at_keys, at_values, sources, weights, sums, beyond)
    batch, places, frames, heads, width = query.shape
    targets, levels = beyond.shape[0], 1 + len(sums)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    begins = [sources.shape[0] - targets]  # of the levels from the second on, counted through all chunks
    for index in sums:
        begins.append(begins[-1] + index.shape[0])
    begins += [begins[-1]] * (MAX_SUMS - len(sums))
    tables = [*sums, *[beyond] * (MAX_SUMS - len(sums))]  # those that are not there are not read
    strip = choose_strip(capability(query), query.dtype, frames, width)
    with on_device(query):
        motion_augmented_attention_kernel[(places * heads, batch)](
            query, keys, values, at_query, at_keys, at_values, sources, weights, beyond, *tables,
            places, heads, branches, targets, width**-0.5, *begins[:MAX_SUMS],
            *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *out.stride()[:3],
            at_query.stride(0), at_keys.stride(0), at_values.stride(0), out,
            **constants(strip, frames, width, levels, query.dtype, crossed),
            num_warps=strip.warps, num_stages=strip.stages, **OPTIONS,
        )  # fmt: skip
    return out
