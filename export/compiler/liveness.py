"""How many bytes of values live at once inside one call of a traced graph: the activations of a memory plan.

Values are counted in the order of the graph, nothing fused: a value lives from the operation that makes it to the last that
reads it or a view of it. Weights, inputs and outputs' callers are not counted; a view takes nothing of its own. Symbolic
sizes count as they were traced.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Graph, Node


def live_bytes(graph: Graph) -> int:
    """The largest sum of bytes of values that live at once; needs `meta["val"]` on the nodes, as a trace leaves it."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr")]
    owner: dict[Node, Node] = {}  # a value -> the one whose memory it looks into
    last: dict[Node, int] = {}
    for number, node in enumerate(nodes):
        for source in node.all_input_nodes:
            if source in owner:
                last[owner[source]] = number
        base = _looked_into(node)
        if base is None:
            owner[node], last[node] = node, number
        elif base in owner:
            owner[node] = owner[base]
    ends: dict[int, list[Node]] = {}
    for node, number in last.items():
        ends.setdefault(number, []).append(node)
    live = most = 0
    for number, node in enumerate(nodes):
        live += _bytes(node) if node in last else 0
        most = max(most, live)
        live -= sum(_bytes(dead) for dead in ends.get(number, ()))
    return most


def made_bytes(graph: Graph) -> int:
    """Bytes of all values that the operations of `graph` make: what is written in one call, nothing fused; a view is none."""
    nodes = (node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output"))
    return sum(_bytes(node) for node in nodes if _looked_into(node) is None)


def _looked_into(node: Node) -> Node | None:
    """The input whose memory the value of `node` shares, or None for a value of its own."""
    if node.op == "output":
        return None
    if getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[0], Node):
        return node.args[0]
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(result.alias_info is not None for result in schema.returns):
        return None
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and index < len(node.args) and isinstance(node.args[index], Node):
            return node.args[index]  # type: ignore[return-value]
    return None


def _bytes(node: Node) -> int:
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
    return sum(math.prod(n if isinstance(n, int) else n.node.hint or 1 for n in t.shape) * t.element_size() for t in tensors)
