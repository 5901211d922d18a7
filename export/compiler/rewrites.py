"""Exact graph rewrites ahead of the partition: they let loop-invariant code motion see further than the code was written.

- A softmax over one element is 1: attention over a context of one token is its value, whatever the query.
- Reassociate when it is cheaper: softmax((h Wq) K^T) with `Wq` constant and `K` invariant is softmax(h (Wq^T K^T)); it ends
  in the op `motionrt::motion_cross_attention`, with scores kept in fp32. Taken only where the FLOP count says so.

The third, sinking broadcasts, is broadcasts.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

import motionrt.kernels.motion_augmented_attention  # noqa: F401  (defines the op)
from motionrt.export.compiler.graph_edit import Fired, emit, is_one, is_tensor, prune, size_arg, sizes, value
from motionrt.kernels.motion_cross_attention import choose_form

aten = torch.ops.aten
FUSED = torch.ops.motionrt.motion_cross_attention.default
AUGMENTED = torch.ops.motionrt.motion_augmented_attention.default  # written by the system itself (motion_i2v/augmented.py)


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
        end, scale, residual = _absorb(merged, hidden, depends)
        with graph.inserting_before(end):
            if scale is not None:  # of M rows, once per request, and not of L rows in every step
                if isinstance(scale, Node) and value(scale).ndim:
                    scale = emit(graph, aten.unsqueeze.default, (scale, -1))
                values = emit(graph, aten.mul.Tensor, (values, scale))
            one = emit(graph, aten.full.default, ([], 1.0), {"dtype": value(hidden).dtype})
            new = emit(graph, FUSED, (hidden, folded, values, one, residual))
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
    if str(value(key).shape[0]) != str(value(hidden).shape[0]) and not is_one(value(key).shape[0]):
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


def _absorb(merged: Node, hidden: Node, depends: dict[Node, frozenset[str]]) -> tuple[Node, Any, bool]:
    """Follow `* scale` and `+ h` behind the attention: (last node absorbed, scale or None, residual).

    A scale is one number, or one for each row `[B, 1, 1]`, that the step does not change.
    """
    end, scale = merged, None
    user = next(iter(end.users)) if len(end.users) == 1 else None
    if user is not None and user.target == aten.mul.Tensor:
        other: Any = user.args[1] if user.args[0] is end else user.args[0]
        if not isinstance(other, Node) or (_one_a_row(other) and not {"step", "schedule"} & depends.get(other, {"step"})):
            end, scale = user, other
            user = next(iter(end.users)) if len(end.users) == 1 else None
    if user is not None and user.target == aten.add.Tensor and hidden in user.args and not user.kwargs:
        if str(value(user).shape) == str(value(hidden).shape):
            return user, scale, True
    return end, scale, False


def _one_a_row(node: Node) -> bool:
    return is_tensor(node) and (value(node).ndim == 0 or (value(node).ndim == 3 and value(node).shape[1:] == (1, 1)))
