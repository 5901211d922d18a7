"""Modules that differentiate, as graphs: the traced gradient is that of autograd, in operators that every backend has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import GraphModule

from motionrt.export.compiler.gradients import differentiated
from motionrt.export.compiler.liveness import live_bytes
from motionrt.export.compiler.weightless import faked, meta

aten = torch.ops.aten

# All that a traced gradient may be made of: what partition, ONNX export and engines know.
KNOWN = {
    "add", "arange", "bmm", "cat", "clone", "constant_pad_nd", "convolution", "div", "erf", "exp", "expand", "gelu", "getitem",
    "group_norm", "layer_norm", "linear", "matmul", "mean", "mul", "ones_like", "permute", "pow", "reshape", "rsqrt", "rsub",
    "scaled_dot_product_attention", "sigmoid", "silu", "slice", "softmax", "_softmax", "split", "squeeze", "sub", "sum", "t",
    "tanh", "transpose", "unsqueeze", "upsample_nearest2d",
}  # fmt: skip


class Gradient(nn.Module):
    """`inner(x)`, and the gradient of its product with a fixed draw."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            tracked = x.detach().requires_grad_()
            y = self.inner(tracked)
            probe = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape) / y.numel() - 0.3
            (gradient,) = torch.autograd.grad((probe * y).sum(), tracked)
        with torch.no_grad():
            return y.detach(), x - 0.5 * gradient


class Do(nn.Module):
    """A function as a module, with the weights that it reads."""

    def __init__(self, call: Callable[..., Tensor], *weights: nn.Module) -> None:
        super().__init__()
        self.call, self.weights = call, nn.ModuleList(weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, *self.weights)


def heads(x: Tensor, count: int = 2) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(x: Tensor, to_q: nn.Module, to_k: nn.Module, to_v: nn.Module) -> Tensor:
    return F.scaled_dot_product_attention(heads(to_q(x)), heads(to_k(x)), heads(to_v(x)))


def across(x: Tensor, to_q: nn.Module, to_k: nn.Module, to_v: nn.Module) -> Tensor:
    """To three rows that do not depend on x."""
    other = (torch.arange(3 * x.shape[-1], dtype=x.dtype) / 10).reshape(1, 3, -1).expand(x.shape[0], -1, -1)
    return F.scaled_dot_product_attention(heads(to_q(x)), heads(to_k(other)), heads(to_v(other)))


def spelled(x: Tensor, to_q: nn.Module, to_k: nn.Module) -> Tensor:
    """Attention whose probabilities are what is asked for."""
    return torch.softmax(heads(to_q(x)) @ heads(to_k(x)).transpose(-1, -2) * 0.5, -1)


def geglu(x: Tensor, proj: nn.Module) -> Tensor:
    hidden, gate = proj(x).chunk(2, -1)
    return hidden * F.gelu(gate)


def turned(x: Tensor, proj: nn.Module) -> Tensor:
    """A linear layer on rows that do not lie together."""
    return proj(x.permute(0, 2, 1))


def skips(x: Tensor, down: nn.Module, mix: nn.Module) -> Tensor:
    """Down, up again, and joined to what was there, cut to an odd size."""
    up = F.interpolate(down(x), scale_factor=2.0, mode="nearest")[:, :, : x.shape[2], : x.shape[3]]
    return mix(torch.cat([F.silu(up), x], 1))


def lin(width: int, to: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(width, to, bias=bias)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 7)),
    "conv-stride-odd": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 9)),
    "conv-stride-even": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (1, 4, 8, 6)),
    "conv-uneven": (lambda: nn.Conv2d(4, 6, (2, 5), stride=(3, 2), padding=(0, 2), dilation=(2, 1)), (1, 4, 12, 9)),
    "conv-groups": (lambda: nn.Conv2d(4, 6, 3, dilation=2, groups=2), (1, 4, 7, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 4, stride=3), (2, 4, 15)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, stride=2, padding=1), (1, 2, 4, 5, 6)),
    "group-norm": (lambda: nn.GroupNorm(2, 6), (3, 6, 5, 3)),
    "group-norm-plain": (lambda: nn.GroupNorm(3, 6, affine=False), (2, 6, 7)),
    "layer-norm": (lambda: nn.LayerNorm(6), (2, 5, 6)),
    "layer-norm-plain": (lambda: nn.LayerNorm(6, elementwise_affine=False), (5, 6)),
    "norm-silu-conv": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3)), (1, 4, 5, 7)),
    "silu": (lambda: nn.SiLU(), (3, 5)),
    "gelu": (lambda: nn.GELU(), (3, 5)),
    "gelu-tanh": (lambda: nn.GELU("tanh"), (3, 5)),
    "geglu": (lambda: Do(geglu, lin(6, 10, True)), (2, 3, 6)),
    "linear-turned": (lambda: Do(turned, lin(6, 5, True)), (2, 6, 3)),
    "two-linear": (lambda: nn.Sequential(lin(6, 8, True), lin(8, 3)), (2, 4, 6)),
    "attention": (lambda: Do(attend, lin(6, 8), lin(6, 8), lin(6, 8)), (2, 7, 6)),
    "cross-attention": (lambda: Do(across, lin(6, 8), lin(6, 8), lin(6, 8)), (2, 7, 6)),
    "probabilities": (lambda: Do(spelled, lin(6, 8), lin(6, 8)), (2, 5, 6)),
    "upsampling": (lambda: nn.Upsample(scale_factor=2.0, mode="nearest"), (2, 3, 4, 5)),
    "skips": (lambda: Do(skips, nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(7, 2, 1)), (1, 3, 7, 5)),
    "slice": (lambda: Do(lambda x: x[:, 1:4] * x[:, 2:5]), (2, 6, 3)),
}  # fmt: skip


def made(name: str) -> tuple[Gradient, Tensor]:
    make, shape = CASES[name]
    torch.manual_seed(0)
    return Gradient(make()).eval().requires_grad_(False), torch.randn(shape, dtype=torch.float64)


def names(module: GraphModule) -> Counter[str]:
    """Operators of a graph, without their overloads."""
    calls = (node.target for node in module.graph.nodes if node.op == "call_function")
    return Counter(str(getattr(target, "overloadpacket", target.__name__)).removeprefix("aten.") for target in calls)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "part"), [*((name, 1 << 20) for name in CASES), *((name, 60) for name in CASES if name.endswith("attention"))]
)
def test_traced_gradient_is_that_of_autograd_in_known_operators(name: str, part: int) -> None:
    module, x = made(name)
    exact = module.double()(x)
    graph = differentiated(module, (x,), part=part)
    for found, wanted in zip(graph(x), exact, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    assert not set(names(graph)) - KNOWN
    module = module.float()
    eager, found = module(x.float()), differentiated(module, (x.float(),), part=part)(x.float())
    for ours, theirs, wanted in zip(found, eager, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - wanted).abs().max() <= 2 * (theirs - wanted).abs().max() + 1e-6


def test_weights_keep_their_names_and_are_not_copied() -> None:
    module, x = made("skips")
    graph = differentiated(module.double(), (x,))
    wanted = dict(module.named_parameters())
    found = dict(graph.named_parameters())
    assert set(found) == set(wanted) and all(found[name] is wanted[name] for name in wanted)


@pytest.mark.parametrize("name", ["skips", "attention", "geglu", "norm-silu-conv"])
def test_module_without_weights_gives_the_same_graph(name: str) -> None:
    module, x = made(name)
    wanted = differentiated(module, (x.float(),))
    with meta():
        empty = Gradient(CASES[name][0]()).eval()
    with faked(empty):
        graph = differentiated(empty, (torch.empty(x.shape),))
    assert graph.code == wanted.code
    assert all(isinstance(weight, FakeTensor) for weight in graph.parameters())


@pytest.mark.parametrize("part", [30, 60, 100, 1 << 20])
def test_attention_makes_no_more_of_its_probabilities_at_once_than_a_part(part: int) -> None:
    module, x = made("attention")  # 2 x 2 x 7 x 7 probabilities, 28 to a row of queries
    graph = differentiated(module.double(), (x,), part=part)
    sizes = [node.meta["val"].numel() for node in graph.graph.nodes if node.target == aten.softmax.int]
    assert sum(sizes) == 2 * 2 * 7 * 7 and len(sizes) >= -(-196 // part)
    assert max(sizes) <= max(part + 28, 28), "a part ends at the end of a row"
    assert part < 196 or len(sizes) == 1


def test_what_is_cheap_is_made_again_and_not_kept() -> None:
    """Of a block of norm, SiLU, product and GEGLU the backward pass keeps the input, the projection, and nothing else."""
    width, rows, blocks = 8, 64, 6

    def block(x: Tensor, *layers: nn.Module) -> Tensor:
        for norm, proj in zip(layers[::2], layers[1::2], strict=True):
            x = x + geglu(F.silu(norm(x)), proj)
        return x

    layers = [layer for _ in range(blocks) for layer in (nn.GroupNorm(2, width), lin(width, 2 * width))]
    module = Gradient(Do(block, *layers)).eval().requires_grad_(False)
    graph = differentiated(module, (torch.randn(rows, width),))
    counts = names(graph)
    assert counts["gelu"] == counts["group_norm"] == 2 * blocks
    assert all(len(node.users) == 1 for node in graph.graph.nodes if node.target == aten.gelu.default)
    one = 4 * rows * width
    kept = blocks * (1 + 2) * one
    assert kept <= live_bytes(graph.graph) <= kept + 8 * one


def test_a_weight_is_not_repeated_for_rows_that_do_not_lie_together() -> None:
    module, x = made("linear-turned")
    graph = differentiated(module.double(), (x,))
    counts = names(graph)
    assert counts["linear"] == 1 and counts["matmul"] == 1 and not counts["bmm"], counts
    weight = next(node for node in graph.graph.nodes if str(node.target).endswith("weight"))
    assert all(user.target in (aten.linear.default, aten.matmul.default) for user in weight.users)


@pytest.mark.parametrize(
    "how", [{"attn_mask": torch.zeros(7, 7)}, {"is_causal": True}, {"scale": 0.3}], ids=lambda how: next(iter(how))
)
def test_attention_that_is_more_than_attention_is_refused(how: dict[str, object]) -> None:
    def masked(x: Tensor) -> Tensor:
        x = x[:, None]
        return F.scaled_dot_product_attention(x, x, x, **how)  # type: ignore[arg-type]

    with pytest.raises(NotImplementedError, match="mask, dropout or a scale"):
        differentiated(Gradient(Do(masked)), (torch.randn(2, 7, 4),))
