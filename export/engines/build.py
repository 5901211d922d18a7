"""The engines of a bundle: each built in a process of its own, proven against the declared interface, renamed into place.

A build holds a lock on its folder. Whatever happens to it (an error, a full disk, a kill), the previous engine stays: a new one
counts from the rename of its sidecar. An engine whose whole identity is unchanged is not built again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

import motionrt
from motionrt.export.engines.calibration import Scales, find_scales
from motionrt.export.engines.checks import check_request, check_room, load_library, scan_operators
from motionrt.export.engines.graph import count_attentions, engine_graph, save
from motionrt.export.engines.process import Event, Listener, run_builder
from motionrt.export.engines.profiles import Sizes, check_names, profiles_of
from motionrt.export.engines.quantised import NothingToQuantise, static
from motionrt.kernels.tensorrt_plugin import DOMAIN, NAMES, available
from motionrt.runtime.backends.onnx_weights import package_weights
from motionrt.runtime.backends.tensorrt.engine_file import KERNELS, EngineFile, EnginePort, engine_folder
from motionrt.runtime.backends.tensorrt.estimate import Estimate, estimate
from motionrt.runtime.bundle.bundle import Bundle, GraphSpec
from motionrt.runtime.dtypes import DTYPES
from motionrt.runtime.errors import EngineError, InputError
from motionrt.runtime.files import replacing, sha256_of

RECIPE = ("from_onnx", "graph", "profiles", "precision")  # what decides an engine's bytes
KERNEL_RECIPE = ("tensorrt_plugin", "aot", "artefacts", "motion_cross_attention_triton", "tiles")  # of a plugin's engine also


@dataclass(frozen=True)
class Options:
    """What to build. `graphs`: names; if empty all, and with `precision` the steps of loops; `profiles`: extra ones; `force`:
    whatever the memory estimate says.

    `kernel`: "plugin" puts the Triton kernel into the engine, "body" builds its operation from standard layers, and "auto"
    takes the plugin where the flavor and this machine can.

    `precision`: "int8" or "fp8" puts the products of a graph into 8 bits, in a network of `dtype` (quantised.py); None: all is
    in `dtype`. `calibrate`: the motion memory that scales, or quality, are measured with; None: with those that are there.
    `requests`: how many of its clips. `least_db`: of forms, the quality for which products are left as they are.
    """

    targets: tuple[str, ...]
    flavor: str = "rtx"
    dtype: str = "float16"
    graphs: tuple[str, ...] = ()
    profiles: tuple[Sizes, ...] = ()
    force: bool = False
    kernel: str = "auto"
    precision: str | None = None
    calibrate: Path | None = None
    requests: int = 8
    least_db: float | None = None


@dataclass(frozen=True)
class Built:
    """One engine in place. `cached`: it was there already. The rest is empty then: what the builder said of the network.

    `repeatable`: another build of it gives the same bytes, as far as the system allowed to see to that.
    """

    file: EngineFile
    cached: bool
    estimate: Estimate | None = None
    network_layers: int = 0
    decomposed: int = 0
    repeatable: bool = True
    warnings: tuple[str, ...] = ()
    figures: Mapping[str, int] = field(default_factory=dict)


def build_engines(path: Path, options: Options, listen: Listener = lambda event: None) -> Iterator[Built]:
    """Build the engines of the bundle `path`, one after the other, each in place before it is yielded.

    Raises `InputError` for options that make no sense, `BackendError` without the flavor's library, `EngineError` where one
    cannot be built: those before it stay, and its predecessor too.
    """
    library = load_library(options.flavor)
    targets = check_request(library, options.flavor, options.targets, options.dtype, options.precision)
    bundle = Bundle.open(path)
    names = chosen_graphs(bundle, options)
    check_names(options.profiles, [bundle.graphs[name] for name in names])
    if options.kernel not in ("auto", *KERNELS):
        raise InputError(f"--kernel is {options.kernel!r}; allowed: auto, {', '.join(KERNELS)}.")
    if options.kernel == "plugin" and (why := available(options.flavor, targets)) is not None:
        raise EngineError(f"the kernel cannot be put into these engines: {why}. Use --kernel body, or auto.")
    folder = engine_folder(path, options.flavor, targets, options.precision or options.dtype)
    with locked(folder):
        scales = find_scales(bundle, names, options.calibrate, options.requests, listen) if options.precision else {}
        for name in names:
            yield _build_one(bundle, name, folder, targets, options, str(library.__version__), scales.get(name), listen)


def chosen_graphs(bundle: Bundle, options: Options) -> tuple[str, ...]:
    """The graphs that `options` name, or all; with a precision of 8 bits the steps of loops. `InputError` for one that the
    bundle has not got."""
    for name in options.graphs:
        if name not in bundle.graphs:
            raise InputError(f"--graphs names '{name}'; this bundle has {', '.join(bundle.graphs)}.")
    if options.precision is not None and not options.graphs and not bundle.networks:
        raise InputError(f"--precision {options.precision} is for the steps of loops, and this bundle has none. Use --graphs.")
    return options.graphs or tuple(bundle.graphs if options.precision is None else bundle.networks)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, or `EngineError` if another builder does; what a killed one left behind is removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise EngineError(
            f"cannot write engines to {folder}: {error.strerror}. Check the folder and its permissions."
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
        except OSError:
            file.seek(0)
            holder = file.read(20).strip() or "unknown"
            raise EngineError(f"another build (process {holder}) is at work in {folder}. Wait until it ends.") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        for leftover in folder.glob(".build-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def recipe_sha256(kernel: str = "body") -> str:
    """Digest of the code that decides what the builder sees and does: another one, another engine."""
    digest, here, package = hashlib.sha256(), Path(__file__), Path(motionrt.__file__).parent
    files = [*(here.with_name(f"{name}.py") for name in RECIPE), package / "runtime" / "backends" / "precision.py"]
    if kernel == "plugin":
        files += [package / "kernels" / f"{name}.py" for name in KERNEL_RECIPE]
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def quantised_recipe(kernel: str = "body") -> str:
    """The same of what is in 8 bits."""
    code = Path(__file__).with_name("quantised.py").read_bytes()
    return hashlib.sha256(recipe_sha256(kernel).encode() + code).hexdigest()


def cached_engine(folder: Path, spec: GraphSpec, wanted: Mapping[str, Any]) -> EngineFile | None:
    """The engine of `spec` in `folder`, if it is whole and its identity is `wanted`."""
    try:
        file = EngineFile.read(folder / f"{spec.name}.json")
        file.check(spec)
    except EngineError:
        return None
    return file if all(getattr(file, key) == value for key, value in wanted.items()) else None


def _kernel(options: Options, targets: tuple[str, ...], path: Path) -> str:
    """How the engine of the graph in `path` gets the motion kernel: "plugin" where that can be and there is a use for it."""
    if options.kernel == "body" or available(options.flavor, targets) is not None:
        return "body"
    return "plugin" if any(node.domain == DOMAIN and node.op_type in NAMES for node in ir.load(path).graph) else "body"


def _build_one(
    bundle: Bundle, name: str, folder: Path, targets: tuple[str, ...], options: Options, library: str,
    scales: Scales | None, listen: Listener,
) -> Built:  # fmt: skip
    spec, path = bundle.graph(name), bundle.graph_path(name)
    kernel = _kernel(options, targets, path)
    profiles = profiles_of(spec, options.profiles)
    identity: dict[str, Any] = {
        "flavor": options.flavor,
        "library": library,
        "motionrt": motionrt.__version__,
        "graph": name,
        "targets": targets,
        "dtype": options.precision or options.dtype,
        "network": options.dtype if options.precision else "",
        "scales_sha256": scales.sha256 if scales is not None else "",
        "onnx_sha256": spec.sha256,
        "weights_sha256": spec.weights_sha256,
        "recipe_sha256": quantised_recipe(kernel) if options.precision else recipe_sha256(kernel),
        "profiles": profiles,
        "kernel": kernel,
    }
    if (file := cached_engine(folder, spec, identity)) is not None:
        return Built(file, cached=True)
    listen(Event(name, "converting"))
    external = package_weights(spec, path, bundle.path) if spec.weights is not None else None
    model = engine_graph(ir.load(path), profiles, options.dtype, external, kernel == "plugin", spec.wide)
    products = 0
    if options.precision is not None:
        try:
            products = static(model, scales.of(options.precision) if scales is not None else {}, options.precision)
        except NothingToQuantise as error:
            raise EngineError(f"graph '{name}' cannot be in {options.precision}: {error}. Choose others: --graphs.") from None
    operators = scan_operators(model, name, (DOMAIN,) if kernel == "plugin" else ())
    attentions = count_attentions(model)
    with workplace(folder) as place:
        needed = estimate(_save(model, place, name))
        if not options.force:
            check_room(name, needed, place)
        listen(Event(name, f"building: {needed}"))
        job: dict[str, Any] = {
            "flavor": options.flavor,
            "targets": targets,
            "dtype": options.dtype,
            "profiles": [{key: asdict(span) for key, span in profile.items()} for profile in profiles],
            "operators": operators,
            "onnx": "graph.onnx",
            "once": not bundle.in_loop(name),
            "full": options.dtype == "float32" or bool(spec.wide),
            "dtypes": {kind.tensorrt: kind.name for kind in DTYPES.values() if kind.tensorrt},
        }
        if kernel == "plugin":  # full TensorRT: its one target is the GPU that is here
            job["plugin"] = {"path": str(Path(motionrt.__file__).resolve().parent.parent), "target": int(targets[0][3:])}
        result = run_builder(name, job, place, needed, listen)
        if result["attentions"] != attentions:
            raise EngineError(
                f"graph '{name}' has {attentions} attentions, of which the builder took {result['attentions']} as such: "
                "the others would run unfused. Nothing was replaced."
            )
        engine = f"{name}-{result['engine_sha256'][:12]}.engine"
        file = EngineFile(
            folder=folder,
            file=engine,
            **identity,
            built_from_sha256=_digest_of(place),
            inputs=_ports(result["inputs"]),
            outputs=_ports(result["outputs"]),
            attentions=attentions,
            products=products,
            **{key: result[key] for key in ("engine_sha256", "engine_bytes", "build_seconds", "peak_rss_mib")},
        )
        _publish(file, place / "engine", spec)
    notes = tuple(line for line in result["warnings"] if not re.search("has Int64 binding", line))
    repeatable = options.flavor == "rtx" and result["repeatable"]
    return Built(file, False, needed, result["network_layers"], result["decomposed"], repeatable, notes, result["figures"])


def _publish(file: EngineFile, built: Path, spec: GraphSpec) -> None:
    """Move the engine beside its sidecar, prove the pair against `spec`, and only then let the sidecar name it."""
    try:
        os.replace(built, file.engine_path)
    except OSError as error:
        raise EngineError(f"cannot write {file.engine_path}: {error.strerror}. Nothing was replaced.") from None
    file.check(spec)
    with replacing(file.folder / f"{file.graph}.json", EngineError) as temporary:
        temporary.write_text(file.to_json(), encoding="utf-8")
    engine = re.compile(rf"{re.escape(file.graph)}-([0-9a-f]{{12}})\.engine")
    for old in file.folder.iterdir():  # the predecessor, and what a killed build left; what RTX compiled of it goes too
        if old.name != file.file and (match := engine.fullmatch(old.name)):
            for path in (old, *file.folder.glob(f"{file.graph}-*-{match[1]}.rtxcache")):
                path.unlink(missing_ok=True)


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A folder to build in, on the disk that the engine will be on; removed at the end. A full disk is an `EngineError`."""
    try:
        with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as name:
            yield Path(name)
    except OSError as error:
        raise EngineError(
            f"cannot build in {folder}: {error.strerror or error}. Free some space, or check permissions."
        ) from None


def _save(model: ir.Model, place: Path, name: str) -> int:
    """Write `graph.onnx`; its bytes, weights included."""
    try:
        save(model, place / "graph.onnx")
    except OSError as error:
        raise EngineError(f"cannot write graph '{name}' for its builder: {error.strerror or error}. Free some space.") from None
    return sum(file.stat().st_size for file in place.glob("graph.*"))


def _digest_of(place: Path) -> str:
    """Digest of what the builder saw: the graph, and its weights where they lie beside it."""
    parts = [sha256_of(file) for file in sorted(place.glob("graph.*"))]
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def _ports(found: Sequence[Mapping[str, Any]]) -> tuple[EnginePort, ...]:
    return tuple(EnginePort(port["name"], port["dtype"], tuple(port["dims"])) for port in found)
