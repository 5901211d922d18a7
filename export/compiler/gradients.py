"""Modules that differentiate, as graphs: the backward pass is traced together with the forward one.

    step = differentiated(GuidedStep(...), args)      # calls torch.autograd.grad; what comes back does not

`torch.export` records what a module calls, and nobody calls a gradient. So the module is run once on fake tensors under
`make_fx`, which sees what autograd does; weights need no gradient and get none. Then the graph is put into operators that every
backend has, and that the compiler knows:

* forward, what `make_fx` took apart is one operator again: linear layers (whose weights it repeats for every row where rows
  do not lie together), norms, attention;
* a convolution's backward is a transposed convolution, that of nearest upsampling a sum;
* norms compute their statistics again in the backward pass; so does attention its probabilities, in parts of at most `PART`
  elements, so that nothing of that size is kept from the forward pass, and no whole one is ever there;
* results of group norms and GELUs that the backward pass reads are made again there, of inputs that it reads anyway.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from motionrt.export.compiler.graph_edit import prune, value

aten = torch.ops.aten

PART = 1 << 27  # elements of the part of its probabilities that attention's backward computes at once: 256 MiB in float16
_FORWARD, _BACKWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_POINTWISE = (aten.silu_backward, aten.gelu_backward, aten._softmax_backward_data)


def differentiated(module: nn.Module, args: Sequence[Tensor], *, part: int = PART) -> GraphModule:
    """`module` with its gradients in the graph, for inputs of the dtypes and shapes of `args`: a trace with a batch of any size
    takes hours. Weights keep their names and are the module's own, real or fake."""
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    known = (tensor.fake_mode for tensor in (*held.values(), *args) if isinstance(tensor, FakeTensor))
    mode = next(known, None) or FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    names = list(held)

    def fake(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor, static_shapes=True)

    def run(weights: list[Tensor], inputs: tuple[Tensor, ...]) -> Any:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), inputs)

    with mode, torch.no_grad(), saved_tensors_hooks(lambda kept: kept, aten.alias.default), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every module that the graph has no reference to: it gets its weights below
        table: Any = get_decompositions(_POINTWISE)
        given = tuple(map(fake, args))
        traced = make_fx(run, decomposition_table=table, _allow_non_fake_inputs=True)([fake(held[n]) for n in names], given)
        _Rewriter(traced.graph, part).run()
        return _with_weights(traced.graph, names, held)


def _with_weights(graph: Graph, names: Sequence[str], held: dict[str, Tensor]) -> GraphModule:
    """The graph as a module whose first inputs, one for each of `names`, are its own weights."""
    root = nn.Module()
    for node, name in zip([n for n in graph.nodes if n.op == "placeholder"], names, strict=False):
        if node.users:
            *path, last = name.split(".")
            at = root
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, nn.Module())
                at = getattr(at, part)
            weight = held[name]
            if isinstance(weight, nn.Parameter):
                at.register_parameter(last, weight)
            else:
                at.register_buffer(last, weight)
            with graph.inserting_before(node):
                read = graph.get_attr(name)
            read.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(read)
        graph.erase_node(node)
    graph.set_codegen(torch.fx.graph.CodeGen())
    return GraphModule(root, graph).eval()


def _args(node: Node) -> tuple[Any, ...]:
    return node.args


class _Rewriter:
    """Puts a graph of `make_fx` into operators that every backend has, in place."""

    def __init__(self, graph: Graph, part: int) -> None:
        self.graph, self.part = graph, part

    def run(self) -> None:
        prune(self.graph)
        rules: dict[Any, Callable[[Node], Node | None]] = {
            aten.detach.default: lambda node: _args(node)[0],
            aten.alias.default: self.kept,
            aten.native_layer_norm.default: self.layer_norm,
            aten.native_group_norm.default: self.group_norm,
            aten.native_layer_norm_backward.default: self.layer_norm_backward,
            aten.native_group_norm_backward.default: self.group_norm_backward,
            aten.convolution_backward.default: self.convolution_backward,
            aten.upsample_nearest2d_backward.default: self.upsample_backward,
            aten.slice_backward.default: self.slice_backward,
            _FORWARD: self.attention,
            _BACKWARD: self.attention_backward,
        }
        for node in list(self.graph.nodes):
            if node.op == "call_function" and (rule := rules.get(node.target)) is not None:
                with self.graph.inserting_before(node):
                    made = rule(node)
                if made is not None:
                    node.replace_all_uses_with(made)
        prune(self.graph)
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in (aten.mm.default, aten.addmm.default, aten.bmm.default):
                self.product(node)
        for node in self.graph.nodes:  # what a value was laid out like is no longer what was traced
            if node.op == "call_function" and node.target in _VIEWS:
                node.target = aten.reshape.default
        prune(self.graph)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node with its fake value."""
        node = self.graph.call_function(target, args, kwargs)
        given, named = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*given, **named)
        return node

    @staticmethod
    def items(node: Node) -> dict[int, Node]:
        """Who takes which result of a node that has several."""
        return {int(_args(user)[1]): user for user in node.users if user.target is operator.getitem}

    def result(self, node: Node, index: int, made: Node) -> None:
        """Give `made` to whoever takes result `index` of `node`."""
        if (user := self.items(node).get(index)) is not None:
            user.replace_all_uses_with(made)

    def kept(self, node: Node) -> Node:
        """What the backward pass reads of the forward one: the value itself, or the same made of what is kept anyway."""
        source: Node = _args(node)[0]
        if source.target in (aten.gelu.default, aten.group_norm.default):
            return self.call(source.target, *_args(source), **source.kwargs)
        return source

    # --- norms --------------------------------------------------------------------------------------------------------

    def layer_norm(self, node: Node) -> None:
        self.result(node, 0, self.call(aten.layer_norm.default, *_args(node)))

    def group_norm(self, node: Node) -> None:
        x, weight, bias, _, _, _, groups, eps = _args(node)
        self.result(node, 0, self.call(aten.group_norm.default, x, groups, weight, bias, eps))

    def normalised(self, x: Node, axis: int, eps: float) -> tuple[Node, Node]:
        """`x` without mean and scale along `axis`, and what it was multiplied by."""
        off = self.call(aten.sub.Tensor, x, self.call(aten.mean.dim, x, [axis], True))
        # a power, not a product: precision.py has it in float32, beyond whose root in float16 no square goes
        variance = self.call(aten.mean.dim, self.call(aten.pow.Tensor_Scalar, off, 2), [axis], True)
        scale = self.call(aten.rsqrt.default, self.call(aten.add.Tensor, variance, eps))
        return self.call(aten.mul.Tensor, off, scale), scale

    def through(self, gradient: Node, x: Node, axis: int, eps: float) -> Node:
        """The gradient of a norm along `axis`: s (g - mean g - x' mean(g x')), with x' = s (x - mean x)."""
        hat, scale = self.normalised(x, axis, eps)
        along = self.call(aten.mean.dim, self.call(aten.mul.Tensor, gradient, hat), [axis], True)
        rest = self.call(aten.sub.Tensor, gradient, self.call(aten.mean.dim, gradient, [axis], True))
        rest = self.call(aten.sub.Tensor, rest, self.call(aten.mul.Tensor, hat, along))
        return self.call(aten.mul.Tensor, rest, scale)

    def layer_norm_backward(self, node: Node) -> None:
        gradient, x, shape, mean, _, weight, *_ = _args(node)
        assert len(shape) == 1
        eps = self.eps(mean)
        if weight is not None:
            gradient = self.call(aten.mul.Tensor, gradient, weight)
        self.result(node, 0, self.through(gradient, x, -1, eps))

    def group_norm_backward(self, node: Node) -> None:
        gradient, x, mean, _, weight, rows, channels, _, groups, _ = _args(node)
        eps, shape = self.eps(mean), list(value(x).shape)
        if weight is not None:
            wide = self.call(aten.view.default, weight, [channels, *[1] * (len(shape) - 2)])
            gradient = self.call(aten.mul.Tensor, gradient, wide)
        flat = [shape[0], groups, math.prod(shape[2:]) * channels // groups]
        made = self.through(self.call(aten.reshape.default, gradient, flat), self.call(aten.reshape.default, x, flat), -1, eps)
        self.result(node, 0, self.call(aten.reshape.default, made, shape))

    @staticmethod
    def eps(mean: Node) -> float:
        """Of the norm whose mean this is."""
        return float(_args(_args(mean)[0])[-1])

    # --- convolutions -------------------------------------------------------------------------------------------------

    def convolution_backward(self, node: Node) -> None:
        gradient, x, weight, _, stride, padding, dilation, transposed, _, groups, _ = _args(node)
        assert not transposed
        kernel, before, behind = value(weight).shape[2:], value(x).shape[2:], value(gradient).shape[2:]
        left = [
            int(size) - ((int(out) - 1) * s - 2 * p + d * (int(k) - 1) + 1)
            for size, out, s, p, d, k in zip(before, behind, stride, padding, dilation, kernel, strict=True)
        ]
        made = self.call(aten.convolution.default, gradient, weight, None, stride, padding, dilation, True, left, groups)
        self.result(node, 0, made)

    def upsample_backward(self, node: Node) -> Node:
        gradient, (high, wide), before, *_ = _args(node)
        height, width = before[2:]
        rows = value(gradient).shape[:2]
        tiles = self.call(aten.reshape.default, gradient, [*rows, height, high // height, width, wide // width])
        return self.call(aten.sum.dim_IntList, tiles, [3, 5])

    def slice_backward(self, node: Node) -> Node:
        gradient, sizes, axis, start, end, step = _args(node)
        assert step == 1
        whole = value(node).shape[axis]
        if value(gradient).shape[axis] == whole:
            return gradient
        behind = int(whole) - min(int(end), int(whole))
        return self.call(aten.constant_pad_nd.default, gradient, [*[0, 0] * (len(sizes) - 1 - axis), start, behind])

    # --- attention ----------------------------------------------------------------------------------------------------

    @staticmethod
    def plain_attention(node: Node, first: int = 0) -> Sequence[Any]:
        """Queries, keys and values, the arguments from `first` on, of an attention that has nothing else."""
        more = {key: value for key, value in node.kwargs.items() if value is not None}
        if any(_args(node)[first + 3 + 2 * (first > 0) :]) or more:
            raise NotImplementedError(f"attention with a mask, dropout or a scale of its own: {node.format_node()}")
        return _args(node)[first : first + 3]

    def attention(self, node: Node) -> None:
        query, key, given = self.plain_attention(node)
        self.result(node, 0, self.call(aten.scaled_dot_product_attention.default, query, key, given, None, 0.0, False))

    def attention_backward(self, node: Node) -> None:
        """dV = P' dO; dS = P (dP - rowsum(dO O)) with dP = dO V'; dQ = c dS K, dK = c dS' Q: in parts of the rows of queries,
        or of whatever comes before them."""
        gradient, output = _args(node)[0], _args(node)[4]
        query, key, given = self.plain_attention(node, 1)
        scale = value(query).shape[-1] ** -0.5
        before, heads, queries, _ = value(query).shape
        keys = value(key).shape[2]
        parts = min(queries, -(-before * heads * queries * keys // self.part))
        bounds = [queries * index // parts for index in range(parts + 1)]
        wanted = self.items(node)
        dq, dk, dv = [], None, None
        for start, end in zip(bounds, bounds[1:], strict=False):
            q, g, o = (x if parts == 1 else self.call(aten.slice.Tensor, x, 2, start, end) for x in (query, gradient, output))
            scores = self.call(aten.matmul.default, q, self.call(aten.transpose.int, key, -2, -1))
            seen = self.call(aten.softmax.int, self.call(aten.mul.Tensor, scores, scale), -1)
            along = self.call(aten.sum.dim_IntList, self.call(aten.mul.Tensor, g, o), [-1], True)
            spread = self.call(aten.matmul.default, g, self.call(aten.transpose.int, given, -2, -1))
            ds = self.call(aten.mul.Tensor, seen, self.call(aten.sub.Tensor, spread, along))
            ds = self.call(aten.mul.Tensor, ds, scale)
            dq.append(self.call(aten.matmul.default, ds, key))
            if 1 in wanted:
                part = self.call(aten.matmul.default, self.call(aten.transpose.int, ds, -2, -1), q)
                dk = part if dk is None else self.call(aten.add.Tensor, dk, part)
            if 2 in wanted:
                part = self.call(aten.matmul.default, self.call(aten.transpose.int, seen, -2, -1), g)
                dv = part if dv is None else self.call(aten.add.Tensor, dv, part)
        self.result(node, 0, dq[0] if parts == 1 else self.call(aten.cat.default, dq, 2))
        for index, made in ((1, dk), (2, dv)):
            if made is not None:
                self.result(node, index, made)

    # --- products -----------------------------------------------------------------------------------------------------

    def product(self, node: Node) -> None:
        """A product of rows that were laid flat for it, and are put back behind it, as one of the rows as they were."""
        bias, flat, factor = _args(node) if node.target == aten.addmm.default else (None, *_args(node))
        if node.target == aten.bmm.default:
            with self.graph.inserting_before(node):
                factor = self.repeated(factor)
            if factor is None:
                return
        source = _args(flat)[0] if flat.target in _VIEWS else flat
        width = value(flat).shape[-1]
        if value(source).ndim < 2 or value(source).shape[-1] != width:
            source = flat
        lead = value(source).shape[:-1]
        for user in list(node.users):
            if user.target in _VIEWS and value(user).shape[:-1] == lead:
                with self.graph.inserting_before(user):
                    user.replace_all_uses_with(self.linear(source, factor, bias))
        if node.users:
            with self.graph.inserting_before(node):
                node.replace_all_uses_with(self.linear(flat, factor, bias))

    def repeated(self, factor: Any) -> Any:
        """The matrix that a batch of matrices repeats; None for a batch of several."""
        turned, node = False, factor
        while (rank := value(node).ndim) > 2:
            source, *axes = _args(node) or (None,)
            if node.target == aten.transpose.int and {axis % rank for axis in axes} == {rank - 2, rank - 1}:
                turned = not turned
            elif node.target not in (*_VIEWS, aten.expand.default) or value(node).shape[-2:] != value(source).shape[-2:]:
                return None
            node = source
        if not turned:
            return node
        return _args(node)[0] if node.target == aten.t.default else self.call(aten.t.default, node)

    def linear(self, rows: Node, factor: Node, bias: Node | None) -> Node:
        """`rows @ factor + bias`, as a linear layer where the factor is a weight that was turned."""
        if factor.target == aten.t.default:
            return self.call(aten.linear.default, rows, _args(factor)[0], bias)
        made = self.call(aten.matmul.default, rows, factor)
        return made if bias is None else self.call(aten.add.Tensor, made, bias)
