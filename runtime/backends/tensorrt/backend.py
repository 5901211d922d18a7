"""The TensorRT backend: engines of a bundle on an NVIDIA GPU, TensorRT-RTX and full TensorRT by one adapter, no PyTorch.

Only `motionrt.runtime.backends.open` imports this module, and only when it is asked for. A sidecar is
checked before its engine is deserialised (`EngineFile.check`): nothing else protects a process from an engine of another
machine or version. How an engine runs, and who owns what it computes, is in graph.py.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

from motionrt.runtime.backends.kinds import MODULES, TENSORRT
from motionrt.runtime.backends.seam import Backend, Checked
from motionrt.runtime.backends.tensorrt.device_memory import Cuda
from motionrt.runtime.backends.tensorrt.engine_file import FLAVORS, EngineFile, Machine
from motionrt.runtime.backends.tensorrt.graph import Arena, TensorRTExecutor
from motionrt.runtime.backends.tensorrt.library import Library, installed, load_module
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.dtypes import PREFERRED, QUANTISED, WEIGHTS
from motionrt.runtime.errors import BackendError, BackendWarning, EngineError, InputError, install


class TensorRTBackend:
    """Runs the engines that `motionrt build` put into a bundle.

    device: "cuda" or "cuda:1". engines: the folder below engines/ to take, such as "rtx-sm_89-float16"; None takes the first
    that fits, by `MODULES` and then `PREFERRED`. precision: only engines of this dtype; "int8" and "fp8", which are not taken
    unasked: those of the graphs that have one, and of the others what there is. fallback: runs graphs that have no engine
    (silently) or none that fits (with a `BackendWarning`), and inputs outside an engine's profiles; None refuses them.
    `cuda` and `libraries` (flavor to module) are for tests. Raises `BackendError` where there is no GPU, driver or TensorRT,
    `InputError` for bad arguments.
    """

    def __init__(
        self,
        device: str = "cuda",
        *,
        engines: str | None = None,
        precision: str | None = None,
        fallback: Backend | None = None,
        cuda: Any = None,
        libraries: Mapping[str, Any] | None = None,
    ) -> None:
        _, index = TENSORRT.parse(device)
        if engines is not None and re.search(r"[/\\*?\[\]]|^\.", engines):
            raise InputError(f"engines is {engines!r}; it must be the name of one folder below engines/ of the bundle.")
        if libraries is None and not installed():
            raise TENSORRT.missing()
        self.cuda: Cuda = Cuda(index) if cuda is None else cuda
        self.engines, self.fallback, self._asked = engines, fallback, precision
        self.precision = precision or PREFERRED[0]  # of the engine that was loaded last
        self.arena = Arena(self.cuda)
        self.parallel_load = False
        self.label = f"tensorrt {self.cuda.name} {self.cuda.target}" + (f" {precision}" if precision in QUANTISED else "")
        self.used: dict[str, str] = {}  # graph -> what runs it
        self._modules = libraries
        self._libraries: dict[str, Library] = {}

    def library(self, flavor: str) -> Library:
        """The TensorRT of `flavor`, loaded once."""
        if flavor not in self._libraries:
            if self._modules is not None and flavor not in self._modules:
                raise BackendError(f"this engine needs {FLAVORS[flavor]}: {install(flavor)}.")
            module = load_module(flavor) if self._modules is None else self._modules[flavor]
            self._libraries[flavor] = Library(flavor, module)
        return self._libraries[flavor]

    def find(self, bundle: Bundle, name: str) -> EngineFile:
        """The engine of graph `name` that this machine can run. Nothing is deserialised.

        Raises `EngineError`: there is none, or the one that comes nearest is refused with its reason.
        """
        files, faults, taken = [], [], self._taken(bundle, name)
        for path in sorted((bundle.path / "engines").glob(f"{self.engines or '*'}/{name}.json")):
            try:
                file = EngineFile.read(path)
            except EngineError as error:
                faults.append(error)
                continue
            if file.dtype in taken:
                files.append(file)
        here, order, dtypes = self.cuda.target, list(MODULES), (*PREFERRED, *QUANTISED)
        flavors = installed() if self._modules is None else list(self._modules)

        def rank(file: EngineFile) -> tuple[bool, bool, int, int]:
            missing = file.flavor not in flavors
            return here not in file.targets, missing, order.index(file.flavor), dtypes.index(file.dtype)

        refused: list[EngineError] = []
        for file in sorted(files, key=rank):
            try:
                machine = Machine(file.flavor, self.library(file.flavor).version, here)
                file.check(bundle.graph(name), machine)
                return file
            except EngineError as error:
                refused.append(error)
            except BackendError as error:
                refused.append(EngineError(f"engine '{name}' in {file.folder}: {error}"))
        if not (refused or faults):
            inside = f" in engines/{self.engines}" if self.engines else ""
            inside += f" in {self._asked}" if self._asked else ""
            dtype = f" --{'precision' if self._asked in QUANTISED else 'dtype'} {self._asked}" if self._asked else ""
            dtype += " --calibrate MEMORY" if self._asked in QUANTISED else ""
            raise NoEngine(
                f"bundle {bundle.path} has no engine of graph '{name}'{inside}. Build one: `motionrt build {bundle.path} "
                f"--target {here}{dtype}`, or allow ONNX Runtime for such graphs: --allow-onnxruntime."
            )
        first, *others = refused + faults
        more = f" ({len(others)} other engines of it do not fit either: see `motionrt doctor {bundle.path}`.)" if others else ""
        raise EngineError(f"{first}{more}")

    def _taken(self, bundle: Bundle, name: str) -> tuple[str, ...]:
        """The dtypes of engines that may run graph `name`."""
        if self._asked is None:
            return (*WEIGHTS, *QUANTISED) if self.engines else WEIGHTS
        if self._asked not in QUANTISED or name in bundle.steps:
            return (self._asked,)
        return (self._asked,) if self._has(bundle, name) or not any(self._has(bundle, s) for s in bundle.steps) else WEIGHTS

    def _has(self, bundle: Bundle, name: str) -> bool:
        return any((bundle.path / "engines").glob(f"*-{self._asked}/{name}.json"))

    def load(self, bundle: Bundle, name: str) -> Checked:
        """Load graph `name`, warmed up at the first profile's `opt` shapes, so that no request pays for it.

        Raises `EngineError` as `find` does, or where TensorRT refuses the engine; `BackendError` where it fails.
        """
        spec, fallback = bundle.graph(name), self.fallback
        try:
            file = self.find(bundle, name)
            otherwise = None if fallback is None else partial(fallback.load, bundle, name)
            library = self.library(file.flavor)
            executor = TensorRTExecutor(spec, file, library, self.arena, loop=bundle.in_loop(name), otherwise=otherwise)
            executor.prepare()
        except EngineError as error:
            if fallback is None:
                raise
            if not isinstance(error, NoEngine):
                warnings.warn(f"graph '{name}' runs in {fallback.label}: {error}", BackendWarning, stacklevel=2)
            self.used[name] = fallback.label
            return fallback.load(bundle, name)
        self.precision = self._asked if self._asked in QUANTISED else file.dtype
        self.used[name] = f"{FLAVORS[file.flavor]} {file.library}, {file.folder.name}, kernel {file.kernel}"
        return Checked(spec, executor)


class NoEngine(EngineError):
    """A bundle has no engine of a graph at all."""
