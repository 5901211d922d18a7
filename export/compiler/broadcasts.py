"""The rewrite that moves repetition towards the outputs, past every op that treats what is repeated alike.

So work is done once per distinct row: one timestep shared by the halves of guidance and by all frames, one context row shared
by all positions. Three things are repetition: an axis along which all values are equal (`expand`); along axis 0, each row
several times in place; and along axis 0, all rows several times over. The last two are what a view makes of the first when it
merges axes: rows `[B, 2]` equal along the 2, seen as `[2 B]`.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx import Graph, GraphModule, Node

from motionrt.export.compiler.graph_edit import Fired, ancestors, emit, is_one, is_tensor, prune, size_arg, value

aten = torch.ops.aten

# Ops that treat every element alike; their tensor arguments broadcast.
POINTWISE = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.pow.Tensor_Scalar,
    aten.sin.default, aten.cos.default, aten.exp.default, aten.log.default, aten.sqrt.default, aten.rsqrt.default,
    aten.sigmoid.default, aten.tanh.default, aten.relu.default, aten.silu.default, aten.gelu.default,
    aten._to_copy.default, aten.clone.default, aten.rsub.Scalar, aten.add.Scalar, aten.mul.Scalar, aten.where.self,
}  # fmt: skip
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
FILLED = (aten.full.default, aten.zeros.default, aten.ones.default)


@dataclass(frozen=True)
class Broadcast:
    """What a node repeats: `base` has size 1 on `dims` (of the node's own shape), where the node is uniform.

    Along axis 0 the node has all rows of `base`, each of them `inner` times in place, and all that `outer` times over.
    """

    base: Node
    dims: frozenset[int] = frozenset()
    outer: Any = 1
    inner: Any = 1

    @property
    def rows(self) -> tuple[int, int]:
        """`outer` and `inner` as comparable numbers."""
        return _number(self.outer), _number(self.inner)

    def __bool__(self) -> bool:
        return bool(self.dims) or self.rows != (1, 1)


def sink_broadcasts(module: GraphModule) -> list[Fired]:
    """Recompute every node that repeats itself once per distinct row, then repeat the result."""
    graph = module.graph
    known: dict[Node, Broadcast] = {}
    fired: list[Fired] = []
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        with graph.inserting_before(node):
            found = _made(node, known, graph) or _through(node, known, graph)
            if not found:
                continue
            known[node] = found
            if isinstance(value(node), torch.Tensor) and node.target not in (aten.expand.default, *FILLED):
                new = _spread(graph, found, value(node).shape)
                node.replace_all_uses_with(new)
                known[new] = found
                fired.append(Fired("sink_broadcast", node.name, 0, 0))
    if fired:  # a view was traced over memory that is no longer laid out so
        for node in graph.nodes:
            if node.op == "call_function" and node.target in VIEWS:
                node.target = aten.reshape.default
    prune(graph)
    return fired


def pack_tables(module: GraphModule, depends: Mapping[Node, frozenset[str]]) -> None:
    """Join the schedule's tables whose rows the step repeats: one table, repeated by one node and then split.

    A denoiser reads dozens of tables `[B, 1, D]`, each for both halves of guidance; one by one they would be as many inputs of
    the step and two nodes each. Exact: only where values lie changes.
    """
    graph, groups = module.graph, dict[tuple[Any, ...], list[tuple[Node, Node]]]()
    for node in graph.nodes:
        wide: Any = node.args[0] if node.target == aten.reshape.default else None
        source: Any = wide.args[0] if isinstance(wide, Node) and wide.target == aten.expand.default else None
        if source is None or depends.get(source) != frozenset({"schedule"}):
            continue
        shape, times = value(source).shape, wide.args[1]
        axis = next((d for d, size in enumerate(shape) if d and not is_one(size)), 0)
        ones = axis and all(is_one(size) for d, size in enumerate(shape) if d not in (0, axis))
        if ones and len(times) > 1 and {*times[:1], *times[2:]} == {-1} and node.args[1][0] == -1:
            groups.setdefault((times[1], axis, len(shape), value(node).ndim, value(node).dtype), []).append((node, source))
    for (times, axis, rank, left, _), found in groups.items():
        if len(found) == 1:
            continue
        first = next(n for n in graph.nodes if n.op == "call_function" and "step" in depends.get(n, ()))
        early = ancestors([source for _, source in found])
        nodes = list(graph.nodes)
        for node in nodes[nodes.index(first) :]:  # what lies before it stays there: others may read it
            if node in early:
                first.prepend(node)
        widths = [value(source).shape[axis] for _, source in found]
        with graph.inserting_before(first):
            table = emit(graph, aten.cat.default, ([source for _, source in found], axis))
            table._rename("tables")
            wide = emit(graph, aten.expand.default, (table, [-1, times, *[-1] * (rank - 2)]))
            flat = [sum(widths) if d == axis else 1 for d in range(rank - left + 1, rank)]
            rows = emit(graph, aten.reshape.default, (wide, [-1, *flat]))
            pieces = emit(graph, aten.split_with_sizes.default, (rows, widths, axis - (rank - left)))
            for number, (node, _) in enumerate(found):
                node.replace_all_uses_with(emit(graph, operator.getitem, (pieces, number)))
    prune(graph)


def _spread(graph: Graph, found: Broadcast, shape: Any, keep: Broadcast | None = None) -> Node:
    """The node of `shape` that `found` describes; what `keep` names as kept of it is left as it is in the base."""
    kept = Broadcast(found.base) if keep is None else keep
    node, wide = found.base, found.dims - kept.dims
    if wide:
        node = emit(graph, aten.expand.default, (node, [size_arg(graph, s) if d in wide else -1 for d, s in enumerate(shape)]))
    outer, inner = (1 if k != 1 else f for f, k in ((found.outer, kept.outer), (found.inner, kept.inner)))
    if _number(outer) == _number(inner) == 1:
        return node
    rest = [1 if is_one(s) else size_arg(graph, s) for s in value(node).shape[1:]]
    if _number(inner) != 1:
        if not rest or rest[0] != 1:
            node = emit(graph, aten.unsqueeze.default, (node, 1))
        node = emit(graph, aten.expand.default, (node, [-1, size_arg(graph, inner), *[-1] * (value(node).ndim - 2)]))
    if _number(outer) != 1:
        node = emit(graph, aten.unsqueeze.default, (node, 0))
        node = emit(graph, aten.expand.default, (node, [size_arg(graph, outer), *[-1] * (value(node).ndim - 1)]))
    return emit(graph, aten.reshape.default, (node, [-1, *rest]))


def _made(node: Node, known: dict[Node, Broadcast], graph: Graph) -> Broadcast | None:
    """The broadcast that an op makes which repeats by itself."""
    target, args = node.target, node.args
    if target in FILLED:
        sizes: Any = value(node).shape
        dims = frozenset(d for d, size in enumerate(sizes) if not is_one(size))
        if not dims or all(isinstance(size, int) for size in sizes):
            return None  # of fixed size it is a constant like any other
        return Broadcast(emit(graph, target, ([1] * len(sizes), *args[1:]), dict(node.kwargs)), dims)
    if target not in (aten.expand.default, aten.repeat.default):
        return None
    source, shape = args[0], value(node).shape
    assert isinstance(source, Node)
    found = known.get(source, Broadcast(source))
    missing = len(shape) - value(source).ndim
    if (missing or target == aten.repeat.default) and found.rows != (1, 1):
        return None
    base = found.base
    for _ in range(missing):
        base = emit(graph, aten.unsqueeze.default, (base, 0))
    times: Any = args[1]
    if target == aten.repeat.default and any(not is_one(n) and not is_one(value(base).shape[d]) for d, n in enumerate(times)):
        return None  # rows repeated in turn, not one row
    dims = frozenset(d for d in range(len(shape)) if is_one(value(base).shape[d]) and not is_one(shape[d]))
    return replace(found, base=base, dims=dims)


def _partial(node: Node, keep: Broadcast, known: dict[Node, Broadcast], graph: Graph) -> Node:
    """`node`, repeated in all that it repeats but for what `keep` names."""
    found = known.get(node)
    if found is None or not keep:
        return node
    if found.dims <= keep.dims and found.rows == keep.rows:
        return found.base
    return _spread(graph, found, value(node).shape, replace(keep, dims=keep.dims & found.dims))


def _through(node: Node, known: dict[Node, Broadcast], graph: Graph) -> Broadcast | None:
    """The broadcast form of a call whose arguments are broadcasts, or None."""
    nodes = [n for n in node.all_input_nodes if n in known]
    if not nodes:
        return None
    target: Any = node.target
    args: Any = node.args
    if target in POINTWISE:
        return _through_pointwise(node, known, graph)
    if target in (aten.cat.default, aten.stack.default):
        return _through_join(node, known, graph)
    source = args[0]
    if not isinstance(source, Node) or source not in known or any(n in known for n in nodes if n is not source):
        return None
    have = known[source]
    rank = getattr(value(source), "ndim", 0)

    def same(mixed: Sequence[int] = (), after: Callable[[int], int] = lambda d: d) -> Broadcast | None:
        """The call on the base; `mixed`: axes that it does not treat row by row; `after`: where an axis goes."""
        keep = replace(have, dims=have.dims - set(mixed))
        if 0 in mixed or after(0) != 0:
            keep = replace(keep, outer=1, inner=1)
        if not keep:
            return None
        new = emit(graph, target, (_partial(source, keep, known, graph), *args[1:]), dict(node.kwargs))
        return replace(keep, base=new, dims=frozenset(after(d) for d in keep.dims))

    if target == aten.linear.default:
        return same([rank - 1])
    if target == aten.layer_norm.default:
        return same(range(rank - len(args[1]), rank))
    if target in (aten.slice.Tensor, aten.softmax.int, aten.split.Tensor, aten.split_with_sizes.default):
        position = 2 if target in (aten.split.Tensor, aten.split_with_sizes.default) else 1
        return same([(args[position] if len(args) > position else 0) % rank])
    if target.__name__ == "getitem":
        return same()
    if target == aten.unsqueeze.default:
        new_axis = args[1] % (rank + 1)
        return same(after=lambda d: d + (d >= new_axis))
    if target == aten.select.int:
        axis = args[1] % rank
        return same([axis], lambda d: d - (d > axis))
    if target == aten.transpose.int:
        a, b = (x % rank for x in args[1:3])
        return same(after=lambda d: b if d == a else a if d == b else d)
    if target == aten.permute.default:
        order = [x % rank for x in args[1]]
        return same(after=lambda d: order.index(d))
    if target in VIEWS:
        return _through_view(node, source, have, known, graph)
    if target == aten.scaled_dot_product_attention.default and len(args) == 3:  # rows of the query are independent
        return same([d for d in range(rank) if d != rank - 2])
    return None


def _through_pointwise(node: Node, known: dict[Node, Broadcast], graph: Graph) -> Broadcast | None:
    rank, shape = value(node).ndim, value(node).shape
    tensors = [n for n in node.all_input_nodes if is_tensor(n)]
    dims = frozenset(d for d in range(rank) if not is_one(shape[d]) and all(_silent(n, d - rank, known) for n in tensors))
    outer: Any = 1
    inner: Any = 1
    rows = [known.get(n, Broadcast(n)) for n in tensors if rank and not _silent(n, -rank, known)]
    if rows and all(found.rows == rows[0].rows for found in rows):
        outer, inner = rows[0].outer, rows[0].inner
    keep = Broadcast(node, dims, outer, inner)
    if not keep:
        return None
    swap = {}
    for n in tensors:
        shift = rank - value(n).ndim
        mine = replace(keep, dims=frozenset(d - shift for d in dims if d >= shift))
        if rank and n in known and 0 in known[n].dims and 0 not in dims and shift == 0 and (outer, inner) != (1, 1):
            mine = replace(mine, dims=mine.dims | {0})  # one row for all of them, however many there are
        swap[n] = _partial(n, mine, known, graph)
    new_args, new_kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: swap.get(n, n))
    return replace(keep, base=emit(graph, node.target, tuple(new_args), dict(new_kwargs)))


def _silent(node: Node, negative_dim: int, known: dict[Node, Broadcast]) -> bool:
    """Whether an argument has no say along an axis: absent, of size 1, or uniform."""
    dim = value(node).ndim + negative_dim
    return dim < 0 or is_one(value(node).shape[dim]) or (node in known and dim in known[node].dims)


def _through_join(node: Node, known: dict[Node, Broadcast], graph: Graph) -> Broadcast | None:
    parts: Any = node.args[0]
    if not all(part in known for part in parts):
        return None
    first = known[parts[0]]
    rank = value(parts[0]).ndim
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    stack = node.target == aten.stack.default
    axis %= rank + stack
    common = frozenset.intersection(*(known[part].dims for part in parts)) - (frozenset() if stack else {axis})
    keep = Broadcast(node, common)
    if axis and all(known[part].rows == first.rows for part in parts):
        keep = replace(keep, outer=first.outer, inner=first.inner)
    if not keep:
        return None
    new = emit(graph, node.target, ([_partial(part, keep, known, graph) for part in parts], axis))
    return replace(keep, base=new, dims=frozenset(d + (stack and d >= axis) for d in common))


def _through_view(node: Node, source: Node, have: Broadcast, known: dict[Node, Broadcast], graph: Graph) -> Broadcast | None:
    """Axes of a view repeat where they are made of what repeats: `kept_by_view`."""
    before, after = value(source).shape, value(node).shape
    kept, keep = kept_by_view(before, after, have)
    if not keep:
        return None
    shape = [1 if e in keep.dims else size_arg(graph, s) for e, s in enumerate(after)]
    if keep.rows != (1, 1):
        shape[0] = -1
    base = _partial(source, kept, known, graph)
    return replace(keep, base=emit(graph, aten.reshape.default, (base, shape)))


def kept_by_view(before: Sequence[Any], after: Sequence[Any], have: Broadcast) -> tuple[Broadcast, Broadcast]:
    """(what of `have` survives a view of `before` as `after`, the same in terms of `after`); both have the base of `have`.

    Axis 0 of `before` stands for three: `outer`, the base's rows, `inner`. The shapes are cut into runs of equal product. Where
    all of a run is uniform, it stays so however it is split or merged; else what is uniform at its end makes the last axes
    uniform that it divides into, and a rest of it is `inner` if it ends in axis 0; what is uniform at its beginning likewise.
    """
    parts: list[tuple[Any, Any]] = [(size, d) for d, size in enumerate(before)]  # (size, what it is called)
    if have.rows != (1, 1):
        rows = _number(before[0]) // math.prod(have.rows)
        parts[:1] = [(have.outer, "outer"), (rows, None), (have.inner, "inner")]
    uniform = {*have.dims, "outer", "inner"}
    kept: set[Any] = set()
    found = Broadcast(have.base)
    for run, targets in _runs(parts, after):
        pieces = [(size, name) for size, name in run if _number(size) != 1]
        axes = [e for e in targets if not is_one(after[e])]
        free = [name in uniform for _, name in pieces]
        if all(free):
            kept |= {name for _, name in pieces}
            found = replace(found, dims=found.dims | set(axes))
            continue
        front, back = free.index(False), free[::-1].index(False)
        for used in range(back, 0, -1):
            fits = _laid([size for size, _ in pieces[-used:]][::-1], axes[::-1], after)
            if fits is not None:
                kept |= {name for _, name in pieces[-used:]}
                found = replace(found, dims=found.dims | fits[0], inner=fits[1])
                break
        for used in range(front, 0, -1):
            fits = _laid([size for size, _ in pieces[:used]], axes, after)
            if fits is not None and not fits[0] & found.dims:
                kept |= {name for _, name in pieces[:used]}
                found = replace(found, dims=found.dims | fits[0], outer=fits[1])
                break
    said = Broadcast(
        have.base, frozenset(d for d in kept if isinstance(d, int)),
        have.outer if "outer" in kept else 1, have.inner if "inner" in kept else 1,
    )  # fmt: skip
    return said, found


def _laid(sizes: Sequence[Any], axes: Sequence[int], after: Sequence[Any]) -> tuple[frozenset[int], Any] | None:
    """(axes that the product of `sizes` fills, what is left of it inside axis 0), from one end; None where it does not fit."""
    full: set[int] = set()
    rest = math.prod(_number(size) for size in sizes)
    for axis in axes:
        size = _number(after[axis])
        if rest == 1:
            break
        if rest % size:
            if axis or size % rest:
                return None
            whole = next((s for s in sizes if _number(s) == rest), rest)
            return (frozenset(full), whole) if isinstance(whole, torch.SymInt) or rest < _SYMBOL else None
        rest //= size
        full.add(axis)
    return (frozenset(full), 1) if rest == 1 else None


def _runs(parts: Sequence[tuple[Any, Any]], after: Sequence[Any]) -> Iterator[tuple[list[tuple[Any, Any]], list[int]]]:
    """Cut the pieces of one shape and the axes of another into runs of equal product."""
    d = e = 0
    while d < len(parts) and e < len(after):
        run, to = [parts[d]], [e]
        left, right = _number(parts[d][0]), _number(after[e])
        d, e = d + 1, e + 1
        while left != right:
            if left < right:
                left, run, d = left * _number(parts[d][0]), [*run, parts[d]], d + 1
            else:
                right, to, e = right * _number(after[e]), [*to, e], e + 1
        yield run, to


_SYMBOL = 1_000_003  # a prime above every fixed size; a symbol counts as it or a later prime


@functools.cache
def _of_expression(expression: Any) -> int:
    symbols = sorted(expression.free_symbols, key=str)
    return int(expression.subs({s: sympy.nextprime(_SYMBOL + 1000 * int("0" + str(s).strip("su"))) for s in symbols}))


def _number(size: Any) -> int:
    """A size as an integer that two sizes share only where they are equal for all values of their symbols.

    Symbols count as large primes: sizes are products, so factors of symbols and of fixed sizes stay apart.
    """
    return size if isinstance(size, int) else _of_expression(size.node.expr)
