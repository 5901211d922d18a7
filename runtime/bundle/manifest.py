"""bundle.json as typed, frozen records. Unknown keys, missing keys and newer formats are refused in plain words."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionrt.runtime.dtypes import PORTS
from motionrt.runtime.errors import BundleError

FORMAT = 1
LOOP = ("step", "step_plain")  # the graphs that every step runs: worth a CUDA graph, and never to be slow without a word
TARGET_RANGES = ("correct", "released")


@dataclass(frozen=True)
class Dim:
    """One dimension: sizes from `min` to `max`; equal `name`s are equal sizes within a call. Fixed when min == max."""

    name: str
    min: int
    opt: int
    max: int

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.name} {self.min}-{self.max}"


@dataclass(frozen=True)
class Port:
    """One input or output of a graph. `dtype` is one of `dtypes.PORTS`."""

    name: str
    dtype: str
    dims: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Weights:
    """Initializers that stay in an installed package: import name `package`, `file` inside it, its digest."""

    package: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Data:
    """The file of a graph's weights inside the bundle (safetensors, read as ONNX external data), and its digest."""

    file: str
    sha256: str


@dataclass(frozen=True)
class GraphSpec:
    """The declared interface of one graph and the file that holds it; `activations`: bytes alive at once in a call.

    `wide`: patterns (as of `fnmatch`) of weights whose results leave the range of float16: see `precision.low_ops`.
    """

    name: str
    file: str
    sha256: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: Weights | None = None
    data: Data | None = None
    activations: int | None = None
    wide: tuple[str, ...] = ()

    @property
    def weights_sha256(self) -> str:
        """Identifies all weights outside `file`: their file's digest, the digest of both digests for two files, "" for none."""
        digests = [part.sha256 for part in (self.weights, self.data) if part is not None]
        return "".join(digests) if len(digests) < 2 else hashlib.sha256("".join(digests).encode()).hexdigest()


@dataclass(frozen=True)
class ProgramSpec:
    """The torch form of a graph, an optional part: `file` from `torch.export.save` by version `torch`.

    It takes `inputs` and gives `outputs`, each in order; its weights lie in the graph's own `data` file.
    """

    file: str
    sha256: str
    torch: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """Sizes that all graphs of a bundle share. `latents` is [F, C, H, W], `motion_tokens` [M, D]; pixels, 1/s."""

    frames: int
    height: int
    width: int
    fps: float
    latents: tuple[int, ...]
    motion_tokens: tuple[int, ...]
    max_references: int
    default_references: int


@dataclass(frozen=True)
class SolverSpec:
    """Which solvers and step counts the file of solver tables holds."""

    file: str
    sha256: str
    default: str
    default_steps: int
    entries: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizers JSON file; texts of more than `max_length` tokens are refused, shorter ones may be padded."""

    file: str
    sha256: str
    max_length: int
    pad_id: int


@dataclass(frozen=True)
class Manifest:
    """bundle.json; `raw` is the parsed JSON, for printing."""

    raw: Mapping[str, Any]
    name: str
    model: Model
    graphs: Mapping[str, GraphSpec]
    solvers: SolverSpec
    tokenizers: Mapping[str, TokenizerSpec]
    guidance: float
    target_range: str
    digests: Mapping[str, str]
    programs: Mapping[str, ProgramSpec]


def parse_json(path: Path) -> Any:
    """bundle.json as parsed JSON; `BundleError` in plain words."""
    if not path.parent.is_dir():
        raise BundleError(f"bundle {path.parent} is not a directory. Give the directory that `motionrt export` wrote.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(
            f"{path.parent} holds no bundle.json. Give the directory that `motionrt export` wrote."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read ({error}). Export the bundle again.") from None


class _Fields:
    """Reads one JSON object: every key once, with its type; `close` refuses what was not asked for."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise BundleError(f"bundle.json: {where} is {value!r:.60}; it must be an object. Export the bundle again.")
        self._left = dict(value)
        self._where = where

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        if key not in self._left and default is not ...:
            return default
        if key not in self._left:
            raise BundleError(f"bundle.json: {self._where} lacks the key '{key}'. Export the bundle again.")
        value = self._left.pop(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise BundleError(
                f"bundle.json: '{key}' of {self._where} is {value!r:.60}, which is of the wrong type. "
                "Export the bundle again."
            )
        return value

    def positive(self, key: str) -> int:
        value: int = self.take(key, int)
        if value < 1:
            raise BundleError(f"bundle.json: '{key}' of {self._where} is {value}; it must be 1 or more.")
        return value

    def sizes(self, key: str, rank: int) -> tuple[int, ...]:
        value = self.take(key, list)
        if len(value) != rank or not all(type(size) is int and size > 0 for size in value):
            raise BundleError(f"bundle.json: '{key}' of {self._where} is {value}; it must be {rank} sizes, 1 or more.")
        return tuple(value)

    def digest(self, key: str = "sha256") -> str:
        value: str = self.take(key, str)
        if not re.fullmatch("[0-9a-f]{64}", value):
            raise BundleError(f"bundle.json: '{key}' of {self._where} is {value!r:.80}; it must be 64 hex digits.")
        return value

    def file(self) -> str:
        """A path inside the bundle: a manifest must not be able to point anywhere else."""
        value: str = self.take("file", str)
        if not value or Path(value).is_absolute() or ".." in Path(value).parts:
            raise BundleError(f"bundle.json: 'file' of {self._where} is {value!r}; it must lie inside its directory.")
        return value

    def close(self) -> None:
        if self._left:
            raise BundleError(
                f"bundle.json: {self._where} has the unknown key{'s' * (len(self._left) > 1)} "
                f"{', '.join(map(repr, sorted(self._left)))}; this version reads format {FORMAT}. "
                "Upgrade motionrt, or export the bundle again."
            )


def read_manifest(path: Path) -> Manifest:
    """Parse the file `path`; `BundleError` for anything that this version does not understand."""
    raw = parse_json(path)
    top = _Fields(raw, "the manifest")
    number = top.take("format", int)
    if number != FORMAT:
        newer = "a newer version of motionrt wrote it: upgrade motionrt" if number > FORMAT else "export it again"
        raise BundleError(f"bundle {path.parent} has format {number}; this version reads format {FORMAT} ({newer}).")
    top.take("motionrt", str)
    top.take("partition", dict, None)
    top.take("provenance", dict, None)
    defaults = _Fields(top.take("defaults", dict), "'defaults'")
    guidance = float(defaults.take("guidance", (int, float)))
    if not math.isfinite(guidance):
        raise BundleError(f"bundle.json: default guidance is {guidance}; it must be finite.")
    target_range = defaults.take("target_range", str, "correct")
    if target_range not in TARGET_RANGES:
        raise BundleError(f"bundle.json: 'target_range' is {target_range!r}; allowed: {', '.join(TARGET_RANGES)}.")
    defaults.close()
    digests = _Fields(top.take("digests", dict), "'digests'")
    graphs = {name: _graph(name, value) for name, value in top.take("graphs", dict).items()}
    manifest = Manifest(
        raw=raw,
        name=top.take("name", str),
        model=_model(top.take("model", dict)),
        graphs=graphs,
        solvers=_solvers(top.take("solvers", dict)),
        tokenizers={name: _tokenizer(name, value) for name, value in top.take("tokenizers", dict).items()},
        guidance=guidance,
        target_range=target_range,
        digests={name: digests.digest(name) for name in ("text_query", "motion", "appearance")},
        programs={name: _program(name, value, graphs) for name, value in top.take("programs", dict, {}).items()},
    )
    digests.close()
    top.close()
    return manifest


def _model(value: Any) -> Model:
    fields = _Fields(value, "'model'")
    fps = float(fields.take("fps", (int, float)))
    if not (math.isfinite(fps) and fps > 0):
        raise BundleError(f"bundle.json: 'fps' of 'model' is {fps}; it must be more than 0.")
    model = Model(
        frames=fields.positive("frames"),
        height=fields.positive("height"),
        width=fields.positive("width"),
        fps=fps,
        latents=fields.sizes("latents", 4),
        motion_tokens=fields.sizes("motion_tokens", 2),
        max_references=fields.positive("max_references"),
        default_references=fields.positive("default_references"),
    )
    fields.close()
    if model.default_references > model.max_references:
        raise BundleError("bundle.json: 'default_references' is more than 'max_references'. Export the bundle again.")
    return model


def _graph(name: str, value: Any) -> GraphSpec:
    fields = _Fields(value, f"graph '{name}'")
    weights = None
    if (declared := fields.take("weights", dict, None)) is not None:
        inner = _Fields(declared, f"'weights' of graph '{name}'")
        package = inner.take("package", str)
        if not re.fullmatch(r"[A-Za-z_]\w*", package):
            raise BundleError(f"bundle.json: graph '{name}' names the package {package!r}; that is no import name.")
        weights = Weights(package, inner.file(), inner.digest())
        inner.close()
    data = None
    if (declared := fields.take("data", dict, None)) is not None:
        inner = _Fields(declared, f"'data' of graph '{name}'")
        data = Data(inner.file(), inner.digest())
        inner.close()
    spec = GraphSpec(
        name,
        fields.file(),
        fields.digest(),
        tuple(_port(name, port) for port in fields.take("inputs", list)),
        tuple(_port(name, port) for port in fields.take("outputs", list)),
        weights,
        data,
        fields.take("activations", int, None),
        tuple(map(str, fields.take("wide", list, []))),
    )
    fields.close()
    return spec


def _program(name: str, value: Any, graphs: Mapping[str, GraphSpec]) -> ProgramSpec:
    if name not in graphs:
        raise BundleError(f"bundle.json: 'programs' has '{name}', which is no graph of the bundle. Export it again.")
    fields = _Fields(value, f"program '{name}'")
    ports = (tuple(fields.take("inputs", list)), tuple(fields.take("outputs", list)))
    spec = ProgramSpec(fields.file(), fields.digest(), fields.take("torch", str), *ports)
    fields.close()
    for got, declared in zip(ports, (graphs[name].inputs, graphs[name].outputs), strict=True):
        wanted = sorted(port.name for port in declared)
        if sorted(map(str, got)) != wanted:
            raise BundleError(
                f"bundle.json: program '{name}' has the ports {list(got)}; its graph has {wanted}. Export it again."
            )
    return spec


def _port(graph: str, value: Any) -> Port:
    fields = _Fields(value, f"a port of graph '{graph}'")
    name, dtype, dims = fields.take("name", str), fields.take("dtype", str), fields.take("dims", list)
    fields.close()
    if dtype not in PORTS:
        raise BundleError(f"bundle.json: port `{name}` of graph '{graph}' is {dtype}; allowed: {', '.join(PORTS)}.")
    return Port(name, dtype, tuple(_dim(f"port `{name}` of graph '{graph}'", dim) for dim in dims))


def _dim(where: str, value: Any) -> Dim:
    if type(value) is int and value >= 0:
        return Dim("", value, value, value)
    fields = _Fields(value, f"a dimension of {where}")
    dim = Dim(fields.take("name", str), *(fields.take(key, int) for key in ("min", "opt", "max")))
    fields.close()
    if not 0 <= dim.min <= dim.opt <= dim.max:
        raise BundleError(f"bundle.json: dimension '{dim.name}' of {where} must have 0 <= min <= opt <= max.")
    return dim


def _solvers(value: Any) -> SolverSpec:
    fields = _Fields(value, "'solvers'")
    entries = {}
    for name, entry in fields.take("entries", dict).items():
        inner = _Fields(entry, f"solver '{name}'")
        steps = inner.take("steps", list)
        entries[name] = _steps(name, steps)
        inner.close()
    spec = SolverSpec(
        fields.file(), fields.digest(), fields.take("default", str), fields.positive("default_steps"), entries
    )
    fields.close()
    if spec.default_steps not in entries.get(spec.default, ()):
        raise BundleError(
            f"bundle.json: the default solver '{spec.default}' with {spec.default_steps} steps is not in 'entries'."
        )
    return spec


def _steps(name: str, steps: list[Any]) -> tuple[int, ...]:
    if not steps or not all(type(count) is int and count > 0 for count in steps):
        raise BundleError(f"bundle.json: 'steps' of solver '{name}' must list step counts of 1 or more.")
    return tuple(steps)


def _tokenizer(name: str, value: Any) -> TokenizerSpec:
    fields = _Fields(value, f"tokenizer '{name}'")
    spec = TokenizerSpec(fields.file(), fields.digest(), fields.positive("max_length"), fields.take("pad_id", int, 0))
    fields.close()
    return spec
