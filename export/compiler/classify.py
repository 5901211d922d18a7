"""What each tensor of a graph depends on, what it costs, and where to cut: the analysis behind `partition`."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence, Set
from typing import Any

import networkx
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from motionrt.export.compiler.graph_edit import sizes, value
from motionrt.export.compiler.rewrites import AUGMENTED, FUSED

aten = torch.ops.aten

# Recomputing these costs nothing worth a transfer, so they may stand on the step's side of the frontier.
FREE = {
    aten.expand.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int,
    aten.permute.default, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.select.int,
    aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.clone.default, aten._to_copy.default,
    aten.flatten.using_ints, aten.repeat_interleave.self_int, operator.getitem,
}  # fmt: skip


MIXED = frozenset({"schedule", "request"})
# What a table of request and schedule must save. Every row of it is written once and read once, and T rows are kept: it counts
# as twice its bytes, so that a sum of a request's value and a schedule's, which would be read in its place, stays a sum in the
# step. And the step computes a value itself unless that takes this many FLOPs for each of those bytes: about the time that it
# takes to move them (a CPU does about 5 FLOPs while it reads a byte, a GPU 20 to 300).
FLOPS_PER_BYTE = 64


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
    """For every node the kinds of input it depends on; sizes depend on nothing. Empty means weights only.

    A node whose size only the step knows depends on the step too. So does one that mixes kinds where the timesteps have no
    dynamic leading size: it could not be computed for all of them at once.
    """
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
            if found and "step" not in found:
                known = set.union(*(symbols[kind] for kind in found))
                if not _symbols(node) <= known or (found == MIXED and not (_symbols(node) and symbols["schedule"])):
                    found |= {"step"}
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


def frontier(
    depends: Mapping[Node, frozenset[str]], known: dict[str, int], early: Sequence[Node], late: Set[Node]
) -> set[Node]:
    """Nodes of `early` whose values `late` ones read: a minimum cut, with capacity the bytes of each tensor.

    Each early node n is on the early side (source) or, computed where it is read, on the late one (sink). Reading what stands
    on the early side costs its bytes, twice if it mixes schedule and request. Only two sorts of node may be on the late side:
    free ones, and those that mix, which cost there a byte for `FLOPS_PER_BYTE` of their FLOPs. Among equal cuts, early inputs
    win for schedule and request (fewer nodes in the step), and the weights themselves for constants (views stay at the place
    of use).
    """
    flow: Any = networkx.DiGraph()
    scale = 1 << 20
    nodes = [node for node in early if not floating_constant(node, depends)]
    within = set(nodes)
    for node in nodes:
        kinds = depends[node]
        if isinstance(node.meta.get("val"), Tensor):
            capacity = 1 if node.op == "get_attr" else max(bytes_of(node, known), 1) * scale * (1 + (kinds == MIXED))
            flow.add_edge(("in", node), ("out", node), capacity=capacity)
        else:  # a list (split) is not a tensor: it cannot cross, its items can
            flow.add_edge(("in", node), ("out", node))
        if node.op in ("placeholder", "get_attr") or (node.target not in FREE and kinds != MIXED):
            flow.add_edge("source", ("in", node))
        elif kinds:
            cost = flops(node, known) * scale // FLOPS_PER_BYTE
            flow.add_edge("source", ("in", node), capacity=max(cost, int(kinds != MIXED)))
        else:
            flow.add_edge(("in", node), "sink", capacity=1)
        for user in node.users:
            if isinstance(user.meta.get("val"), torch.SymInt):
                continue  # sizes are read from whatever input has them
            if user in late or floating_constant(user, depends) or (not kinds and depends[user]):
                flow.add_edge(("out", node), "sink")  # constants are stored for whichever program reads them
            elif user in within:
                flow.add_edge(("out", node), ("in", user))
    flow.add_nodes_from(["source", "sink"])
    _, (reachable, _) = networkx.minimum_cut(flow, "source", "sink")
    return {node for node in nodes if ("in", node) in reachable and ("out", node) not in reachable}


def floating_constant(node: Node, depends: Mapping[Node, frozenset[str]]) -> bool:
    return not depends[node] and floating(node)


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
        transposed = node.target == aten.convolution.default and node.args[6]
        return 2 * kernel * (math.prod(shape[0]) if transposed else elements)
    if node.target == aten.scaled_dot_product_attention.default:
        *batch, length, width = shape[0]
        rows = length
        for size in batch:
            rows *= size
        return 2 * rows * shape[1][-2] * (width + shape[2][-1])
    if node.target == AUGMENTED:  # two products over all rows, and four rows of frame 0 for each that arrives, twice
        places, (frames, heads, width) = math.prod(shape[0][:2]), shape[0][2:]
        return 2 * places * heads * width * (2 * frames * (2 * frames - 1) + 8 * (frames - 1))
    if node.target == FUSED:
        (b, length, inner), (_, _, columns), (_, _, _, width) = shape[:3]
        return 2 * b * length * columns * (inner + width)
    return 0
