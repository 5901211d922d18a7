"""A torch program typed in float32 as one that computes in float16 or bfloat16, with casts written out: no autocast.

The rules are those of precision.py. Like all of the torch backend this is imported only when it is asked for.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from motionrt.runtime.backends.precision import Op, low_ops

FULL = torch.float32
_aten = torch.ops.aten
_CASTS = (_aten._to_copy.default, _aten.to.dtype, _aten.to.dtype_layout)


def to_precision(graph: Graph, low: torch.dtype) -> None:
    """Convert `graph` in place. Every node has `meta["val"]`; weights are `get_attr` nodes, inputs placeholders, both float32.

    Afterwards `meta["val"]` of weights and inputs says what they are to be: `low` where nothing reads them in float32. A
    weight that is read in both has a second node of the same target.
    """
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if node.target in _CASTS and isinstance(source, Node) and _is_float(node) and _is_float(source):
            node.replace_all_uses_with(source)  # between floats, in a float32 graph: precisions are chosen anew here
            graph.erase_node(node)
    calls = [node for node in graph.nodes if node.op == "call_function" and _is_float(node)]
    ops = [_op(node) for node in calls]
    end = graph.output_node()
    chosen = {node: low if here else FULL for node, here in zip(calls, low_ops(ops, list(end.all_input_nodes)), strict=True)}
    for node in calls:  # one of several results is what they are
        if node.target is operator.getitem:
            chosen[node] = chosen.get(node.args[0], FULL)
    made: dict[tuple[Node, torch.dtype], Node] = {}

    def wanted(source: Node, kind: torch.dtype) -> Node:
        """`source` in `kind`."""
        if not _is_float(source) or chosen.get(source, FULL) == kind or isinstance(source.meta["val"], (list, tuple)):
            return source
        if (source, kind) not in made:
            with graph.inserting_after(source):
                if source.op == "get_attr":
                    new = graph.create_node("get_attr", source.target)
                else:
                    new = graph.call_function(_aten._to_copy.default, (source,), {"dtype": kind})
            new.meta["val"] = source.meta["val"].to(kind)
            made[source, kind] = new
        return made[source, kind]

    for node in graph.nodes:
        if node.op != "call_function" or node in made.values():
            continue
        if node in chosen:
            kind = chosen[node]
            node.args, node.kwargs = torch.fx.node.map_arg((node.args, node.kwargs), functools.partial(wanted, kind=kind))
            _retype(node, kind)
        elif any(chosen.get(source, FULL) == low for source in node.all_input_nodes):  # comparisons: numbers to integers
            node.args, node.kwargs = torch.fx.node.map_arg((node.args, node.kwargs), functools.partial(wanted, kind=FULL))
    _settle_inputs(graph, low)
    for node in reversed(list(graph.nodes)):
        if node.op in ("get_attr", "call_function") and not node.users:
            graph.erase_node(node)


def _settle_inputs(graph: Graph, low: torch.dtype) -> None:
    """Inputs that are read in the low precision alone come in it: the caller converts them once, and not every call."""
    for node in graph.nodes:
        if node.op == "placeholder" and node.users and all(
            user.target == _aten._to_copy.default and user.kwargs.get("dtype") == low for user in node.users
        ):  # fmt: skip
            node.meta["val"] = node.meta["val"].to(low)
            for user in list(node.users):
                user.replace_all_uses_with(node)


def _op(node: Node) -> Op:
    constants = tuple(str(source.target) for source in node.all_input_nodes if source.op == "get_attr")
    flowing = tuple(source for source in node.all_input_nodes if source.op != "get_attr" and _is_float(source))
    widens = node.target in _CASTS  # those between floats are gone
    schema = getattr(node.target, "_schema", None)
    name = schema.name.partition("::")[2] if schema is not None else getattr(node.target, "__name__", str(node.target))
    return Op(name, flowing, (node,), constants, widens)


def _is_float(node: Node) -> bool:
    value: Any = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(item, torch.Tensor) and item.dtype.is_floating_point for item in values)


def _retype(node: Node, kind: torch.dtype) -> None:
    """The node's fake value in `kind`, and in its arguments what says a dtype."""
    if node.kwargs.get("dtype") in (torch.float32, torch.float64):
        node.kwargs = {**node.kwargs, "dtype": kind}
    value = node.meta["val"]

    def typed(item: Any) -> Any:
        return item.to(kind) if isinstance(item, torch.Tensor) and item.dtype.is_floating_point else item

    node.meta["val"] = type(value)(map(typed, value)) if isinstance(value, (list, tuple)) else typed(value)
