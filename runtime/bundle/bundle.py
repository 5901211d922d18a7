"""Reading a bundle: a directory with `bundle.json`, ONNX graphs, solver tables and tokenizers.

Reading never executes anything. `Bundle.open` checks the manifest's keys and version and the SHA-256 of every file of
the bundle, so that what follows can trust it; every later check reads the one interface that the manifest declares.
Programs, the optional part for the torch backend, and weights that lie beside a graph (large: gigabytes) are checked when
one is asked for: nobody else pays for them. A file that did not change since it was checked is not read again (digests.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.bundle.manifest import (
    FORMAT,
    Dim,
    GraphSpec,
    Manifest,
    Model,
    Port,
    ProgramSpec,
    Weights,
    read_manifest,
)
from motionrt.runtime.errors import BundleError, InputError
from motionrt.runtime.files import digest_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["FORMAT", "Bundle", "Dim", "GraphSpec", "Model", "Port", "ProgramSpec", "Solver", "Weights"]


@dataclass(frozen=True)
class Solver:
    """One row of the solver table: `timesteps` int64 or float32 [T], `coefficients` float32 [T, 6] (see sampler.py)."""

    name: str
    steps: int
    timesteps: NDArray[np.int64] | NDArray[np.float32]
    coefficients: NDArray[np.float32]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Frozen; `manifest` is bundle.json as read, for printing."""

    path: Path
    _manifest: Manifest
    _tables: Mapping[str, NDArray[Any]] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open and verify the bundle directory `path`; `BundleError` if it is missing, damaged or of a newer format."""
        path = Path(path)
        manifest = read_manifest(path / "bundle.json")
        for kind, specs in (("graph", manifest.graphs), ("tokenizer", manifest.tokenizers)):
            for name, spec in specs.items():
                verify_file(path, spec.file, spec.sha256, f"{kind} '{name}'")
        verify_file(path, manifest.solvers.file, manifest.solvers.sha256, "the solver tables")
        return cls(path, manifest, _solver_tables(path / manifest.solvers.file, manifest))

    @property
    def manifest(self) -> Mapping[str, Any]:
        """bundle.json as parsed."""
        return self._manifest.raw

    @property
    def name(self) -> str:
        return self._manifest.name

    @property
    def model(self) -> Model:
        return self._manifest.model

    @property
    def graphs(self) -> Mapping[str, GraphSpec]:
        return self._manifest.graphs

    @property
    def digests(self) -> Mapping[str, str]:
        """What a motion memory must match: the digests of `text_query`, `motion` and `appearance`."""
        return self._manifest.digests

    @property
    def guidance(self) -> float:
        """The default guidance scale."""
        return self._manifest.guidance

    @property
    def target_range(self) -> str:
        """What the appearance graph sees of a request's still: "correct", [-1, 1]; "released", [0, 1] (a quirk)."""
        return self._manifest.target_range

    @property
    def solvers(self) -> Mapping[str, tuple[int, ...]]:
        """The step counts of each solver."""
        return self._manifest.solvers.entries

    def graph(self, name: str) -> GraphSpec:
        """The declared interface of graph `name`; `BundleError` if the bundle has none."""
        if name not in self.graphs:
            raise BundleError(
                f"bundle {self.path} has no graph '{name}'; it has {', '.join(sorted(self.graphs))}. Export it again."
            )
        return self.graphs[name]

    def port(self, graph: str, name: str) -> Port:
        """The declared input or output `name` of `graph`."""
        spec = self.graph(graph)
        for port in (*spec.inputs, *spec.outputs):
            if port.name == name:
                return port
        raise BundleError(f"graph '{graph}' of bundle {self.path} has no port `{name}`.")

    def graph_path(self, name: str) -> Path:
        """The ONNX file of graph `name`; `BundleError` if the weights beside it are missing or damaged."""
        spec = self.graph(name)
        if spec.data is not None:
            verify_file(self.path, spec.data.file, spec.data.sha256, f"the weights of graph '{name}'")
        return self.path / spec.file

    @property
    def programs(self) -> Mapping[str, ProgramSpec]:
        """The graphs that the bundle also carries as torch programs."""
        return self._manifest.programs

    def program_path(self, name: str) -> Path:
        """The verified file of program `name`; `BundleError` if the bundle has none, or it is missing or damaged."""
        if name not in self.programs:
            raise BundleError(f"bundle {self.path} has no torch program of graph '{name}'. Export it again, with programs.")
        spec = self.programs[name]
        return verify_file(self.path, spec.file, spec.sha256, f"program '{name}'")

    def solver(self, name: str | None = None, steps: int | None = None) -> Solver:
        """Timesteps and coefficients of `steps` steps of solver `name`; `InputError` for one that is not there."""
        name = self._manifest.solvers.default if name is None else name
        if name not in self.solvers:
            raise InputError(f"solver is '{name}'; this bundle has {', '.join(sorted(self.solvers))}.")
        steps = self._manifest.solvers.default_steps if steps is None else steps
        if isinstance(steps, bool) or steps not in self.solvers[name]:
            raise InputError(f"steps is {steps!r}; solver '{name}' of this bundle takes {_span(self.solvers[name])}.")
        key = f"{name}/{steps}"
        return Solver(name, int(steps), self._tables[f"{key}/timesteps"], self._tables[f"{key}/coefficients"])

    def tokenizer(self, name: str) -> Tokenizer:
        """The `tokenizers.Tokenizer` of `name`, with its own padding and truncation switched off. Cached by file."""
        if name not in self._manifest.tokenizers:
            raise BundleError(f"bundle {self.path} has no tokenizer '{name}'. Export it again.")
        return _load_tokenizer(str(self.path / self._manifest.tokenizers[name].file))

    def tokenize(self, name: str, text: str) -> dict[str, NDArray[np.int64]]:
        """`input_ids` and `attention_mask`, int64 [1, L], of `text` for the graph `name`.

        Padded where the graph declares a longer length; never cut: a text that is too long is an `InputError`.
        """
        tokenizer, spec = self.tokenizer(name), self._manifest.tokenizers[name]
        if not isinstance(text, str):
            raise InputError(f"the prompt is of type {type(text).__name__}; it must be a string.")
        try:
            ids = tokenizer.encode(text).ids
        except (UnicodeEncodeError, TypeError):  # by version of the library
            raise InputError("the prompt holds characters that are not valid Unicode text; remove them.") from None
        if len(ids) > spec.max_length:
            raise InputError(
                f"the prompt is {len(ids)} tokens long; tokenizer '{name}' of this bundle takes {spec.max_length}. "
                "Shorten the prompt."
            )
        padding = max(0, self.port(name, "input_ids").dims[1].min - len(ids))
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


def _solver_tables(path: Path, manifest: Manifest) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load_file

    try:
        tables: dict[str, NDArray[Any]] = load_file(path)
    except Exception as error:  # safetensors raises its own error type, or OSError
        raise BundleError(f"the solver tables {path} cannot be read ({error}). Export the bundle again.") from None
    for name, counts in manifest.solvers.entries.items():
        for steps in counts:
            integers, floats = ("int64",), ("float32",)
            for leaf, shape, dtypes in (("timesteps", (steps,), integers + floats), ("coefficients", (steps, 6), floats)):
                table = tables.get(f"{name}/{steps}/{leaf}")
                if table is None or table.shape != shape or str(table.dtype) not in dtypes or not np.isfinite(table).all():
                    raise BundleError(
                        f"the solver tables {path} hold no finite {' or '.join(dtypes)} {list(shape)} "
                        f"'{name}/{steps}/{leaf}'. Export the bundle again."
                    )
                table.setflags(write=False)
    return tables
