"""The full-size CogVideoX step with random weights on a GPU, bf16: the base model, the released adapter, and ours.

    .venv-dev/bin/python benchmarks/gpu/gpu_step.py                                  # gpu_suite.py runs it too
    .venv-dev/bin/python benchmarks/gpu/gpu_step.py --stages released_eager ours_graph --budget 500

Stages: `released_eager` and `_compiled` (the step as it is written), `ours_eager`, `_compiled` and `_graph` (the rewritten
step in the torch backend; `_graph` is what it runs on a GPU), `base_eager` and `_compiled` (no adapter); `_tuned` is compiled
with max-autotune, the rival's best. Each is checked before it is timed (the base alone has nothing to be checked against but
that it is finite), a row is kept as soon as it is there, and none starts after `--budget` seconds: compiling takes minutes.
Stages run after one another, not in turns (two full models rarely fit), so small differences between them mean little.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from motionrt.benchmarks import harness
from motionrt.benchmarks.models.full_step import OUTPUTS, SIZES, Size, build_step, cut, feed, step_inputs
from motionrt.benchmarks.questions.roofline import GPUS, Work, released_of
from motionrt.export.compiler.partition import Partition
from motionrt.runtime.backends.seam import Checked
from motionrt.runtime.backends.torch_backend import TorchExecutor, TorchValue
from motionrt.runtime.bundle.bundle import Dim, GraphSpec, Port
from motionrt.runtime.errors import BackendWarning

STAGES = (
    "released_eager", "ours_graph", "ours_eager", "ours_compiled", "released_compiled", "released_tuned", "base_eager",
    "base_compiled", "base_tuned",
)  # fmt: skip
# Relative to the released step's values (L2): gates against mistakes, not figures of accuracy.
ALLOWED = {torch.bfloat16: 5e-2, torch.float32: 1e-4}
Step = Callable[[], Sequence[Tensor]]


def spec_of(inputs: Mapping[str, Tensor], outputs: Sequence[str] = OUTPUTS) -> GraphSpec:
    """The interface of a step at exactly these sizes, typed in float32 as a bundle's is, whatever it computes in; `outputs` are
    as large as the latents."""

    def port(name: str, value: Tensor) -> Port:
        dtype = "float32" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
        return Port(name, dtype, tuple(Dim("", s, s, s) for s in value.shape))

    made = tuple(port(name, inputs["latents"]) for name in outputs)
    return GraphSpec("step", "", "", tuple(port(*item) for item in inputs.items()), made)


def graph_of(partition: Partition, inputs: Mapping[str, Tensor], mode: str, device: str) -> tuple[Checked, str]:
    """The rewritten step behind the seam, prepared as `mode` says, and its mode; what it fell back from is printed."""
    spec = spec_of(inputs, partition.step.outputs)
    executor = TorchExecutor(spec, partition.step.module, inputs, partition.step.outputs, torch.device(device))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        executor.prepare({"compiled": "compile"}.get(mode, mode))
    for warning in seen:
        if issubclass(warning.category, BackendWarning):
            print(f"  {warning.message}")
    return Checked(spec, executor), executor.mode


def ours(partition: Partition, inputs: Mapping[str, Tensor], mode: str, device: str) -> tuple[Step, str]:
    """One call of the rewritten step with its values on the device; and the mode that it really runs in."""
    graph, mode = graph_of(partition, inputs, mode, device)
    values = {port.name: TorchValue(inputs[port.name], port.dtype) for port in graph.spec.inputs}
    return lambda: [value.tensor for value in graph.run(values).values()], mode


def plain(module: nn.Module, values: Mapping[str, Tensor], mode: str) -> Step:
    """A step as it is written, eager, compiled, or tuned: compiled with max-autotune, which is a rival's best."""
    call: Callable[..., Any] = module
    if mode != "eager":
        call = torch.compile(module, dynamic=False, mode="max-autotune" if mode == "tuned" else "default")

    def run() -> Sequence[Tensor]:
        with torch.no_grad():
            results: Sequence[Tensor] = call(**values)
        if results[0].is_cuda:
            torch.cuda.synchronize()
        return results

    return run


def counted(module: nn.Module, values: Mapping[str, Tensor], device: str) -> int:
    """FLOPs of a step, counted by torch as it runs it once.

    Its counter knows no fused attention of a CPU: there it is run as the products that it consists of.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    attention = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext()
    with torch.no_grad(), attention, FlopCounterMode(display=False) as counter:
        module(**values)
    return int(counter.get_total_flops())


def relative(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest relative L2 difference over the outputs; ParityError where something is not finite."""
    worst = 0.0
    for ours, theirs in zip(got, want, strict=True):
        worst = max(worst, float((ours.double().cpu() - theirs.double()).norm() / theirs.double().norm()))
    if not np.isfinite(worst):
        raise harness.ParityError("an output is not finite")
    return worst


def bound(flops: int, device: str) -> float | None:
    """The static bound in milliseconds of the GPU that calls itself `device`; None where roofline.py does not know it."""
    words = device.replace("-", " ").split()
    for gpu in GPUS:
        if set(gpu.name.split()) - {"SXM", "80GB"} <= set(words):
            return Work(flops, 0).bound(gpu)[0]
    return None


class Suite:
    """Runs stages within a budget of seconds and keeps their rows."""

    def __init__(self, size: Size, device: str, dtype: torch.dtype, options: argparse.Namespace) -> None:
        self.size, self.device, self.dtype, self.options = size, device, dtype, options
        self.start = perf_counter()
        self.wanted: list[Tensor] = []

    def due(self, stage: str) -> bool:
        """Whether `stage` is asked for and there is time; says so if there is not."""
        if stage not in self.options.stages:
            return False
        spent = perf_counter() - self.start
        if spent < self.options.budget:
            return True
        print(f"{stage}: not run: {spent:.0f} s of {self.options.budget:g} s are spent")
        return False

    def stage(self, stage: str, flops: int, make: Callable[[], tuple[Step, str]]) -> None:
        """Make, check, time and keep one stage; a failure is printed and the next stage goes on."""
        if not self.due(stage):
            return
        cuda = self.device == "cuda"
        try:
            before = perf_counter()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            step, mode = make()
            got = [value.clone() for value in step()]
            prepared = perf_counter() - before
            error = relative(got, self.wanted) if self.wanted and not stage.startswith("base") else None
            if error is not None and error > ALLOWED[self.dtype]:
                raise harness.ParityError(f"it differs from released_eager by {error:.3g}, allowed {ALLOWED[self.dtype]:g}")
            if not all(bool(torch.isfinite(value).all()) for value in got):
                raise harness.ParityError("an output is not finite")
            if stage == "released_eager":
                self.wanted = [value.cpu() for value in got]
            seconds = harness.clock(step, rounds=self.options.rounds, warmups=self.options.warmups)
        except Exception as failure:  # out of memory, a compiler: the other stages may still run
            print(f"{stage}: failed: {type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}")
            return
        row = {
            "what": f"{self.size.name} step",
            "backend": stage,
            "ran_as": mode,
            **harness.summary(seconds),
            "warmups": self.options.warmups,
            "layers": self.size.layers,
            "shape": [1, *self.size.latents],
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "prepare_seconds": prepared,
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "flops": flops,
            "tflops": flops / float(np.median(seconds)) / 1e12,
            "bound_ms": bound(flops, torch.cuda.get_device_name() if cuda else "cpu"),
            "error": {"relative_l2": error, "to": "released_eager", "allowed": ALLOWED[self.dtype]},
            "note": "random weights; stages one after another",
        }
        harness.append_row("gpu_step", row, folder=self.options.results)
        text = "{backend:>18} ({ran_as}): p50 {p50_ms:.2f} ms, p95 {p95_ms:.2f} ms, n {n}, {tflops:.2f} TFLOP/s".format(**row)
        print(text, flush=True)

    def free(self) -> None:
        """Give back what the last model held."""
        gc.collect()
        torch.compiler.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def run(suite: Suite) -> None:
    """All stages: the released model, then what the pass makes of it (shared weights), then the base model."""
    size, device, dtype = suite.size, suite.device, suite.dtype
    values = feed(size, dtype, device)
    if any(suite.due(stage) for stage in STAGES if not stage.startswith("base")):
        module = build_step(size, dtype, device)
        before = perf_counter()
        partition = cut(size, dtype, device, module)
        print(f"{size.name}: partitioned in {perf_counter() - before:.0f} s", flush=True)
        inputs = step_inputs(partition, values)
        whole, flops = partition.original.flops, partition.classes["step"].flops
        suite.stage("released_eager", whole, lambda: (plain(module, values, "eager"), "eager"))
        for mode in ("graph", "eager", "compiled"):
            suite.stage(f"ours_{mode}", flops, lambda mode=mode: ours(partition, inputs, mode, device))  # type: ignore[misc]
            suite.free()
        for mode in ("compiled", "tuned"):
            suite.stage(f"released_{mode}", whole, lambda mode=mode: (plain(module, values, mode), mode))  # type: ignore[misc]
            suite.free()
        del module, partition, inputs
        suite.free()
        base_flops = whole - released_of(size).flops
    else:
        base_flops = 0
    if any(suite.due(stage) for stage in STAGES if stage.startswith("base")):
        base = build_step(size, dtype, device, adapter=False)
        for mode in ("eager", "compiled", "tuned"):
            suite.stage(f"base_{mode}", base_flops, lambda mode=mode: (plain(base, values, mode), mode))  # type: ignore[misc]


def read_options(arguments: list[str] | None, what: str, sizes: Iterable[str]) -> argparse.Namespace:
    """The options of a suite that measures `what` at one of `sizes`, the first of which is "full"."""
    parser = argparse.ArgumentParser(description=f"The {what}: base, released and ours.")
    parser.add_argument("--size", choices=list(sizes), default="full")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--budget", type=float, default=1500.0, help="seconds after which no stage starts")
    harness.add_options(parser, rounds=20, warmups=3)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> None:
    """Run the stages on the GPU; `device` and `dtype` are for the test of this file at toy size."""
    options = read_options(arguments, "full-size CogVideoX step", SIZES)
    if device == "cuda" and not torch.cuda.is_available():
        print("not run: no CUDA device")
        return
    run(Suite(SIZES[options.size], device, dtype, options))


if __name__ == "__main__":
    main()
