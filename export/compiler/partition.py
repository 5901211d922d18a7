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

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from motionrt.export.compiler.broadcasts import sink_broadcasts
from motionrt.export.compiler.classify import bytes_of, depends_on, floating, flops, frontier
from motionrt.export.compiler.graph_edit import Fired, prune, sizes, value
from motionrt.export.compiler.rewrites import reassociate, softmax_of_one

aten = torch.ops.aten

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
    """One of the three programs: a module with named inputs and outputs, in order.

    `weights`: buffer of `module` -> the node of `Partition.rewritten` that it holds: a weight, or a folded constant.
    """

    module: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, Node] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Partition:
    """The three programs and what the pass did. Feed outputs to the step's inputs of the same name."""

    schedule: Program
    request: Program
    step: Program
    whole: GraphModule
    rewritten: GraphModule
    hoisted: tuple[Hoisted, ...]
    fired: tuple[Fired, ...]
    classes: Mapping[str, Counts]
    original: Counts

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
    cut = frontier(whole, depends, known)
    return _split(whole, original, depends, cut, inputs, outputs, tuple(fired), original_counts, known)


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
) -> Partition:
    placeholders = dict(zip(_placeholders(whole), inputs, strict=True))
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
        "constant": _count(whole, [n for n in folded if not floating(n)], known, weights=False),
        "schedule": _count_program(invariant["schedule"], known),
        "request": _count_program(invariant["request"], known),
        "step": _count_program(step, known),
    }
    hoisted = tuple(
        Hoisted(names[n], kinds[n], sizes(value(n).shape, known), bytes_of(n, known)) for n in kinds
    )
    return Partition(
        invariant["schedule"], invariant["request"], step, original, whole, hoisted, fired, classes, original_counts
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
        graph, env, root, weights = Graph(), {}, nn.Module(), {}
        for node in available:
            env[node] = graph.placeholder(self.names[node])
            env[node].meta["val"] = node.meta["val"]

        def weight(name: str, tensor: Tensor, source: Node) -> Node:
            flat = name.replace(".", "_")
            if not hasattr(root, flat):
                weights[flat] = source
                root.register_buffer(flat, tensor.detach().clone() if tensor._is_view() else tensor.detach())
            return graph.get_attr(flat)

        def get(node: Node) -> Node:
            if node in env:
                return env[node]
            seen = node.meta.get("val")
            if node.op == "get_attr":
                new = weight(str(node.target), _weight(self.whole, node), node)
            elif node in self.constants:
                new = weight(f"constant_{node.name}", self.evaluate(node), node)
            elif isinstance(seen, torch.SymInt):
                new = self._size(graph, env, available, node, get)
            else:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), get)
                new = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
            new.meta["val"] = seen
            env[node] = new
            return new

        # in the graph's order, so that `get` finds what a node reads: it must not go as deep as the network is
        needed, todo = set[Node](), list(wanted)
        while todo:
            node = todo.pop()
            if node in env or node in needed:
                continue
            needed.add(node)
            if node.op == "call_function" and node not in self.constants and not isinstance(node.meta.get("val"), torch.SymInt):
                todo += node.all_input_nodes
        for node in self.whole.graph.nodes:
            if node in needed:
                get(node)
        results = [env[node] for node in wanted]
        graph.output(tuple(results))
        if drop_unused:
            for node in available:
                if not env[node].users:
                    graph.erase_node(env[node])
        kept = tuple(self.names[n] for n in available if not drop_unused or env[n].users)
        module = GraphModule(root, graph)
        return Program(module.eval(), kept, outputs, weights)

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


class Batched(nn.Module):
    """The schedule program over all timesteps at once: inputs `[T, ...]` -> tables `[T, ...]`, row t for step t.

    The program was traced with a leading axis of length 1, and its ops treat rows alike; `check` proves that.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.inner = _any_rows(program.module)

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


def _any_rows(module: GraphModule) -> GraphModule:
    """A copy whose reshapes keep the leading axis, whatever its length: traced with one row, they name that one."""
    module = GraphModule(module, _copy(module).graph)
    for node in module.graph.nodes:
        if node.target not in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
            continue
        source, shape = node.args
        if list(shape)[:1] == [1] and len(shape) > 1 and value(source).ndim and value(source).shape[0] == 1:
            node.args = (source, [-1, *shape[1:]])
    module.recompile()
    return module
