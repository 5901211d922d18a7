"""One engine from one ONNX graph: a thin adapter over TensorRT 10.x, 11.x and TensorRT-RTX, in a process of its own.

This file is run as a script, in an empty environment, for every engine, for two reasons. A parser that meets what it cannot
digest may abort or crash its process; there that is an exit status and a plain sentence, not the end of the caller. And the
builder keeps some of its tables in the order of addresses, so that the bytes of an engine repeat only if the heap does: one
thread, one arena, no address randomisation, and the same process from the start. It therefore imports the standard library and
TensorRT only, reads `job.json` and `graph.onnx` from its working directory, writes `engine` there, and reports one JSON object
per line.

Networks are strongly typed: precision is in the ONNX. TensorRT-RTX builds for targets that need not be here; full TensorRT
builds for the GPU that it runs on.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

LIBRARIES = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
FUSED_HEADS = range(16, 257)  # head sizes that fused kernels take, fp16 and bf16 alike (RTX 1.7; tried: sm_75, 80, 89, 120)
SAYS = {  # what the builder's own log says of the engine: its text, without a GPU that could inspect it
    "layers": r"After reformat layers: (\d+) layers",
    "device_bytes": r"Total Activation Memory: (\d+) bytes",
    "weight_bytes": r"Total Weights Memory: (\d+) bytes",
}


def report(**message: Any) -> None:
    """One line for the parent process."""
    print(json.dumps(message), flush=True)


class BuildFailure(Exception):
    """The builder refused; the message is what it logged. `fused`: the network had attentions that had to stay whole."""

    def __init__(self, message: str, fused: bool = False) -> None:
        super().__init__(message)
        self.fused = fused


def logger_class(trt: Any) -> Any:
    """A logger that keeps errors and warnings, and the few figures in `SAYS`."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.figures: dict[str, int] = {}

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)
            else:
                for name, pattern in SAYS.items():
                    if found := re.search(pattern, message):
                        self.figures[name] = int(found[1])

        def text(self) -> str:
            """Every different error, in order."""
            return "\n".join(dict.fromkeys(self.errors)) or "the builder gave no reason"

    return Log


def progress_monitor(trt: Any) -> Any:
    """An IProgressMonitor that reports at most ten times a second, or None for a version that has none."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.last = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.steps[name] = steps

        def step_complete(self, name: str, step: int) -> bool:
            now = time.monotonic()
            if now - self.last > 0.1:
                self.last = now
                report(progress=[name, step + 1, self.steps.get(name, 0)])
            return True

        def phase_finish(self, name: str) -> None:
            self.steps.pop(name, None)

    return Monitor()


def ports(count: int, get: Any, dtypes: Mapping[str, str]) -> list[dict[str, Any]]:
    """Names, dtypes (by `dtypes`, from TensorRT's names) and sizes of a network's inputs or outputs."""
    found = (get(index) for index in range(count))
    return [{"name": t.name, "dtype": dtypes.get(t.dtype.name, t.dtype.name), "dims": list(t.shape)} for t in found]


def settle_attentions(trt: Any, network: Any, whole: bool, full: bool) -> tuple[int, int]:
    """How many IAttention the network has, and how many of them may be taken apart, which is set here.

    fp32 ones may where the graph has such on purpose (`full`): there is no kernel for them. fp16 and bf16 heads of 16 to 256
    stay whole unless `whole` is false: where no kernel takes one, the build fails.
    """
    found = apart = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "ATTENTION_OUTPUT":
            layer.__class__ = trt.IAttentionOutputLayer
            attention = layer.attention
            found += 1
            query = attention.get_input(0)
            if not whole or (full and query.dtype.name == "FLOAT") or query.shape[-1] not in FUSED_HEADS:
                attention.decomposable = True
                apart += 1
    return found, apart


def typed_network(trt: Any, builder: Any) -> Any:
    """A strongly typed network, also where that has become the only kind."""
    flags = getattr(trt, "NetworkDefinitionCreationFlag", None)
    flag = getattr(flags, "STRONGLY_TYPED", None)
    return builder.create_network(0 if flag is None else 1 << int(flag))


def configure(trt: Any, builder: Any, network: Any, job: dict[str, Any]) -> Any:
    """The builder's configuration: progress, profiles for sizes that are not fixed, and on RTX the targets."""
    config = builder.create_builder_config()
    config.progress_monitor = job["monitor"]
    moving = {tensor.name for tensor in (network.get_input(i) for i in range(network.num_inputs)) if -1 in tuple(tensor.shape)}
    for profile in job["profiles"] if moving else []:
        added = builder.create_optimization_profile()
        for name in sorted(moving):
            added.set_shape(name, *(tuple(profile[name][side]) for side in ("min", "opt", "max")))
        if config.add_optimization_profile(added) < 0:
            raise BuildFailure(f"the profile {profile} was refused")
    if job["flavor"] == "rtx":
        config.num_compute_capabilities = len(job["targets"])
        for index, target in enumerate(job["targets"]):
            capability = getattr(trt.ComputeCapability, target.replace("sm_", "SM"))
            if not config.set_compute_capability(capability, index):
                raise BuildFailure(f"the target {target} was refused")
    return config


def check_operators(parser: Any, operators: Sequence[str]) -> None:
    """Refuse operators that the parser does not know before it parses anything."""
    unknown = sorted(name for name in set(operators) if not parser.supports_operator(name))
    if unknown:
        raise BuildFailure(f"no importer for the operators {', '.join(unknown)}")


def register_plugin(path: str, target: int) -> None:
    """Make the motion kernel known to full TensorRT, for GPUs of `target`; `path` is where the package motionrt lies."""
    if path not in sys.path:
        sys.path.append(path)
    importlib.import_module("motionrt.kernels.tensorrt_plugin").register(target)


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Parse, build and write `engine`; what the parent makes an `EngineFile` of. Raises `BuildFailure` with the logger's text.

    Where the builder has no kernel for an attention, a graph of `once`, which a request runs once, is built again with its
    attentions taken apart; another, which every step runs, would grow slow without a word, and fails.
    """
    start = time.perf_counter()
    try:
        return _build(job, start, whole=True)
    except BuildFailure as failure:
        if not job["once"] or not failure.fused:
            raise
        return _build(job, start, whole=False)


def _build(job: dict[str, Any], start: float, whole: bool) -> dict[str, Any]:
    trt = importlib.import_module(LIBRARIES[job["flavor"]])
    log = logger_class(trt)()
    job["monitor"] = progress_monitor(trt)
    builder = trt.Builder(log)
    if job["flavor"] == "rtx":
        builder.max_threads = 1  # no slower here, and no order of threads in the engine
    if job.get("plugin"):
        register_plugin(**job["plugin"])
    network = typed_network(trt, builder)
    parser = trt.OnnxParser(network, log)
    check_operators(parser, job["operators"])
    if not parser.parse_from_file(job["onnx"]):
        said = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise BuildFailure("\n".join(dict.fromkeys(said)) or log.text())
    if network.num_outputs == 0:
        raise BuildFailure("the parser took the file and found no graph in it")
    attentions, apart = settle_attentions(trt, network, whole, job["full"])
    config = configure(trt, builder, network, job)
    result: dict[str, Any] = {
        "library": str(trt.__version__),
        "inputs": ports(network.num_inputs, network.get_input, job["dtypes"]),
        "outputs": ports(network.num_outputs, network.get_output, job["dtypes"]),
        "network_layers": network.num_layers,
        "attentions": attentions,
        "decomposed": apart,
    }
    engine = builder.build_serialized_network(network, config)
    if engine is None:  # it logs, and raises nothing
        raise BuildFailure(log.text(), fused=attentions > apart)
    data = memoryview(engine).cast("B")
    with open("engine", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {
        **result,
        "engine_sha256": hashlib.sha256(data).hexdigest(),
        "engine_bytes": data.nbytes,
        "build_seconds": round(time.perf_counter() - start, 3),
        "peak_rss_mib": peak_rss_mib(),
        "warnings": list(dict.fromkeys(log.warnings)),
        "figures": log.figures,
    }


def peak_rss_mib() -> float:
    """The most memory that this process has held, MiB; of this program, not of what it was forked from."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            found = re.search(r"VmHWM:\s*(\d+) kB", file.read())
            return round(int(found[1]) / 1024, 1) if found else 0.0
    except OSError:
        return 0.0


def die_with_parent() -> None:
    """On Linux a killed caller takes this process with it."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def fix_addresses() -> bool:
    """Start this process over without address randomisation; False where the system does not allow that (some sandboxes)."""
    if sys.platform != "linux":
        return False
    import ctypes

    libc, no_randomize = ctypes.CDLL(None), 0x0040000  # ADDR_NO_RANDOMIZE of <sys/personality.h>
    current = libc.personality(0xFFFFFFFF)
    if current & no_randomize:
        return True
    if libc.personality(current | no_randomize) == -1:
        return False
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> int:
    """Build what `job.json` says; exit status 0, or 3 with an `error` line."""
    repeatable = fix_addresses()
    die_with_parent()
    with open("job.json", encoding="utf-8") as file:
        job = json.load(file)
    if job["site"] not in sys.path:
        sys.path.append(job["site"])
    try:
        report(result={**build(job), "repeatable": repeatable})
        return 0
    except BuildFailure as failure:
        report(error=str(failure))
    except MemoryError:
        report(error="out of memory")
    except OSError as error:
        report(error=f"{error.filename or 'engine'}: {error.strerror}", errno=error.errno)
    except Exception as error:  # of the library's bindings
        report(error=f"{type(error).__name__}: {error}")
    return 3


if __name__ == "__main__":
    sys.exit(main())
