"""Exact graph rewrites ahead of the partition: they let loop-invariant code motion see further than the code was written.

- A softmax over one element is 1: attention over a context of one token is its value, whatever the query.
- Sink broadcasts: an `expand` moves towards the outputs through every op that treats the expanded axis alike, so work is
  done once per distinct row (one timestep shared by the guidance halves; one context row shared by all positions).
- Reassociate when it is cheaper: softmax((h Wq) K^T) with `Wq` constant and `K` invariant is softmax(h (Wq^T K^T)); it ends
  in the op `motionrt::motion_cross_attention`, with scores kept in fp32. Taken only where the FLOP count says so.

Graphs are aten level (`torch.export`, `run_decompositions({})`), with parameters as `get_attr` and `meta["val"]` set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from motionrt.kernels.motion_cross_attention import choose_form

aten = torch.ops.aten
FUSED = torch.ops.motionrt.motion_cross_attention.default

# Ops that treat every element alike; their tensor arguments broadcast.
POINTWISE = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.pow.Tensor_Scalar,
    aten.sin.default, aten.cos.default, aten.exp.default, aten.log.default, aten.sqrt.default, aten.rsqrt.default,
    aten.sigmoid.default, aten.tanh.default, aten.relu.default, aten.silu.default, aten.gelu.default,
    aten._to_copy.default, aten.clone.default, aten.rsub.Scalar, aten.add.Scalar, aten.mul.Scalar,
}  # fmt: skip


@dataclass(frozen=True)
class Fired:
    """One application of a rule: where (node name) and FLOPs per step before and after."""

    rule: str
    where: str
    flops_before: int
    flops_after: int


def value(node: Any) -> Any:
    """The fake tensor that a node yields."""
    return node.meta["val"]


def sizes(shape: Iterable[Any], known: dict[str, int]) -> tuple[int, ...]:
    """Concrete sizes: every symbol takes the value it had in the example inputs."""
    out = []
    for size in shape:
        if isinstance(size, int):
            out.append(size)
        else:
            expression = size.node.expr
            out.append(int(expression.subs({s: known[str(s)] for s in expression.free_symbols})))
    return tuple(out)


def emit(graph: torch.fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
    """A new call with its `meta["val"]`, at the graph's insertion point."""
    node = graph.call_function(target, args, kwargs or {})
    fake = torch.fx.node.map_arg((args, kwargs or {}), value)
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(fake) if isinstance(leaf, torch.Tensor)]
    mode = next((t.fake_mode for t in tensors if hasattr(t, "fake_mode")), None)
    if mode is None:
        node.meta["val"] = target(*fake[0], **fake[1])
    else:
        with mode:
            node.meta["val"] = target(*fake[0], **fake[1])
    return node


def prune(graph: torch.fx.Graph) -> None:
    """Erase every call that nothing reads (torch keeps attention, which may draw dropout masks; ours never does)."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def size_arg(graph: torch.fx.Graph, size: Any) -> Any:
    """A size as a graph argument: an int, or a node that reads an equal symbolic size from an input."""
    if isinstance(size, int):
        return size
    for node in graph.nodes:
        if node.op != "placeholder":
            break
        for dim, other in enumerate(getattr(value(node), "shape", ())):
            if not isinstance(other, int) and other.node.expr == size.node.expr:
                return emit(graph, aten.sym_size.int, (node, dim))
    for node in graph.nodes:  # composite sizes, such as 2 * batch, are computed somewhere already
        seen = node.meta.get("val")
        if isinstance(seen, torch.SymInt) and seen.node.expr == size.node.expr:
            return node
    raise ValueError(f"size {size} cannot be read from any input of the graph")


# --- softmax over one element ---------------------------------------------------------------------------------------


def softmax_of_one(module: GraphModule) -> list[Fired]:
    """Replace attention over a single key by its value, and a softmax over a single element by ones."""
    graph, fired = module.graph, []
    for node in list(graph.nodes):
        if node.target == aten.scaled_dot_product_attention.default:
            query, key, values = node.args[:3]
            masked = len(node.args) > 3 and node.args[3] is not None or node.kwargs.get("attn_mask") is not None
            dropout = (node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)) != 0.0
            if value(key).shape[-2] != 1 or masked or dropout:
                continue
            with graph.inserting_before(node):
                shape = [size_arg(graph, s) for s in (*value(node).shape[:-1], value(values).shape[-1])]
                new = emit(graph, aten.expand.default, (values, shape))
        elif node.target in (aten.softmax.int, aten._softmax.default):
            source, dim = node.args[:2]
            if value(source).shape[dim] != 1:
                continue
            with graph.inserting_before(node):
                shape = [size_arg(graph, s) for s in value(node).shape]
                new = emit(graph, aten.full.default, (shape, 1.0), {"dtype": value(node).dtype})
        else:
            continue
        node.replace_all_uses_with(new)
        fired.append(Fired("softmax_of_one", node.name, 0, 0))
    prune(graph)
    return fired


# --- sinking broadcasts ---------------------------------------------------------------------------------------------


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
    dims = frozenset(d for d in range(len(shape)) if _is_one(value(base).shape[d]) and not _is_one(shape[d]))
    return Broadcast(base, dims)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


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
            if not _is_one(value(node).shape[d])
            and all(_uniform_at(n, d - rank, uniform) for n in node.all_input_nodes if _tensor(n))
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


def _tensor(node: Node) -> bool:
    return isinstance(value(node), torch.Tensor)


def _uniform_at(node: Node, negative_dim: int, uniform: dict[Node, Broadcast]) -> bool:
    """Whether an argument has no say along an axis: absent, of size 1, or broadcast."""
    dim = value(node).ndim + negative_dim
    return dim < 0 or _is_one(value(node).shape[dim]) or (node in uniform and dim in uniform[node].dims)


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


# --- reassociation --------------------------------------------------------------------------------------------------


def reassociate(module: GraphModule, depends: dict[Node, frozenset[str]], known: dict[str, int]) -> list[Fired]:
    """Fold the query projection into invariant keys where `choose_form` counts fewer FLOPs per step.

    Matches `scaled_dot_product_attention(q, k, v)` without mask where q = heads(linear(h, Wq)), `Wq` is constant, h depends
    on the step and k, v do not; `h + scale * (...)` around it is absorbed into the op. Where the plain form is chosen the
    graph keeps it as it is. The folded matrices are made K-major, [B, N*M, D] in memory: what the kernel reads.
    """
    graph, fired = module.graph, []
    for node in list(graph.nodes):
        match = _match_query(node, depends)
        if match is None:
            continue
        hidden, weight, merged = match
        key, values = node.args[1], node.args[2]
        batch, length, inner = sizes(value(hidden).shape, known)
        _, heads, tokens, width = sizes(value(key).shape, known)
        form, plain, cheaper = choose_form(batch * length, inner, heads, tokens, width)
        if form != "folded":
            continue
        factor = node.kwargs.get("scale")
        factor = width**-0.5 if factor is None else factor
        with graph.inserting_before(node):
            query_heads = emit(graph, aten.reshape.default, (weight, [heads, width, inner]))
            product = emit(graph, aten.matmul.default, (key, query_heads))  # [B, N, M, d] x [N, d, D]
            rows = emit(graph, aten.flatten.using_ints, (emit(graph, aten.mul.Tensor, (product, factor)), 1, 2))
            folded = emit(graph, aten.transpose.int, (rows, 1, 2))
        end, scale, residual = _absorb(merged, hidden)
        with graph.inserting_before(end):
            if not isinstance(scale, Node):
                # an expression on a value of the graph keeps device and dtype; folded away by the partition
                scale = emit(graph, aten.full.default, ([], float(scale)), {"dtype": value(hidden).dtype})
            new = emit(graph, FUSED, (hidden, folded, values, scale, residual))
        end.replace_all_uses_with(new)
        fired.append(Fired("reassociate", node.name, plain, cheaper))
    prune(graph)
    return fired


def _match_query(node: Node, depends: dict[Node, frozenset[str]]) -> tuple[Node, Node, Node] | None:
    """(h, Wq, the node that holds the merged heads [B, L, N d]) of an attention that the rule fits."""
    if node.target != aten.scaled_dot_product_attention.default or len(node.args) != 3:
        return None
    if set(node.kwargs) - {"scale"} or len(value(node.args[0]).shape) != 4:
        return None
    query, key, values = node.args
    heads_first = query
    view = heads_first.args[0] if _is_call(heads_first, aten.transpose.int, 1, 2) else None  # type: ignore[union-attr]
    if not isinstance(view, Node) or view.target not in (aten.view.default, aten.reshape.default):
        return None
    linear = view.args[0]
    if not isinstance(linear, Node) or linear.target != aten.linear.default or len(linear.args) != 2:
        return None
    if any(len(n.users) != 1 for n in (query, view, linear)):  # somebody else needs the query: nothing is saved
        return None
    hidden, weight = linear.args
    if value(hidden).ndim != 3 or "step" not in depends.get(hidden, frozenset()) or depends.get(weight, {"?"}):  # type: ignore[arg-type]
        return None
    if any("step" in depends.get(n, {"step"}) or "schedule" in depends.get(n, ()) for n in (key, values)):  # type: ignore[arg-type]
        return None
    if str(value(key).shape[0]) != str(value(hidden).shape[0]) and not _is_one(value(key).shape[0]):
        return None
    merged = node
    for _ in range(3):  # transpose, perhaps a copy, view
        if len(merged.users) != 1:
            return None
        merged = next(iter(merged.users))
        if merged.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints):
            break
    if value(merged).ndim != 3 or str(value(merged).shape[1]) != str(value(hidden).shape[1]):
        return None
    return hidden, weight, merged  # type: ignore[return-value]


def _is_call(node: Any, target: Any, *args: Any) -> bool:
    return isinstance(node, Node) and node.target == target and node.args[1:] == args


def _absorb(merged: Node, hidden: Node) -> tuple[Node, Any, bool]:
    """Follow `* scale` and `+ h` behind the attention: (last node absorbed, scale, residual)."""
    end, scale = merged, 1.0
    user = next(iter(end.users)) if len(end.users) == 1 else None
    if user is not None and user.target == aten.mul.Tensor:
        other = user.args[1] if user.args[0] is end else user.args[0]
        if not isinstance(other, Node) or (_tensor(other) and value(other).ndim == 0):
            end, scale = user, other  # type: ignore[assignment]
            user = next(iter(end.users)) if len(end.users) == 1 else None
    if user is not None and user.target == aten.add.Tensor and hidden in user.args and not user.kwargs:
        if str(value(user).shape) == str(value(hidden).shape):
            return user, scale, True
    return end, scale, False
