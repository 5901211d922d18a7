"""What a built engine is, written beside it: a JSON sidecar that is checked before anything is deserialised.

    engines/<flavor>-<targets>-<dtype>/<graph>.json                    the sidecar; it names
    engines/<flavor>-<targets>-<dtype>/<graph>-<digest>.engine         the engine

The sidecar's rename is the moment at which a build counts: an engine is written first, under a name that holds its own
digest, so that a build which is killed at any point leaves the previous pair whole. Only the standard library here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from motionrt.runtime.bundle.manifest import GraphSpec
from motionrt.runtime.dtypes import WEIGHTS
from motionrt.runtime.errors import EngineError, InputError
from motionrt.runtime.files import digest_of

FORMAT = 1
FLAVORS = {"rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
KERNELS = ("body", "plugin")
_DIGESTS = ("onnx_sha256", "built_from_sha256", "recipe_sha256", "engine_sha256")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """Shapes that one input may have in one optimisation profile: `min` <= shape <= `max`, tuned for `opt`."""

    min: Shape
    opt: Shape
    max: Shape

    def __str__(self) -> str:
        sides = (str(a) if a == b else f"{a}-{b}" for a, b in zip(self.min, self.max, strict=True))
        return f"[{', '.join(sides)}]"

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether `shape` lies inside."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


Profile = Mapping[str, Span]


@dataclass(frozen=True)
class EnginePort:
    """An input or output as the engine declares it; -1 is a size that a profile or the inputs decide."""

    name: str
    dtype: str
    dims: Shape


@dataclass(frozen=True)
class Machine:
    """What would run an engine: `flavor` and version text of the installed `library`, compute capability `target`."""

    flavor: str
    library: str
    target: str


@dataclass(frozen=True)
class EngineFile:
    """One sidecar. `folder` is where it lies; everything else is in the JSON, beside `format`.

    `weights_sha256` is `GraphSpec.weights_sha256`, "" for a graph that holds its own weights. `recipe_sha256` is the digest of
    the code that made the builder's input from the bundle's graph; `built_from_sha256` that of the input itself. `kernel`:
    "plugin" if the Triton kernel is inside, "body" if its operation was built from standard layers. Seconds, bytes, MiB.
    """

    folder: Path
    file: str
    flavor: str
    library: str
    motionrt: str
    graph: str
    targets: tuple[str, ...]
    dtype: str
    onnx_sha256: str
    weights_sha256: str
    built_from_sha256: str
    recipe_sha256: str
    profiles: tuple[Profile, ...]
    inputs: tuple[EnginePort, ...]
    outputs: tuple[EnginePort, ...]
    kernel: str
    attentions: int
    engine_sha256: str
    engine_bytes: int
    build_seconds: float
    peak_rss_mib: float

    @property
    def engine_path(self) -> Path:
        """The engine's file."""
        return self.folder / self.file

    @property
    def bundle(self) -> Path:
        """The folder of the bundle that the engine belongs to."""
        return self.folder.parent.parent

    def rebuild_command(self, target: str | None = None) -> str:
        """The command that builds this engine anew, for `target` if it is another one."""
        targets, bundle = ",".join([target] if target else self.targets), self.bundle
        return f"motionrt build {bundle} --target {targets} --flavor {self.flavor} --dtype {self.dtype} --graphs {self.graph}"

    def check(self, spec: GraphSpec, machine: Machine | None = None, *, read: bool = False) -> None:
        """Raise `EngineError` unless the engine is that of the bundle's graph `spec`, whole, and `machine` can run it.

        Without `machine` only the bundle's side is checked. Reads the whole engine file for its digest, unless it did not
        change since that was last done; with `read` in any case.
        """
        engine, fix = f"engine '{self.graph}' in {self.folder}", f"Rebuild: `{self.rebuild_command()}`."
        check_origin(self, spec, engine, fix)
        self._check_ports(spec, engine, fix)
        if machine is not None:
            self._check_machine(machine, engine)
        self._check_content(engine, fix, read)

    def _check_ports(self, spec: GraphSpec, engine: str, fix: str) -> None:
        for kind, built, declared in (("inputs", self.inputs, spec.inputs), ("outputs", self.outputs, spec.outputs)):
            ours = {port.name: port for port in built}
            if ours.keys() != {port.name for port in declared}:
                raise EngineError(
                    f"{engine} has the {kind} {', '.join(sorted(ours))}; the bundle declares "
                    f"{', '.join(sorted(port.name for port in declared))}. {fix}"
                )
            for port in declared:
                got = ours[port.name]
                fits = len(got.dims) == len(port.dims) and all(
                    size == -1 or dim.min <= size <= dim.max for size, dim in zip(got.dims, port.dims, strict=True)
                )
                if got.dtype != port.dtype or not fits:
                    raise EngineError(
                        f"{engine} has `{got.name}: {got.dtype} {list(got.dims)}`; the bundle has `{port}`. {fix}"
                    )

    def _check_machine(self, machine: Machine, engine: str) -> None:
        name = FLAVORS[self.flavor]
        if machine.flavor != self.flavor:
            raise EngineError(
                f"{engine} is for {name}; here {FLAVORS.get(machine.flavor, machine.flavor)} is asked to run it. "
                f"Rebuild: `{self.rebuild_command().replace(f'--flavor {self.flavor}', f'--flavor {machine.flavor}')}`."
            )
        if machine.library != self.library:
            raise EngineError(
                f"{engine} was built with {name} {self.library}; {machine.library} is installed here. "
                f"Install that version, or rebuild: `{self.rebuild_command()}`."
            )
        if machine.target not in self.targets:
            raise EngineError(
                f"{engine} was built for {', '.join(self.targets)}; this machine is {machine.target}. "
                f"Rebuild: `{self.rebuild_command(machine.target)}`."
            )

    def _check_content(self, engine: str, fix: str, read: bool) -> None:
        try:
            size = self.engine_path.stat().st_size
            if size != self.engine_bytes:
                said = f"its sidecar says {self.engine_bytes}: it was cut or replaced"
                raise EngineError(f"{engine} has {size} bytes; {said}. {fix}")
            got = digest_of(self.engine_path, self.engine_sha256, self.bundle, read=read)
        except OSError as error:
            raise EngineError(f"{engine}: {self.engine_path.name} cannot be read ({error.strerror}). {fix}") from None
        if got != self.engine_sha256:
            raise EngineError(
                f"{engine} is damaged: SHA-256 {got[:12]}…, its sidecar says {self.engine_sha256[:12]}…. "
                f"Nothing was loaded. {fix}"
            )

    def profile_for(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Index of the first profile that holds all of `shapes` (input name to shape); `InputError` if none does."""
        for index, profile in enumerate(self.profiles):
            if all(profile[name].holds(shape) for name, shape in shapes.items() if name in profile):
                return index
        for name, shape in shapes.items():
            spans = [profile[name] for profile in self.profiles if name in profile]
            if spans and not any(span.holds(shape) for span in spans):
                break
        taken = "; or ".join(f"`{name}` {profile[name]}" for profile in self.profiles if name in profile)
        raise InputError(
            f"{self.graph} input `{name}` is {list(shape)}; this engine accepts {taken}. "
            f"Rebuild with a profile that holds it (`{self.rebuild_command()} --profile SIZE=MIN..MAX`), or change the array."
        )

    def to_json(self) -> str:
        """The sidecar's text; the same for the same engine."""
        record = {"format": FORMAT} | {key: value for key, value in asdict(self).items() if key != "folder"}
        return json.dumps(record, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> EngineFile:
        """Read the sidecar `path`; `EngineError` in plain words if it is missing, damaged or of another format."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise EngineError(f"there is no engine {path}. Build it: `motionrt build {path.parent.parent.parent}`.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise EngineError(f"{path} cannot be read ({error}). Build the bundle's engines again.") from None
        return cls(folder=path.parent, **_checked(path, raw))


class Made(Protocol):
    """What was made from a graph of a bundle, and says from which."""

    @property
    def graph(self) -> str: ...
    @property
    def motionrt(self) -> str: ...
    @property
    def onnx_sha256(self) -> str: ...
    @property
    def weights_sha256(self) -> str: ...


def check_origin(made: Made, spec: GraphSpec, name: str, fix: str) -> None:
    """Raise `EngineError` unless `made`, called `name`, was made from the graph `spec` with its weights by this version."""
    from motionrt import __version__

    for what, built, here in (
        ("graph", made.graph, spec.name),
        ("ONNX digest", made.onnx_sha256[:12], spec.sha256[:12]),
        ("weights digest", made.weights_sha256[:12] or "none", spec.weights_sha256[:12] or "none"),
        ("MotionRT version", made.motionrt, __version__),
    ):
        if built != here:
            raise EngineError(f"{name} was built from {what} {built}; this bundle and installation have {here}. {fix}")


def engine_folder(bundle: Path, flavor: str, targets: Sequence[str], dtype: str) -> Path:
    """Where the engines of a bundle for these targets lie; the order of `targets` does not matter."""
    return bundle / "engines" / f"{flavor}-{'+'.join(sorted_targets(targets))}-{dtype}"


def sorted_targets(targets: Sequence[str]) -> tuple[str, ...]:
    """Targets such as "sm_89", each once, the smallest first; `InputError` for what is no target."""
    for target in targets:
        if not re.fullmatch(r"sm_\d{2,3}", target):
            raise InputError(f"target is {target!r}; allowed is sm_ and a compute capability, such as sm_89 or sm_120.")
    return tuple(sorted(set(targets), key=lambda target: int(target[3:])))


def _checked(path: Path, raw: Any) -> dict[str, Any]:
    """The fields of a sidecar with their types, or `EngineError`."""

    def bad(what: str) -> EngineError:
        return EngineError(f"{path}: {what}. Build the bundle's engines again with this version of motionrt.")

    if not isinstance(raw, dict):
        raise bad("it must hold one object")
    if (number := raw.pop("format", None)) != FORMAT:
        raise bad(f"format is {number!r}; this version reads format {FORMAT}")
    wanted = {field.name: field.type for field in fields(EngineFile) if field.name != "folder"}
    if missing := sorted(wanted.keys() - raw.keys()):
        raise bad(f"it lacks {', '.join(missing)}")
    if unknown := sorted(raw.keys() - wanted.keys()):
        raise bad(f"it has the unknown {', '.join(unknown)}")
    for key, kind in wanted.items():
        kinds = {"str": (str,), "int": (int,), "float": (int, float)}.get(str(kind), (list,))
        if not isinstance(raw[key], kinds) or isinstance(raw[key], bool):
            raise bad(f"'{key}' is {raw[key]!r:.60}, which is of the wrong type")
    for key in _DIGESTS:
        if not re.fullmatch("[0-9a-f]{64}", raw[key]):
            raise bad(f"'{key}' is {raw[key]!r:.80}; it must be 64 hex digits")
    for key, allowed in (("flavor", tuple(FLAVORS)), ("dtype", WEIGHTS), ("kernel", KERNELS)):
        if raw[key] not in allowed:
            raise bad(f"'{key}' is {raw[key]!r:.40}; allowed: {', '.join(allowed)}")
    if Path(raw["file"]).name != raw["file"] or not raw["file"].endswith(".engine"):
        raise bad(f"'file' is {raw['file']!r:.80}; it must be an .engine file beside the sidecar")
    try:
        raw["targets"] = sorted_targets(raw["targets"])
        raw["profiles"] = tuple(
            {str(name): Span(**{side: _shape(value) for side, value in span.items()}) for name, span in profile.items()}
            for profile in raw["profiles"]
        )
        for key in ("inputs", "outputs"):
            raw[key] = tuple(EnginePort(str(p["name"]), str(p["dtype"]), _shape(p["dims"])) for p in raw[key])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise bad(f"its targets, profiles or ports are not well formed ({error})") from None
    return raw


def _shape(value: Any) -> Shape:
    if not isinstance(value, list) or not all(type(size) is int for size in value):
        raise ValueError(f"{value!r:.40} is no shape")
    return tuple(value)
