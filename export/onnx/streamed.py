"""ONNX graphs of models that do not fit in memory: traced with fake tensors, weights streamed into a file beside the graph.

    entry = stream_program(stage / "graphs" / "step.onnx", cut, "step", weights.get, ranges)
    entry = stream_module(stage / "graphs" / "text.onnx", module, examples, ("text",), weights.get, ranges)

One tensor at a time is in memory; `onnx_stored` says how weights are kept. What comes out passes the ONNX checker and shape
inference, or is not published.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from motionrt.export.checkpoints.files import CheckpointError, InMemory, Lazy
from motionrt.export.compiler.graph_edit import functional
from motionrt.export.compiler.liveness import live_bytes
from motionrt.export.compiler.partition import Partition, Program
from motionrt.export.compiler.weightless import faked, materialise
from motionrt.export.onnx.from_torch import (
    OPSET,
    RESULT,
    Example,
    Range,
    bare,
    check_parity,
    dynamic_axes,
    dynamic_shapes,
    optimise,
    outputs_of,
    port,
)
from motionrt.export.onnx.functions import JOINS, translations
from motionrt.export.onnx.rewrites import rewrite
from motionrt.export.onnx.stored import INLINE, INLINE_SIZES, Computed, names_in, narrowest, store
from motionrt.export.onnx.torch_programs import check_program, weights_of, write_program
from motionrt.runtime.files import replacing

Find = Callable[[str], Lazy | None]


def stream_program(
    path: Path, cut: Partition, kind: str, find: Find, ranges: Mapping[str, Range], torch_program: Path | None = None,
    shared: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the program `kind` of a partition that was traced with fake weights; its manifest entry.

    `find(name)` gives the weights of the module that was cut, by its own names; None for tables that it holds itself. A
    dynamic size is "steps" where timesteps are taken all at once, and "batch" elsewhere, of the range that `ranges` gives;
    other sizes are the traced ones. `torch_program`: where the same program goes in its torch form, without its weights; the
    entry then has the key `program`. `shared`: as of `stream_module`.
    """
    program, size = cut.programs[kind], "steps" if kind in ("schedule", "timeline") else "batch"
    values = [node.meta["val"] for node in program.module.graph.nodes if node.op == "placeholder"]
    mode = values[0].fake_mode if values else next(program.module.buffers()).fake_mode
    dynamic = any(isinstance(length, torch.SymInt) for value in values for length in value.shape)
    over = kind == "schedule" and bool(values) and not dynamic  # of one request, but its timesteps are taken all at once
    dynamic |= over

    def sized(rows: int) -> Example:
        shapes = ([_at(n, dict.fromkeys(_symbols(n), rows)) for n in value.shape] for value in values)
        shapes = ([rows, *shape[1:]] if over else shape for shape in shapes)
        feed = [torch.empty(shape, dtype=value.dtype) for shape, value in zip(shapes, values, strict=True)]
        return Example({size: rows} if dynamic else {}, dict(zip(program.inputs, feed, strict=True)))

    with mode:
        return _stream(
            path, program.module, [sized(2), sized(3)], program.outputs, ranges if dynamic else {},
            lambda name: _of(cut, program, name, find), torch_program, shared=shared,
        )  # fmt: skip


def _of(cut: Partition, program: Program, name: str, find: Find) -> Lazy | None:
    """A weight of a program as it is stored: as in its checkpoint, or, for what was computed from such, as computed."""
    if name not in program.weights:
        return None
    root = program.weights[name]
    if root.op == "get_attr" and (found := find(str(root.target))) is not None:
        return found

    def read(weight: str) -> Tensor | None:
        lazy = find(weight)
        return None if lazy is None else lazy.read()

    value = root.meta["val"]
    return Computed(value.dtype, tuple(value.shape), lambda: materialise(cut, program, name, read))


def stream_module(
    path: Path,
    module: nn.Module,
    examples: Sequence[Example],
    outputs: Sequence[str],
    find: Find,
    ranges: Mapping[str, Range] | None = None,
    *,
    shared: Path | None = None,
) -> dict[str, Any]:
    """Write a module that was built with `meta`; `find` knows its parameters, and buffers that it does not are its own.

    `shared`: the file beside `path` that another graph's weights are in, and these too, whatever their names: none is written.

    Feeds of the examples give dtypes and shapes; the axes in which the first two differ are dynamic.
    """
    module = module.eval()
    own = dict(module.named_buffers())

    def value(name: str) -> Lazy | None:
        found = find(name)
        if found is None and name in own and not isinstance(own[name], FakeTensor) and own[name].device.type != "meta":
            return InMemory(own[name])
        return found

    with faked(module):
        fakes = [Example(e.sizes, {n: torch.empty(v.shape, dtype=v.dtype) for n, v in e.feed.items()}) for e in examples]
        return _stream(path, module, fakes, outputs, ranges or {}, value, shared=shared)


def stream_real(
    path: Path,
    module: nn.Module,
    examples: Sequence[Example],
    outputs: Sequence[str],
    ranges: Mapping[str, Range],
    *,
    atol: float = 2e-5,
    torch_program: Path | None = None,
    external: Mapping[str, NDArray[Any]] | None = None,
    shared: Path | None = None,
) -> dict[str, Any]:
    """Write a module that is in memory; weights are stored as float16 where that loses nothing.

    Graph and program are run on all examples: |ours - module| <= atol * max(1, max |module|), or `ParityError`, and no graph.
    `external` names tensors that stay outside: a weight equal to one takes its name, and is stored nowhere. `shared`: as of
    `stream_module`.
    """
    module = module.eval()
    state = weights_of(module)
    wanted = [outputs_of(module, example.feed) for example in examples]
    known = {(value.shape, value.tobytes()): name for name, value in (external or {}).items()}
    arrays = ((name, value.detach().numpy()) for name, value in state.items() if known)
    outside = {name: known[key] for name, value in arrays if (key := (value.shape, value.tobytes())) in known}

    def find(name: str) -> Lazy | None:
        return InMemory(narrowest(state[name].detach())) if name in state else None

    try:
        entry = _stream(path, module, examples, outputs, ranges, find, torch_program, outside, shared)
        check_parity(path, outputs, examples, wanted, atol, external or {})
        if torch_program is not None and "program" in entry:
            data = shared or (path.with_suffix(".safetensors") if "data" in entry else None)  # none: without weights
            check_program(torch_program, entry["program"], data, examples, wanted, atol)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return entry


def _stream(
    path: Path,
    module: nn.Module,
    examples: Sequence[Example],
    outputs: Sequence[str],
    ranges: Mapping[str, Range],
    value: Find,
    torch_program: Path | None = None,
    outside: Mapping[str, str] = MappingProxyType({}),
    shared: Path | None = None,
) -> dict[str, Any]:
    """`value`: weights by the module's names. `outside`: those that are stored elsewhere, and their names there; `shared`: as
    of `stream_module`."""
    from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization

    first, second = examples[0], examples[min(1, len(examples) - 1)]
    names = list(first.feed)
    axes = {n: dynamic_axes(first.feed[n], second.feed[n], first.sizes, second.sizes) for n in names}
    with torch.no_grad(), warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        shapes = dynamic_shapes(module, [first, second], ranges) if ranges else None
        program = torch.export.export(module, tuple(first.feed.values()), dynamic_shapes=shapes, strict=False)
        inputs = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"][-len(names) :]
        results = [n.meta["val"] for n in program.graph.output_node().args[0] if isinstance(n, torch.fx.Node)]
        if not functional(module) or any(node.target in JOINS for node in program.graph.nodes):
            program = program.run_decompositions(JOINS)
        activations = live_bytes(program.graph)
        exported = torch.onnx.export(
            program, input_names=names, output_names=[f"{RESULT}{n}" for n in outputs], opset_version=OPSET, dynamo=True,
            verbose=False, optimize=False, custom_translation_table=translations(),
        )  # fmt: skip
    assert exported is not None
    model = exported.model
    weights: dict[str, Lazy] = {}

    def large(size: int, floating: bool) -> bool:
        """Whether a tensor of `size` bytes goes into the file beside; a graph whose weights are elsewhere has none."""
        return not outside and size >= (INLINE if floating else INLINE_SIZES)

    def known(name: str) -> Lazy:
        found = value(name)
        if found is None:
            raise ValueError(f"graph {path.stem}: weight `{name}` is in no checkpoint and no table of the module")
        return found

    for name, initializer in model.graph.initializers.items():
        raw = getattr(initializer.const_value, "raw", None)
        if isinstance(raw, FakeTensor):
            weights[name], initializer.const_value = known(name), None  # so that nothing tries to fold it
        elif isinstance(raw, Tensor) and (name in outside or large(raw.nbytes, raw.is_floating_point())):
            weights[name], initializer.const_value = value(name) or InMemory(raw), None
    with _quiet(), torch._subclasses.fake_tensor.unset_fake_temporarily():
        optimise(model)
        fuse_rms_normalization(model)  # alone: its rotations repeat no tables, which ONNX Runtime refuses beyond a batch of one
        rewrite(model, lambda name: weights[name].read().float().numpy())
        for name, initializer in model.graph.initializers.items():
            held = initializer.const_value
            if held is not None and large(held.nbytes, held.dtype.is_floating_point()):  # tables that the rewrites made
                weights[name], initializer.const_value = InMemory(torch.from_numpy(held.numpy())), None
        weights = {name: lazy for name, lazy in weights.items() if name in model.graph.initializers and name not in outside}
    entry: dict[str, Any] = {}
    extra: dict[str, Lazy] = {}
    if torch_program is not None:
        own = {name: value(name) or InMemory(weight.detach()) for name, weight in weights_of(module).items()}
        stored = {} if shared is None else names_in(shared, own)
        if shared is not None:
            own = {name: weight for name, weight in own.items() if name in stored or not _written_out(module, name)}
        if shared is None or stored.keys() == own.keys():  # a program takes its weights from one file
            entry["program"] = write_program(torch_program, module, first.feed, outputs, shapes, stored)
        extra = {name: weight for name, weight in own.items() if name not in weights}
    with _quiet(), torch._subclasses.fake_tensor.unset_fake_temporarily():
        written = store(model, path, weights, extra, shared)
        _leave_outside(model.graph, outside)
        proto = bare(ir.serde.serialize_model(model))
        _publish(path, proto, checked=not outside)
        at = _shapes(examples, inputs, results)
    entry |= {
        "inputs": [port(n, first.feed[n], axes[n], ranges) for n in names],
        "outputs": [
            port(n, a, dynamic_axes(a, b, first.sizes, second.sizes), ranges) for n, a, b in zip(outputs, *at, strict=True)
        ],
        "activations": activations,
    }
    if written is not None:
        entry["data"] = {"file": f"{path.parent.name}/{path.with_suffix('.safetensors').name}", "sha256": written.sha256}
    return entry


def _written_out(module: nn.Module, name: str) -> bool:
    """Whether a weight of a graph is one number, and stands in the graph from now on."""
    held = operator.attrgetter(name)(module)
    if not isinstance(module, torch.fx.GraphModule) or held.numel() != 1 or isinstance(held, FakeTensor):
        return False
    for node in module.graph.find_nodes(op="get_attr", target=name):
        with module.graph.inserting_before(node):
            number = module.graph.call_function(
                torch.ops.aten.full.default, ([*held.shape], held.item()), {"dtype": held.dtype}
            )
        number.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(number)
        module.graph.erase_node(node)
    module.recompile()
    delattr(module, name)
    return True


def _shapes(examples: Sequence[Example], inputs: Sequence[Tensor], results: Sequence[Tensor]) -> list[list[Tensor]]:
    """Outputs at the sizes of the first two examples, as meta tensors: shapes and dtypes are all that is asked of them.

    `inputs`: the traced inputs; a symbol has the value with which they have the shapes of an example.
    """
    found = []
    for example in (examples[0], examples[min(1, len(examples) - 1)]):
        known: dict[Any, int] = {}
        for traced, value in zip(inputs, example.feed.values(), strict=True):
            for length, actual in zip(traced.shape, value.shape, strict=True):
                for symbol in _symbols(length):
                    known[symbol] = actual // int(length.node.expr.subs({symbol: 1}))  # lengths are multiples of one size
        found.append([torch.empty([_at(n, known) for n in r.shape], dtype=r.dtype, device="meta") for r in results])
    return found


def _symbols(length: Any) -> Set[Any]:
    return set() if isinstance(length, int) else length.node.expr.free_symbols  # type: ignore[no-any-return]


def _at(length: Any, known: Mapping[Any, int]) -> int:
    return length if isinstance(length, int) else int(length.node.expr.subs(known))


def _leave_outside(graph: ir.Graph, names: Mapping[str, str]) -> None:
    """Give initializers the names that they have where they are stored, and no data, in place."""
    for name, there in names.items():
        if (value := graph.initializers.pop(name, None)) is not None:
            assert value.dtype is not None and value.shape is not None
            value.const_value = ir.ExternalTensor(
                "weights-stay-in-their-package", None, None, value.dtype, shape=value.shape, name=there
            )
            value.name = there
            graph.register_initializer(value)


def _publish(path: Path, model: onnx.ModelProto, checked: bool) -> None:
    """Write `model` as `path`; if `checked`, once the ONNX checker and shape inference have nothing against it."""
    with replacing(path, CheckpointError) as partial:
        partial.write_bytes(model.SerializeToString(deterministic=True))
        if not checked:
            return
        onnx.checker.check_model(str(partial), full_check=False)
        inferred = path.with_name(f"{partial.name}.inferred")
        try:
            onnx.shape_inference.infer_shapes_path(str(partial), str(inferred), check_type=True, strict_mode=True)
        finally:
            inferred.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from telling, for every weight, that it has no value."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
