"""Models without their weights: built from configs alone, traced with fake tensors, counted class by class.

    with meta():                                   # parameters are on the meta device: no memory, no time
        transformer = CogVideoXTransformer3DModel(**config)
    step = CogVideoXStep(transformer, ...)         # small tables are real
    cut = fake_partition(step, args, INPUTS, outputs=...)
    rows = weights_by_class(cut)                   # parameters that only this class reads

Nothing of the size of the model is ever allocated; `materialise` later computes one tensor of a program at a time from
whatever `read` gives for the weights that it needs.
"""

from __future__ import annotations

import gc
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.modules.module import register_module_parameter_registration_hook

from motionrt.export.compiler.graph_edit import ancestors
from motionrt.export.compiler.partition import Partition, Program, partition

BATCH = 4  # the most requests that share a call, unless said otherwise


@contextmanager
def meta(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Modules made in the block have parameters of `dtype` on the meta device, and real buffers (tables).

    A parameter is replaced as it is registered, before it is drawn or its memory is touched.
    """

    def without_memory(module: nn.Module, name: str, param: nn.Parameter | None) -> nn.Parameter | None:
        if param is None or param.device.type == "meta":
            return None  # as it is
        kind = dtype if param.is_floating_point() else param.dtype
        return nn.Parameter(torch.empty(param.shape, dtype=kind, device="meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(without_memory)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def faked(module: nn.Module) -> Iterator[FakeTensorMode]:
    """Trace in the block: `module`, built with `meta`, has fake CPU parameters (the exporter refuses a mix of devices), in
    place; real tensors may be mixed in."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with mode:
        for part in module.modules():
            stores: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for store in stores:
                for name, tensor in store.items():
                    if tensor is not None and tensor.device.type == "meta":
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        store[name] = nn.Parameter(fake, requires_grad=False) if store is part._parameters else fake
        yield mode


def fake_partition(
    module: nn.Module, args: tuple[Tensor, ...], inputs: Mapping[str, str], *, outputs: tuple[str, ...], batch: int = BATCH,
    suffix: str = "", traced: Callable[[nn.Module, tuple[Tensor, ...]], nn.Module] | None = None,
) -> Partition:  # fmt: skip
    """`partition` of a module whose weights are not there; `args` give dtypes and shapes, of one request.

    `batch`: the most requests that a call may have; where it is more than 1, axis 0 of every argument is dynamic.
    `suffix` as of `partition`; `traced`: what makes a graph of the module where `torch.export` cannot.
    """
    rows = torch.export.Dim("batch", min=1, max=batch) if batch > 1 else None
    with faked(module.eval()):
        shapes = [arg.shape if rows is None else (2 * arg.shape[0], *arg.shape[1:]) for arg in args]
        fakes = tuple(torch.empty(shape, dtype=arg.dtype) for shape, arg in zip(shapes, args, strict=True))
        dynamic = None if rows is None else tuple({0: rows} for _ in args)
        module = module if traced is None else traced(module, fakes)
        cut = partition(module, fakes, inputs, outputs=outputs, dynamic_shapes=dynamic, suffix=suffix)
    gc.collect()  # traces of a big model hold each other in cycles
    return cut


@dataclass(frozen=True)
class ClassSize:
    """What the released weights of one class come to: tensors, elements, bytes; FLOPs of one evaluation of the class."""

    tensors: int
    parameters: int
    bytes: int
    flops: int


def weights_by_class(cut: Partition, widths: Mapping[str, int] | None = None) -> dict[str, ClassSize]:
    """The model's weights by the class that reads them, and those that nothing reads ("dead").

    widths: bytes of an element of a weight as it is stored, by name; where there is none, of the traced one.

    A weight counts where it is needed most often: step before timeline before request before schedule before constant. Tables
    that were folded from constants are no parameters.
    """
    programs = {kind: cut.programs[kind] for kind in ("step", "timeline", "request", "schedule") if kind in cut.programs}
    direct = {kind: {str(n.target) for n in p.weights.values() if n.op == "get_attr"} for kind, p in programs.items()}
    folded = [n for program in programs.values() for n in program.weights.values() if n.op != "get_attr"]
    direct["constant"] = {name for node in folded for name in leaves(node)}
    everything = parameters(cut.whole)
    sizes_of = {name: t.numel() * (widths or {}).get(name, t.element_size()) for name, t in everything.items()}
    sizes, seen = {}, set[str]()

    def size(names: set[str], flops: int) -> ClassSize:
        return ClassSize(
            len(names), sum(everything[name].numel() for name in names), sum(sizes_of[name] for name in names), flops
        )

    for kind in (*programs, "constant"):
        names = {name for name in direct[kind] if name in everything} - seen
        seen |= names
        sizes[kind] = size(names, cut.classes[kind].flops)
    sizes["dead"] = size(everything.keys() - seen, 0)
    sizes["model"] = size(set(everything), cut.original.flops)
    return sizes


def parameters(module: GraphModule) -> dict[str, Tensor]:
    """The parameters that a traced graph reads or read: name -> tensor. Buffers (tables) are none."""
    return dict(module.named_parameters())


def leaves(node: Node) -> set[str]:
    """Names of the weights that a constant node is computed from."""
    return {str(item.target) for item in ancestors([node]) if item.op == "get_attr"}


def materialise(cut: Partition, program: Program, name: str, read: Callable[[str], Tensor | None]) -> Tensor:
    """The real value of buffer `name` of a program: a weight from `read`, or a constant computed from such.

    `read(weight)` returns None for what is no weight of the checkpoint: tables that the module itself holds.
    """
    root = program.weights[name]
    needed = ancestors([root])
    values: dict[Node, Any] = {}
    with torch.no_grad():
        for node in cut.rewritten.graph.nodes:
            if node not in needed:
                continue
            if node.op == "get_attr":
                values[node] = _leaf(cut, node, read)
            else:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    result: Tensor = values[root]
    return result


def _leaf(cut: Partition, node: Node, read: Callable[[str], Tensor | None]) -> Tensor:
    """A weight or table of the traced module, in the dtype that it was traced with."""
    name = str(node.target)
    found = read(name)
    if found is None:
        found = operator.attrgetter(name)(cut.rewritten).detach()
        if isinstance(found, FakeTensor):
            raise ValueError(f"weight `{name}` has no value: neither the checkpoint nor the module holds it")
    return found.to(node.meta["val"].dtype)
