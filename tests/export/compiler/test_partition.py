"""The compiler pass: programs composed equal the original, and each rule fires exactly where it pays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from motionrt.export.compiler.broadcasts import _kept_axes
from motionrt.export.compiler.partition import Batched, Partition, partition
from motionrt.export.systems.motionrag import MotionAdapterCrossAttention, split_heads
from motionrt.kernels.motion_cross_attention import motion_cross_attention, reference

INPUTS = {"x": "step", "timestep": "schedule", "context": "request"}


def compose(cut: Partition, feed: Mapping[str, Tensor]) -> list[Tensor]:
    env = dict(feed)
    with torch.no_grad():
        for program in (cut.schedule, cut.request, cut.step):
            env.update(zip(program.outputs, program.module(*(env[n] for n in program.inputs)), strict=True))
    return [env[name] for name in cut.step.outputs]


def ops(module: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


class Modulated(nn.Module):
    """AdaLN from a timestep shared by the batch, then cross-attention to a context of any length."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.time = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, 2 * width))
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_out = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.to_k, self.to_v = nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)
        self.register_buffer("frequencies", torch.tensor([0.1, 0.2, 0.3, 0.4]))

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        angles = timestep.expand(x.shape[0])[:, None].float() * torch.exp(-self.frequencies)
        shift, scale = self.time(angles.sin()).chunk(2, dim=-1)
        h = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
        q, k, v = split_heads(self.to_q(h), self.heads), *(split_heads(p(context), self.heads) for p in (self.to_k, self.to_v))
        return x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def modulated(
    batch: int, length: int, width: int, heads: int, tokens: int
) -> tuple[Modulated, Partition, dict[str, Tensor]]:
    torch.manual_seed(0)
    module = Modulated(width, heads, 12).eval()
    feed = {
        "x": torch.randn(batch, length, width),
        "timestep": torch.tensor([7]),
        "context": torch.randn(batch, tokens, 12),
    }
    return module, partition(module, tuple(feed.values()), INPUTS, outputs=("y",)), feed


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    heads=st.sampled_from([1, 2, 3]),
    width=st.sampled_from([4, 8, 16]),
    tokens=st.sampled_from([1, 2, 3, 5, 9, 17]),
)
def test_partition_composes_and_reassociates_exactly_where_it_pays(
    batch: int, length: int, heads: int, width: int, tokens: int
) -> None:
    module, cut, feed = modulated(batch, length, heads * width, heads, tokens)
    with torch.no_grad():
        torch.testing.assert_close(compose(cut, feed)[0], module(*feed.values()), atol=2e-6, rtol=1e-5)
    rules = [f for f in cut.fired if f.rule == "reassociate"]
    inner = heads * width
    pays = tokens > 1 and inner * heads * tokens < inner * (inner + tokens)
    assert len(rules) == pays
    assert all(f.flops_after < f.flops_before for f in rules)
    assert ("motionrt.motion_cross_attention.default" in ops(cut.step.module)) == pays
    assert any(f.rule == "softmax_of_one" for f in cut.fired) == (tokens == 1)


def test_partition_hoists_the_time_path_once_for_the_whole_batch() -> None:
    _, cut, _ = modulated(3, 5, 16, 2, 3)
    tables = [h for h in cut.hoisted if h.kind == "schedule"]
    assert tables and all(h.shape[0] == 1 for h in tables)  # the batch shares one row
    assert sum(h.bytes for h in tables) == 2 * 16 * 4
    assert cut.classes["schedule"].parameters == 4 * 16 + 16 + 16 * 32 + 32 + 4  # and the folded table
    assert not any(op.startswith("aten.sin") for op in ops(cut.step.module) + ops(cut.request.module))


def test_partition_of_one_token_context_leaves_no_attention_in_the_step() -> None:
    _, cut, _ = modulated(2, 6, 16, 2, 1)
    assert not any("attention" in op or "softmax" in op for op in ops(cut.step.module))
    assert cut.classes["step"].flops == 0  # every product left the loop
    assert [h.shape for h in cut.hoisted if h.kind == "request"] == [(2, 1, 16)]


def test_partition_of_svd_style_cross_attention_with_adapter_is_one_vector_per_request() -> None:
    torch.manual_seed(0)
    attention = Attention(query_dim=32, cross_attention_dim=12, heads=2, dim_head=16).eval()
    attention.set_processor(MotionAdapterCrossAttention(32, 12))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(32), attention

        def forward(self, x: Tensor, context: Tensor, motion: Tensor, scale: Tensor) -> Tensor:
            return x + self.attention(self.norm(x), context, motion=motion, motion_scale=scale)

    feed = (torch.randn(4, 6, 32), torch.randn(2, 1, 12), torch.randn(2, 5, 12), torch.tensor(0.7))
    kinds = {"x": "step", "context": "request", "motion": "request", "scale": "request"}
    cut = partition(Block(), feed, kinds, outputs=("y",))
    with torch.no_grad():
        want = Block()(*feed)
    torch.testing.assert_close(compose(cut, dict(zip(kinds, feed, strict=True)))[0], want, atol=2e-6, rtol=1e-5)
    assert cut.classes["step"].flops == 0
    assert "aten.layer_norm.default" not in ops(cut.step.module)  # the query died, and its norm with it


class Shared(nn.Module):
    """Two readers of the query projection: folding it would save nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        q = self.to_q(x)
        k = split_heads(context, 2)
        h = F.scaled_dot_product_attention(split_heads(q, 2), k, k).transpose(1, 2).flatten(2)
        return h * timestep, q


def test_reassociate_leaves_a_query_that_is_read_elsewhere() -> None:
    feed = (torch.randn(1, 9, 16), torch.tensor([3]), torch.randn(1, 2, 16))
    cut = partition(Shared(), feed, INPUTS, outputs=("y", "q"))
    assert not [f for f in cut.fired if f.rule == "reassociate"]
    for got, want in zip(compose(cut, dict(zip(INPUTS, feed, strict=True))), cut.whole(*feed), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kinds", [{"x": "step"}, {"x": "step", "timestep": "schedul", "context": "request"}])
def test_partition_refuses_wrong_declarations(kinds: dict[str, str]) -> None:
    feed = (torch.randn(1, 9, 16), torch.tensor([3]), torch.randn(1, 2, 16))
    with pytest.raises(ValueError, match="partition: "):
        partition(Shared(), feed, kinds, outputs=("y", "q"))


def test_batched_schedule_equals_row_by_row() -> None:
    _, cut, _ = modulated(2, 5, 16, 2, 3)
    Batched(cut.schedule).check(torch.tensor([1, 500, 999]))


def test_batched_schedule_refuses_a_program_that_mixes_timesteps() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 4)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return x * self.linear(timestep.float().softmax(0)[:, None] * timestep[:, None])

    feed = (torch.randn(1, 4), torch.tensor([7]))
    cut = partition(Mixed(), feed, {"x": "step", "timestep": "schedule"}, outputs=("y",))
    # over one timestep the softmax is 1 and leaves the graph, so rows are independent; summing them is not
    Batched(cut.schedule).check(torch.tensor([3, 5]))

    class Summed(Mixed):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return x * self.linear(timestep.float().sum()[None, None])

    cut = partition(Summed(), feed, {"x": "step", "timestep": "schedule"}, outputs=("y",))
    with pytest.raises(ValueError, match="mixes timesteps"):
        Batched(cut.schedule).check(torch.tensor([3, 5]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sharpness", [0.1, 3.0])
def test_motion_cross_attention_reference_obeys_the_tolerance_law(dtype: torch.dtype, sharpness: float) -> None:
    """Folded against the plain form, both against fp64 of the same rounded weights: error <= 2x plain's + small atol."""
    torch.manual_seed(0)
    heads, width, tokens = 3, 32, 25
    inner = heads * width
    h = torch.randn(2, 17, inner).to(dtype)
    weight = (torch.randn(inner, inner) / inner**0.5 * sharpness).to(dtype)
    k, v = (torch.randn(2, heads, tokens, width).to(dtype) for _ in range(2))

    def plain(h: Tensor, weight: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = split_heads(h @ weight.T, heads)
        return h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    truth = plain(h.double(), weight.double(), k.double(), v.double())
    folded = torch.einsum("nde,bnmd->benm", weight.float().view(heads, width, inner), k.float()) / width**0.5
    got = motion_cross_attention(h, folded.flatten(2).to(dtype), v, torch.tensor(1.0, dtype=dtype), True)
    error, allowed = (got.double() - truth).abs().max(), (plain(h, weight, k, v).double() - truth).abs().max()
    assert error <= 2 * allowed + 1e-6


@pytest.mark.parametrize(
    ("shapes", "residual"),
    [
        (((2, 5, 8), (1, 8, 7), (1, 2, 3, 4)), True),
        (((2, 5, 8), (1, 8, 6), (1, 2, 3, 3)), True),
        (((5, 8), (1, 8, 6), (1, 2, 3, 4)), False),
    ],
    ids=["columns", "residual width", "rank"],
)
def test_motion_cross_attention_refuses_shapes_that_disagree(shapes: Any, residual: bool) -> None:
    with pytest.raises(ValueError, match="motion_cross_attention"):
        motion_cross_attention(*(torch.zeros(s) for s in shapes), torch.tensor(1.0), residual)


def test_motion_cross_attention_scale_zero_returns_the_input_bit_for_bit() -> None:
    h = torch.randn(2, 5, 8)
    out = reference(h, torch.randn(1, 8, 6), torch.randn(1, 2, 3, 4), torch.tensor(0.0), True)
    assert torch.equal(out, h)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    factors=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=5),
    cuts=st.tuples(st.lists(st.booleans(), min_size=5, max_size=5), st.lists(st.booleans(), min_size=5, max_size=5)),
    uniform=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_axes_stay_uniform_through_a_view_exactly_as_claimed(
    factors: list[int], cuts: tuple[list[bool], list[bool]], uniform: list[bool]
) -> None:
    def merged(cut: list[bool]) -> list[int]:
        sizes = [factors[0]]
        for factor, apart in zip(factors[1:], cut, strict=False):
            sizes = [*sizes, factor] if apart else [*sizes[:-1], sizes[-1] * factor]
        return sizes

    before, after = merged(cuts[0]), merged(cuts[1])
    have = frozenset(d for d, size in enumerate(before) if uniform[d] and size > 1)
    sources, targets = _kept_axes(before, after, have)
    assert sources <= have
    base = torch.randn([1 if d in have else size for d, size in enumerate(before)])
    want = base.expand(before).reshape(after)
    partial = base.expand([1 if d in sources else size for d, size in enumerate(before)])
    got = partial.reshape([1 if e in targets else size for e, size in enumerate(after)]).expand(after)
    assert torch.equal(got, want)
    for e in range(len(after)):  # nothing that a run of whole axes would have kept is lost
        if have == frozenset(d for d, size in enumerate(before) if size > 1):
            assert (e in targets) == (after[e] > 1)
