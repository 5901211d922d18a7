"""What the kernel of motion_augmented_attention.py takes: its limits, and the check that its launcher and its op make first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NAME = "motion_augmented_attention"
SLOTS = 4  # entries of a target, and of a chunk
MAX_FRAMES = 16  # a tile of rows; the released table of positions ends there too
MAX_WIDTH = 256
MAX_SUMS = 6  # levels of chunks of chunks: enough for 128 x 128 places
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fits(frames: int, width: int, sums: int) -> bool:
    """Whether the kernel takes so many frames, heads of this width and a table of so many levels of sums."""
    return 2 <= frames <= MAX_FRAMES and 1 <= width <= MAX_WIDTH and sums <= MAX_SUMS


def check(
    query: Tensor, keys: Tensor, values: Tensor, at_query: Tensor, at_keys: Tensor, at_values: Tensor,
    sources: Tensor, weights: Tensor, sums: Sequence[Tensor], beyond: Tensor,
) -> tuple[int, int]:  # fmt: skip
    """(requests, branches of a request); shapes as in motion_augmented_attention.py.

    ValueError, naming the argument, what it got and what is allowed, unless the kernel can take these. What the table says is
    not looked at: on a device that would stop the stream, and break a graph capture. A source that is not of the request, or a
    chunk that is not there, is read all the same.
    """

    def refuse(name: str, got: object, allowed: str) -> None:
        raise ValueError(f"{NAME}: `{name}` is {got}; allowed: {allowed}.")

    if query.ndim != 5:
        refuse("query", tuple(query.shape), "[B, P, F, N, d]")
    batch, places, frames, heads, width = query.shape
    if query.dtype not in DTYPES or (query.is_cuda and query.dtype == torch.float64):
        refuse("query", query.dtype, "float16, bfloat16, float32, and on the CPU float64")
    if not 2 <= frames <= MAX_FRAMES:
        refuse("query", f"{tuple(query.shape)}, F = {frames}", f"F from 2 to {MAX_FRAMES}")
    if not 1 <= width <= MAX_WIDTH:
        refuse("query", f"{tuple(query.shape)}, d = {width}", f"d from 1 to {MAX_WIDTH}")
    if places < 1 or heads < 1:
        refuse("query", tuple(query.shape), "at least one place and one head")
    rows = {"keys": keys, "values": values}
    tables = {"at_query": at_query, "at_keys": at_keys, "at_values": at_values}
    whole = {"sources": sources, "beyond": beyond, **{f"sums[{level}]": index for level, index in enumerate(sums)}}
    for name, tensor in {**rows, **tables, **whole, "weights": weights}.items():
        if tensor.device != query.device:
            refuse(name, f"on {tensor.device}", f"{query.device}, where `query` is")
    for name, tensor in {**rows, **tables}.items():
        many = frames if name == "at_query" else 2 * frames - 1
        if tensor.shape != (wanted := query.shape if name in rows else (many, heads, width)):
            refuse(name, tuple(tensor.shape), f"{tuple(wanted)} for query {tuple(query.shape)}")
        if tensor.dtype != query.dtype:
            refuse(name, tensor.dtype, f"{query.dtype}, as `query`")
    for name, tensor in {"query": query, **rows, **tables}.items():
        if tensor.stride(-1) != 1 and width > 1 or tensor.stride(-2) != width and heads > 1:
            refuse(name, f"of strides {tensor.stride()}", f"last strides {width} and 1; call .contiguous()")
    for name, tensor in whole.items():
        if tensor.dtype not in (torch.int64, torch.int32) or tensor.dtype != sources.dtype:
            refuse(name, tensor.dtype, "int64 or int32, all of the table alike")
    if not weights.dtype.is_floating_point:
        refuse("weights", weights.dtype, "a floating-point dtype")
    if beyond.ndim != 1 or beyond.shape[0] == 0 or beyond.shape[0] % (places * (frames - 1)):
        refuse("beyond", tuple(beyond.shape), f"[R], R a multiple of P (F - 1) = {places * (frames - 1)}")
    requests = beyond.shape[0] // (places * (frames - 1))
    if batch % requests:
        refuse("query", f"of batch {batch}", f"a multiple of {requests}, the requests of the table")
    if sources.ndim != 2 or sources.shape[1] != SLOTS or sources.shape[0] <= beyond.shape[0]:
        refuse("sources", tuple(sources.shape), f"[R + chunks, {SLOTS}], R = {beyond.shape[0]} and at least one chunk")
    if weights.shape != sources.shape:
        refuse("weights", tuple(weights.shape), f"{tuple(sources.shape)}, as `sources`")
    if len(sums) > MAX_SUMS:
        refuse("sums", f"of {len(sums)} levels", f"at most {MAX_SUMS}; warp in torch beyond")
    for name, tensor in whole.items():
        if name.startswith("sums") and (tensor.ndim != 2 or tensor.shape[1] != SLOTS or tensor.shape[0] == 0):
            refuse(name, tuple(tensor.shape), f"[chunks, {SLOTS}]")
    for name, tensor in {**whole, "weights": weights}.items():
        if not tensor.is_contiguous():
            refuse(name, f"of strides {tensor.stride()}", "a contiguous tensor")
    return requests, batch // requests
