"""The op, its checks, its counts and its strip, and the reference against the formula: what needs neither a GPU nor Triton.
Numbers of the kernel: test_augmented_interpreter.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from motionrt.export.systems.motion_i2v.stencil import stencil, warped
from motionrt.kernels.motion_augmented_attention import (
    arrived,
    flops,
    motion_augmented_attention,
    moved_bytes,
    reference,
)
from motionrt.kernels.motion_augmented_attention_limits import MAX_SUMS, check
from motionrt.kernels.tiles import choose_strip

NAMES = (
    "query", "keys", "values", "at_query", "at_keys", "at_values", "sources", "weights", "sums", "beyond", "crossed",
)  # fmt: skip


def fields(requests: int, frames: int = 4, grid: tuple[int, int] = (3, 4)) -> Tensor:
    """Fields `[requests, F - 1, 2, h, w]` that draw many sources to a few places, so that slots do not suffice."""
    height, across = grid
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(across).float(), indexing="ij")
    noise = torch.rand(requests, frames - 1, 2, height, across, generator=torch.Generator().manual_seed(1))
    return torch.stack([-0.7 * x, -0.7 * y]) + noise


def arguments(
    requests: int = 1, branches: int = 2, grid: tuple[int, int] = (3, 4), frames: int = 4, heads: int = 2, width: int = 3,
    crossed: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A call of the op, by names."""
    torch.manual_seed(0)
    rows = lambda: torch.randn(requests * branches, grid[0] * grid[1], frames, heads, width)  # noqa: E731
    table = stencil(fields(requests, frames, grid))
    positions = (torch.randn(count, heads, width) for count in (frames, 2 * frames - 1, 2 * frames - 1))
    values = (rows(), rows(), rows(), *positions, table.sources, table.weights, list(table.sums), table.beyond, crossed)
    return dict(zip(NAMES, values, strict=True))


def changed(**tensors: Callable[[Any], Any]) -> dict[str, Any]:
    good = arguments()
    return {**good, **{name: change(good[name]) for name, change in tensors.items()}}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank of query": (changed(query=lambda x: x[0]), r"`query` is \(12, 4, 2, 3\); allowed: \[B, P, F, N, d\]"),
    "dtype of query": (changed(query=lambda x: x.int()), r"`query` is torch.int32; allowed: float16, bfloat16, float32"),
    "one frame": (changed(query=lambda x: x[:, :, :1]), r"`query` is .*, F = 1; allowed: F from 2 to 16"),
    "too many frames": (arguments(frames=17), r"`query` is .*, F = 17; allowed: F from 2 to 16"),
    "too wide": (arguments(width=257), r"`query` is .*, d = 257; allowed: d from 1 to 256"),
    "no heads": (changed(query=lambda x: x[:, :, :, :0]), r"`query` is .*; allowed: at least one place and one head"),
    "device mix": (changed(sources=lambda x: x.to("meta")), r"`sources` is on meta; allowed: cpu, where `query` is"),
    "device of a level": (changed(sums=lambda x: [x[0].to("meta")]), r"`sums\[0\]` is on meta; allowed: cpu"),
    "shape of keys": (changed(keys=lambda x: x[:, :5]), r"`keys` is \(2, 5, 4, 2, 3\); allowed: \(2, 12, 4, 2, 3\)"),
    "dtypes that differ": (changed(values=lambda x: x.half()), r"`values` is torch.float16; allowed: torch.float32, as"),
    "positions": (changed(at_keys=lambda x: x[:4]), r"`at_keys` is \(4, 2, 3\); allowed: \(7, 2, 3\) for query"),
    "stride of values": (
        changed(values=lambda x: x.transpose(3, 4).contiguous().transpose(3, 4)),
        r"`values` is of strides .*; allowed: last strides 3 and 1",
    ),
    "dtype of sources": (changed(sources=lambda x: x.short()), r"`sources` is torch.int16; allowed: int64 or int32"),
    "whole numbers that differ": (changed(beyond=lambda x: x.int()), r"`beyond` is torch.int32; allowed: .* all of the table"),
    "dtype of weights": (changed(weights=lambda x: x.int()), r"`weights` is torch.int32; allowed: a floating-point dtype"),
    "targets": (changed(beyond=lambda x: x[:-1]), r"`beyond` is \(35,\); allowed: \[R\], R a multiple of P \(F - 1\) = 36"),
    "no targets": (changed(beyond=lambda x: x[:0]), r"`beyond` is \(0,\); allowed: \[R\]"),
    "batch": (
        {**arguments(requests=3, branches=1), **{n: arguments()[n] for n in ("query", "keys", "values")}},
        r"`query` is of batch 2; allowed: a multiple of 3, the requests of the table",
    ),
    "slots": (changed(sources=lambda x: x[:, :3]), r"`sources` is \(.*, 3\); allowed: \[R \+ chunks, 4\]"),
    "no chunks": (changed(sources=lambda x: x[:36]), r"`sources` is \(36, 4\); allowed: .*at least one chunk"),
    "weights and sources": (changed(weights=lambda x: x[:-1]), r"`weights` is .*; allowed: .*, as `sources`"),
    "levels": (changed(sums=lambda x: (MAX_SUMS + 1) * x[:1]), r"`sums` is of 7 levels; allowed: at most 6"),
    "shape of a level": (changed(sums=lambda x: [x[0][:, 0]]), r"`sums\[0\]` is .*; allowed: \[chunks, 4\]"),
    "a table that is not contiguous": (
        changed(weights=lambda x: x.T.contiguous().T),
        r"`weights` is of strides .*; allowed: a contiguous tensor",
    ),
}


@pytest.mark.parametrize("bad", BAD, ids=lambda name: name.replace(" ", "-"))
def test_check_names_argument_got_and_allowed(bad: str) -> None:
    call, said = BAD[bad]
    with pytest.raises(ValueError, match=rf"motion_augmented_attention: {said}"):
        check(*list(call.values())[:-1])


@pytest.mark.parametrize("bad", ["positions", "targets", "levels"])
def test_the_op_checks_before_it_computes(bad: str) -> None:
    with pytest.raises(ValueError, match="motion_augmented_attention: "):
        motion_augmented_attention(*BAD[bad][0].values())


def test_check_counts_requests_and_branches() -> None:
    assert check(*list(arguments(requests=3, branches=2).values())[:-1]) == (3, 2)
    assert check(*list(arguments(requests=2, branches=1, width=1, heads=1).values())[:-1]) == (2, 1)


@pytest.mark.parametrize("crossed", [False, True], ids=["own", "crossed"])
@pytest.mark.parametrize("requests, branches", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_reference_is_attention_over_frames_and_what_arrives(requests: int, branches: int, crossed: bool) -> None:
    """Written as the paper has it: 2 F - 1 rows a place, in the order of the frames and each with its position."""
    given, frames = arguments(requests, branches, crossed=crossed), 4
    call = {name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in given.items()}
    alone = [stencil(field[None]) for field in fields(requests)]
    tables = [table._replace(weights=table.weights.double()) for table in alone]
    other = torch.arange(requests * branches).view(requests, branches).flip(1).flatten()

    def rows(name: str) -> Tensor:
        own, at = call[name], call[f"at_{name}"]
        first = own[:, :, 0].flatten(2)
        every = [own[:, :, 0] + at[0]]
        for frame in range(1, frames):
            source = first[other] if crossed and frame % 2 == 0 else first
            moved = [
                warped(tables[request], source[request * branches + branch][None])[0, :, frame - 1]
                for request in range(requests) for branch in range(branches)
            ]  # fmt: skip
            every += [torch.stack(moved).view(own[:, :, 0].shape) + at[frames + frame - 1], own[:, :, frame] + at[frame]]
        return torch.stack(every, 2).transpose(2, 3)

    query = (call["query"] + call["at_query"]).transpose(2, 3)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, rows("keys"), rows("values")).transpose(2, 3)
    torch.testing.assert_close(reference(**call), wanted, atol=1e-12, rtol=0)


def test_arrived_leaves_nothing_out_and_gives_0_where_nothing_comes() -> None:
    call = arguments(branches=1)
    table = [call[name] for name in ("sources", "weights", "sums", "beyond")]
    assert (call["beyond"] != call["sources"].shape[0] - 36 - 1).any(), "slots suffice: nothing is tried"
    ones = arrived(torch.ones(1, 12, 1), 1, *table, False)
    assert set(ones.round(decimals=2).unique().tolist()) == {0.0, 1.0}
    assert arrived(torch.ones(1, 12, 1, dtype=torch.bfloat16), 1, *table, False).dtype == torch.float32


@pytest.mark.parametrize("crossed", [False, True], ids=["own", "crossed"])
def test_motion_augmented_attention_is_a_lawful_op(crossed: bool) -> None:
    """Schema, fake implementation and dispatch, as torch.export, torch.compile and CUDA graphs rely on them."""
    call = tuple(arguments(crossed=crossed).values())
    torch.library.opcheck(motion_augmented_attention, call, test_utils=("test_schema", "test_faketensor"))


def test_motion_augmented_attention_survives_export_with_a_dynamic_batch() -> None:
    class Step(torch.nn.Module):
        def forward(self, *given: Any) -> Tensor:
            *tensors, sources, weights, sums, beyond = given
            return motion_augmented_attention(*tensors, sources, weights, [sums], beyond, False) * 2

    def feed(branches: int) -> tuple[Tensor, ...]:
        return tuple(v[0] if isinstance(v, list) else v for v in list(arguments(branches=branches).values())[:-1])

    batch = torch.export.Dim("batch", min=1, max=8)
    shapes = (({0: batch}, {0: batch}, {0: batch}, *[None] * 7),)
    program = torch.export.export(Step(), feed(2), dynamic_shapes=shapes, strict=False).module()
    torch.testing.assert_close(program(*feed(3)), 2 * reference(**arguments(branches=3)))


def test_flops_agree_with_the_counted_table() -> None:
    """specs/motion_i2v.md 8.2, of the 42 attentions of one branch: keys and values of 15 moved rows cost 0.52 TFLOP, of which
    sums of frame 0's projections cost less than a hundredth."""
    levels = ((2560, 40, 10), (640, 80, 10), (160, 160, 10), (40, 160, 12))  # places, d, attentions
    found = [(count, flops(1, places, 16, 8, width)) for places, width, count in levels]
    assert sum(count * (released - ours) for count, (released, ours) in found) / 1e12 == pytest.approx(0.52, abs=0.01)


def test_bytes_are_of_rows_and_of_slots() -> None:
    rows = 4 * 2 * 12 * 4 * 6 + (4 + 7 + 7) * 6
    assert moved_bytes(2, 12, 4, 2, 3, size=2) == 2 * rows + 36 * (4 * 12 + 8)


@pytest.mark.parametrize("frames", [2, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_choose_strip_holds_all_frames(frames: int, dtype: torch.dtype) -> None:
    strip = choose_strip(90, dtype, frames, 40)
    assert strip.frames >= max(16, frames)  # the smallest product of a tensor core
    for power in (strip.frames, strip.chunk, strip.warps):
        assert power & (power - 1) == 0
    with pytest.raises(ValueError, match="sm_75 GPU; allowed: sm_80 or newer"):
        choose_strip(75, dtype, frames, 40)
