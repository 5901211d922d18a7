"""ONNX graphs of models that do not fit in memory: traced with fake tensors, weights streamed into a file beside the graph.

    entry = stream_program(stage / "graphs" / "step.onnx", cut, cut.step, source.get, ranges={})
    entry = stream_module(stage / "graphs" / "text.onnx", module, examples, ("text",), source.get, ranges)

`graph.onnx` holds nodes and sizes, `graph.safetensors` the weights: ONNX external data that any safetensors reader opens
too. One tensor at a time is in memory. What comes out passes the ONNX checker and shape inference, or is not published.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from motionrt.export.liveness import live_bytes
from motionrt.export.onnx_from_torch import (
    OPSET,
    Example,
    Range,
    _name_outputs,
    dynamic_axes,
    dynamic_shapes,
    port,
    quick_rules,
)
from motionrt.export.onnx_functions import add_functions, symbolic_forms
from motionrt.export.onnx_rewrites import rewrite
from motionrt.export.partition import Partition, Program
from motionrt.export.safetensors_file import Entry, write_file
from motionrt.export.structure import faked, materialise

Read = Callable[[str], Tensor | None]
_RESULT = "result of "
_INLINE = 1024  # bytes: smaller constants stay in the graph


def stream_program(path: Path, cut: Partition, program: Program, read: Read) -> dict[str, Any]:
    """Write one program of a partition that was traced with fake weights; its manifest entry.

    `read(name)` gives the weights of the module that was cut, by its own names; None for tables that it holds itself.
    Sizes are the traced ones.
    """
    nodes = [node for node in program.module.graph.nodes if node.op == "placeholder"]
    mode = nodes[0].meta["val"].fake_mode if nodes else next(program.module.buffers()).fake_mode
    with mode:
        feed = {
            name: torch.empty(node.meta["val"].shape, dtype=node.meta["val"].dtype)
            for name, node in zip(program.inputs, nodes, strict=True)
        }
        example = Example({}, feed)
        return _stream(
            path,
            program.module,
            [example, example],
            program.outputs,
            {},
            lambda name: materialise(cut, program, name, read) if name in program.weights else None,
        )


def stream_tables(path: Path, cut: Partition, module: nn.Module, read: Read, ranges: Mapping[str, Range]) -> dict[str, Any]:
    """Write the schedule program over all timesteps at once: `module` is `Batched(cut.schedule)`."""
    program = cut.schedule
    mode = next(module.buffers()).fake_mode
    kind = next(n for n in program.module.graph.nodes if n.op == "placeholder").meta["val"].dtype
    with mode:
        examples = [Example({"steps": n}, {"timesteps": torch.empty(n, dtype=kind)}) for n in (5, 8)]
        return _stream(
            path, module, examples, program.outputs, ranges,
            lambda name: materialise(cut, program, name.removeprefix("inner."), read),
        )  # fmt: skip


def stream_module(
    path: Path,
    module: nn.Module,
    examples: Sequence[Example],
    outputs: Sequence[str],
    read: Read,
    ranges: Mapping[str, Range] | None = None,
) -> dict[str, Any]:
    """Write a module that was built with `meta`; `read` knows its parameters, and buffers that it does not are its own.

    Feeds of the examples give dtypes and shapes; the axes in which the first two differ are dynamic.
    """
    module = module.eval()
    own = dict(module.named_buffers())

    def value(name: str) -> Tensor | None:
        found = read(name)
        if found is None and name in own and not isinstance(own[name], FakeTensor) and own[name].device.type != "meta":
            return own[name]
        return found

    with faked(module):
        fakes = [Example(e.sizes, {n: torch.empty(v.shape, dtype=v.dtype) for n, v in e.feed.items()}) for e in examples]
        return _stream(path, module, fakes, outputs, ranges or {}, value)


def _stream(
    path: Path,
    module: nn.Module,
    examples: Sequence[Example],
    outputs: Sequence[str],
    ranges: Mapping[str, Range],
    value: Read,
) -> dict[str, Any]:
    import onnx_ir
    import onnxscript.optimizer

    first, second = examples[0], examples[min(1, len(examples) - 1)]
    names = list(first.feed)
    axes = {n: dynamic_axes(first.feed[n], second.feed[n], first.sizes, second.sizes) for n in names}
    with torch.no_grad(), warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        shapes = dynamic_shapes(module, [first, second], ranges) if ranges else None
        program = torch.export.export(module, tuple(first.feed.values()), dynamic_shapes=shapes, strict=False)
        results = [n.meta["val"] for n in program.graph.output_node().args[0] if isinstance(n, torch.fx.Node)]
        program = program.run_decompositions(symbolic_forms())
        activations = live_bytes(program.graph)
        exported = torch.onnx.export(
            program, input_names=names, output_names=[f"{_RESULT}{n}" for n in outputs], opset_version=OPSET, dynamo=True,
            verbose=False, optimize=False,
        )  # fmt: skip
    assert exported is not None
    model = exported.model
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    real: dict[str, Tensor] = {}
    for name, initializer in model.graph.initializers.items():
        raw = getattr(initializer.const_value, "raw", None)
        if not isinstance(raw, Tensor):
            continue
        if isinstance(raw, FakeTensor):
            kinds[name] = (raw.dtype, tuple(raw.shape))
            initializer.const_value = None  # so that nothing tries to fold it
        elif raw.numel() * raw.element_size() >= _INLINE:
            kinds[name], real[name] = (raw.dtype, tuple(raw.shape)), raw
            initializer.const_value = None
    with _quiet(), torch._subclasses.fake_tensor.unset_fake_temporarily():
        with quick_rules():
            onnxscript.optimizer.optimize_ir(model)

        def make(name: str) -> Tensor:
            found = real[name] if name in real else value(name)
            if found is None:
                raise ValueError(f"graph {path.stem}: weight `{name}` is in no checkpoint and no table of the module")
            return found.to(kinds[name][0])

        rewrite(model, lambda name: make(name).numpy())
        for name, initializer in model.graph.initializers.items():
            held = initializer.const_value
            if held is not None and held.nbytes >= _INLINE:  # tables that the rewrites made
                real[name] = torch.from_numpy(held.numpy())
                kinds[name], initializer.const_value = (real[name].dtype, tuple(real[name].shape)), None
        kinds = {name: kind for name, kind in kinds.items() if name in model.graph.initializers}

        entries = [Entry(name, *kinds[name], lambda name=name: make(name)) for name in kinds]  # type: ignore[misc]
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.with_suffix(".safetensors")
        if entries:
            written = write_file(data, entries)
            for name, stored in written.tensors.items():
                initializer = model.graph.initializers[name]
                initializer.const_value = onnx_ir.ExternalTensor(
                    data.name, stored.offset, stored.size, onnx_ir.DataType(_ONNX[stored.dtype]),
                    shape=onnx_ir.Shape(stored.shape), name=name, base_dir=path.parent,
                )  # fmt: skip
        proto = _bare(onnx_ir.serde.serialize_model(model))
        _check(path, proto)
        wanted = _shapes(examples, results)
    ports = {
        "inputs": [port(n, first.feed[n], axes[n], ranges) for n in names],
        "outputs": [
            port(n, a, dynamic_axes(a, b, first.sizes, second.sizes), ranges) for n, a, b in zip(outputs, *wanted, strict=True)
        ],
        "activations": activations,
    }
    if not entries:
        return ports
    return {**ports, "data": {"file": f"{path.parent.name}/{data.name}", "sha256": written.sha256}}


_ONNX = {
    torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.float64: onnx.TensorProto.DOUBLE, torch.int64: onnx.TensorProto.INT64, torch.int32: onnx.TensorProto.INT32,
    torch.bool: onnx.TensorProto.BOOL, torch.uint8: onnx.TensorProto.UINT8,
}  # fmt: skip


def _shapes(examples: Sequence[Example], results: Sequence[Tensor]) -> list[list[Tensor]]:
    """Outputs at the sizes of the first two examples, as meta tensors: shapes and dtypes are all that is asked of them."""
    first, second = examples[0], examples[min(1, len(examples) - 1)]
    symbols = {str(s): (first.sizes, second.sizes) for r in results for d in r.shape for s in _free(d)}
    found: list[list[Tensor]] = [[], []]
    for result in results:
        for index, sizes in enumerate((first.sizes, second.sizes)):
            if len(symbols) > 1:
                raise ValueError("outputs may depend on one dynamic size")
            only = next((sizes[n] for n in sizes if first.sizes[n] != second.sizes[n]), 0)
            dims = [d if isinstance(d, int) else int(d.node.expr.subs(dict.fromkeys(_free(d), only))) for d in result.shape]
            found[index].append(torch.empty(dims, dtype=result.dtype, device="meta"))
    return found


def _free(dim: Any) -> list[Any]:
    return [] if isinstance(dim, int) else list(dim.node.expr.free_symbols)


def _bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its names and functions, and without what only its making needed."""
    _name_outputs(model)
    add_functions(model)
    graph = model.graph
    del graph.value_info[:], graph.metadata_props[:], model.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for entry in (*graph.input, *graph.output, *graph.initializer):
        entry.doc_string = ""
        del entry.metadata_props[:]
    return model


def _check(path: Path, model: onnx.ModelProto) -> None:
    """Publish `model` as `path` once the ONNX checker and shape inference have nothing against it."""
    from motionrt.export.checkpoints import CheckpointError
    from motionrt.runtime.video import replacing

    with replacing(path, CheckpointError) as partial:
        partial.write_bytes(model.SerializeToString(deterministic=True))
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
