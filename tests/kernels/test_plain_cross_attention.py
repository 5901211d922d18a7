"""The unfolded op: its checks and its agreement with the folded form. Numbers of the kernel: test_kernel_interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motionrt.kernels.motion_cross_attention import motion_cross_attention
from motionrt.kernels.plain_cross_attention import check, plain_cross_attention
from motionrt.kernels.tiles import SHARED_LIMIT, choose_plain_tile


def arguments(heads: int = 3, tokens: int = 70, width: int = 8) -> dict[str, Any]:
    torch.manual_seed(0)
    inner = heads * width
    return {
        "hidden": torch.randn(2, 5, inner),
        "query": torch.randn(inner, inner) / inner**0.5,
        "keys": torch.randn(2, heads, tokens, width),
        "values": torch.randn(1, heads, tokens, width),
        "scale": torch.tensor(0.5),
        "factor": width**-0.5,
        "residual": True,
    }


GOOD = arguments()
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank of hidden": ({"hidden": GOOD["hidden"][0]}, r"`hidden` is \(5, 24\); allowed: \[B, L, D\]"),
    "rank of keys": ({"keys": GOOD["keys"][0]}, r"`keys` is \(3, 70, 8\); allowed"),
    "rank of scale": ({"scale": torch.ones(1)}, r"`scale` is \(1,\); allowed: \[\], one number"),
    "query of another width": ({"query": GOOD["query"][:-1]}, r"`query` is \(23, 24\); allowed: \[N\*d, D\] = \(24, 24\)"),
    "stride of query": ({"query": GOOD["query"].T}, r"`query` is of strides"),
    "values disagree": ({"values": GOOD["values"][:, :, 1:]}, r"`values` is \(1, 3, 69, 8\); allowed: N, M and d of `keys`"),
    "batch of keys": ({"keys": GOOD["keys"].repeat(2, 1, 1, 1)}, r"`keys` .* batch 4; allowed: batch 1 or 2"),
    "dtypes that differ": ({"keys": GOOD["keys"].half()}, r"`keys` is torch.float16; allowed: torch.float32"),
    "device mix": ({"values": GOOD["values"].to("meta")}, r"`values` is on meta; allowed: cpu"),
    "no tokens": ({"keys": GOOD["keys"][:, :, :0]}, r"`keys` is \(2, 3, 0, 8\); allowed: N and M of at least 1"),
    "factor": ({"factor": float("nan")}, r"`factor` is nan; allowed: a finite number"),
    "scale": ({"scale": torch.tensor(float("inf"))}, r"`scale` is inf; allowed: a finite number"),
}


@pytest.mark.parametrize("bad", BAD, ids=lambda name: name.replace(" ", "-"))
def test_check_names_argument_got_and_allowed(bad: str) -> None:
    change, said = BAD[bad]
    with pytest.raises(ValueError, match=f"plain_cross_attention: {said}"):
        check(**{**GOOD, **change})


def test_plain_cross_attention_is_a_lawful_op() -> None:
    torch.library.opcheck(plain_cross_attention, tuple(GOOD.values()), test_utils=("test_schema", "test_faketensor"))


def test_plain_cross_attention_is_the_folded_form_before_folding() -> None:
    call = arguments(tokens=5)
    heads, width = call["keys"].shape[1], call["keys"].shape[3]
    by_head = call["query"].unflatten(0, (heads, width))
    folded = (call["factor"] * call["keys"] @ by_head).flatten(1, 2).transpose(1, 2)
    want = motion_cross_attention(call["hidden"], folded, call["values"], call["scale"], True)
    torch.testing.assert_close(plain_cross_attention(**call), want, atol=2e-6, rtol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    capability=st.sampled_from(sorted(SHARED_LIMIT)),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    heads=st.integers(1, 64),
    width=st.integers(1, 256),
)
def test_choose_plain_tile_holds_every_head(capability: int, dtype: torch.dtype, heads: int, width: int) -> None:
    tile = choose_plain_tile(capability, dtype, heads, width)
    assert tile.columns == tile.heads * tile.slot and tile.slot >= width
    assert tile.stages * tile.depth * (tile.rows + tile.columns) * dtype.itemsize <= SHARED_LIMIT[capability]
