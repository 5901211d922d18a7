"""The one exporter: any `System` as a bundle, whole or not at all.

    lines = export_system(system, out, say=print)     # what became of the keys of its files, a line each

Weights of published models are streamed: the largest thing in memory is one tensor. A module that is in memory is checked against
its graph. bundle.json is filled in from the structs that the run side reads it by, and read once more before it is published.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.numpy import save_file
from torch import nn

import motionrt
from motionrt.export.compiler.partition import Partition, Program, partition
from motionrt.export.compiler.weightless import fake_partition, weights_by_class
from motionrt.export.onnx.from_torch import Example, onnx_from_torch
from motionrt.export.onnx.streamed import stream_module, stream_program, stream_real
from motionrt.export.onnx.torch_programs import FOLDER as PROGRAMS
from motionrt.export.systems.system import Graph, Step, System
from motionrt.runtime.bundle.manifest import FORMAT, MemorySpec, Node, read_manifest
from motionrt.runtime.files import sha256_of

Say = Callable[[str], None]
_TABLES = "rows.safetensors"


def silent(text: str) -> None:
    """Says nothing."""


def export_system(system: System, out: Path, *, programs: bool = True, say: Say = silent) -> list[str]:
    """Write the bundle `out`, whole or not at all; what became of the keys of its files, one line per file.

    `programs`: with the torch programs of the loops' graphs; `say` is told which graph is next. Nothing but weights is read from
    here on: `system` was checked when it was made. Raises `ParityError` for a graph that does not give what its module gives.
    """
    with staged(out) as folder:
        writer = Writer(folder, programs, say)
        for name, graph in system.graphs.items():
            writer.add(name, graph)
        reports = [writer.cut(step) for step in system.steps]
        writer.finish(system, reports)
    return [report.summary() for report in system.reports]


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A directory to write into; it takes the place of `out` when the block ends well, and vanishes otherwise."""
    partial, old = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    (partial / "graphs").mkdir(parents=True)
    (partial / "tokenizers").mkdir()
    try:
        yield partial
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


class Writer:
    """The files of one bundle in the making: graphs are added one after the other, then `finish`. `graphs`: their entries."""

    def __init__(self, folder: Path, programs: bool, say: Say) -> None:
        self.folder, self.programs, self.say = folder, programs, say
        self.graphs: dict[str, dict[str, Any]] = {}
        self.tables: dict[str, list[str]] = {}  # graph of a loop -> graphs that make tables for all of its steps

    def add(self, name: str, graph: Graph) -> None:
        """Write one graph; its network stays as it is."""
        self.say(name)
        path, network, examples = self._path(name), graph.network, graph.examples()
        if network.package is not None:
            outside = {key: lazy.read().numpy() for key, lazy in (network.weights or {}).items()}
            entry = onnx_from_torch(path, network.module, examples, graph.outputs, graph.sizes, external=outside)
            entry["weights"] = msgspec.to_builtins(network.package)
        elif network.weights is None:
            entry = stream_real(path, network.module, examples, graph.outputs, graph.sizes)
        else:
            held = self.folder / self.graphs[graph.weights_of]["data"]["file"] if graph.weights_of else None
            module = copy.deepcopy(network.module)  # a trace uses up a module without weights
            entry = stream_module(path, module, examples, graph.outputs, network.weights.get, graph.sizes, held=held)
            if graph.weights_of:
                entry["data"] = self.graphs[graph.weights_of]["data"]
        if network.wide:
            entry["wide"] = list(network.wide)
        self._keep(name, entry)
        gc.collect()

    def cut(self, step: Step) -> dict[str, Any]:
        """Write the graphs that a step is cut into, with their torch programs; what the manifest says of the cut."""
        self.say("partition")
        raise NotImplementedError

    def _path(self, name: str) -> Path:
        return self.folder / "graphs" / f"{name}.onnx"

    def _keep(self, name: str, entry: dict[str, Any]) -> None:
        self.graphs[name] = {"file": f"graphs/{name}.onnx", "sha256": sha256_of(self._path(name)), **entry}

    def finish(self, system: System, partitions: list[dict[str, Any]]) -> None:
        """Write rows, tokenizers, keys.json and bundle.json; `BundleError` for a manifest that the run side would not take."""
        schedules = {
            f"{loop}/{name}/{steps}": rows
            for loop, entries in system.schedules.items()
            for name, lengths in entries.items()
            for steps, rows in lengths.items()
        }
        save_file(schedules, self.folder / _TABLES)
        for name, tokenizer in system.tokenizers.items():
            (self.folder / "tokenizers" / f"{name}.json").write_text(tokenizer.json, encoding="utf-8")
        if system.reports:
            keys = json.dumps([asdict(report) for report in system.reports], indent=1)
            (self.folder / "keys.json").write_text(f"{keys}\n", encoding="utf-8")
        made = [graph for tables in self.tables.values() for graph in tables]
        there = {*self.graphs, *system.loops}
        loops = {
            name: msgspec.structs.replace(loop, tables=tuple(t for graph in loop.graphs for t in self.tables.get(graph, ())))
            for name, loop in system.loops.items()
        }
        manifest = {
            "format": FORMAT,
            "name": system.name,
            "motionrt": motionrt.__version__,
            "inputs": _sparse(system.inputs),
            "plan": [_sparse(node) for node in system.plan if _name(node) in there and _name(node) not in made],
            "loops": _sparse(loops),
            "graphs": self.graphs,
            "tables": self._file(_TABLES),
            "output": _sparse(system.output),
            "memory": None if system.memory is None else _sparse(self._fingerprinted(system, system.memory)),
            "tokenizers": {
                name: {**self._file(f"tokenizers/{name}.json"), "max_length": text.max_length, "pad_id": text.pad_id}
                for name, text in system.tokenizers.items()
            },
            "approximations": [msgspec.to_builtins(entry) for entry in system.approximations],
            "partition": partitions[0] if len(partitions) == 1 else dict(enumerate(partitions)),
            "provenance": {**system.provenance, "torch": torch.__version__},
        }
        (self.folder / "bundle.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        read_manifest(self.folder / "bundle.json")

    def _file(self, relative: str) -> dict[str, str]:
        return {"file": relative, "sha256": sha256_of(self.folder / relative)}

    def _fingerprinted(self, system: System, memory: MemorySpec) -> MemorySpec:
        """`memory` with the SHA-256 of all that made its vectors and records: networks, tokenizer, clip size and record."""
        networks = {name: system.graphs[name].network.digest() for name in (memory.query, *memory.graphs)}
        made = {
            "networks": networks,
            "tokenizer": hashlib.sha256(system.tokenizers[memory.tokenizer].json.encode()).hexdigest(),
            "clip": msgspec.to_builtins(memory.clip),
            "record": msgspec.to_builtins(memory.record),
        }
        text = json.dumps(made, sort_keys=True)
        return msgspec.structs.replace(memory, fingerprint=hashlib.sha256(text.encode()).hexdigest())


def _name(node: str | Node) -> str:
    return node if isinstance(node, str) else node.graph


def _sparse(value: Any) -> Any:
    """A struct of the manifest as JSON, without what says nothing: null, and empty lists and objects."""
    value = msgspec.to_builtins(value, str_keys=True)
    if isinstance(value, dict):
        return {key: _sparse(entry) for key, entry in value.items() if entry is not None and entry != {} and entry != []}
    return [_sparse(entry) for entry in value] if isinstance(value, list | tuple) else value
