"""The rewrite that moves an `expand` towards the outputs, past every op that treats the expanded axis alike.

So work is done once per distinct row: one timestep shared by the guidance halves, one context row shared by all positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from motionrt.export.compiler.graph_edit import Fired, emit, is_one, is_tensor, prune, size_arg, value

aten = torch.ops.aten

# Ops that treat every element alike; their tensor arguments broadcast.
POINTWISE = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.pow.Tensor_Scalar,
    aten.sin.default, aten.cos.default, aten.exp.default, aten.log.default, aten.sqrt.default, aten.rsqrt.default,
    aten.sigmoid.default, aten.tanh.default, aten.relu.default, aten.silu.default, aten.gelu.default,
    aten._to_copy.default, aten.clone.default, aten.rsub.Scalar, aten.add.Scalar, aten.mul.Scalar,
}  # fmt: skip


@dataclass(frozen=True)
class Broadcast:
    """A node equal to `base.expand(...)`: `base` has size 1 on `dims` (of the node's own shape)."""

    base: Node
    dims: frozenset[int]


def sink_broadcasts(module: GraphModule) -> list[Fired]:
    """Recompute every node that is uniform along some axis once per distinct row, then expand the result."""
    graph = module.graph
    uniform: dict[Node, Broadcast] = {}
    fired: list[Fired] = []
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target == aten.expand.default:
            found = _of_expand(node, uniform, graph)
        else:
            with graph.inserting_before(node):
                found = _through(node, uniform, graph)
        if found is None or not found.dims:
            continue
        uniform[node] = found
        if node.target != aten.expand.default and isinstance(value(node), torch.Tensor):
            with graph.inserting_before(node):
                shape = [size_arg(graph, s) for s in value(node).shape]
                new = emit(graph, aten.expand.default, (found.base, shape))
            node.replace_all_uses_with(new)
            uniform[new] = found
            fired.append(Fired("sink_broadcast", node.name, 0, 0))
    if fired:  # a view was traced over memory that is no longer laid out so
        for node in graph.nodes:
            if node.op == "call_function" and node.target in (aten.view.default, aten._unsafe_view.default):
                node.target = aten.reshape.default
    prune(graph)
    return fired


def _of_expand(node: Node, uniform: dict[Node, Broadcast], graph: torch.fx.Graph) -> Broadcast | None:
    source, shape = node.args[0], value(node).shape
    assert isinstance(source, Node)
    base = uniform[source].base if source in uniform else source
    missing = len(shape) - value(base).ndim
    if missing:
        return None  # a new leading axis: rare, and left where it is
    dims = frozenset(d for d in range(len(shape)) if is_one(value(base).shape[d]) and not is_one(shape[d]))
    return Broadcast(base, dims)


def _partial(node: Node, keep: frozenset[int], uniform: dict[Node, Broadcast], graph: torch.fx.Graph) -> Node:
    """`node` reduced to size 1 on exactly the axes `keep` (a subset of those it is uniform on)."""
    found = uniform.get(node)
    if found is None or not keep:
        return node
    if found.dims == keep:
        return found.base
    shape = [1 if d in keep else size_arg(graph, s) for d, s in enumerate(value(node).shape)]
    return emit(graph, aten.expand.default, (found.base, shape))


def _through(node: Node, uniform: dict[Node, Broadcast], graph: torch.fx.Graph) -> Broadcast | None:
    """The broadcast form of a call whose arguments are broadcasts, or None."""
    nodes = [n for n in node.all_input_nodes if n in uniform]
    if not nodes:
        return None
    target, args, kwargs = node.target, node.args, node.kwargs
    if target in POINTWISE:
        rank = value(node).ndim
        dims = frozenset(
            d
            for d in range(rank)
            if not is_one(value(node).shape[d])
            and all(_uniform_at(n, d - rank, uniform) for n in node.all_input_nodes if is_tensor(n))
        )
        if not dims:
            return None
        swap = {n: _partial(n, _aligned(n, dims, rank, uniform), uniform, graph) for n in nodes}
        new_args, new_kwargs = torch.fx.node.map_arg((args, kwargs), lambda n: swap.get(n, n))
        return Broadcast(emit(graph, target, tuple(new_args), dict(new_kwargs)), dims)
    source: Any = args[0]
    if target in (aten.cat.default, aten.stack.default):
        return _through_join(node, uniform, graph)
    if not isinstance(source, Node) or source not in uniform or any(n in uniform for n in nodes if n is not source):
        return None
    have = uniform[source].dims
    rank = getattr(value(source), "ndim", 0)

    def same(keep: frozenset[int], after: Callable[[int], int] = lambda d: d) -> Broadcast | None:
        if not keep:
            return None
        new = emit(graph, target, (_partial(source, keep, uniform, graph), *args[1:]), dict(kwargs))
        return Broadcast(new, frozenset(after(d) for d in keep))

    if target == aten.linear.default:
        return same(have - {rank - 1})
    if target == aten.layer_norm.default:
        normalised: Any = args[1]
        return same(frozenset(d for d in have if d < rank - len(normalised)))
    if target in (aten.slice.Tensor, aten.softmax.int, aten.split.Tensor, aten.split_with_sizes.default):
        position = 2 if target in (aten.split.Tensor, aten.split_with_sizes.default) else 1
        where: Any = args[position] if len(args) > position else 0
        return same(have - {where % rank})
    if target.__name__ == "getitem":
        return same(have)
    if target == aten.unsqueeze.default:
        new_axis = args[1] % (rank + 1)  # type: ignore[operator]
        return same(have, lambda d: d + (d >= new_axis))
    if target == aten.select.int:
        axis = args[1] % rank  # type: ignore[operator]
        return same(have - {axis}, lambda d: d - (d > axis))
    if target == aten.transpose.int:
        a, b = (x % rank for x in args[1:3])  # type: ignore[operator]
        return same(have, lambda d: b if d == a else a if d == b else d)
    if target == aten.permute.default:
        order: Any = [x % rank for x in args[1]]  # type: ignore[union-attr]
        return same(have, lambda d: order.index(d))
    if target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return _through_view(node, source, have, uniform, graph)
    if target == aten.scaled_dot_product_attention.default and len(args) == 3:  # rows of the query are independent
        return same(have & {rank - 2})
    return None


def _uniform_at(node: Node, negative_dim: int, uniform: dict[Node, Broadcast]) -> bool:
    """Whether an argument has no say along an axis: absent, of size 1, or broadcast."""
    dim = value(node).ndim + negative_dim
    return dim < 0 or is_one(value(node).shape[dim]) or (node in uniform and dim in uniform[node].dims)


def _aligned(node: Node, dims: frozenset[int], rank: int, uniform: dict[Node, Broadcast]) -> frozenset[int]:
    shift = rank - value(node).ndim
    return frozenset(d - shift for d in dims if d - shift >= 0) & uniform[node].dims


def _through_join(node: Node, uniform: dict[Node, Broadcast], graph: torch.fx.Graph) -> Broadcast | None:
    parts: Any = node.args[0]
    if not all(part in uniform for part in parts):
        return None
    rank = value(parts[0]).ndim
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    stack = node.target == aten.stack.default
    axis %= rank + stack
    common = frozenset.intersection(*(uniform[part].dims for part in parts)) - (frozenset() if stack else {axis})
    if not common:
        return None
    new = emit(graph, node.target, ([_partial(part, common, uniform, graph) for part in parts], axis))
    return Broadcast(new, frozenset(d + (stack and d >= axis) for d in common))


def _through_view(
    node: Node, source: Node, have: frozenset[int], uniform: dict[Node, Broadcast], graph: torch.fx.Graph
) -> Broadcast | None:
    """Axes of a view are uniform where they are made of uniform axes alone: `_kept_axes`."""
    before, after = value(source).shape, value(node).shape
    sources, targets = _kept_axes(before, after, have)
    if not targets:
        return None
    shape = [1 if e in targets else size_arg(graph, s) for e, s in enumerate(after)]
    source = _partial(source, sources, uniform, graph)
    return Broadcast(emit(graph, aten.reshape.default, (source, shape)), targets)


def _kept_axes(before: Any, after: Any, have: frozenset[int]) -> tuple[frozenset[int], frozenset[int]]:
    """(axes of `before`, axes of `after`) that stay uniform through a view, `have` being uniform before it.

    Fixed sizes: the shapes are cut into runs of equal product, and a run whose axes are all uniform (or 1) stays so, however
    it is split or merged. Dynamic ones: an axis that stands alone, with equal products of sizes before it and equal size.
    """
    if not all(isinstance(size, int) for size in (*before, *after)):
        kept: dict[int, int] = {}
        for d in have:
            for e in range(len(after)):
                if str(before[d]) == str(after[e]) and str(math.prod(before[:d])) == str(math.prod(after[:e])):
                    kept[d] = e
                    break
        return frozenset(kept), frozenset(kept.values())
    sources: set[int] = set()
    targets: set[int] = set()
    d = e = 0
    while d < len(before) and e < len(after):
        left, right, run, to = before[d], after[e], [d], [e]
        d, e = d + 1, e + 1
        while left != right:
            if left < right:
                left, run, d = left * before[d], [*run, d], d + 1
            else:
                right, to, e = right * after[e], [*to, e], e + 1
        if left > 1 and all(axis in have or before[axis] == 1 for axis in run):
            sources |= {axis for axis in run if before[axis] != 1}
            targets |= {axis for axis in to if after[axis] != 1}
    return frozenset(sources), frozenset(targets)
