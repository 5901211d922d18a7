"""What a built engine is, written beside it: a sidecar that is checked before anything is deserialised.

    engines/<flavor>-<targets>-<dtype>/<graph>.json                    the sidecar; it names
    engines/<flavor>-<targets>-<dtype>/<graph>-<digest>.engine         the engine

An engine is written first, under a name that holds its own digest, so that a build which is killed at any point leaves the
previous pair whole. No NumPy here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from motionrt.runtime.backends.sidecar import Sha256, Sidecar
from motionrt.runtime.bundle.manifest import GraphSpec
from motionrt.runtime.dtypes import QUANTISED, WEIGHTS
from motionrt.runtime.errors import InputError

FLAVORS = {"rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
KERNELS = ("body", "plugin")

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


Profile = dict[str, Span]


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


class EngineFile(Sidecar, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One engine. `built_from_sha256` is the digest of the builder's input, which `recipe_sha256` made from the bundle's graph.

    `kernel`: "plugin" if the Triton kernel is inside, "body" if its operation was built from standard layers; `attentions`: how
    many there are. `library`: the version of TensorRT. Seconds, bytes, MiB.
    """

    kind = "engine"

    file: Annotated[str, msgspec.Meta(pattern=r"^[^/\\]+\.engine$")]
    flavor: str
    library: str
    targets: tuple[str, ...]
    built_from_sha256: Sha256
    profiles: tuple[Profile, ...]
    inputs: tuple[EnginePort, ...]
    outputs: tuple[EnginePort, ...]
    kernel: str
    attentions: int
    network: str = ""
    products: int = 0
    scales_sha256: str = ""
    engine_sha256: Sha256
    engine_bytes: int
    build_seconds: float
    peak_rss_mib: float

    def __post_init__(self) -> None:
        for key, allowed in (("flavor", tuple(FLAVORS)), ("dtype", (*WEIGHTS, *QUANTISED)), ("kernel", KERNELS)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} is {getattr(self, key)!r}; allowed: {', '.join(allowed)}")
        sorted_targets(self.targets)

    @property
    def engine_path(self) -> Path:
        """The engine's file."""
        return self.folder / self.file

    def rebuild_command(self, *, target: str | None = None, flavor: str | None = None) -> str:
        """The command that builds this engine anew, for `target` and with `flavor` if they are others."""
        where = f"--target {target or ','.join(self.targets)} --flavor {flavor or self.flavor}"
        dtype = f"--dtype {self.network} --precision {self.dtype}" if self.dtype in QUANTISED else f"--dtype {self.dtype}"
        return f"motionrt build {self.bundle} {where} {dtype} --graphs {self.graph}"

    def check(self, spec: GraphSpec, machine: Machine | None = None, *, read: bool = False) -> None:
        """Raise `EngineError` unless the engine is that of the bundle's graph `spec`, whole, and `machine` can run it.

        Without `machine` only the bundle's side is checked. Reads the whole engine file for its digest, unless it did not
        change since that was last done; with `read` in any case.
        """
        self.check_origin(spec)
        self._check_ports(spec)
        if machine is not None:
            self._check_machine(machine)
        size = self.engine_path.stat().st_size if self.engine_path.is_file() else self.engine_bytes  # gone: said by the next
        if size != self.engine_bytes:
            raise self.refuse(f"has {size} bytes; its sidecar says {self.engine_bytes}: it was cut or replaced")
        self.check_file(self.file, self.engine_sha256, read=read)

    def _check_ports(self, spec: GraphSpec) -> None:
        for kind, built, declared in (("inputs", self.inputs, spec.inputs), ("outputs", self.outputs, spec.outputs)):
            ours = {port.name: port for port in built}
            if ours.keys() != {port.name for port in declared}:
                names = ", ".join(sorted(port.name for port in declared))
                raise self.refuse(f"has the {kind} {', '.join(sorted(ours))}; the bundle declares {names}")
            for port in declared:
                got = ours[port.name]
                fits = len(got.dims) == len(port.dims) and all(
                    size == -1 or dim.min <= size <= dim.max for size, dim in zip(got.dims, port.dims, strict=True)
                )
                if got.dtype != port.dtype or not fits:
                    raise self.refuse(f"has `{got.name}: {got.dtype} {list(got.dims)}`; the bundle has `{port}`")

    def _check_machine(self, machine: Machine) -> None:
        name = FLAVORS[self.flavor]
        if machine.flavor != self.flavor:
            other = FLAVORS.get(machine.flavor, machine.flavor)
            raise self.refuse(f"is for {name}; here {other} is asked to run it", self.rebuild_command(flavor=machine.flavor))
        if machine.library != self.library:
            here = f"{machine.library} is installed here: install {self.library}, or rebuild"
            raise self.refuse(f"was built with {name} {self.library}; {here}")
        if machine.target not in self.targets:
            here, command = f"this machine is {machine.target}", self.rebuild_command(target=machine.target)
            raise self.refuse(f"was built for {', '.join(self.targets)}; {here}", command)

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


def engine_folder(bundle: Path, flavor: str, targets: Sequence[str], dtype: str) -> Path:
    """Where the engines of a bundle for these targets lie; the order of `targets` does not matter."""
    return bundle / "engines" / f"{flavor}-{'+'.join(sorted_targets(targets))}-{dtype}"


def sorted_targets(targets: Sequence[str]) -> tuple[str, ...]:
    """Targets such as "sm_89", each once, the smallest first; `InputError` for what is no target."""
    for target in targets:
        if not re.fullmatch(r"sm_\d{2,3}", target):
            raise InputError(f"target is {target!r}; allowed is sm_ and a compute capability, such as sm_89 or sm_120.")
    return tuple(sorted(set(targets), key=lambda target: int(target[3:])))
