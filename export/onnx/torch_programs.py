"""Torch programs of a bundle: what the torch backend runs. An optional part, saved by `torch.export.save`.

    entry = write_program(stage / "programs" / "step.pt2", module, feed, outputs, dynamic_shapes)

A program is the graph alone, typed in float32: its weights are inputs, which the backend takes from the file beside the ONNX
graph of the same name, so a bundle holds them once.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from motionrt.export.compiler.graph_edit import functional
from motionrt.runtime.backends.torch_program import WEIGHTS, load_program
from motionrt.runtime.files import sha256_of

FOLDER = "programs"


class ParityError(RuntimeError):
    """An exported graph or program does not give what its module gives; nothing is published."""


class _Lifted(nn.Module):
    """A module whose weights are arguments: `forward([weights in order], *inputs)`."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.__dict__["inner"], self.names = module, tuple(names)  # not a part of this one: it would keep its weights

    def forward(self, weights: list[Tensor], *inputs: Tensor) -> Any:
        inner: nn.Module = self.__dict__["inner"]
        return torch.func.functional_call(inner, dict(zip(self.names, weights, strict=True)), inputs)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """All that a program of `module` takes as weights, in that order: parameters and tables."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def write_program(
    path: Path, module: nn.Module, feed: Mapping[str, Tensor], outputs: Sequence[str], dynamic_shapes: Any = None,
    stored: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:  # fmt: skip
    """Write the program of `module` to `path`, whole or not at all; its entry in the manifest's `programs`.

    `feed`: inputs by name, real or fake like the module's weights; `dynamic_shapes` as `torch.export.export` takes them for
    these inputs alone. `stored`: names that weights are stored under, if others.
    """
    state = weights_of(module)
    names, weights = list(state), [value.detach() for value in state.values()]
    shapes = dynamic_shapes
    if shapes is not None:
        inner = shapes[0] if len(shapes) == 1 and isinstance(shapes[0], tuple) else shapes  # of *inputs: one tuple of them
        shapes = ([None] * len(names), tuple(inner))
    partial = path.with_name(f"{path.stem}.partial.pt2")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lifted = _Lifted(module, names).eval()
            program = torch.export.export(lifted, (weights, *feed.values()), dynamic_shapes=shapes, strict=False)
            if not functional(module):
                program = program.run_decompositions({})  # assignments to slices as values, and nothing taken apart
            places = json.dumps([stored.get(name, name) for name in names])
            torch.export.save(_bare(program), partial, extra_files={WEIGHTS: places})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return {
        "file": f"{FOLDER}/{path.name}",
        "sha256": sha256_of(path),
        "torch": torch.__version__,
        "inputs": list(feed),
        "outputs": list(outputs),
    }


def check_program(
    path: Path, entry: Mapping[str, Any], data: Path | None, examples: Sequence[Any], wanted: Sequence[Sequence[Tensor]],
    atol: float,
) -> None:  # fmt: skip
    """`ParityError` unless the program in `path`, with weights from the file `data`, gives the outputs `wanted` for the
    examples: |program - wanted| <= atol * max(1, max |wanted|)."""
    run = load_program(path, path.stem, data, torch.device("cpu"))
    for example, outputs in zip(examples, wanted, strict=True):
        with torch.no_grad():
            got = run.module(*example.feed.values())
        for name, ours, theirs in zip(entry["outputs"], got, outputs, strict=True):
            compare(f"program {path.stem}, output `{name}` at {dict(example.sizes)}: it", ours, theirs, atol)


def compare(what: str, ours: Tensor, theirs: Tensor, atol: float) -> None:
    """`ParityError` unless |ours - theirs| <= atol * max(1, max |theirs|), of the same shape and dtype."""
    alike = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    error = float((ours.double() - theirs.double()).abs().amax()) if alike and theirs.numel() else 0.0
    limit = atol * max(1.0, float(theirs.abs().max()) if theirs.numel() else 0.0)
    if not alike or not error <= limit:
        raise ParityError(
            f"{what} differs from its module by {error:.2e}, allowed {limit:.2e} ({ours.dtype} {tuple(ours.shape)}, "
            f"{theirs.dtype} {tuple(theirs.shape)})"
        )


def _bare(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """`program` without what only its making needed."""
    program._example_inputs = None  # they would be pickled, and they can be as large as the weights
    symbols: set[str] = set()
    for node in program.graph.nodes:
        for note in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
            node.meta.pop(note, None)  # paths of the build machine do not travel
        for leaf in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            for size in leaf.shape if isinstance(leaf, Tensor) else [leaf]:
                if isinstance(size, torch.SymInt):
                    symbols |= {str(symbol) for symbol in size.node.expr.free_symbols}
    unused = [symbol for symbol in program._range_constraints if str(symbol) not in symbols]
    for symbol in unused:  # the loader warns of each
        del program._range_constraints[symbol]
    return program
