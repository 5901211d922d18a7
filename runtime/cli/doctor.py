"""`motionrt doctor`: the findings of runtime/cli/diagnosis.py as tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motionrt.runtime.backends.kinds import TENSORRT
from motionrt.runtime.cli.terminal import echo

if TYPE_CHECKING:
    from rich.table import Table

MIB = 2**20
PLANNED = ("float32", "float16")  # the plans that are printed; --json has those of all dtypes


def doctor(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle directory; without one, the machine only.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything that was found, as one JSON object.")] = False,
) -> None:
    """Say what this machine and a bundle can run together, why not, and what building its engines would take.

    Exit status 2 where nothing can run.

    \b
    Examples:
      motionrt doctor
      motionrt doctor demo/bundle --json
    """
    from motionrt.runtime.cli import show as report
    from motionrt.runtime.cli.diagnosis import examine, runs

    found = examine(bundle)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        console = report.console()
        for table in tables(found):
            console.print(table)
        echo(found["verdict"])
    if not runs(found):
        raise typer.Exit(2)


def tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """Machine, backends, and the bundle's graphs."""
    from motionrt.runtime.cli.show import table

    yield from _found(found)
    memory = {} if found["bundle"] is None else found["bundle"].get("memory", {})
    for dtype in PLANNED:
        if (plan := memory.get(dtype)) is None:
            continue
        rows = [
            (g["name"], g["when"], f"{g['weights'] / MIB:,.1f}", _mib(g["activations"]), f"{g['ports'] / MIB:,.1f}")
            for g in plan["graphs"]
        ]
        rows.append(("request state", "loop", f"{plan['request_state'] / MIB:,.1f}", "", ""))
        rows.append((f"schedule, {plan['steps']} steps", "loop", f"{plan['schedule_rows'] / MIB:,.1f}", "", ""))
        columns = ("graph", "when, of the loop", "weights, MiB", "activations", "ports")
        yield table(f"memory plan of one request, {dtype}", columns, rows, left=2)
        note = f"; activations of {', '.join(plan['unrecorded'])} are not recorded" if plan["unrecorded"] else ""
        yield table(f"{dtype}: what devices take{note}", ("",), [(line,) for line in plan["lines"]], left=1)


def _mib(count: int | None) -> str:
    return "?" if count is None else f"{count / MIB:,.1f}"


def _found(found: Mapping[str, Any]) -> Iterator[Table]:
    from motionrt.runtime.cli.show import table

    rows: list[tuple[object, ...]] = [("motionrt", found["motionrt"]), ("python", f"{found['python']}, {found['system']}")]
    if found["memory_available"] is not None:
        rows.append(("free memory", f"{found['memory_available'] / MIB:,.0f} MiB"))
    for gpu in found["gpus"]:
        memory = f"{gpu['memory'] / MIB:,.0f} MiB"
        rows.append(("GPU", f"{gpu['name']}, {gpu['target']}, {memory}, driver {gpu['driver']}, CUDA up to {gpu['cuda']}"))
    if found["no_gpu"]:
        rows.append(("GPU", f"none: {found['no_gpu']}"))
    for name, facts in (("TensorRT-RTX", found["tensorrt"]["rtx"]), ("TensorRT", found["tensorrt"]["tensorrt"])):
        targets = f", builds for {', '.join(facts['targets'])}" if facts["targets"] else ""
        rows.append((name, f"{facts['version']}{targets}" if facts["version"] else facts["why"]))
    ort = found["onnxruntime"]
    rows.append(("ONNX Runtime", f"{ort['version']}, {', '.join(ort['providers'])}" if ort["version"] else ort["why"]))
    yield table("this machine", ("", ""), rows, left=2)
    bundle = found["bundle"]
    backends = found["backends"] if bundle is None else {n: facts["why"] for n, facts in bundle["backends"].items()}
    if backends:
        rows = [(name, "yes" if why is None else "no", why or "") for name, why in backends.items()]
        yield table("what can run" if bundle is None else f"what can run {bundle['name']}", ("backend", "", "why not"), rows, 3)
    if bundle is not None and bundle["graphs"]:
        rows = []
        for name, facts in bundle["graphs"].items():
            guess, fits = facts["predicted_build"], [e["folder"] for e in facts["engines"] if e["why"] is None]
            said = ", ".join(fits) or facts[TENSORRT.name]
            rows.append((name, said, f"{guess['seconds']:.0f} s", f"{guess['memory_bytes'] / MIB:,.0f} MiB"))
        columns = ("graph", "engines that run here, or why none does", f"build, {guess['dtype']}", "memory")
        yield table("engines: times and memory of a build are predictions", columns, rows, left=2)
