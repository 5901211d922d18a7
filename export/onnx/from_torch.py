"""What every ONNX graph of a module has: examples, declared ports, the optimiser, and the proof that ONNX Runtime agrees.

Which axes are dynamic is not written down twice: it is read off two example feeds that differ in their sizes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from motionrt.export.onnx.functions import add_functions
from motionrt.export.onnx.torch_programs import compare

Feed = Mapping[str, Tensor]
OPSET = 23
RESULT = "result of "  # the exporter does not keep output names apart from those of inner values: no inner one starts so


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


def dynamic_shapes(module: nn.Module, examples: Sequence[Example], ranges: Mapping[str, Range]) -> Any:
    """The `dynamic_shapes` of `torch.export.export` for `module`: the axes in which the first two examples differ."""
    first, second = examples[0], examples[1]
    symbols = {n: torch.export.Dim(n, min=span.min, max=span.max) for n, span in ranges.items()}
    shapes = []
    for name in first.feed:
        axes = dynamic_axes(first.feed[name], second.feed[name], first.sizes, second.sizes)
        shapes.append({i: symbols[size] if factor == 1 else factor * symbols[size] for i, (size, factor) in axes.items()})
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(shapes)
    named = kinds.index(inspect.Parameter.VAR_POSITIONAL)  # the others are one argument, a tuple, if there are any
    return (*shapes[:named], tuple(shapes[named:])) if shapes[named:] else tuple(shapes)


def optimise(model: ir.Model) -> None:
    """onnxscript's optimiser (`optimize_ir`), without its one rule over pairs of nodes (two slices that are a split).

    For every node that rule looks at all slices of the graph: 5 of 7 s at 6 blocks of CogVideoX, and it grows with their
    square. Where a graph has such a pair, two nodes stay in the place of one.
    """
    from onnxscript import rewriter
    from onnxscript.optimizer import _constant_folding as folding

    rules = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name != "SlicesSplit"]
    fold = folding.FoldConstantsPass(
        shape_inference=True,
        input_size_limit=folding.DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
        output_size_limit=folding.DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
    )
    unused = [common.RemoveUnusedNodesPass(), common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass()]
    ir.passes.Sequential(
        common.InlinePass(),
        ir.passes.PassManager([fold, rewriter.RewritePass(rules), *unused], steps=2, early_stop=True),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def outputs_of(module: nn.Module, feed: Feed) -> list[Tensor]:
    """The outputs of `module` on a feed, as a list."""
    with torch.no_grad():
        result = module(*feed.values())
    return [result] if isinstance(result, Tensor) else list(result)


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
    names = {f"{RESULT}{n}": n for n in (v.name.removeprefix(RESULT) for v in graph.output)}
    names |= {n: f"{n}.inner" for n in list(names.values())}
    for value in graph.input:
        names.pop(value.name, None)
    for node in graph.node:
        for field in (node.input, node.output):
            for index, name in enumerate(field):
                field[index] = names.get(name, name)
    for value in graph.output:
        value.name = value.name.removeprefix(RESULT)


def check_parity(
    path: Path, outputs: Sequence[str], examples: Sequence[Example], wanted: Sequence[Sequence[Tensor]],
    atol: float, external: Mapping[str, NDArray[Any]] | None = None,
) -> None:  # fmt: skip
    """`ParityError` unless ONNX Runtime gives `wanted` for the examples with the file `path`, within atol * max(1, max)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if external:
        held = onnx.load(path, load_external_data=False).graph.initializer
        names = [tensor.name for tensor in held if tensor.name in external]
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(external[name])) for name in names]
        options.add_external_initializers(names, values)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for example, reference_values in zip(examples, wanted, strict=True):
        got = session.run(list(outputs), {name: value.numpy() for name, value in example.feed.items()})
        for name, ours, theirs in zip(outputs, got, reference_values, strict=True):
            what = f"graph {path.stem}, output `{name}` at {dict(example.sizes)}: ONNX Runtime"
            compare(what, torch.from_numpy(ours), theirs, atol)
