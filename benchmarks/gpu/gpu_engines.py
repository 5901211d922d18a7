"""TensorRT engines on this machine's GPU: build each graph, load it, check it against ONNX Runtime, time it.

    .venv-dev/bin/python benchmarks/gpu/gpu_engines.py                       # gpu_suite.py --engines runs it too
    .venv-dev/bin/python benchmarks/gpu/gpu_engines.py --dtype bfloat16 --graphs step decode
    .venv-dev/bin/python benchmarks/gpu/gpu_engines.py --precision fp8       # what 8 bits gain: the steps in turns with --dtype

Every graph gets what a request of the demo gives it, recorded from ONNX Runtime on the CPU, which is also what it is checked
against. A row is kept for each graph as soon as it is there, and one for a whole request. Engines go to a copy of the bundle
that is removed afterwards (--keep names another place). Nothing is run, and the reason is said, where there is no GPU, no
TensorRT, or a GPU that the flavor builds nothing for: TensorRT-RTX has no sm_90, which is an H100 or H200.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.benchmarks import harness
from motionrt.benchmarks.pipeline import DEMO, answer, any_request, open_pipeline, recorded
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.backends.seam import Backend, fetch
from motionrt.runtime.backends.tensorrt.engine_file import FLAVORS
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.cli.diagnosis import examine
from motionrt.runtime.dtypes import QUANTISED
from motionrt.runtime.errors import MotionRTError
from motionrt.runtime.pipeline import Result

# Relative to ONNX Runtime's fp32 (L2, the worst output): gates against mistakes, not figures of accuracy.
ALLOWED = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
EIGHT_BITS = 1e-1  # likewise, of `QUANTISED`
Arrays = Mapping[str, Any]


def missing(flavor: str) -> tuple[str | None, str]:
    """(why nothing can run here, or None; the GPU's target)."""
    found = examine()
    if found["no_gpu"]:
        return str(found["no_gpu"]), ""
    target, facts = str(found["gpus"][0]["target"]), found["tensorrt"][flavor]
    if facts["version"] is None:
        return f"{FLAVORS[flavor]}: {facts['why']}", target
    if facts["targets"] is not None and target not in facts["targets"]:
        return f"{FLAVORS[flavor]} {facts['version']} has no target {target}; it has {', '.join(facts['targets'])}", target
    return found["backends"]["tensorrt"], target


def record(bundle: Path) -> tuple[dict[str, dict[str, NDArray[Any]]], Result]:
    """(inputs of every graph that a request runs, the request's result), by ONNX Runtime on the CPU."""
    with open_pipeline(bundle, threads=1) as pipeline:
        seen, result = recorded(pipeline, any_request(pipeline))
        if (memory := pipeline.bundle.manifest.memory) is not None:  # its references were drawn, not searched for
            tokens = pipeline.bundle.tokenize(memory.tokenizer, "a red star moves right")
            seen[memory.query] = {port.name: tokens[port.name] for port in pipeline.bundle.graph(memory.query).inputs}
    return seen, result


def error_of(got: Arrays, want: Arrays) -> float:
    """Largest relative L2 difference over the outputs; ParityError where names, shapes or finiteness differ."""
    harness.difference({k: fetch(v) for k, v in got.items()}, want)
    worst = 0.0
    for name, value in want.items():
        scale = max(float(np.linalg.norm(value)), 1e-30)
        worst = max(worst, float(np.linalg.norm(fetch(got[name]).astype(np.float64) - value)) / scale)
    return worst


def measure_graph(bundle: Bundle, name: str, backend: Backend, inputs: Arrays, options: argparse.Namespace) -> dict[str, Any]:
    """Load graph `name`, check it, time it: with host arrays in and out, and with everything on the device.

    Raises ParityError, before anything is timed, where it differs from ONNX Runtime by more than `ALLOWED`.
    """
    before = perf_counter()
    graph = backend.load(bundle, name)
    loaded = perf_counter() - before
    want = OnnxRuntimeBackend(1).load(bundle, name)(inputs)
    error, allowed = error_of(graph(inputs), want), ALLOWED[options.dtype]
    if not error <= allowed:
        raise harness.ParityError(f"it differs from ONNX Runtime by {error:.3g} (relative L2), allowed {allowed:g}")
    row: dict[str, Any] = {
        "what": f"{bundle.name} {name}, host to host",
        **harness.summary(harness.clock(lambda: graph(inputs), rounds=options.rounds, warmups=options.warmups)),
        "warmups": options.warmups,
        "load_seconds": loaded,
        "error": {"relative_l2": error, "to": "onnxruntime fp32", "allowed": allowed},
    }
    if graph.executor.device is not None:
        placed = {port: graph.put(port, value) for port, value in inputs.items()}
        resident = harness.clock(lambda: graph.run(placed), rounds=options.rounds, warmups=options.warmups)
        row["resident"] = harness.summary(resident)
    return row


def run(bundle: Path, backend: Backend, facts: Mapping[str, Mapping[str, Any]], options: argparse.Namespace) -> int:
    """Rows for the graphs in `facts` (what is known of each engine) and a whole request; how many graphs failed."""
    inputs, expected = record(bundle)
    opened, failed = Bundle.open(bundle), 0
    for name, known in facts.items():
        if name not in inputs:
            print(f"{name}: not run: a request does not call it")
            continue
        try:
            row = measure_graph(opened, name, backend, inputs[name], options)
        except (MotionRTError, harness.ParityError) as error:
            print(f"{name}: failed: {error}")
            failed += 1
            continue
        shapes = {key: list(np.shape(value)) for key, value in inputs[name].items()}
        shape = shapes if len(shapes) <= 8 else {key: shapes[key] for key in list(shapes)[:8]}
        harness.append_row(
            "gpu_engines",
            {**row, "backend": backend.label, "dtype": options.dtype, "shape": shape, **known},
            folder=options.results,
        )
        text = "{what}: p50 {p50_ms:.3f} ms, p95 {p95_ms:.3f} ms, n {n}".format(**row)
        on_device = f", on the device {row['resident']['p50_ms']:.3f} ms" if "resident" in row else ""
        print(f"{text}{on_device}, error {row['error']['relative_l2']:.1e}", flush=True)
    memory = opened.manifest.memory
    whole = inputs.keys() - ({memory.query} if memory is not None else set())  # what the request of drawn references called
    if failed or not whole <= facts.keys():
        print("whole request: not run: " + ("a graph failed" if failed else "only some graphs were asked for"))
        return failed
    with open_pipeline(bundle, backend=backend) as pipeline:
        pipeline.warm()
        request = any_request(pipeline)
        got = answer(pipeline, request)
        apart = np.abs(got.frames.astype(int) - expected.frames.astype(int))
        seconds = harness.clock(lambda: answer(pipeline, request), rounds=max(options.rounds // 10, 1), warmups=1)
    row = {
        "what": f"{opened.name} request", **harness.summary(seconds), "warmups": 1, "backend": backend.label,
        "dtype": options.dtype, "shape": list(got.frames.shape),
        "error": {"mean_grey_levels": float(apart.mean()), "max_grey_levels": int(apart.max()), "to": "onnxruntime fp32"},
    }  # fmt: skip
    path = harness.append_row("gpu_engines", row, folder=options.results)
    print("{what}: p50 {p50_ms:.1f} ms, n {n}, {error[mean_grey_levels]:.3f} grey levels from ONNX Runtime's".format(**row))
    print(f"rows appended: {path.name}")
    return failed


def gain(bundle: Path, names: Sequence[str], eight: Backend, half: Backend, options: argparse.Namespace) -> int:
    """Rows of the steps `names` in 8 bits and in --dtype, everything on the device, in turns; how many were refused.

    Whether a fused 8-bit kernel runs shows in the ratio alone: an engine that only stores 8 bits is no faster. Both are checked
    against ONNX Runtime before they are timed; one engine that differs by more than it may from it is not timed.
    """
    inputs, _ = record(bundle)
    opened, failed = Bundle.open(bundle), 0
    for name in (name for name in names if name in inputs):
        try:
            graphs = {options.precision: eight.load(opened, name), options.dtype: half.load(opened, name)}
            want = OnnxRuntimeBackend(1).load(opened, name)(inputs[name])
            errors = {key: error_of(graph(inputs[name]), want) for key, graph in graphs.items()}
        except (MotionRTError, harness.ParityError) as error:
            print(f"{name}: failed: {error}")
            failed += 1
            continue
        if errors[options.precision] > EIGHT_BITS or errors[options.dtype] > ALLOWED[options.dtype]:
            print(f"{name}: failed: relative L2 to ONNX Runtime is {errors}")
            failed += 1
            continue
        placed = {key: {port: graph.put(port, value) for port, value in inputs[name].items()} for key, graph in graphs.items()}
        seconds: dict[str, list[float]] = {key: [] for key in graphs}
        for _ in range(options.rounds):
            for key, graph in graphs.items():
                seconds[key].extend(harness.clock(partial(graph.run, placed[key]), rounds=1, warmups=1))
        for key, other, backend in (
            (options.precision, options.dtype, eight), (options.dtype, options.precision, half),
        ):  # fmt: skip
            row = {
                "what": f"{opened.name} {name}, {key} in turns with {other}",
                **harness.summary(np.array(seconds[key])), "warmups": 1, "backend": backend.label, "dtype": key,
                "error": {"relative_l2": errors[key], "to": "onnxruntime fp32"},
            }  # fmt: skip
            harness.append_row("gpu_engines", row, folder=options.results)
        ratio = np.median(seconds[options.dtype]) / np.median(seconds[options.precision])
        print(f"{name}: {options.precision} is {ratio:.2f}x as fast as {options.dtype}, n {options.rounds}", flush=True)
    return failed


def build(bundle: Path, target: str, options: argparse.Namespace, precision: str | None = None) -> dict[str, dict[str, Any]]:
    """Build the engines for `target`, all in --dtype or the steps in `precision`; graph -> what a row tells of its engine."""
    from motionrt.export.engines.build import Options, build_engines

    wanted = Options((target,), options.flavor, options.dtype, tuple(options.graphs))
    if precision is not None:
        wanted = replace(wanted, precision=precision, calibrate=options.calibrate)
    facts = {}
    for built in build_engines(bundle, wanted):
        file = built.file
        facts[file.graph] = {
            "engine": {
                "flavor": file.flavor, "library": file.library, "target": target, "kernel": file.kernel,
                "bytes": file.engine_bytes, "build_seconds": file.build_seconds, "peak_rss_mib": file.peak_rss_mib,
            }
        }  # fmt: skip
        print(f"{file.graph}: built in {file.build_seconds:.1f} s, {file.engine_bytes / 2**20:.1f} MiB", flush=True)
    return facts


def main(arguments: list[str] | None = None) -> int:
    """Build, load, check and time; 1 where a graph failed."""
    parser = argparse.ArgumentParser(description="TensorRT engines on this machine's GPU.")
    parser.add_argument("--bundle", type=Path, default=DEMO / "bundle")
    parser.add_argument("--flavor", choices=list(FLAVORS), default="rtx")
    parser.add_argument("--dtype", choices=list(ALLOWED), default="float16")
    parser.add_argument("--precision", choices=QUANTISED, help="time the steps in 8 bits, in turns with --dtype")
    parser.add_argument("--calibrate", type=Path, default=DEMO / "memory", help="the memory that --precision is measured with")
    parser.add_argument("--graphs", nargs="+", default=[], help="all if not given")
    parser.add_argument("--keep", type=Path, help="build in this copy of the bundle and keep it")
    harness.add_options(parser, rounds=50, warmups=10)
    options = parser.parse_args(arguments)
    reason, target = missing(options.flavor)
    if reason is not None:
        print(f"engines: not run: {reason}")
        return 0
    from motionrt.runtime.backends.tensorrt.backend import TensorRTBackend

    with tempfile.TemporaryDirectory(prefix="motionrt-engines-") as folder:
        bundle = options.keep or Path(folder) / "bundle"
        if not bundle.exists():
            shutil.copytree(options.bundle, bundle)
        facts = build(bundle, target, options)
        backend = TensorRTBackend(engines=f"{options.flavor}-{target}-{options.dtype}")
        if options.precision is not None:
            names = list(build(bundle, target, options, options.precision))
            eight = TensorRTBackend(engines=f"{options.flavor}-{target}-{options.precision}", precision=options.precision)
            return int(gain(bundle, names, eight, backend, options) > 0)
        return int(run(bundle, backend, facts, options) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
