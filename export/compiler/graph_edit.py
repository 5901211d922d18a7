"""Reading and changing a traced graph: what the rewrites and the partition share.

Graphs are aten level (`torch.export`, `run_decompositions({})`), with parameters as `get_attr` and `meta["val"]` set.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten


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
    with fake_mode(graph):
        node.meta["val"] = target(*fake[0], **fake[1])
    return node


def fake_mode(graph: torch.fx.Graph) -> Any:
    """The mode that the values of a traced graph were made in."""
    values = (node.meta.get("val") for node in graph.nodes)
    return next(v.fake_mode for v in values if isinstance(v, FakeTensor))


def functional(module: nn.Module) -> bool:
    """Whether a module is a graph of the pass, in which nothing is written in place: to decompose it again changes nothing."""
    if not isinstance(module, GraphModule):
        return False
    ops = {node.target for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    return not any(op._schema.is_mutable for op in ops)


def prune(graph: torch.fx.Graph) -> None:
    """Erase every call that nothing reads (torch keeps attention, which may draw dropout masks; ours never does)."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def ancestors(nodes: Iterable[Node], stop: Set[Node] = frozenset()) -> set[Node]:
    """`nodes` and all that they are computed from, nothing behind those of `stop`; what only gives sizes is not followed."""
    found, todo = set[Node](), list(nodes)
    while todo:
        node = todo.pop()
        if node in found:
            continue
        found.add(node)
        if node not in stop and not isinstance(node.meta.get("val"), torch.SymInt):
            todo += node.all_input_nodes
    return found


def read_size(graph: torch.fx.Graph, size: torch.SymInt) -> Node | None:
    """A node that reads a symbolic size from an input of the graph, if one has an axis of it."""
    for node in graph.nodes:
        if node.op == "placeholder":
            for dim, other in enumerate(getattr(value(node), "shape", ())):
                if not isinstance(other, int) and other.node.expr == size.node.expr:
                    return emit(graph, aten.sym_size.int, (node, dim))
    return None


def size_arg(graph: torch.fx.Graph, size: Any) -> Any:
    """A size as a graph argument: an int, or a node that has an equal symbolic size."""
    if isinstance(size, int):
        return size
    if (found := read_size(graph, size)) is not None:
        return found
    for node in graph.nodes:  # composite sizes, such as 2 * batch, are computed somewhere already
        seen = node.meta.get("val")
        if isinstance(seen, torch.SymInt) and seen.node.expr == size.node.expr:
            return node
    raise ValueError(f"size {size} cannot be read from any input of the graph")


def is_one(size: Any) -> bool:
    """Whether a size is the number 1, not a symbol."""
    return isinstance(size, int) and size == 1


def is_tensor(node: Node) -> bool:
    """Whether a node yields a tensor."""
    return isinstance(value(node), torch.Tensor)
