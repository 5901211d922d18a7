"""What each tensor of a graph depends on, what it costs, and where to cut: the analysis behind `partition`."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import networkx
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from motionrt.export.compiler.graph_edit import sizes, value
from motionrt.export.compiler.rewrites import FUSED

aten = torch.ops.aten

# Recomputing these costs nothing worth a transfer, so they may stand on the step's side of the frontier.
FREE = {
    aten.expand.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int,
    aten.permute.default, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.select.int,
    aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.clone.default, aten._to_copy.default,
    aten.flatten.using_ints, aten.repeat_interleave.self_int, operator.getitem,
}  # fmt: skip


def floating(node: Node) -> bool:
    """Whether a node's value or shape needs a dynamic size: it can be recomputed anywhere, but not stored."""
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    for leaf in leaves:
        if isinstance(leaf, torch.SymInt | torch.SymBool | torch.SymFloat):
            return True
        if isinstance(leaf, Tensor) and any(not isinstance(s, int) for s in leaf.shape):
            return True
    return False


def depends_on(module: GraphModule, inputs: Mapping[str, str]) -> dict[Node, frozenset[str]]:
    """For every node the kinds of input it depends on; sizes depend on nothing. Empty means weights only."""
    depends: dict[Node, frozenset[str]] = {}
    kinds = iter(inputs.values())
    symbols: dict[str, set[str]] = {"schedule": set(), "request": set()}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            kind = next(kinds)
            depends[node] = frozenset({kind})
            if kind in symbols:
                symbols[kind] |= _symbols(node)
        elif isinstance(node.meta.get("val"), torch.SymInt | int):
            depends[node] = frozenset()
        else:
            found = frozenset().union(*(depends[n] for n in node.all_input_nodes))
            hoistable = len(found) == 1 and "step" not in found
            if hoistable and not _symbols(node) <= symbols[next(iter(found))]:
                found |= {"step"}  # its size is known to the step alone
            if len(found) > 1:
                found = frozenset({"step"}) | found
            depends[node] = found
    return depends


def _symbols(node: Node) -> set[str]:
    found: set[str] = set()
    for leaf in torch.utils._pytree.tree_leaves(node.meta.get("val")):
        for size in leaf.shape if isinstance(leaf, Tensor) else [leaf]:
            if isinstance(size, torch.SymInt):
                found |= {str(s) for s in size.node.expr.free_symbols}
    return found


def bytes_of(node: Node, known: Mapping[str, int]) -> int:
    total = 0
    for leaf in torch.utils._pytree.tree_leaves(node.meta.get("val")):
        if isinstance(leaf, Tensor):
            count = 1
            for size in sizes(leaf.shape, dict(known)):
                count *= size
            total += count * leaf.element_size()
    return total


def frontier(module: GraphModule, depends: Mapping[Node, frozenset[str]], known: Mapping[str, int]) -> set[Node]:
    """Invariant nodes whose values the step reads: a minimum cut, with capacity the bytes of each tensor.

    Each invariant node n is on the hoisted side (source) or the step's side (sink). Reading a hoisted n from the step
    costs its bytes once. Only free nodes may be on the step's side; among equal cuts, hoisted inputs win for schedule and
    request (fewer nodes in the step), and the weights themselves for constants (views stay at the place of use).
    """
    flow: Any = networkx.DiGraph()
    scale = 1 << 20
    for node in module.graph.nodes:
        if node.op == "output" or floating_constant(node, depends):
            continue
        kinds = depends[node]
        if "step" in kinds:
            flow.add_edge(("in", node), "sink")
            for source in node.all_input_nodes:
                if not floating_constant(source, depends) and "step" not in depends[source]:
                    flow.add_edge(("out", source), "sink")
            continue
        # a list (split) is not a tensor: it cannot cross, its items can
        passable = isinstance(node.meta.get("val"), Tensor)
        weight = node.op == "get_attr"
        capacity = 1 if weight else max(bytes_of(node, known), 1) * scale
        if passable:
            flow.add_edge(("in", node), ("out", node), capacity=capacity)
        else:
            flow.add_edge(("in", node), ("out", node))
        if node.op in ("placeholder", "get_attr") or node.target not in FREE:
            flow.add_edge("source", ("in", node))
        elif kinds:
            flow.add_edge("source", ("in", node), capacity=1)
        else:
            flow.add_edge(("in", node), "sink", capacity=1)
        for user in node.users:
            if isinstance(user.meta.get("val"), torch.SymInt):
                continue  # sizes are read from whatever input has them
            if user.op == "output" or floating_constant(user, depends) or (not kinds and depends[user]):
                flow.add_edge(("out", node), "sink")  # constants are stored for whichever program reads them
            elif "step" not in depends[user]:
                flow.add_edge(("out", node), ("in", user))
    flow.add_node("source")
    flow.add_node("sink")
    _, (reachable, _) = networkx.minimum_cut(flow, "source", "sink")
    return {
        node
        for node in module.graph.nodes
        if ("in", node) in reachable and ("out", node) in flow and ("out", node) not in reachable
    }


def floating_constant(node: Node, depends: Mapping[Node, frozenset[str]]) -> bool:
    return node.op != "output" and not depends[node] and floating(node)


def flops(node: Node, known: dict[str, int]) -> int:
    """FLOPs of one call, a multiply-add counted as two; products and attention only, as torch's counter does."""
    if node.op != "call_function":
        return 0
    shape = [sizes(value(n).shape, known) for n in node.args if isinstance(n, Node) and isinstance(value(n), Tensor)]
    out = node.meta.get("val")
    if not isinstance(out, Tensor):
        return 0
    elements = 1
    for size in sizes(out.shape, known):
        elements *= size
    if node.target in (aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default):
        return 2 * elements * shape[0][-1]
    if node.target == aten.addmm.default:
        return 2 * elements * shape[1][-1]
    if node.target in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default):
        kernel = 1
        for size in shape[1][1:]:
            kernel *= size
        return 2 * elements * kernel
    if node.target == aten.scaled_dot_product_attention.default:
        *batch, length, width = shape[0]
        rows = length
        for size in batch:
            rows *= size
        return 2 * rows * shape[1][-2] * (width + shape[2][-1])
    if node.target == FUSED:
        (b, length, inner), (_, _, columns), (_, _, _, width) = shape[:3]
        return 2 * b * length * columns * (inner + width)
    return 0
