"""Torch programs of a bundle: what the torch backend runs. An optional part, saved by `torch.export.save`.

    entry = program_from_torch(stage / "programs" / "step.pt2", module, examples, outputs, ranges)   # while exporting
    add_programs(bundle, {"step": (module, examples, outputs)}, ranges)                              # to a finished bundle

Takes what `onnx_from_torch` takes, so an exporter writes both forms of a graph from the same line.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from motionrt.export.onnx_from_torch import Example, ParityError, Range, dynamic_shapes
from motionrt.runtime.bundle import Bundle
from motionrt.runtime.manifest import read_manifest, sha256_of
from motionrt.runtime.torch_program import load_program

FOLDER = "programs"


def program_from_torch(
    path: Path,
    module: nn.Module,
    examples: Sequence[Example],
    outputs: Sequence[str],
    ranges: Mapping[str, Range],
    *,
    atol: float = 2e-5,
) -> dict[str, Any]:
    """Write `module` to `path` (whole or not at all) and return its entry in the manifest's `programs`.

    The first example is traced; the saved file is loaded again and checked on all: |program - module| <= atol * max(1,
    max |module|), or `ParityError`. The program keeps the module's dtypes; the backend casts at its edges.
    """
    module = module.eval()
    partial = path.with_name(f"{path.stem}.partial.pt2")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shapes = dynamic_shapes(module, examples, ranges)
            program = torch.export.export(module, tuple(examples[0].feed.values()), dynamic_shapes=shapes, strict=False)
            torch.export.save(_bare(program), partial)
            again = load_program(partial, path.stem, torch.device("cpu")).module(check_guards=False)
        for example in examples:
            for name, want, got in zip(outputs, _results(module, example), _results(again, example), strict=True):
                error = float((want.double() - got.double()).abs().max()) if want.numel() else 0.0
                limit = atol * max(1.0, float(want.abs().max())) if want.numel() else 0.0
                if want.shape != got.shape or want.dtype != got.dtype or not error <= limit:
                    raise ParityError(
                        f"program {path.stem}, output `{name}` at {dict(example.sizes)}: it differs from its module by "
                        f"{error:.2e}, allowed {limit:.2e} (shapes {tuple(got.shape)}, {tuple(want.shape)})"
                    )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return {
        "file": f"{FOLDER}/{path.name}",
        "sha256": sha256_of(path),
        "torch": torch.__version__,
        "inputs": list(examples[0].feed),
        "outputs": list(outputs),
    }


def _results(module: nn.Module, example: Example) -> list[torch.Tensor]:
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(module(*example.feed.values()))


def _bare(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """`program` without what only its making needed."""
    program._example_inputs = None  # they would be pickled, and they can be as large as the weights
    symbols: set[str] = set()
    for node in program.graph.nodes:
        for note in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
            node.meta.pop(note, None)  # paths of the build machine do not travel
        for leaf in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            for size in leaf.shape if isinstance(leaf, torch.Tensor) else [leaf]:
                if isinstance(size, torch.SymInt):
                    symbols |= {str(symbol) for symbol in size.node.expr.free_symbols}
    unused = [symbol for symbol in program._range_constraints if str(symbol) not in symbols]
    for symbol in unused:  # the loader warns of each
        del program._range_constraints[symbol]
    return program


def add_programs(
    bundle: Path,
    modules: Mapping[str, tuple[nn.Module, Sequence[Example], Sequence[str]]],
    ranges: Mapping[str, Range],
) -> Bundle:
    """Write a program for each of `modules` (name -> module, examples, outputs) into the bundle directory, all or none.

    Programs that it had before are replaced; if writing or checking one fails, the bundle is what it was. Returns the
    bundle, opened anew; raises `BundleError` for names or ports that it does not declare, `ParityError`.
    """
    opened = Bundle.open(bundle)
    partial, final = bundle / f"{FOLDER}.partial", bundle / FOLDER
    shutil.rmtree(partial, ignore_errors=True)
    try:
        entries = {}
        for name, (module, examples, outputs) in modules.items():
            opened.graph(name)
            entries[name] = program_from_torch(partial / f"{name}.pt2", module, examples, outputs, ranges)
        text = json.dumps({**opened.manifest, "programs": entries}, indent=1) + "\n"
        manifest = partial / "bundle.json"
        manifest.write_text(text, encoding="utf-8")
        read_manifest(manifest)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        os.replace(final / "bundle.json", bundle / "bundle.json")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Bundle.open(bundle)
