"""Graphs that exports of one session share: none is traced twice from the same weights, module and sizes.

    with shared_graphs(store(tmp_path_factory)):
        export_system(system, out)

Loaded by path: the tests are not a package.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from motionrt.export.checkpoints.files import InMemory

DEMO = Path(__file__).resolve().parents[2] / "demo" / "bundle"


def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for `shared_graphs` in this session, of all its processes."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "graphs"


@contextmanager
def shared_graphs(kept: Path, packaged: bool = False) -> Iterator[None]:
    """Exports in the block put their graphs into `kept` or find them there. That of the packaged text encoder is the demo's,
    unless `packaged`."""
    from motionrt.export.exporter import Writer

    plain_add, plain_cut = Writer.add, Writer.cut

    def add(self: Any, name: str, graph: Any) -> None:
        if graph.network.package is not None and not packaged:
            self.graphs[name] = packaged_text_query(self.folder)
        else:
            _once(kept, self, name, graph, lambda: plain_add(self, name, graph))

    def cut(self: Any, step: Any) -> Any:
        return _once(kept, self, f"step{step.suffix}", step, lambda: plain_cut(self, step))

    with patch.object(Writer, "add", add), patch.object(Writer, "cut", cut):
        yield


def packaged_text_query(folder: Path) -> dict[str, Any]:
    """Copies the demo's graph of the packaged encoder, which need not be exported in every test, into a bundle; its entry."""
    entry: dict[str, Any] = json.loads((DEMO / "bundle.json").read_text())["graphs"]["text_query"]
    shutil.copy(DEMO / entry["file"], folder / entry["file"])
    return entry


def _once(kept: Path, writer: Any, name: str, what: Any, write: Callable[[], Any]) -> Any:
    """What `write` returns, which adds graphs to `writer`: their files and entries, and what it notes of them."""
    about = [
        *(repr(getattr(what, part.name)) for part in fields(what) if part.name != "network"),
        repr(writer.graphs.get(what.weights_of or "", {}).get("data")), *_settings(what.network.module),
    ]  # fmt: skip
    key = hashlib.sha256("\n".join((_weights(what.network), repr(what.network.wide), *about)).encode()).hexdigest()[:24]
    kept.mkdir(parents=True, exist_ok=True)
    with (kept / f"{name}-{key}.lock").open("w") as lock:  # another process that traces this very graph is waited for
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _found_or_made(kept, f"{name}-{key}", writer, write)


def _found_or_made(kept: Path, name: str, writer: Any, write: Callable[[], Any]) -> Any:
    """What `_once` returns of the graph that is kept as `name`."""
    found = kept / f"{name}-programs"
    if not writer.programs and not found.is_dir():
        found = kept / name
    if not found.is_dir():
        notes = {"graphs": dict(writer.graphs), "tables": dict(writer.tables), "empty": set(writer.empty)}
        before = {path for path in writer.folder.rglob("*") if path.is_file()}
        result = write()
        entries = {
            "graphs": {graph: entry for graph, entry in writer.graphs.items() if graph not in notes["graphs"]},
            "tables": {graph: tables for graph, tables in writer.tables.items() if graph not in notes["tables"]},
            "empty": sorted(writer.empty - notes["empty"]), "result": result,
        }  # fmt: skip
        made = Path(tempfile.mkdtemp(dir=kept))
        for path in writer.folder.rglob("*"):
            if path.is_file() and path not in before:
                (made / path.relative_to(writer.folder)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, made / path.relative_to(writer.folder))
        (made / "entries.json").write_text(json.dumps(entries))
        made.rename(found)
        return result
    entries = json.loads((found / "entries.json").read_text())
    if not writer.programs:
        for entry in entries["graphs"].values():
            entry.pop("program", None)
    left = ("entries.json", *(() if writer.programs else ("programs",)))
    shutil.copytree(found, writer.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*left))
    writer.graphs |= entries["graphs"]
    writer.tables |= entries["tables"]
    writer.empty |= set(entries["empty"])
    return entries["result"]


def _weights(network: Any) -> str:
    """The digest of a network's weights without tables, which `_settings` tells of and files may have or not."""
    if network.package is not None:
        return str(network.digest())
    held = network.weights or {name: InMemory(value) for name, value in network.module.state_dict().items()}
    tables = {name for name, _ in network.module.named_buffers()}
    return str(replace(network, weights={name: value for name, value in held.items() if name not in tables}).digest())


def _settings(module: nn.Module) -> Iterator[str]:
    """All that a module is but its weights, a line each: classes, numbers and choices of its parts, and tables."""
    yield repr(module)
    for path, part in module.named_modules():
        for name, value in sorted(vars(part).items()):
            if name == "training" or (name.startswith("_") and name != "_internal_dict"):
                continue
            if isinstance(value, torch.Tensor):
                yield f"{path}.{name} {_digest(value)}"
            elif not isinstance(value, nn.Module):
                yield f"{path}.{name} {_said(value)}"
    for name, table in module.named_buffers():
        yield f"{name} {_digest(table)}"


def _said(value: Any) -> str:
    """A setting in words that are the same in every process: an object is its class and its own plain settings."""
    if isinstance(value, list | tuple):
        return repr([_said(entry) for entry in value])
    if isinstance(value, dict):  # diffusers lists what was left out in the order of a set, another in each process
        return repr({name: _said(held) for name, held in value.items() if name != "_use_default_values"})
    if isinstance(value, str | int | float | torch.dtype | type(None)) or is_dataclass(value):
        return repr(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    plain = {name: held for name, held in getattr(value, "__dict__", {}).items() if isinstance(held, str | int | float)}
    return f"{type(value).__qualname__} {sorted(plain.items())}"


def _digest(value: torch.Tensor) -> str:
    if value.device.type == "meta":
        return repr(tuple(value.shape))
    return hashlib.sha256(value.detach().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
