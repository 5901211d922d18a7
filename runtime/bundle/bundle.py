"""Reading a bundle: a directory with `bundle.json`, ONNX graphs, rows of numbers for its loops, and tokenizers.

Reading never executes anything. `Bundle.open` checks the manifest and the SHA-256 of every file of the bundle, so that what
follows can trust it; every later check reads the one interface that the manifest declares. Programs, the optional part for the
torch backend, and weights that lie beside a graph (large: gigabytes) are checked when one is asked for: nobody else pays for
them. A file that did not change since it was checked is not read again (files.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.arguments import whole
from motionrt.runtime.bundle.manifest import Dim, GraphSpec, Manifest, Port, Program, read_manifest
from motionrt.runtime.errors import BundleError, InputError, shown
from motionrt.runtime.files import digest_of, replacing, sealed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Bundle", "Dim", "GraphSpec", "Port", "Schedule", "rewrite", "verify_file"]


@dataclass(frozen=True)
class Schedule:
    """The rows of a loop, float32 `[T, R]`, one column for each of the loop's `columns`."""

    name: str
    rows: NDArray[np.float32]

    @property
    def steps(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    path: Path
    manifest: Manifest
    _tables: Mapping[str, NDArray[np.float32]] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open and verify the bundle directory `path`; `BundleError` if it is missing, damaged or of another format."""
        if not isinstance(path, str | Path):
            raise InputError(f"the bundle is {shown(path)}; it must be the path of its directory.")
        manifest = read_manifest(Path(path) / "bundle.json")
        path = Path(path).absolute()  # files are read later as well, and the process may change its folder
        for kind, specs in (("graph", manifest.graphs), ("tokenizer", manifest.tokenizers)):
            for name, spec in specs.items():
                verify_file(path, spec.file, spec.sha256, f"{kind} '{name}'")
        verify_file(path, manifest.tables.file, manifest.tables.sha256, "the tables of rows")
        return cls(path, manifest, _read_tables(path / manifest.tables.file, manifest))

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def tables(self) -> Mapping[str, NDArray[np.float32]]:
        """The rows of all loops: `LOOP/SCHEDULE/STEPS` -> float32 `[T, R]`."""
        return self._tables

    @property
    def graphs(self) -> Mapping[str, GraphSpec]:
        return self.manifest.graphs

    def graph(self, name: str) -> GraphSpec:
        """The declared interface of graph `name`; `BundleError` if the bundle has none."""
        if not isinstance(name, str) or name not in self.graphs:
            raise BundleError(
                f"bundle {self.path} has no graph {shown(name)}; it has {', '.join(sorted(self.graphs))}. Export it again."
            )
        return self.graphs[name]

    def port(self, graph: str, name: str) -> Port:
        """The declared input or output `name` of `graph`."""
        spec = self.graph(graph)
        for port in (*spec.inputs, *spec.outputs):
            if port.name == name:
                return port
        raise BundleError(f"graph '{graph}' of bundle {self.path} has no port `{name}`.")

    @property
    def steps(self) -> list[str]:
        """The graphs that the steps of denoising loops run, and those called ahead of them: worth a CUDA graph, and never to be
        slow without a word.

        A loop that is fed no numbers puts something together (the pictures of a decoder), and is none of these.
        """
        return list(dict.fromkeys(graph for loop in self.manifest.loops.values() if loop.feeds for graph in loop.run))

    @property
    def networks(self) -> list[str]:
        """The `steps` that run a network: those that extrapolate run none, and those with calls ahead leave it to these."""
        loops = self.manifest.loops.values()
        left_out = {loop.extrapolates for loop in loops} | {step for loop in loops for step in loop.ahead}
        return [graph for graph in self.steps if graph not in left_out]

    def in_loop(self, graph: str) -> bool:
        """Whether `graph` is one of `steps`, or what one is compared with."""
        return graph in self.steps or any(loop.plain == graph for loop in self.manifest.loops.values())

    def graph_path(self, name: str) -> Path:
        """The ONNX file of graph `name`; `BundleError` if the weights beside it are missing or damaged."""
        spec = self.graph(name)
        if spec.data is not None:
            verify_file(self.path, spec.data.file, spec.data.sha256, f"the weights of graph '{name}'")
        return self.path / spec.file

    @property
    def programs(self) -> Mapping[str, Program]:
        """The graphs that the bundle also carries as torch programs."""
        return {name: spec.program for name, spec in self.graphs.items() if spec.program is not None}

    def program_path(self, name: str) -> Path:
        """The verified file of the torch program of graph `name`; `BundleError` if there is none, or it is damaged."""
        program = self.graph(name).program
        if program is None:
            raise BundleError(f"bundle {self.path} has no torch program of graph '{name}'. Export it again, with programs.")
        return verify_file(self.path, program.file, program.sha256, f"program '{name}'")

    def schedule(self, loop: str, name: str | None = None, steps: int | None = None) -> Schedule:
        """The rows of `steps` steps of schedule `name` of a loop, the default ones if not given; `InputError` for others."""
        if not isinstance(loop, str) or loop not in self.manifest.loops:
            raise InputError(f"the loop is {shown(loop)}; this bundle has {', '.join(self.manifest.loops)}.")
        spec = self.manifest.loops[loop]
        name = spec.default[0] if name is None else name
        if not isinstance(name, str) or name not in spec.schedules:
            raise InputError(f"solver is {shown(name)}; loop '{loop}' of this bundle has {', '.join(sorted(spec.schedules))}.")
        if steps is None:
            steps = spec.default[1] if spec.default[1] in spec.schedules[name] else max(spec.schedules[name])
        whole = isinstance(steps, int | np.integer) and not isinstance(steps, bool)
        if not whole or steps not in spec.schedules[name]:
            got = f"steps is {shown(steps)}{'' if whole else ', no whole number'}"
            raise InputError(f"{got}; solver '{name}' of this bundle takes {_span(spec.schedules[name])}.")
        return Schedule(name, self._tables[f"{loop}/{name}/{int(steps)}"])

    def tokenizer(self, name: str) -> Tokenizer:
        """The `tokenizers.Tokenizer` of `name`, with its own padding and truncation switched off. Cached by file."""
        if not isinstance(name, str) or name not in self.manifest.tokenizers:
            raise BundleError(f"bundle {self.path} has no tokenizer {shown(name)}. Export it again.")
        return _load_tokenizer(str(self.path / self.manifest.tokenizers[name].file))

    def tokenize(self, name: str, text: str, length: int = 0, what: str = "the prompt") -> dict[str, NDArray[np.int64]]:
        """`input_ids` and `attention_mask`, int64 `[1, L]`, of `text`.

        Padded to `length`, never cut: a text that is too long is an `InputError`, which calls it `what`.
        """
        tokenizer, spec, length = self.tokenizer(name), self.manifest.tokenizers[name], whole("length", length, 0, 1 << 20)
        if not isinstance(text, str):
            raise InputError(f"{what} is of type {type(text).__name__}; it must be a string.")
        try:
            ids = tokenizer.encode(text).ids
        except (UnicodeEncodeError, TypeError):  # by version of the library
            raise InputError(f"{what} holds characters that are not valid Unicode text; remove them.") from None
        if len(ids) > spec.max_length:
            raise InputError(
                f"{what} is {len(ids)} tokens long; tokenizer '{name}' of this bundle takes {spec.max_length}. Shorten it."
            )
        padding = max(0, length - len(ids))
        return {
            "input_ids": np.array([ids + [spec.pad_id] * padding], np.int64),
            "attention_mask": np.array([[1] * len(ids) + [0] * padding], np.int64),
        }


@lru_cache(maxsize=8)
def _load_tokenizer(path: str) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the library raises a bare Exception
        raise BundleError(f"tokenizer file {path} cannot be read ({error}). Export the bundle again.") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _span(values: Iterable[int]) -> str:
    ordered = sorted(values)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change bundle.json of the bundle directory `path`, as it was parsed from JSON; a seal is made anew where there was one.

    The bundle is the old one or the new one at every moment. Raises `BundleError` where it cannot be written.
    """
    file = path / "bundle.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    change(raw)
    was_sealed = raw.pop("seal", None) is not None
    with replacing(file, BundleError) as temporary:
        temporary.write_text(json.dumps(sealed(raw) if was_sealed else raw, indent=1) + "\n", encoding="utf-8")


def verify_file(bundle: Path, file: str, expected: str, what: str, *, read: bool = False) -> Path:
    """The path of `file` of the bundle's folder, whose SHA-256 is `expected`; `BundleError` if it is missing or damaged.

    read: read it even if it did not change since it was last read.
    """
    path = bundle / file
    try:
        got = digest_of(path, expected, bundle, read=read)
    except OSError as error:
        raise BundleError(
            f"{what} of the bundle cannot be read: {path}: {error.strerror}. Copy or export the bundle again."
        ) from None
    if got != expected:
        raise BundleError(
            f"{what} of the bundle is damaged: {path} has SHA-256 {got[:12]}…, bundle.json says {expected[:12]}…. "
            "Copy or export the bundle again."
        )
    return path


def _read_tables(path: Path, manifest: Manifest) -> dict[str, NDArray[np.float32]]:
    """The rows of all loops, `LOOP/SCHEDULE/STEPS` -> float32 `[T, R]`; `BundleError` if the file has not all of them."""
    from safetensors.numpy import load_file

    try:
        tables: dict[str, NDArray[Any]] = load_file(path)
    except Exception as error:  # safetensors raises its own error type, or OSError
        raise BundleError(f"the tables of rows {path} cannot be read ({error}). Export the bundle again.") from None
    for loop, spec in manifest.loops.items():
        at = spec.columns.index("graph")
        for name, counts in spec.schedules.items():
            for steps in counts:
                key, shape = f"{loop}/{name}/{steps}", (steps, len(spec.columns))
                rows = tables.get(key)
                if rows is None or rows.shape != shape or rows.dtype != np.float32 or not np.isfinite(rows).all():
                    raise BundleError(f"{path} holds no finite float32 {list(shape)} '{key}'. Export the bundle again.")
                if not np.isin(rows[:, at], range(len(spec.graphs))).all():
                    raise BundleError(f"'{key}' of {path} names a graph that loop '{loop}' has not got. Export it again.")
                rows.setflags(write=False)
    return tables
