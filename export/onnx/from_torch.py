"""One ONNX graph from one module, with its declared interface, proven in ONNX Runtime at other shapes than the traced.

Which axes are dynamic is not written down twice: it is read off two example feeds that differ in their sizes.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from motionrt.export.onnx.functions import add_functions, symbolic_forms
from motionrt.export.onnx.rewrites import rewrite
from motionrt.export.onnx.torch_programs import ParityError

Feed = Mapping[str, Tensor]
OPSET = 23
_RESULT = "result of "  # the exporter does not keep output names apart from those of inner values: no inner one starts so


@dataclass(frozen=True)
class Range:
    """A dynamic size: allowed from `min` to `max`, tuned for `opt`."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True)
class Example:
    """Inputs of a graph at given sizes, such as `{"batch": 2}`."""

    sizes: Mapping[str, int]
    feed: Feed


def dynamic_axes(first: Tensor, second: Tensor, a: Mapping[str, int], b: Mapping[str, int]) -> dict[int, tuple[str, int]]:
    """Axes that change between two examples: axis -> (size name, factor), factor * size being the axis's length.

    Raises ValueError where a length follows no declared size.
    """
    axes: dict[int, tuple[str, int]] = {}
    for axis, (left, right) in enumerate(zip(first.shape, second.shape, strict=True)):
        if left == right:
            continue
        for name in a:
            factor, rest = divmod(left, a[name])
            if rest == 0 and a[name] != b[name] and factor * b[name] == right:
                axes[axis] = (name, factor)
                break
        else:
            raise ValueError(f"axis {axis} is {left} at sizes {dict(a)} and {right} at {dict(b)}: no size explains it")
    return axes


def port(name: str, value: Tensor, axes: Mapping[int, tuple[str, int]], ranges: Mapping[str, Range]) -> dict[str, Any]:
    """The manifest's declaration of an input or output."""
    dims: list[Any] = list(value.shape)
    for axis, (size, factor) in axes.items():
        span = ranges[size]
        dims[axis] = {
            "name": size if factor == 1 else f"{factor}*{size}",
            "min": factor * span.min,
            "opt": factor * span.opt,
            "max": factor * span.max,
        }
    return {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "dims": dims}


def onnx_from_torch(
    path: Path,
    module: nn.Module,
    examples: Sequence[Example],
    outputs: Sequence[str],
    ranges: Mapping[str, Range],
    *,
    atol: float = 2e-5,
    opset: int = OPSET,
    external: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, Any]:
    """Write `module` to `path` (whole or not at all) and return its ports: `{"inputs": [...], "outputs": [...]}`.

    The first example is traced; all are checked: |ONNX Runtime - torch| <= atol * max(1, max |torch|), or `ParityError`.
    `external` names tensors that stay outside: an initializer equal to one takes its name and holds no data.
    """
    module = module.eval()
    first, second = examples[0], examples[1]
    names = list(first.feed)
    axes = {n: dynamic_axes(first.feed[n], second.feed[n], first.sizes, second.sizes) for n in names}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            module, tuple(first.feed.values()), dynamic_shapes=dynamic_shapes(module, examples, ranges), strict=False
        )
        program = program.run_decompositions(symbolic_forms())
        exported = torch.onnx.export(
            program,
            input_names=names,
            output_names=[f"{_RESULT}{name}" for name in outputs],
            opset_version=opset,
            dynamo=True,
            verbose=False,
            optimize=False,
        )
        assert exported is not None
        with quick_rules():
            exported.optimize()
        rewrite(exported.model)
    model = bare(_compact(exported.model_proto, external or {}))
    wanted = [outputs_of(module, example.feed) for example in examples]
    _publish(path, model, outputs, examples, wanted, atol, external or {})
    results = {n: dynamic_axes(x, y, first.sizes, second.sizes) for n, x, y in zip(outputs, wanted[0], wanted[1], strict=True)}
    return {
        "inputs": [port(n, first.feed[n], axes[n], ranges) for n in names],
        "outputs": [port(n, x, results[n], ranges) for n, x in zip(outputs, wanted[0], strict=True)],
    }


def dynamic_shapes(module: nn.Module, examples: Sequence[Example], ranges: Mapping[str, Range]) -> Any:
    """The `dynamic_shapes` of `torch.export.export` for `module`: the axes in which the first two examples differ."""
    first, second = examples[0], examples[1]
    symbols = {n: torch.export.Dim(n, min=span.min, max=span.max) for n, span in ranges.items()}
    shapes = []
    for name in first.feed:
        axes = dynamic_axes(first.feed[name], second.feed[name], first.sizes, second.sizes)
        shapes.append({i: symbols[size] if factor == 1 else factor * symbols[size] for i, (size, factor) in axes.items()})
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    return (tuple(shapes),) if inspect.Parameter.VAR_POSITIONAL in kinds else tuple(shapes)


@contextlib.contextmanager
def quick_rules() -> Iterator[None]:
    """While this is open, onnxscript's optimiser leaves out its one rule over pairs of nodes (two slices that are a split).

    For every node that rule looks at all slices of the graph: 5 of 7 s at 6 blocks of CogVideoX, and it grows with their
    square. Where a graph has such a pair, two nodes stay in the place of one.
    """
    from onnxscript import rewriter

    rules = tuple(rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name != "SlicesSplit")
    with mock.patch.object(rewriter, "_DEFAULT_REWRITE_RULES", rules):
        yield


def outputs_of(module: nn.Module, feed: Feed) -> list[Tensor]:
    """The outputs of `module` on a feed, as a list."""
    with torch.no_grad():
        result = module(*feed.values())
    return [result] if isinstance(result, Tensor) else list(result)


def _compact(model: onnx.ModelProto, external: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """Store weights as fp16 with a cast where that loses nothing, and leave `external` ones out."""
    known = {(v.shape, hash(v.tobytes())): k for k, v in external.items()}
    graph, renamed, casts = model.graph, {}, []
    shells: dict[str, onnx.TensorProto] = {}
    for tensor in list(graph.initializer):
        value = onnx.numpy_helper.to_array(tensor)
        outside = known.get((value.shape, hash(value.tobytes())))
        flipped = None
        if outside is None and value.ndim == 2:  # the exporter stores some weights transposed
            flipped = known.get((value.T.shape, hash(np.ascontiguousarray(value.T).tobytes())))
        if source := outside or flipped:
            if source not in shells:
                shells[source] = onnx.TensorProto(
                    name=source,
                    data_type=tensor.data_type,
                    dims=external[source].shape,
                    data_location=onnx.TensorProto.EXTERNAL,
                )
                shells[source].external_data.add(key="location", value="weights-stay-in-their-package")
            if flipped:
                casts.append(onnx.helper.make_node("Transpose", [source], [tensor.name], perm=[1, 0]))
            else:
                renamed[tensor.name] = source
            graph.initializer.remove(tensor)
        elif value.dtype == np.float32 and value.size >= 64:
            with np.errstate(over="ignore"):
                half = value.astype(np.float16)
            if np.array_equal(half.astype(np.float32), value):
                casts.append(onnx.helper.make_node("Cast", [f"{tensor.name}.half"], [tensor.name], to=onnx.TensorProto.FLOAT))
                tensor.CopyFrom(onnx.numpy_helper.from_array(half, f"{tensor.name}.half"))
    graph.initializer.extend(shells.values())
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    body = list(graph.node)
    del graph.node[:]
    graph.node.extend(casts + body)
    return model


def bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its names and functions, and without what only its making needed: paths of the build machine among it."""
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


def _name_outputs(model: onnx.ModelProto) -> None:
    """Give outputs their names, and inner values that had the same name another."""
    graph = model.graph
    names = {f"{_RESULT}{n}": n for n in (v.name.removeprefix(_RESULT) for v in graph.output)}
    names |= {n: f"{n}.inner" for n in list(names.values())}
    for value in graph.input:
        names.pop(value.name, None)
    for node in graph.node:
        for field in (node.input, node.output):
            for index, name in enumerate(field):
                field[index] = names.get(name, name)
    for value in graph.output:
        value.name = value.name.removeprefix(_RESULT)


def _publish(
    path: Path,
    model: onnx.ModelProto,
    outputs: Sequence[str],
    examples: Sequence[Example],
    wanted: Sequence[Sequence[Tensor]],
    atol: float,
    external: Mapping[str, NDArray[Any]],
) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_bytes(model.SerializeToString(deterministic=True))
        keep = {n: np.ascontiguousarray(external[n]) for n in external_names(model)}
        check_parity(partial, path.stem, outputs, examples, wanted, atol, keep)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_parity(
    path: Path, graph: str, outputs: Sequence[str], examples: Sequence[Example], wanted: Sequence[Sequence[Tensor]],
    atol: float, external: Mapping[str, NDArray[Any]] | None = None,
) -> None:  # fmt: skip
    """`ParityError` unless ONNX Runtime gives `wanted` for the examples with the file `path`, within atol * max(1, max)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if external:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in external.values()]
        options.add_external_initializers(list(external), values)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for example, reference_values in zip(examples, wanted, strict=True):
        got = session.run(list(outputs), {name: value.numpy() for name, value in example.feed.items()})
        for name, ours, theirs in zip(outputs, got, reference_values, strict=True):
            error = float(np.abs(ours - theirs.numpy()).max(initial=0.0))
            limit = atol * max(1.0, float(theirs.abs().max()))
            if tuple(ours.shape) != tuple(theirs.shape) or not error <= limit:
                raise ParityError(
                    f"graph {graph}, output `{name}` at {dict(example.sizes)}: ONNX Runtime differs from torch by "
                    f"{error:.2e}, allowed {limit:.2e} (shapes {ours.shape}, {tuple(theirs.shape)})"
                )


def external_names(model: onnx.ModelProto) -> list[str]:
    """Initializers of a graph whose values live elsewhere."""
    return [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
