"""What is looked at before an engine is built: targets and dtype, every operator, memory and disk."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx.defs
import onnx_ir as ir

from motionrt.export.engines.from_onnx import LIBRARIES
from motionrt.runtime.backends.machine import find_gpus
from motionrt.runtime.backends.tensorrt.engine_file import FLAVORS, sorted_targets
from motionrt.runtime.backends.tensorrt.estimate import Estimate, available_memory, mib
from motionrt.runtime.dtypes import QUANTISED, WEIGHTS
from motionrt.runtime.errors import BackendError, EngineError, InputError

BFLOAT16_FROM = 80  # compute capability 8.0: Ampere
FLOAT8_FROM = 89  # 8.9: Ada


def load_library(flavor: str) -> Any:
    """The TensorRT module of `flavor`; `BackendError` if it is not installed, `InputError` for no flavor."""
    if flavor not in FLAVORS:
        raise InputError(f"flavor is {flavor!r}; allowed: {', '.join(FLAVORS)}.")
    try:
        return importlib.import_module(LIBRARIES[flavor])
    except (ImportError, OSError) as error:  # OSError: its shared libraries are missing or of another system
        there = importlib.util.find_spec(LIBRARIES[flavor]) is not None
        why = f" It is installed but does not load ({error})." if there else ""
        raise BackendError(f"building engines needs {FLAVORS[flavor]}: `pip install motionrt[{flavor}]`.{why}") from None


def check_request(
    library: Any, flavor: str, targets: Sequence[str], dtype: str, precision: str | None = None
) -> tuple[str, ...]:
    """The targets in order; `InputError` or `EngineError` where the flavor cannot build for one, or one lacks `dtype` or
    `precision`."""
    if precision is not None and precision not in QUANTISED:
        raise InputError(f"precision is {precision!r}; allowed: {', '.join(QUANTISED)}. For another dtype of all use --dtype.")
    if dtype not in WEIGHTS:
        raise InputError(f"dtype is {dtype!r}; allowed: {', '.join(WEIGHTS)}.")
    if not targets:
        raise InputError("no target was given; name the GPU that will run the engines, such as --target sm_89.")
    wanted, name = sorted_targets(targets), f"{FLAVORS[flavor]} {library.__version__}"
    if flavor == "rtx":
        known = [f"sm_{member[2:]}" for member in library.ComputeCapability.__members__ if member[2:].isdigit()]
        lacking = [target for target in wanted if target not in known]
        if lacking:
            raise EngineError(
                f"{name} has no target {', '.join(lacking)}; it builds for {', '.join(sorted_targets(known))}. "
                "Use --flavor tensorrt on a machine with that GPU, or run the bundle there with --backend torch or onnxruntime."
            )
    else:
        _check_local(name, wanted)
    old = [target for target in wanted if int(target[3:]) < BFLOAT16_FROM]
    if dtype == "bfloat16" and old:
        raise EngineError(f"bfloat16 needs sm_{BFLOAT16_FROM} or newer; {', '.join(old)} has none. Use --dtype float16.")
    older = [target for target in wanted if int(target[3:]) < FLOAT8_FROM]
    if precision == "fp8" and older:
        newer = [target for target in wanted if target not in older]
        split = f", and an fp8 engine of its own for {', '.join(newer)}" if newer else ""
        raise EngineError(
            f"fp8 needs sm_{FLOAT8_FROM} or newer; {', '.join(older)} has none. Use --precision int8 there{split}."
        )
    return wanted


def _check_local(name: str, wanted: tuple[str, ...]) -> None:
    """Full TensorRT times kernels on the GPU it builds for."""
    gpus = find_gpus()
    if isinstance(gpus, str):
        raise EngineError(f"{name} builds on the GPU that will run the engine, and there is none: {gpus}. Use --flavor rtx.")
    here = gpus[0].target
    if wanted != (here,):
        raise EngineError(
            f"{name} builds for the GPU that it runs on, {here}, not for {', '.join(wanted)}. "
            f"Use --target {here}, or build on the other machine, or use --flavor rtx."
        )


def scan_operators(model: ir.Model, graph: str, allowed: Sequence[str] = ()) -> list[str]:
    """The standard operators of a graph that is ready to be parsed; `EngineError` if it has any other.

    A parser that matches an unknown node with a plug-in's creator aborts its process, so nothing else may reach it.
    `allowed`: domains that the caller has a plug-in for.
    """
    names: set[str] = set()
    bad: dict[str, int] = {}
    for node in model.graph.all_nodes():
        if node.domain in allowed:
            continue
        if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type, model.graph.opset_imports.get("", 1), ""):
            full = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            bad[full] = bad.get(full, 0) + 1
        names.add(node.op_type)
    if bad:
        listed = ", ".join(f"{name} ({count}x)" for name, count in sorted(bad.items()))
        raise EngineError(
            f"graph '{graph}' has operators that no engine builder knows: {listed}. "
            "Give each a body of standard operators (a model-local function), or run this graph in ONNX Runtime."
        )
    return sorted(names)


def check_room(graph: str, needed: Estimate, folder: Path) -> None:
    """`EngineError` where the disk or the free memory is less than the estimate."""
    free = shutil.disk_usage(folder).free
    if free < needed.disk:
        raise EngineError(
            f"building graph '{graph}' takes {needed}; {folder} has {mib(free)} free. Free some, or move the bundle."
        )
    memory = available_memory()
    if memory is not None and memory < needed.memory:
        raise EngineError(
            f"building graph '{graph}' takes {needed}; {mib(memory)} of memory are free. "
            "Close other programs, build on a larger machine, or try all the same with --force."
        )
