"""Loop-invariant code motion on an exported program: compute each tensor when it changes and not more often.

`partition(module, args, inputs)` traces a step function, applies the exact rewrites, and cuts it into programs by what each
tensor depends on: `schedule` (timesteps only), `request` (prompt, image, motion), `timeline` (both of these, where a table
pays: once per request, for all timesteps at once) and `step` (the rest). What depends on weights alone is evaluated once.

Programs take a leading batch. `schedule` and `timeline` take the timesteps there, and what they give are tables whose rows
the step reads in turn. The frontier between programs carries the fewest bytes: it is a minimum cut in which views, broadcasts
and casts may be recomputed on either side (free); what else is invariant must stay out of the step.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from motionrt.export.compiler.broadcasts import pack_tables, sink_broadcasts
from motionrt.export.compiler.classify import MIXED, bytes_of, depends_on, floating, flops, frontier
from motionrt.export.compiler.graph_edit import Fired, ancestors, emit, fake_mode, prune, read_size, sizes, value
from motionrt.export.compiler.rewrites import reassociate, softmax_of_one

aten = torch.ops.aten

KINDS = frozenset({"schedule", "request", "step"})


@dataclass(frozen=True)
class Counts:
    """Size of a class: graph nodes, parameters (elements), their bytes, and FLOPs of one evaluation."""

    nodes: int = 0
    parameters: int = 0
    weight_bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Hoisted:
    """A tensor that crosses the frontier into the step."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Program:
    """What is computed at one time: a module with named inputs and outputs, in order.

    `weights`: buffer of `module` -> the node of `Partition.rewritten` that it holds: a weight, or a folded constant.
    """

    module: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, Node] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Partition:
    """The programs by class, in the order in which they run, and what the pass did.

    Feed outputs to inputs of the same name. There is a `timeline` only where a tensor is in that class.
    """

    programs: Mapping[str, Program]
    whole: GraphModule
    rewritten: GraphModule
    hoisted: tuple[Hoisted, ...]
    fired: tuple[Fired, ...]
    classes: Mapping[str, Counts]
    original: Counts

    @property
    def schedule(self) -> Program:
        return self.programs["schedule"]

    @property
    def request(self) -> Program:
        return self.programs["request"]

    @property
    def step(self) -> Program:
        return self.programs["step"]

    def report(self) -> dict[str, Any]:
        """The manifest's `partition` entry."""
        return {
            "classes": {kind: vars(counts) for kind, counts in self.classes.items()},
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
    suffix: str = "",
) -> Partition:
    """Cut `module(*args)` into programs by what its tensors depend on.

    `inputs` declares, in the order of `args`, each argument's name and what it changes with ("schedule", "request" or
    "step"); `outputs` names the results, and `suffix` is put behind the class in the names of what crosses. Row b of every
    argument belongs to request b: rows must not mix. Counts are those of one request, a dynamic size being 1. A `GraphModule`
    is taken as it is. Raises ValueError for an unknown class or a count that does not match.
    """
    if len(inputs) != len(args):
        raise ValueError(f"partition: {len(inputs)} inputs are declared, {len(args)} arguments given; they must match.")
    for name, kind in inputs.items():
        if kind not in KINDS:
            raise ValueError(f"partition: input `{name}` is declared {kind!r}; allowed: {', '.join(sorted(KINDS))}.")
    if isinstance(module, GraphModule):  # traced already: a module that differentiates (gradients.py)
        whole = module
    else:
        exported = torch.export.export(module.eval(), args, dynamic_shapes=dynamic_shapes, strict=False)
        exported = exported.run_decompositions({})
        whole = exported.module(check_guards=False)  # type: ignore[assignment]
        _tidy(whole)
    original = _copy(whole)
    known = _sizes_of_one(whole)
    original_counts = _count(whole, list(whole.graph.nodes), known)

    fired = softmax_of_one(whole) + sink_broadcasts(whole)
    fired += reassociate(whole, depends_on(whole, inputs), known)
    pack_tables(whole, depends_on(whole, inputs))
    whole.recompile()
    depends = depends_on(whole, inputs)
    programs, hoisted = _split(whole, depends, inputs, outputs, known, suffix)
    folded = [n for n in whole.graph.nodes if n.op == "call_function" and not depends[n] and not floating(n)]
    classes = {"constant": _count(whole, folded, known, weights=False)}
    classes |= {kind: _count(p.module, list(p.module.graph.nodes), known) for kind, p in programs.items()}
    return Partition(programs, original, whole, hoisted, tuple(fired), classes, original_counts)


def _tidy(module: GraphModule) -> None:
    """Drop run-time assertions, and give every weight node its fake value."""
    mode = fake_mode(module.graph)
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


def _sizes_of_one(module: GraphModule) -> dict[str, int]:
    """Every symbol of a dynamic size as 1."""
    values = (value(node) for node in module.graph.nodes if node.op == "placeholder")
    symbolic = [size for tensor in values for size in tensor.shape if not isinstance(size, int)]
    return {str(symbol): 1 for size in symbolic for symbol in size.node.expr.free_symbols}


def _split(
    whole: GraphModule,
    depends: dict[Node, frozenset[str]],
    inputs: Mapping[str, str],
    outputs: tuple[str, ...],
    known: dict[str, int],
    suffix: str,
) -> tuple[dict[str, Program], tuple[Hoisted, ...]]:
    """The programs, and what crosses into the step."""
    nodes = list(whole.graph.nodes)
    placeholders = dict(zip((n for n in nodes if n.op == "placeholder"), inputs, strict=True))
    results = list(torch.utils._pytree.tree_leaves(nodes[-1].args[0]))
    late = {n for n in nodes if n.op == "output" or "step" in depends[n]}
    cut = frontier(depends, known, [n for n in nodes if n not in late], late)
    constants = {n for n in cut if not depends[n] and n.op != "get_attr"}
    into_step = [n for n in nodes if n in cut and depends[n]]
    mixed = {n for n in ancestors([n for n in into_step if depends[n] == MIXED]) if depends[n] == MIXED}
    early = [n for n in nodes if n not in late and depends[n] and depends[n] != MIXED]
    cut = frontier(depends, known, early, mixed)
    into_timeline = [n for n in nodes if n in cut]

    names: dict[Node, str] = dict(placeholders)
    kinds: dict[Node, str] = {}
    for node in nodes:
        if node in into_step or node in into_timeline:
            kinds[node] = "timeline" if depends[node] == MIXED else next(iter(depends[node]))
            names.setdefault(node, _name(node, f"{kinds[node]}{suffix}", set(names.values())))
    build = _Builder(whole, constants, names)

    def given(kind: str) -> list[Node]:
        return [n for n in placeholders if inputs[placeholders[n]] == kind]

    def made(kind: str, where: list[Node]) -> list[Node]:
        return [n for n in where if kinds[n] == kind and n.op != "placeholder"]

    programs = {kind: build.program(given(kind), made(kind, list(kinds))) for kind in ("schedule", "request")}
    if mixed:
        programs["timeline"] = build.program(into_timeline, made("timeline", into_step), over=depends)
    direct = [n for n in into_step if n.op == "placeholder"]
    state = [n for kind in ("schedule", "timeline", "request") for n in made(kind, into_step)]
    programs["step"] = build.program([*given("step"), *state, *direct], results, outputs)
    return programs, tuple(Hoisted(names[n], kinds[n], sizes(value(n).shape, known), bytes_of(n, known)) for n in into_step)


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

    def __init__(self, whole: GraphModule, constants: set[Node], names: Mapping[Node, str]) -> None:
        self.whole, self.constants, self.names = whole, constants, names
        self.stored: dict[Node, Tensor] = {}

    def evaluate(self, node: Node) -> Any:
        """The value of a node that depends on weights only (computed once, without gradients)."""
        if node.op == "get_attr":
            return _weight(self.whole, node).detach()
        if node not in self.stored:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.evaluate)
            with torch.no_grad():
                self.stored[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self.stored[node]

    def program(
        self,
        available: list[Node],
        wanted: list[Node],
        outputs: tuple[str, ...] | None = None,
        over: Mapping[Node, frozenset[str]] | None = None,
    ) -> Program:
        """The program that makes `wanted` of `available`. Without `outputs` they have the nodes' names, and inputs that are
        not read are left out. `over` (what nodes depend on): of timesteps it takes many, and of requests one."""
        graph, env, root, weights = Graph(), {}, nn.Module(), {}
        for node in available:
            env[node] = graph.placeholder(self.names[node])
            env[node].meta["val"] = node.meta["val"]
        given = dict(env)
        if over is not None:
            steps = next(n for n in available if over[n] == {"schedule"} and isinstance(_batch(n), torch.SymInt))
            for node in available:
                if over[node] == {"request"} and not isinstance(_batch(node), int):
                    env[node] = _for_each(graph, env[steps], env[node])

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
            elif isinstance(seen, torch.SymInt) and (size := read_size(graph, seen)) is not None:
                new = size
            else:
                if node.op == "placeholder" or node.target == aten.sym_size.int:
                    raise ValueError(f"partition: {node} is not known to the program that needs it")
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), get)
                new = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
            new.meta["val"] = seen
            env[node] = new
            return new

        # in the graph's order, so that `get` finds what a node reads: it must not go as deep as the network is
        needed = ancestors(wanted, {*env, *self.constants})
        for node in self.whole.graph.nodes:
            if node in needed:
                get(node)
        graph.output(tuple(env[node] for node in wanted))
        if outputs is None:
            prune(graph)
            for node in available:
                if not given[node].users:
                    graph.erase_node(given.pop(node))
        kept = tuple(self.names[n] for n in given)
        return Program(GraphModule(root, graph).eval(), kept, outputs or tuple(self.names[n] for n in wanted), weights)


def any_rows(module: GraphModule) -> None:
    """Make a graph that was traced for one row one for any number of them, in place: its shapes say 1 where they mean that."""
    for node in module.graph.nodes:
        if node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default):
            source, shape = node.args
            if shape and shape[0] == 1 and value(source).shape[0] == 1:
                node.args = (source, [-1, *shape[1:]])
    module.recompile()


def _batch(node: Node) -> Any:
    """The leading size of a node's value; 1 for a number."""
    return value(node).shape[0] if value(node).ndim else 1


def _for_each(graph: Graph, steps: Node, one: Node) -> Node:
    """`one`, an input with rows of a batch, made an input with the rows of one request, repeated for each of `steps`."""
    traced = value(one)
    (symbol,) = traced.shape[0].node.expr.free_symbols
    rows = sizes(traced.shape, {str(symbol): 1})
    with traced.fake_mode:
        one.meta["val"] = torch.empty(rows, dtype=traced.dtype)
    count = emit(graph, aten.sym_size.int, (steps, 0))
    wide = emit(graph, aten.expand.default, (emit(graph, aten.unsqueeze.default, (one, 0)), [count, *[-1] * len(rows)]))
    return emit(graph, aten.reshape.default, (wide, [-1, *rows[1:]]))


def _count(module: GraphModule, nodes: list[Node], known: dict[str, int], weights: bool = True) -> Counts:
    tensors = {n.target: _weight(module, n) for n in module.graph.nodes if n.op == "get_attr" and weights}
    return Counts(
        sum(n.op == "call_function" for n in nodes),
        sum(t.numel() for t in tensors.values()),
        sum(t.numel() * t.element_size() for t in tensors.values()),
        sum(flops(n, known) for n in nodes),
    )
