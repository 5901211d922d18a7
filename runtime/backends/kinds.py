"""The backends, in one list: what each needs, what it runs on, and whether it can run here. `open.py` opens them.

The help of the command line, `doctor`, `auto` and errors all read `BACKENDS`. Only the standard library is imported until a
backend is asked whether it can run: a broken installation can be asked as well.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from motionrt.runtime.backends.machine import Gpu
from motionrt.runtime.backends.openvino.library import load_library
from motionrt.runtime.errors import BackendError, InputError, install

if TYPE_CHECKING:
    from motionrt.runtime.bundle.bundle import Bundle

GPU_BUILD = f"{install('gpu')} in place of motionrt[cpu]"  # of ONNX Runtime: both have one import name
PROVIDERS = {  # of ONNX Runtime, by device: the wanted one, and what may run what that leaves
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider",),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
}
NVIDIA = ("cuda", "tensorrt")  # devices that the NVIDIA driver must tell of
MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}  # flavor of TensorRT -> import name, the preferred one first


@dataclass(frozen=True)
class BackendKind:
    """A backend that there is, installed or not.

    library, extras: what it is made on, and the extras of motionrt that bring it, the usual one first. needs: what it needs
    besides motionrt, for a sentence. devices: what it runs on, the default first. probe: device -> why it cannot run there,
    also where there is the NVIDIA GPU that it may want; or None. lacks: bundle, graph, target -> what the bundle has not got to
    run the graph, on a GPU like "sm_89"; or None.
    """

    name: str
    library: str
    extras: tuple[str, ...]
    needs: str
    devices: tuple[str, ...]
    probe: Callable[[str], str | None]
    lacks: Callable[[Bundle, str, str], str | None]

    @property
    def install(self) -> str:
        """The command that brings its library."""
        return install(*self.extras)

    def missing(self) -> BackendError:
        """The error where its library is not installed."""
        return BackendError(f"backend '{self.name}' needs {self.library}: {self.install}.")

    @property
    def places(self) -> str:
        """Its devices, for a sentence."""
        *others, last = self.devices
        return f"{', '.join(others)} or {last}" if others else last

    def on(self, device: str) -> str:
        """What it is called on `device`: just its name where that is its only one."""
        return f"{self.name} on {device}" if len(self.devices) > 1 else self.name

    def parse(self, device: str) -> tuple[str, int]:
        """`device` as one of `devices` and the number of the GPU: ("cuda", 1) for "cuda:1". Raises `InputError`."""
        found = re.fullmatch(r"(\w+)(?::(\d+))?", device) if isinstance(device, str) else None
        if found is None or found[1] not in self.devices or (found[1] == "cpu" and found[2]):
            second = next(name for name in self.devices if name != "cpu")
            raise InputError(f"device is {device!r}; the backend {self.name} runs on {self.places} ({second}:1: the second).")
        return found[1], int(found[2] or 0)

    def why_not(self, device: str, gpus: list[Gpu] | str) -> str | None:
        """Why it cannot run on `device` here, None if it can, as far as can be told without loading a graph.

        `gpus`: what `find_gpus` found.
        """
        return gpus if device in NVIDIA and isinstance(gpus, str) else self.probe(device)


def onnxruntime_facts() -> dict[str, Any]:
    """ONNX Runtime's version and providers, or why it is not there."""
    try:
        import onnxruntime
    except Exception as error:
        return {"version": None, "providers": [], "why": _absent("onnxruntime", ONNXRUNTIME.install, error)}
    return {"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers(), "why": None}


def tensorrt_facts(flavor: str) -> dict[str, Any]:
    """The TensorRT of one flavor: its version and, for RTX, the GPUs that it builds for; or why it is not there."""
    name = MODULES[flavor]
    if importlib.util.find_spec(name) is None:
        return {"version": None, "targets": None, "why": _absent(name, install(flavor))}
    try:
        library = importlib.import_module(name)
        members = getattr(library, "ComputeCapability", None) if flavor == "rtx" else None
        targets = None if members is None else [f"sm_{name[2:]}" for name in members.__members__ if name[2:].isdigit()]
        return {"version": str(library.__version__), "targets": targets, "why": None}
    except Exception as error:  # libraries that are missing or of another system: any kind of exception
        return {"version": None, "targets": None, "why": _absent(name, install(flavor), error)}


def _absent(module: str, how: str, error: Exception | None = None) -> str:
    if error is None or importlib.util.find_spec(module) is None:
        return f"not installed: {how}"
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return f"installed, but does not load: {line}"


def _probe_onnxruntime(device: str) -> str | None:
    facts, provider = onnxruntime_facts(), PROVIDERS[device][0]
    why: str | None = facts["why"]
    if why is None and provider not in facts["providers"]:
        return f"this onnxruntime has no {provider}: {GPU_BUILD}"
    return why


def _probe_torch(device: str) -> str | None:
    return None if importlib.util.find_spec("torch") is not None else _absent("torch", TORCH.install)


def _probe_openvino(device: str) -> str | None:
    for module in ("openvino", "onnx"):
        if importlib.util.find_spec(module) is None:
            return _absent(module, OPENVINO.install)
    if device == "cpu":
        return None
    try:
        found = load_library().Core().available_devices
    except Exception as error:
        return _absent("openvino", OPENVINO.install, error)
    if any(name.split(".")[0] == device.upper() for name in found):
        return None
    return f"OpenVINO finds no {device.upper()} here, only {', '.join(found) or 'nothing'} (is its driver installed?)"


def _probe_tensorrt(device: str) -> str | None:
    reasons = [tensorrt_facts(flavor)["why"] for flavor in TENSORRT.extras]  # the extras are named like the flavors
    if None not in reasons:
        return f"{TENSORRT.library} is {reasons[0]}"
    return None if importlib.util.find_spec("cuda") is not None else f"cuda-python is {_absent('cuda', TENSORRT.install)}"


def _no_program(bundle: Bundle, graph: str, target: str) -> str | None:
    return None if graph in bundle.programs else "the bundle has no torch program of it"


def _no_engine(bundle: Bundle, graph: str, target: str) -> str | None:
    if any((bundle.path / "engines").glob(f"*/{graph}.json")):
        return None
    return f"no engine: `motionrt build {bundle.path} --target {target}`"


ONNXRUNTIME = BackendKind(
    "onnxruntime", "ONNX Runtime", ("cpu", "gpu"), "ONNX Runtime alone", ("cpu", "cuda", "tensorrt"),
    _probe_onnxruntime, lambda bundle, graph, target: None,
)  # fmt: skip
OPENVINO = BackendKind(
    "openvino", "OpenVINO", ("openvino",), "OpenVINO", ("cpu", "gpu", "npu"),
    _probe_openvino, lambda bundle, graph, target: None,
)  # fmt: skip
TORCH = BackendKind(
    "torch", "PyTorch", ("torch",), "PyTorch, and torch programs in the bundle", ("cpu", "cuda"),
    _probe_torch, _no_program,
)  # fmt: skip
TENSORRT = BackendKind(
    "tensorrt", "TensorRT", ("rtx", "tensorrt"), "TensorRT, an NVIDIA GPU, and engines in the bundle", ("cuda",),
    _probe_tensorrt, _no_engine,
)  # fmt: skip
# The default first, the fastest last: `auto` tries them from the end.
BACKENDS: dict[str, BackendKind] = {kind.name: kind for kind in (ONNXRUNTIME, OPENVINO, TORCH, TENSORRT)}
