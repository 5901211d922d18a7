"""The compiler pass: programs composed equal the original, and each rule fires exactly where it pays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from motionrt.export.compiler.broadcasts import Broadcast, kept_by_view
from motionrt.export.compiler.partition import Partition, partition
from motionrt.export.systems.motionrag import MotionAdapterCrossAttention, split_heads
from motionrt.export.systems.rows import paired, repeated
from motionrt.kernels.motion_cross_attention import motion_cross_attention, reference

INPUTS = {"x": "step", "timestep": "schedule", "context": "request"}


def compose(cut: Partition, feed: Mapping[str, Tensor]) -> list[Tensor]:
    env = dict(feed)
    with torch.no_grad():
        for program in cut.programs.values():
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


@pytest.mark.slow
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


@pytest.mark.parametrize("frames", [1, 3], ids=["halves", "halves and frames"])
def test_tables_have_one_row_for_each_request_whose_timestep_is_its_own(frames: int) -> None:
    """Each row of a timestep's path repeated in place is computed once; requests of a batch are at steps of their own."""

    class Halves(Modulated):
        def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            rows, many = repeated(timestep, 2 * frames), repeated(repeated(x, 2), frames)
            return super().forward(many, rows, repeated(context, 2 * frames)).unflatten(0, (-1, 2 * frames)).sum(1)

    torch.manual_seed(0)
    module = Halves(16, 2, 12).eval()
    batch = torch.export.Dim("batch", min=1, max=4)

    def feed(size: int) -> tuple[Tensor, ...]:
        return torch.randn(size, 5, 16), torch.randint(0, 1000, (size,)), torch.randn(size, 3, 12)

    cut = partition(module, feed(2), INPUTS, outputs=("y",), dynamic_shapes=({0: batch},) * 3)
    assert cut.classes["schedule"].flops == 2 * (4 * 16 + 16 * 32)  # of one row
    tables = [h for h in cut.hoisted if h.kind == "schedule"]
    assert [h.shape for h in tables] == [(1, 1, 16)] * 2
    for size in (1, 2, 3):
        values = feed(size)
        with torch.no_grad():
            want = module(*values)
            alone = [cut.schedule.module(one) for one in values[1].split(1)]
            together = cut.schedule.module(values[1])  # as the graph `schedule` runs: rows of one batch are steps of a loop
        torch.testing.assert_close(compose(cut, dict(zip(INPUTS, values, strict=True)))[0], want, atol=2e-6, rtol=1e-5)
        for number, table in enumerate(together):
            assert table.shape[0] == size
            torch.testing.assert_close(table, torch.cat([row[number] for row in alone]), atol=1e-6, rtol=1e-6)


def test_tables_that_the_step_repeats_alike_are_one() -> None:
    """Both tables of the modulation: one input of the step, `[B, 1, 2 D]`, repeated for the halves and then split."""

    class Halves(Modulated):
        def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            both = paired(x, -x)
            return super().forward(both, repeated(timestep, 2), paired(context, 1 - context)).unflatten(0, (-1, 2)).sum(1)

    torch.manual_seed(0)
    module = Halves(16, 2, 12).eval()
    batch = torch.export.Dim("batch", min=1, max=4)

    def feed(size: int) -> dict[str, Tensor]:
        values = torch.randn(size, 5, 16), torch.randint(0, 1000, (size,)), torch.randn(size, 3, 12)
        return dict(zip(INPUTS, values, strict=True))

    cut = partition(module, tuple(feed(2).values()), INPUTS, outputs=("y",), dynamic_shapes=({0: batch},) * 3)
    assert [(h.name, h.shape) for h in cut.hoisted if h.kind == "schedule"] == [("schedule_tables", (1, 1, 32))]
    assert ops(cut.step.module).count("aten.split_with_sizes.default") == 1
    for size in (1, 2, 3):
        values = feed(size)
        with torch.no_grad():
            torch.testing.assert_close(compose(cut, values)[0], module(**values), atol=2e-6, rtol=1e-5)


class Controlled(nn.Module):
    """A branch reads the timestep and a condition, and not the latents, as SparseCtrl does; its result is added to them."""

    def __init__(self, channels: int = 64, kernel: int = 3) -> None:
        super().__init__()
        self.time, self.hint = nn.Linear(4, channels), nn.Conv2d(3, channels, kernel, padding=kernel // 2)
        self.mix = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.out, self.into = nn.Conv2d(channels, 4, kernel, padding=kernel // 2), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        time = self.time((timestep[:, None].float() * torch.arange(1, 5) / 1000).sin())
        both = torch.cat([x, -x], dim=1).unflatten(1, (2, 4)).flatten(0, 1)  # two rows of a request
        hidden = repeated(F.silu(self.hint(context)), 2) + repeated(time, 2)[:, :, None, None]
        residual = self.out(F.silu(self.mix(hidden)))
        return self.into(both + residual).unflatten(0, (-1, 2)).sum(1)


def controlled(module: Controlled) -> tuple[Partition, Callable[[int], tuple[Tensor, ...]]]:
    def feed(size: int) -> tuple[Tensor, ...]:
        return torch.randn(size, 4, 8, 8), torch.randint(0, 1000, (size,)), torch.randn(size, 3, 8, 8)

    batch = torch.export.Dim("batch", min=1, max=8)
    return partition(module.eval(), feed(2), INPUTS, outputs=("y",), dynamic_shapes=({0: batch},) * 3), feed


def test_what_reads_request_and_timestep_but_no_latents_is_a_table_made_in_one_call() -> None:
    torch.manual_seed(0)
    module = Controlled()
    cut, feed = controlled(module)
    assert list(cut.programs) == ["schedule", "request", "timeline", "step"]
    timeline = cut.programs["timeline"]
    (table,) = timeline.outputs
    assert table in cut.step.inputs and [h.shape for h in cut.hoisted if h.kind == "timeline"] == [(2, 4, 8, 8)]
    convolution = 2 * 2 * 64 * 9 * (64 * 64 + 64 * 4)  # of both rows at 8 x 8 places
    assert cut.classes["timeline"].flops == convolution
    assert cut.classes["step"].flops == 2 * 2 * 64 * 4 * 4  # `into` alone
    assert ops(cut.programs["request"].module).count("aten.conv2d.default") == 1  # the hint, which knows no timestep

    timesteps = torch.tensor([999, 640, 320, 10, 1])
    for requests in (1, 3):
        x, _, context = feed(requests)
        with torch.no_grad():
            made = dict(zip(cut.schedule.outputs, cut.schedule.module(timesteps), strict=True)) | {"timestep": timesteps}
            lines = []
            for one in context.split(1):  # once per request, over all timesteps
                known = made | {"context": one}
                known |= dict(
                    zip(cut.request.outputs, cut.request.module(*(known[n] for n in cut.request.inputs)), strict=True)
                )
                (line,) = timeline.module(*(known[name] for name in timeline.inputs))
                lines.append(line.unflatten(0, (len(timesteps), -1)))
            for t in range(len(timesteps)):
                at = [(t + number) % len(timesteps) for number in range(requests)]  # each at a step of its own
                rows = torch.cat([line[step] for line, step in zip(lines, at, strict=True)])
                given = {"x": x, table: rows}
                got = cut.step.module(*(given[name] for name in cut.step.inputs))[0]
                torch.testing.assert_close(got, module(x, timesteps[at], context), atol=2e-6, rtol=1e-5)


def test_a_sum_of_request_and_schedule_stays_in_the_step() -> None:
    """Its table would be T times the hint, to save one addition."""

    class Added(Controlled):
        def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            time = self.time(timestep[:, None].float() * torch.arange(1, 5))
            return x[:, :1] * F.silu(self.hint(context) + time[:, :, None, None])

    cut, feed = controlled(Added())
    assert list(cut.programs) == ["schedule", "request", "step"] and "timeline" not in cut.classes
    values = feed(3)
    torch.testing.assert_close(compose(cut, dict(zip(INPUTS, values, strict=True))), list(cut.whole(*values)))


def test_a_cheap_product_of_request_and_schedule_stays_in_the_step_too() -> None:
    class Thin(Controlled):
        """4 x 4 weights at every place: few FLOPs for each byte of the table."""

        def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            return x + self.into(F.silu(self.out(self.hint(context))) + timestep[:, None, None, None])

    cut, _ = controlled(Thin())
    assert "timeline" not in cut.programs and cut.classes["step"].flops == 2 * 64 * 4 * 4


def test_request_and_schedule_of_fixed_batch_stay_in_the_step() -> None:
    """Timesteps without a dynamic size: one call could not take all of them."""
    module = Controlled().eval()
    feed = (torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 3, 8, 8))
    cut = partition(module, feed, INPUTS, outputs=("y",))
    assert "timeline" not in cut.programs
    torch.testing.assert_close(compose(cut, dict(zip(INPUTS, feed, strict=True)))[0], module(*feed), atol=2e-6, rtol=1e-5)


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


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    factors=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=5),
    cuts=st.tuples(st.lists(st.booleans(), min_size=5, max_size=5), st.lists(st.booleans(), min_size=5, max_size=5)),
    uniform=st.lists(st.booleans(), min_size=5, max_size=5),
    outer=st.sampled_from([1, 2, 3]),
    inner=st.sampled_from([1, 2, 3]),
)
def test_repetition_goes_through_a_view_exactly_as_claimed(
    factors: list[int], cuts: tuple[list[bool], list[bool]], uniform: list[bool], outer: int, inner: int
) -> None:
    def merged(cut: list[bool]) -> list[int]:
        sizes = [factors[0]]
        for factor, apart in zip(factors[1:], cut, strict=False):
            sizes = [*sizes, factor] if apart else [*sizes[:-1], sizes[-1] * factor]
        return sizes

    before, after = merged(cuts[0]), merged(cuts[1])
    dims = frozenset(d for d, size in enumerate(before) if uniform[d] and size > 1)
    if 0 in dims or before[0] == 1:
        outer = inner = 1
    before[0], after[0] = before[0] * outer * inner, after[0] * outer * inner
    none: Any = None
    have = Broadcast(none, dims, outer, inner)
    rows = before[0] // outer // inner
    base = torch.randn([rows if d == 0 and d not in dims else 1 if d in dims else size for d, size in enumerate(before)])

    def spread(kept: Broadcast) -> Tensor:
        """What `have` describes, with what `kept` names left unrepeated."""
        x = base.expand([1 if d in kept.dims else -1 if d not in dims else size for d, size in enumerate(before)])
        x = x if kept.inner != 1 else x.repeat_interleave(inner, 0)
        return x if kept.outer != 1 else x.repeat(outer, *[1] * (x.ndim - 1))

    want = spread(Broadcast(none)).reshape(after)
    kept, found = kept_by_view(before, after, have)
    assert kept.dims <= have.dims and found.rows[0] in (1, outer) or found.dims or kept.dims
    shape = [1 if e in found.dims else size for e, size in enumerate(after)]
    shape[0] //= found.outer * found.inner
    got = spread(kept).reshape(shape).repeat_interleave(found.inner, 0).repeat(found.outer, *[1] * (len(after) - 1))
    assert torch.equal(got.expand(after), want)
    if have.rows == (1, 1) and dims == frozenset(d for d, size in enumerate(before) if size > 1):
        assert found.dims == frozenset(e for e, size in enumerate(after) if size > 1)  # nothing that is uniform is lost


@pytest.mark.parametrize(
    ("before", "after", "have", "want"),
    [
        ((5, 2), (10,), ({1}, 1, 1), ((), 1, 2)),
        ((5, 6, 4), (10, 3, 4), ({1}, 1, 1), ((1,), 1, 2)),
        ((2, 3), (6,), ({0}, 1, 1), ((), 2, 1)),
        ((10, 7), (5, 2, 7), ((), 1, 2), ((1,), 1, 1)),
        ((30, 7), (10, 3, 7), ((), 1, 6), ((1,), 1, 2)),
        ((6, 4), (2, 3, 4), ((), 2, 1), ((0,), 1, 1)),
        ((5, 4), (20,), ({0}, 1, 1), ((), 5, 1)),
        ((5, 2, 4), (40,), ({1}, 1, 1), ((), 1, 1)),
    ],
    ids=[
        "merged into rows", "partly merged into rows", "all rows over", "rows split again", "frames split from halves",
        "rows over split again", "rows of places", "in the middle: lost",
    ],
)  # fmt: skip
def test_rows_that_a_view_makes(before: Any, after: Any, have: Any, want: Any) -> None:
    none: Any = None
    dims, outer, inner = have
    _, found = kept_by_view(before, after, Broadcast(none, frozenset(dims), outer, inner))
    assert (tuple(found.dims), found.outer, found.inner) == want
