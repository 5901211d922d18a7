"""Loop-invariant code motion on an exported program: compute each tensor when it changes and not more often.

`partition(module, args, inputs)` traces a step function, applies the exact rewrites, and cuts it into three programs by
what each tensor depends on: `schedule` (timesteps only), `request` (prompt, image, motion) and `step` (the rest). What
depends on weights alone is evaluated once. A tensor that needs both schedule and request belongs to the step.

The frontier between programs carries the fewest bytes: it is a minimum cut in which views, broadcasts and casts may be
recomputed on either side (free), everything else that is invariant must stay out of the step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from motionrt.export.rewrites import FUSED, Fired, prune, reassociate, sink_broadcasts, sizes, softmax_of_one, value

aten = torch.ops.aten

# Recomputing these costs nothing worth a transfer, so they may stand on the step's side of the frontier.
FREE = {
    aten.expand.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int,
    aten.permute.default, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor, aten.select.int,
    aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.clone.default, aten._to_copy.default,
    aten.flatten.using_ints, aten.repeat_interleave.self_int, operator.getitem,
}  # fmt: skip
CLASSES = ("constant", "schedule", "request", "step")
KINDS = frozenset({"schedule", "request", "step"})


@dataclass(frozen=True)
class Counts:
    """Size of a class: graph nodes, parameters (elements), their bytes, and FLOPs of one evaluation."""

    nodes: int = 0
    parameters: int = 0
    weight_bytes: int = 0
    flops: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.nodes + other.nodes,
            self.parameters + other.parameters,
            self.weight_bytes + other.weight_bytes,
            self.flops + other.flops,
        )


@dataclass(frozen=True)
class Hoisted:
    """A tensor that crosses the frontier into the step."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Program:
    """One of the three programs: a module with named inputs and outputs, in order."""

    module: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Partition:
    """The three programs and what the pass did. Feed outputs to the step's inputs of the same name."""

    schedule: Program
    request: Program
    step: Program
    whole: GraphModule
    hoisted: tuple[Hoisted, ...]
    fired: tuple[Fired, ...]
    classes: Mapping[str, Counts]
    original: Counts
    example_inputs: Mapping[str, Tensor] = field(repr=False)

    def report(self) -> dict[str, Any]:
        """The manifest's `partition` entry."""
        return {
            "classes": {kind: vars(self.classes[kind]) for kind in CLASSES},
            "original": vars(self.original),
            "hoisted": [
                {"name": h.name, "class": h.kind, "shape": list(h.shape), "bytes": h.bytes} for h in self.hoisted
            ],
            "rules": [vars(f) for f in self.fired],
        }


def partition(
    module: nn.Module,
    args: tuple[Tensor, ...],
    inputs: Mapping[str, str],
    *,
    outputs: tuple[str, ...],
    dynamic_shapes: Any = None,
) -> Partition:
    """Cut `module(*args)` into schedule, request and step programs.

    `inputs` declares, in the order of `args`, each argument's name and what it changes with ("schedule", "request" or
    "step"); `outputs` names the results. Raises ValueError for an unknown class or a count that does not match.
    """
    if len(inputs) != len(args):
        raise ValueError(f"partition: {len(inputs)} inputs are declared, {len(args)} arguments given; they must match.")
    for name, kind in inputs.items():
        if kind not in KINDS:
            raise ValueError(f"partition: input `{name}` is declared {kind!r}; allowed: {', '.join(sorted(KINDS))}.")
    exported = torch.export.export(module.eval(), args, dynamic_shapes=dynamic_shapes, strict=False)
    exported = exported.run_decompositions({})
    whole: GraphModule = exported.module(check_guards=False)  # type: ignore[assignment]
    _tidy(whole, exported)
    original = _copy(whole)
    known = _known_sizes(whole, args)
    original_counts = _count(whole, list(whole.graph.nodes), known)

    fired = softmax_of_one(whole) + sink_broadcasts(whole)
    fired += reassociate(whole, depends_on(whole, inputs), known)
    whole.recompile()

    depends = depends_on(whole, inputs)
    cut = _frontier(whole, depends, known)
    example = dict(zip(inputs, args, strict=True))
    return _split(whole, original, depends, cut, inputs, outputs, tuple(fired), original_counts, known, example)


def _tidy(module: GraphModule, exported: Any) -> None:
    """Drop run-time assertions, and give every weight node its fake value."""
    fakes = [n.meta["val"] for n in exported.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    mode = next(f.fake_mode for f in fakes if hasattr(f, "fake_mode"))
    for node in list(module.graph.nodes):
        if node.op == "call_function" and str(node.target).startswith(("aten._assert", "aten.sym_constrain")):
            module.graph.erase_node(node)
        elif node.op == "get_attr" and "val" not in node.meta:
            node.meta["val"] = mode.from_tensor(_weight(module, node), static_shapes=True)
    prune(module.graph)
    module.recompile()


def _copy(module: GraphModule) -> GraphModule:
    new = Graph()
    new.output(new.graph_copy(module.graph, {}))
    return GraphModule(module, new)


def _weight(module: GraphModule, node: Node) -> Tensor:
    return operator.attrgetter(str(node.target))(module)  # type: ignore[no-any-return]


def _known_sizes(module: GraphModule, args: tuple[Tensor, ...]) -> dict[str, int]:
    """Symbols of the dynamic sizes and their values in the example inputs."""
    known: dict[str, int] = {}
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for node, arg in zip(placeholders, args, strict=True):
        for symbolic, actual in zip(value(node).shape, arg.shape, strict=True):
            if not isinstance(symbolic, int):
                known[str(symbolic.node.expr)] = actual
    return known


def _floating(node: Node) -> bool:
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


def _bytes(node: Node, known: Mapping[str, int]) -> int:
    total = 0
    for leaf in torch.utils._pytree.tree_leaves(node.meta.get("val")):
        if isinstance(leaf, Tensor):
            count = 1
            for size in sizes(leaf.shape, dict(known)):
                count *= size
            total += count * leaf.element_size()
    return total


def _frontier(module: GraphModule, depends: Mapping[Node, frozenset[str]], known: Mapping[str, int]) -> set[Node]:
    """Invariant nodes whose values the step reads: a minimum cut, with capacity the bytes of each tensor.

    Each invariant node n is on the hoisted side (source) or the step's side (sink). Reading a hoisted n from the step
    costs its bytes once. Only free nodes may be on the step's side; among equal cuts, hoisted inputs win for schedule and
    request (fewer nodes in the step), and the weights themselves for constants (views stay at the place of use).
    """
    flow: Any = networkx.DiGraph()
    scale = 1 << 20
    for node in module.graph.nodes:
        if node.op == "output" or _floating_constant(node, depends):
            continue
        kinds = depends[node]
        if "step" in kinds:
            flow.add_edge(("in", node), "sink")
            for source in node.all_input_nodes:
                if not _floating_constant(source, depends) and "step" not in depends[source]:
                    flow.add_edge(("out", source), "sink")
            continue
        # a list (split) is not a tensor: it cannot cross, its items can
        passable = isinstance(node.meta.get("val"), Tensor)
        weight = node.op == "get_attr"
        capacity = 1 if weight else max(_bytes(node, known), 1) * scale
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
            if user.op == "output" or _floating_constant(user, depends) or (not kinds and depends[user]):
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


def _floating_constant(node: Node, depends: Mapping[Node, frozenset[str]]) -> bool:
    return node.op != "output" and not depends[node] and _floating(node)


def _split(
    whole: GraphModule,
    original: GraphModule,
    depends: dict[Node, frozenset[str]],
    cut: set[Node],
    inputs: Mapping[str, str],
    outputs: tuple[str, ...],
    fired: tuple[Fired, ...],
    original_counts: Counts,
    known: dict[str, int],
    example: dict[str, Tensor],
) -> Partition:
    placeholders = {node: name for node, name in zip(_placeholders(whole), inputs, strict=True)}
    final = next(n for n in whole.graph.nodes if n.op == "output")
    results = list(torch.utils._pytree.tree_leaves(final.args[0]))
    names: dict[Node, str] = dict(placeholders)
    kinds: dict[Node, str] = {}
    for node in whole.graph.nodes:
        if node in cut and depends[node]:
            (kinds[node],) = depends[node]
            names.setdefault(node, _name(node, kinds[node], set(names.values())))
    crossing = {k: [n for n in kinds if kinds[n] == k and n.op != "placeholder"] for k in ("schedule", "request")}
    direct = [n for n in kinds if n.op == "placeholder"]
    stored: dict[Node, Tensor] = {}
    constants = {n for n in cut if not depends[n] and n.op != "get_attr"}

    own = [n for n in placeholders if inputs[placeholders[n]] == "step"]
    step_inputs = own + crossing["schedule"] + crossing["request"] + direct
    build = _Builder(whole, constants, stored, names)
    step = build.program(step_inputs, results, outputs)
    invariant = {}
    for kind in ("schedule", "request"):
        available = [n for n in placeholders if inputs[placeholders[n]] == kind]
        wanted = tuple(names[n] for n in crossing[kind])
        invariant[kind] = build.program(available, crossing[kind], wanted, drop_unused=True)

    folded = {n for n in whole.graph.nodes if not depends.get(n, {"x"}) and n.op == "call_function"}
    classes = {
        "constant": _count(whole, [n for n in folded if not _floating(n)], known, weights=False),
        "schedule": _count_program(invariant["schedule"], known),
        "request": _count_program(invariant["request"], known),
        "step": _count_program(step, known),
    }
    hoisted = tuple(
        Hoisted(names[n], kinds[n], sizes(value(n).shape, known), _bytes(n, known)) for n in kinds
    )
    return Partition(
        invariant["schedule"], invariant["request"], step, original, hoisted, fired, classes, original_counts, example
    )


def _placeholders(module: GraphModule) -> list[Node]:
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def _name(node: Node, kind: str, taken: set[str]) -> str:
    """A readable name: the class and the module that made the tensor, numbered where one made several."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else node.name
    name = base = f"{kind}_{str(path).replace('.', '_')}" if path else f"{kind}_{node.name}"
    count = 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name


class _Builder:
    """Copies parts of the rewritten graph into programs; shared weights stay shared tensors."""

    def __init__(
        self, whole: GraphModule, constants: set[Node], stored: dict[Node, Tensor], names: Mapping[Node, str]
    ) -> None:
        self.whole, self.constants, self.stored, self.names = whole, constants, stored, names

    def evaluate(self, node: Node) -> Any:
        """The value of a node that depends on weights only (computed once, without gradients)."""
        if node not in self.stored:
            if node.op == "get_attr":
                return _weight(self.whole, node).detach()
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.evaluate)
            with torch.no_grad():
                self.stored[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self.stored[node]

    def program(
        self, available: list[Node], wanted: list[Node], outputs: tuple[str, ...], drop_unused: bool = False
    ) -> Program:
        graph, env, root = Graph(), {}, nn.Module()
        for node in available:
            env[node] = graph.placeholder(self.names[node])
            env[node].meta["val"] = node.meta["val"]

        def weight(name: str, tensor: Tensor) -> Node:
            flat = name.replace(".", "_")
            if not hasattr(root, flat):
                root.register_buffer(flat, tensor.detach().clone() if tensor._is_view() else tensor.detach())
            return graph.get_attr(flat)

        def get(node: Node) -> Node:
            if node in env:
                return env[node]
            seen = node.meta.get("val")
            if node.op == "get_attr":
                new = weight(str(node.target), _weight(self.whole, node))
            elif node in self.constants:
                new = weight(f"constant_{node.name}", self.evaluate(node))
            elif isinstance(seen, torch.SymInt):
                new = self._size(graph, env, available, node, get)
            else:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), get)
                new = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
            new.meta["val"] = seen
            env[node] = new
            return new

        results = [get(node) for node in wanted]
        graph.output(tuple(results))
        if drop_unused:
            for node in available:
                if not env[node].users:
                    graph.erase_node(env[node])
        kept = tuple(self.names[n] for n in available if not drop_unused or env[n].users)
        module = GraphModule(root, graph)
        return Program(module.eval(), kept, outputs)

    def _size(
        self, graph: Graph, env: dict[Node, Node], available: list[Node], node: Node, get: Callable[[Node], Node]
    ) -> Node:
        """A dynamic size, read from an input of this program where one has it."""
        expression = node.meta["val"].node.expr
        for source in available:
            for dim, size in enumerate(getattr(value(source), "shape", ())):
                if isinstance(size, torch.SymInt) and size.node.expr == expression:
                    return graph.call_function(aten.sym_size.int, (env[source], dim))
        if node.target == aten.sym_size.int:
            raise ValueError(f"partition: size {expression} is not known to the program that needs it")
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), get)
        return graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]


def _count(module: GraphModule, nodes: list[Node], known: dict[str, int], weights: bool = True) -> Counts:
    total = Counts(nodes=sum(n.op == "call_function" for n in nodes), flops=sum(flops(n, known) for n in nodes))
    if weights:
        tensors = {n.target: _weight(module, n) for n in module.graph.nodes if n.op == "get_attr"}
        total += Counts(
            parameters=sum(t.numel() for t in tensors.values()),
            weight_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        )
    return total


def _count_program(program: Program, known: dict[str, int]) -> Counts:
    return _count(program.module, list(program.module.graph.nodes), known)


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


class Batched(nn.Module):
    """The schedule program over all timesteps at once: inputs `[T, ...]` -> tables `[T, ...]`, row t for step t.

    The program was traced with a leading axis of length 1, and its ops treat rows alike; `check` proves that.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.inner = program.module

    def forward(self, timesteps: Tensor) -> tuple[Tensor, ...]:
        """`timesteps [T]` -> one table per output, `[T, *shape of the step's input]`."""
        return tuple(table.unsqueeze(1) for table in self.inner(timesteps))

    @torch.no_grad()
    def check(self, timesteps: Tensor) -> None:
        """Raise ValueError unless every row equals the program run at that timestep alone."""
        tables = self(timesteps)
        for row in range(len(timesteps)):
            alone = self.inner(timesteps[row : row + 1])
            for table, one in zip(tables, alone, strict=True):
                if table[row].shape != one.shape or not torch.allclose(table[row], one, rtol=1e-5, atol=1e-5):
                    raise ValueError("the schedule program mixes timesteps; it cannot be run over all of them at once")
