"""The op, its checks, the choice of form and of tile: what needs neither a GPU nor Triton. Numbers: test_interpreter.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from motionrt.kernels.motion_cross_attention import (
    MAX_TOKENS,
    check,
    choose_form,
    motion_cross_attention,
    reference,
)
from motionrt.kernels.tiles import PACKED_COLUMNS, SHARED_LIMIT, choose_chunk, choose_layout, choose_tile, layout_flops


def arguments(batch: int = 2, length: int = 5, heads: int = 3, tokens: int = 4, width: int = 8) -> dict[str, Any]:
    torch.manual_seed(0)
    inner = heads * width
    return {
        "hidden": torch.randn(batch, length, inner),
        "folded": torch.randn(1, inner, heads * tokens),
        "values": torch.randn(batch, heads, tokens, width),
        "scale": torch.tensor(0.5),
        "residual": True,
    }


def changed(**tensors: Callable[[Tensor], Any]) -> dict[str, Any]:
    good = arguments()
    return {**good, **{name: change(good[name]) for name, change in tensors.items()}}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank of hidden": (changed(hidden=lambda x: x[0]), r"`hidden` is \(5, 24\); allowed: \[B, L, D\]"),
    "rank of folded": (changed(folded=lambda x: x[0]), r"`folded` is \(24, 12\); allowed: \[B or 1, D, N\*M\]"),
    "rank of values": (changed(values=lambda x: x[0]), r"`values` is \(3, 4, 8\); allowed: \[B or 1, N, M, d\]"),
    "rank of scale": (changed(scale=lambda x: x[None]), r"`scale` is \(1,\); allowed: \[\], one number"),
    "stride of hidden": (
        changed(hidden=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        r"`hidden` is of strides .*; allowed: a last stride of 1",
    ),
    "stride of values": (changed(values=lambda x: x.repeat(1, 1, 1, 2)[..., ::2]), r"`values` is of strides"),
    "dtype of hidden": (
        {**arguments(), **{n: arguments()[n].int() for n in ("hidden", "folded", "values")}},
        r"`hidden` is torch.int32; allowed: float16, bfloat16, float32",
    ),
    "dtypes that differ": (
        changed(values=lambda x: x.half()),
        r"`values` is torch.float16; allowed: torch.float32, as `hidden`",
    ),
    "dtype of scale": (changed(scale=lambda x: x.int()), r"`scale` is torch.int32; allowed: a floating-point dtype"),
    "device mix": (changed(folded=lambda x: x.to("meta")), r"`folded` is on meta; allowed: cpu, where `hidden` is"),
    "no tokens": (changed(values=lambda x: x[:, :, :0]), r"`values` is .*, M = 0; allowed: M from 1 to 64"),
    "too many tokens": (
        arguments(tokens=MAX_TOKENS + 1),
        r"`values` is .*, M = 65; allowed: M from 1 to 64; use the plain form beyond",
    ),
    "too wide": (arguments(heads=1, width=264), r"`values` is .*, d = 264; allowed: d from 1 to 256"),
    "A and V disagree": (changed(folded=lambda x: x[..., :-1]), r"`folded` is \(1, 24, 11\); allowed: .*\[.., 24, 12\]"),
    "A and h disagree": (changed(folded=lambda x: x[:, :-1]), r"`folded` is \(1, 23, 12\); allowed: .*\[.., 24, 12\]"),
    "batch of folded": (changed(folded=lambda x: x.expand(3, -1, -1)), r"`folded` .* batch 3; allowed: batch 1 or 2"),
    "batch of values": (changed(values=lambda x: x[:1].expand(3, -1, -1, -1)), r"`values` .* batch 3; allowed: batch 1 or 2"),
    "residual": (changed(values=lambda x: x[..., :4].contiguous()), r"`residual` is True with N\*d = 3 x 4, D = 24"),
    "NaN scale": (changed(scale=lambda x: x * float("nan")), r"`scale` is nan; allowed: a finite number"),
    "infinite scale": (changed(scale=lambda x: x * float("inf")), r"`scale` is inf; allowed: a finite number"),
}


@pytest.mark.parametrize("bad", BAD, ids=lambda name: name.replace(" ", "-"))
def test_check_names_argument_got_and_allowed(bad: str) -> None:
    call, said = BAD[bad]
    with pytest.raises(ValueError, match=rf"motion_cross_attention: {said}"):
        check(**call)


@pytest.mark.parametrize("bad", ["stride of hidden", "A and V disagree", "NaN scale", "residual"])
def test_motion_cross_attention_checks_before_it_computes(bad: str) -> None:
    with pytest.raises(ValueError, match="motion_cross_attention: "):
        motion_cross_attention(**BAD[bad][0])


@pytest.mark.parametrize("residual", [True, False])
def test_motion_cross_attention_is_a_lawful_op(residual: bool) -> None:
    """Schema, fake implementation and dispatch, as torch.export, torch.compile and CUDA graphs rely on them."""
    call = {**arguments(), "residual": residual}
    torch.library.opcheck(motion_cross_attention, tuple(call.values()), test_utils=("test_schema", "test_faketensor"))


def test_motion_cross_attention_survives_export_with_a_dynamic_length() -> None:
    class Step(torch.nn.Module):
        def forward(self, hidden: Tensor, folded: Tensor, values: Tensor, scale: Tensor) -> Tensor:
            return motion_cross_attention(hidden, folded, values, scale, True) * 2

    feed = tuple(v for v in arguments().values() if isinstance(v, Tensor))
    shapes = ({1: torch.export.Dim("length", min=2, max=64)}, None, None, None)
    program = torch.export.export(Step(), feed, dynamic_shapes=shapes, strict=False).module()
    longer = tuple(v for v in arguments(length=9).values() if isinstance(v, Tensor))
    torch.testing.assert_close(program(*longer), 2 * reference(*longer, residual=True))


@pytest.mark.parametrize(
    ("sizes", "form"),
    [
        ((6976, 3072, 48, 25, 64), "folded"),  # CogVideoX's Motion-Adapter
        ((9216, 320, 5, 25, 64), "folded"),  # DynamiCrafter
        ((6976, 3072, 48, 64, 64), "folded"),  # M = d: what is left is the scores of the plain form
        ((6976, 3072, 48, 65, 64), "plain"),  # beyond the kernel
        ((9216, 320, 8, 77, 40), "plain"),  # text tokens
        ((9216, 320, 8, 50, 40), "plain"),  # folding does not pay
        ((9216, 1280, 4, 25, 320), "plain"),  # too wide for the kernel
    ],
)
def test_choose_form_counts_flops(sizes: tuple[int, int, int, int, int], form: str) -> None:
    chosen, plain, folded = choose_form(*sizes)
    length, inner, heads, tokens, width = sizes
    assert chosen == form
    assert plain == 2 * length * heads * width * (inner + tokens) and folded == 2 * length * inner * heads * tokens


def test_choose_form_agrees_with_the_counted_table() -> None:
    """specs/motionrag.md B2, GFLOP per layer: released 131.7 + 1.07 (scores), folded 51.4."""
    _, plain, folded = choose_form(6976, 3072, 48, 25, 64)
    assert plain / 1e9 == pytest.approx(131.7 + 1.07, abs=0.1) and folded / 1e9 == pytest.approx(51.4, abs=0.1)


SIZES = {
    "heads": st.integers(1, 64), "tokens": st.integers(1, 64), "width": st.integers(1, 256),
    "inner": st.sampled_from([1, 37, 320, 1280, 3072]),
    "capability": st.sampled_from([80, 86, 87, 89, 90, 100, 103, 120, 121]),
    "dtype": st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    "layout": st.sampled_from([None, "padded", "packed"]),
}  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True)
@given(**SIZES)
def test_choose_tile_holds_every_head_and_fits_the_target(
    heads: int, tokens: int, width: int, inner: int, capability: int, dtype: torch.dtype, layout: str | None
) -> None:
    tile = choose_tile(capability, dtype, inner, heads, tokens, width, layout)
    assert tile.heads * tile.slot <= tile.columns and tile.slot >= tokens
    for power in (tile.rows, tile.columns, tile.depth, tile.chunk, tile.warps):
        assert power & (power - 1) == 0 and power >= 4
    if not tile.packed:
        assert tile.heads * tile.slot == tile.columns
        assert -(-heads // tile.heads) * tile.heads <= 1.2 * heads or tile.heads == 1
    limit = SHARED_LIMIT[max(t for t in SHARED_LIMIT if t <= capability)]
    size = 4 if dtype == torch.float32 else 2
    assert tile.stages * tile.depth * (tile.rows + tile.columns) * size <= limit


def test_choose_layout_counts_padding() -> None:
    """25 of 32 columns against 125 of 128: packing saves 10 % at D = 3072, too little to pay for masks, and 21 % at N = 20."""
    padded, packed = (layout_flops(layout, 3072, 48, 25, 64) for layout in ("padded", "packed"))
    assert padded == 2 * 48 * 32 * (3072 + 64) and packed == 2 * 10 * PACKED_COLUMNS * (3072 + 5 * 64)
    assert choose_layout(3072, 48, 25, 64) == "padded"
    assert [choose_layout(64 * n, n, 25, 64) for n in (5, 10, 20)] == ["padded", "padded", "packed"]
    assert choose_layout(3072, 48, 32, 64) == "padded" and choose_layout(3072, 48, 17, 64) == "packed"


def test_choose_chunk_pads_the_head_width_least() -> None:
    assert [choose_chunk(width) for width in (32, 40, 64, 80, 128, 160)] == [32, 64, 64, 32, 64, 32]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ((75, torch.float16, 320, 5, 25, 64), "sm_75 GPU; allowed: sm_80 or newer"),
        ((90, torch.float16, 320, 5, 25, 64, "dense"), "`layout` is 'dense'; allowed: padded, packed"),
    ],
    ids=["old GPU", "unknown layout"],
)
def test_choose_tile_refuses(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        choose_tile(*call)
