"""Motion-augmented temporal attention: every frame of a place asks all frames there, and frame 0 as a field moves it there.

    out_i = softmax_j ((q_i + e_i) . k_j / sqrt(d)) v_j          i: F frames; j: F own rows, then F - 1 that arrived
    own     k_j = K_j + e_j,  v_j = V_j + e'_j
    arrived k_i = sum_s w_(p,i,s) K_0(s) + e_(F+i-1), values alike, i = 1 ... F - 1; nothing arrives: the position alone

q, K, V [B, P, F, N, d] rows of P places, projected and without positions; N heads of width d. Positions, projected as well:
`at_query` [F, N, d], `at_keys` and `at_values` [2 F - 1, N, d], of the own rows and then of those that arrive. Source:
Motion-I2V (arXiv 2401.15977), section 4.2, with W (sum w z_0) reassociated to sum w (W z_0): frame 0 is projected once.

The weights w are a table of four slots a target and a tree of chunks for what does not fit, R = requests P (F - 1) targets in
the order [request, place, frame]; B = requests x branches, and branches of a request move alike:

    `sources`, `weights` [R + C, 4]   rows [request, place] of K_0 that a target sums; behind the targets the chunks of level 1;
                                      a slot of weight 0 is empty
    `sums` each [C_l, 4]              of level 2, 3, ...: chunks of the level below that a chunk sums, of one target and one
                                      after another; empty slots name the last chunk below, which is empty itself
    `beyond` [R]                      the chunk that a target adds, counted through all levels; none: the last of level 1

`crossed`: in even frames a request's branches are given frame 0 of each other, the first that of the last, as the release does.
Scores, sums and softmax are kept in fp32 (fp64 for fp64 input).

Here are the reference, the op and its counts. The kernel and its launcher are in motion_augmented_attention_triton.py, which is
imported when CUDA tensors arrive and at no other time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from motionrt.kernels.motion_augmented_attention_limits import check


def arrived(
    first: Tensor, requests: int, sources: Tensor, weights: Tensor, sums: Sequence[Tensor], beyond: Tensor, crossed: bool
) -> Tensor:
    """Rows of frame 0 of `requests` requests, `[B, P, D]` -> as they arrive in the other frames, `[B, P, F - 1, D]`, in fp32
    (fp64 for fp64 input)."""
    batch, places, width = first.shape
    targets, wide = beyond.shape[0], torch.promote_types(first.dtype, torch.float32)
    beside = first.to(wide).view(requests, -1, places, width).transpose(1, 2).reshape(requests * places, -1)
    rows = torch.matmul(weights.to(wide)[:, None], beside[sources])[:, 0]
    chunks = [rows[targets:]]
    for index in sums:
        chunks.append(chunks[-1][index].sum(1))
    moved = (rows[:targets] + torch.cat(chunks)[beyond]).view(requests, places, -1, batch // requests, width)
    if crossed:
        even = torch.arange(1, moved.shape[2] + 1, device=first.device) % 2 == 0
        moved = torch.where(even[:, None, None], moved.flip(3), moved)
    return moved.permute(0, 3, 1, 2, 4).flatten(0, 1)


def reference(
    query: Tensor, keys: Tensor, values: Tensor, at_query: Tensor, at_keys: Tensor, at_values: Tensor,
    sources: Tensor, weights: Tensor, sums: Sequence[Tensor], beyond: Tensor, crossed: bool,
) -> Tensor:  # fmt: skip
    """Plain torch form; arguments as in the module's docstring -> `[B, P, F, N, d]` in q's dtype."""
    wide, frames = torch.promote_types(query.dtype, torch.float32), query.shape[2]
    requests = beyond.shape[0] // (query.shape[1] * (frames - 1))

    def augmented(rows: Tensor, at: Tensor) -> Tensor:
        moved = arrived(rows[:, :, 0].flatten(2), requests, sources, weights, sums, beyond, crossed)
        every = torch.cat([rows.to(wide), moved.unflatten(-1, rows.shape[3:])], 2) + at.to(wide)
        return every.to(query.dtype).transpose(2, 3)  # [B, P, N, 2 F - 1, d]

    asked = (query + at_query).transpose(2, 3)
    scores = torch.matmul(asked.to(wide), augmented(keys, at_keys).to(wide).transpose(3, 4)) * query.shape[4] ** -0.5
    return torch.matmul(scores.softmax(-1).to(query.dtype), augmented(values, at_values)).transpose(2, 3).contiguous()


def flops(batch: int, places: int, frames: int, heads: int, width: int) -> tuple[int, int]:
    """(of the released form, of this one) for one attention, projections of keys, values and frame 0 included.

    The released form projects 2 F - 1 rows a place to keys and values, this one F, and sums four rows for each that arrives
    (those that go beyond the slots aside); queries, scores and the output's projection are the same in both and counted in
    both, but for the last.
    """
    inner = heads * width
    row = 2 * inner * inner
    both = batch * places * (frames * row + 4 * frames * (2 * frames - 1) * inner)
    released = both + batch * places * 2 * (2 * frames - 1) * row
    return released, both + batch * places * (2 * frames * row + 2 * (frames - 1) * 4 * 2 * inner)


def moved_bytes(batch: int, places: int, frames: int, heads: int, width: int, size: int, requests: int = 1) -> int:
    """Bytes that have to move at least: q, K, V and out once, the positions, and the slots of every target, with weights of 4
    bytes and whole numbers of 8; `size` bytes a number. K_0 and V_0 are part of K and V."""
    inner, targets = heads * width, requests * places * (frames - 1)
    rows = 4 * batch * places * frames * inner + (5 * frames - 2) * inner
    return size * rows + targets * (4 * (8 + 4) + 8)


@torch.library.custom_op("motionrt::motion_augmented_attention", mutates_args=(), device_types="cpu")
def motion_augmented_attention(
    query: Tensor, keys: Tensor, values: Tensor, at_query: Tensor, at_keys: Tensor, at_values: Tensor,
    sources: Tensor, weights: Tensor, sums: Sequence[Tensor], beyond: Tensor, crossed: bool,
) -> Tensor:  # fmt: skip
    """The named op: `reference` on the CPU, the Triton kernel on CUDA. A new tensor `[B, P, F, N, d]`; ValueError as `check`
    says."""
    check(query, keys, values, at_query, at_keys, at_values, sources, weights, sums, beyond)
    return reference(query, keys, values, at_query, at_keys, at_values, sources, weights, sums, beyond, crossed)


@motion_augmented_attention.register_kernel("cuda")
def _(
    query: Tensor, keys: Tensor, values: Tensor, at_query: Tensor, at_keys: Tensor, at_values: Tensor,
    sources: Tensor, weights: Tensor, sums: Sequence[Tensor], beyond: Tensor, crossed: bool,
) -> Tensor:  # fmt: skip
    from motionrt.kernels.motion_augmented_attention_triton import launch

    return launch(query, keys, values, at_query, at_keys, at_values, sources, weights, sums, beyond, crossed)


@motion_augmented_attention.register_fake
def _(
    query: Tensor, keys: Tensor, values: Tensor, at_query: Tensor, at_keys: Tensor, at_values: Tensor,
    sources: Tensor, weights: Tensor, sums: Sequence[Tensor], beyond: Tensor, crossed: bool,
) -> Tensor:  # fmt: skip
    return query.new_empty(query.shape)
