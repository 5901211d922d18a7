"""The one exporter: any `System` as a bundle, whole or not at all.

    lines = export_system(system, out, say=print)     # what became of the keys of its files, a line each

Weights of published models are streamed: the largest thing in memory is one tensor. Of a module that is in memory, graphs are
checked against it. bundle.json is filled in from the structs that the run side reads, and read before it is published.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

import motionrt
from motionrt.export.compiler.gradients import differentiated
from motionrt.export.compiler.partition import Partition, Program, any_rows, partition
from motionrt.export.compiler.weightless import fake_partition, weights_by_class
from motionrt.export.onnx.from_torch import Example
from motionrt.export.onnx.streamed import stream_module, stream_program, stream_real
from motionrt.export.onnx.torch_programs import FOLDER as PROGRAMS
from motionrt.export.systems.system import ALL, Graph, Step, System
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.manifest import FORMAT, MemorySpec, Node
from motionrt.runtime.files import STAMPS, replacing_folder, sealed, sha256_of

Say = Callable[[str], None]
_TABLES = "rows.safetensors"
OVER_STEPS = ("schedule", "timeline")  # classes of the compiler whose graphs take all timesteps at once


def silent(text: str) -> None:
    """Says nothing."""


def export_system(system: System, out: Path, *, programs: bool = True, say: Say = silent) -> list[str]:
    """Write the bundle `out`, whole or not at all; what became of the keys of its files, one line per file.

    `programs`: with the torch programs of the loops' graphs; `say` is told which graph is next. Nothing but weights is read
    here: `system` was checked when it was made. Raises `ParityError` for a graph that does not give what its module gives.
    """
    loops = {f"step{step.suffix}" for step in system.steps}  # graphs that others may take weights of
    with replacing_folder(out) as folder:
        writer = Writer(folder, programs, say)
        for name, graph in system.graphs.items():
            if graph.weights_of not in loops:
                writer.add(name, graph)
        reports = [report for step in system.steps if (report := writer.cut(step))["hoisted"] or len(system.steps) == 1]
        for name, graph in system.graphs.items():
            if graph.weights_of in loops:
                writer.add(name, graph)
        writer.finish(system, reports)
    return [report.summary() for report in system.reports]


class Writer:
    """The files of one bundle in the making: graphs are added one after the other, then `finish`. `graphs`: their entries."""

    def __init__(self, folder: Path, programs: bool, say: Say) -> None:
        self.folder, self.programs, self.say = folder, programs, say
        for inside in ("graphs", "tokenizers"):
            (folder / inside).mkdir(parents=True, exist_ok=True)
        self.graphs: dict[str, dict[str, Any]] = {}
        self.tables: dict[str, list[str]] = {}  # graph of a loop -> graphs that make tables for all of its steps
        self.empty: set[str] = set()  # graphs that a cut left nothing for

    def add(self, name: str, graph: Graph) -> None:
        """Write one graph; its network stays as it is."""
        self.say(name)
        path, network, examples, shared = self._path(name), graph.network, graph.examples(), self._shared(graph.weights_of)
        if graph.real:
            outside = {name: lazy.read().numpy() for name, lazy in (network.weights or {}).items()}
            entry = stream_real(
                path, network.module, examples, graph.outputs, graph.sizes, external=outside, shared=shared
            )
            if network.package is not None:
                entry["weights"] = msgspec.to_builtins(network.package)
        else:
            module = copy.deepcopy(network.module)  # a trace uses up a module without weights
            find = (network.weights or {}).get
            entry = stream_module(path, module, examples, graph.outputs, find, graph.sizes, shared=shared)
        if graph.weights_of:
            entry["data"] = self.graphs[graph.weights_of]["data"]
        if network.wide:
            entry["wide"] = list(network.wide)
        self._keep(name, entry)
        gc.collect()

    def cut(self, step: Step) -> dict[str, Any]:
        """Write the graphs that a step is cut into, with their torch programs; what the manifest says of the cut."""
        self.say("partition")
        module, weights, feeds = step.network.module, step.network.weights, step.examples()
        if weights is not None:
            module = copy.deepcopy(module)  # a trace uses up a module without weights, and others may share it
        traced = differentiated if step.gradient else None
        if weights is None:
            first = tuple(feeds[0].values())
            rows = torch.export.Dim("batch", min=1, max=step.most) if step.most > 1 else None
            cut = partition(
                module if traced is None else traced(module, first), first, step.changes, outputs=step.outputs,
                dynamic_shapes=None if rows is None else tuple({0: rows} for _ in first), suffix=step.suffix,
            )
        else:
            cut = fake_partition(
                module, tuple(feeds[-1].values()), step.changes, outputs=step.outputs, batch=step.most, suffix=step.suffix,
                traced=traced,
            )
        for kind, program in cut.programs.items():
            name = f"{kind}{step.suffix}"
            if not program.outputs:
                self.empty.add(name)
                continue
            self.say(name)
            if step.most == 1 and kind == "schedule":
                any_rows(program.module)
            torch_program = self.folder / PROGRAMS / f"{name}.pt2" if self.programs else None
            shared = self._shared(step.weights_of) if kind == "step" else None
            if weights is None:
                examples = _program_examples(cut, kind, feeds, step.most == 1)
                sizes = {name: span for name, span in step.sizes.items() if name in examples[0].sizes}
                entry = stream_real(
                    self._path(name), program.module, examples, program.outputs, sizes, torch_program=torch_program,
                    shared=shared,
                )
            else:
                entry = stream_program(self._path(name), cut, kind, weights.get, step.sizes, torch_program, shared)
            if shared is not None:
                entry["data"] = self.graphs[step.weights_of or ""]["data"]
            self._keep(name, entry)
            if kind in OVER_STEPS:
                self.tables.setdefault(f"step{step.suffix}", []).append(name)
        if step.plain:
            self.say(f"step{step.suffix}_plain")
            examples = [Example({"batch": _rows(feed)}, feed) for feed in feeds]
            name = f"step{step.suffix}_plain"
            self._keep(name, stream_real(self._path(name), module, examples, step.outputs, step.sizes))
        widths = {name: lazy.dtype.itemsize for name, lazy in (weights or {}).items()}
        classes = {kind: asdict(size) for kind, size in weights_by_class(cut, widths).items()}
        return {**cut.report(), "weights": classes}

    def _shared(self, name: str | None) -> Path | None:
        """The file of graph `name`'s weights."""
        return None if name is None else self.folder / self.graphs[name]["data"]["file"]

    def _path(self, name: str) -> Path:
        return self.folder / "graphs" / f"{name}.onnx"

    def _keep(self, name: str, entry: dict[str, Any]) -> None:
        self.graphs[name] = {"file": f"graphs/{name}.onnx", "sha256": sha256_of(self._path(name)), **entry}

    def finish(self, system: System, partitions: list[dict[str, Any]]) -> None:
        """Write rows, tokenizers, keys.json and bundle.json; `BundleError` for a manifest that the run side would not take."""
        schedules = {
            f"{loop}/{name}/{steps}": np.ascontiguousarray(rows)  # safetensors writes a view's memory as it lies there
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
        nodes = [node if isinstance(node, Node) else Node(node) for node in system.plan]
        plan = [self._spelt(node) for node in nodes if node.graph not in self.empty]
        ended = {node.writes[ALL]: self._given(node) for node in nodes if ALL in node.writes}
        loops = {
            name: msgspec.structs.replace(
                loop, tables=(*loop.tables, *(t for graph in loop.run for t in self.tables.get(graph, ()))),
                ahead={step: tuple(self._reading(node, ended) for node in ahead) for step, ahead in loop.ahead.items()},
            )
            for name, loop in system.loops.items()
        }  # fmt: skip
        manifest = {
            "format": FORMAT,
            "name": system.name,
            "motionrt": motionrt.__version__,
            "inputs": _sparse(system.inputs),
            "plan": [_sparse(node if node.reads or node.writes else node.graph) for node in plan],
            "loops": _sparse(loops),
            "graphs": self.graphs,
            "tables": self._file(_TABLES),
            "output": _sparse(system.output),
            "memory": None if system.memory is None else _sparse(self.fingerprinted(system, system.memory)),
            "tokenizers": {
                name: {**self._file(f"tokenizers/{name}.json"), "max_length": text.max_length, "pad_id": text.pad_id}
                for name, text in system.tokenizers.items()
            },
            "approximations": [msgspec.to_builtins(entry) for entry in system.approximations],
            "partition": partitions[0] if len(partitions) == 1 else dict(enumerate(partitions)),
            "provenance": {**system.provenance, **self._counted(system, partitions), "torch": torch.__version__},
        }
        (self.folder / "bundle.json").write_text(json.dumps(sealed(manifest), indent=1) + "\n", encoding="utf-8")
        Bundle.open(self.folder)  # what the run side would not open is not published
        (self.folder / STAMPS).unlink(missing_ok=True)

    def _given(self, node: Node) -> list[str]:
        """What the graph of a node gives; nothing where a cut left nothing for it."""
        return [port["name"] for port in self.graphs[node.graph]["outputs"]] if node.graph in self.graphs else []

    def _spelt(self, node: Node) -> Node:
        """A node of the plan with every name that `ALL` stands for."""
        if (end := node.writes.get(ALL)) is None:
            return node
        return msgspec.structs.replace(node, writes={name: f"{name}_{end}" for name in self._given(node)})

    def _reading(self, node: Node, ended: Mapping[str, Sequence[str]]) -> Node:
        """A call ahead of a step with every name that `ALL` stands for; `ended`: end -> names that the plan gives with it."""
        if (end := node.reads.get(ALL)) is None:
            return node
        own, there = {port["name"] for port in self.graphs[node.graph]["inputs"]}, ended[end]
        reads = {port: value for port, value in node.reads.items() if port in own}
        return msgspec.structs.replace(node, reads=reads | {name: f"{name}_{end}" for name in there if name in own})

    def _counted(self, system: System, partitions: list[dict[str, Any]]) -> dict[str, Any]:
        """Lines about the keys; bytes that each graph keeps resident, of a request's state, and of a row of the tables."""
        files = {name: self.folder / entry["data"]["file"] for name, entry in self.graphs.items() if "data" in entry}
        hoisted = [tensor for partition in partitions for tensor in partition["hoisted"]]
        memory = {
            "weights": {name: files[name].stat().st_size if name in files else 0 for name in self.graphs},
            "request_state": sum(tensor["bytes"] for tensor in hoisted if tensor["class"] == "request"),
            "schedule_row": sum(tensor["bytes"] for tensor in hoisted if tensor["class"] in OVER_STEPS),
        }
        return {"keys": [report.summary() for report in system.reports], "memory": memory}

    def _file(self, relative: str) -> dict[str, str]:
        return {"file": relative, "sha256": sha256_of(self.folder / relative)}

    def fingerprinted(self, system: System, memory: MemorySpec) -> MemorySpec:
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


def _program_examples(cut: Partition, kind: str, feeds: Sequence[Mapping[str, Tensor]], single: bool) -> list[Example]:
    """Inputs of a program of a real module, from inputs of the whole step and what the programs before it make of them.

    single: the step is for one request, and only timesteps are taken many at once.
    """
    found = []
    if single and kind == "schedule":
        over = {name: torch.cat([feed[name] for feed in feeds]) for name in cut.schedule.inputs}
        return [Example({"steps": rows}, {name: value[:rows] for name, value in over.items()}) for rows in (2, 3, 1)]
    for feed in feeds:
        values, tables = dict(feed), set(cut.schedule.inputs)
        for before, program in cut.programs.items():
            if before == kind:
                break
            if before == "timeline":  # for one request at a time: each row here is a request at a step of its own
                rows = [_run(program, {n: v[i : i + 1] for n, v in values.items()}) for i in range(_rows(feed))]
                values |= {name: torch.cat([row[name] for row in rows]) for name in program.outputs}
            else:
                values |= _run(program, values)
            tables |= set(program.outputs) if before == "schedule" else set()
        inputs = {name: values[name] for name in cut.programs[kind].inputs}
        if kind == "timeline":
            inputs = {name: value if name in tables else value[:1] for name, value in inputs.items()}
        size = {} if single else {"steps" if kind in OVER_STEPS else "batch": _rows(feed)}
        found.append(Example(size, inputs))
    return found


def _run(program: Program, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(zip(program.outputs, program.module(*(values[name] for name in program.inputs)), strict=True))


def _rows(feed: Mapping[str, Tensor]) -> int:
    return next(iter(feed.values())).shape[0]


def _sparse(value: Any) -> Any:
    """A struct of the manifest as JSON, without what says nothing: null, and empty lists and objects."""
    value = msgspec.to_builtins(value, str_keys=True)
    if isinstance(value, dict):
        return {key: _sparse(entry) for key, entry in value.items() if entry not in (None, {}, [], ())}
    return [_sparse(entry) for entry in value] if isinstance(value, list | tuple) else value
