"""Where a published model's weights and FLOPs belong, at full size, from its structure alone: no weights, no GPU.

    python benchmarks/models/partition_report.py cogvideox-5b-i2v --frames 17
    python benchmarks/models/partition_report.py cogvideox-5b-i2v --frames 49
    python benchmarks/models/partition_report.py svd --frames 16
    python benchmarks/models/partition_report.py dynamicrafter-1024 --frames 16
    python benchmarks/models/partition_report.py motion-i2v --frames 16            # a row for each of its three steps

    python benchmarks/models/partition_report.py --table        # docs/models.md's table of memory plans, from the newest rows

Appends a row to results/partition_report.jsonl, and with `--memory` the memory plan of all graphs of a bundle (text encoder,
VAE and so on traced as well) to results/memory_plan.jsonl; `--no-row` only prints.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from time import perf_counter
from typing import Any

from motionrt.benchmarks.harness import RESULTS, append_row
from motionrt.benchmarks.models.full_sizes import (
    STEPS,
    decode_flops,
    full_roles,
    full_sizes,
    sparse_system,
    system_cuts,
    system_roles,
    system_sizes,
)
from motionrt.benchmarks.models.released import released_partition
from motionrt.export.compiler.partition import Partition
from motionrt.export.compiler.weightless import weights_by_class
from motionrt.export.systems.system import System
from motionrt.runtime.bundle.footprint import GraphSize, Roles, plan_memory

MODELS = ("cogvideox-5b-i2v", "svd", "dynamicrafter-1024", "motion-i2v")
SMALL = 2**30 // 10  # bytes of a graph that the table of memory plans does without


def report(model: str, frames: int, layers: int | None = None) -> tuple[dict[str, Any], Partition]:
    """The row: sizes of each class, what crosses into the step (bytes), rules that fired, seconds and peak memory, FLOPs of the
    decoder for all frames; the cut."""
    start = perf_counter()
    cut = released_partition(model, frames=frames, layers=layers)
    row = counted(model, frames, cut, "bfloat16", perf_counter() - start)
    return {**row, "decode_flops": decode_flops(model, frames)}, cut


def counted(model: str, frames: int, cut: Partition, dtype: str, seconds: float) -> dict[str, Any]:
    """The row of a cut that was traced in `dtype`."""
    return {
        "model": model,
        "frames": frames,
        "dtype": dtype,
        "classes": {kind: vars(size) for kind, size in weights_by_class(cut).items()},
        "hoisted_bytes": {
            kind: sum(h.bytes for h in cut.hoisted if h.kind == kind) for kind in cut.programs if kind != "step"
        },
        "rules": dict(Counter(f.rule for f in cut.fired)),
        "seconds": round(seconds, 1),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip


def memory(model: str, frames: int, cut: Partition) -> dict[str, Any]:
    """The row of the memory plan of a model of one step."""
    return planned(model, frames, full_sizes(model, frames, cut), full_roles(cut))


def planned(model: str, frames: int, found: Iterable[GraphSize], roles: Roles) -> dict[str, Any]:
    """The row of the memory plan: the plan in bfloat16, its lines, and the ports of the state by shape."""
    sizes = []
    for size in found:
        print(f"{size.name}: {sum(size.weights.values())} bytes of weights, {size.activations} of activations", flush=True)
        sizes.append(size)
    plan = plan_memory(sizes, roles, steps=STEPS, dtype="bfloat16")
    loop = {name for name, when in roles.when.items() if when == "loop"}
    read = {port for size in sizes if size.name in loop for port in size.inputs}
    state = Counter(f"{kind} {list(shape)}" for name, kind, shape in read if name in roles.state)
    return {
        "model": model, "frames": frames, "plan": asdict(plan), "lines": [str(fit) for fit in plan.fits], "state": dict(state),
    }  # fmt: skip


def steps_of(system: System, frames: int) -> tuple[list[dict[str, Any]], Mapping[str, Partition]]:
    """A row for each step of a system that has several, whose models are named after them; the cuts by their suffixes."""
    start = perf_counter()
    cuts = system_cuts(system)
    seconds = (perf_counter() - start) / len(cuts)
    return [counted(system.name + suffix, frames, cut, "float32", seconds) for suffix, cut in cuts.items()], cuts


def table() -> str:
    """The newest memory plans as Markdown: one column for each model and number of frames. Graphs that take less than `SMALL`
    bytes in all of them are left out."""
    rows = {}
    for line in (RESULTS / "memory_plan.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[f"{row['model']}, {row['frames']} frames"] = row

    def gib(count: int) -> str:
        return f"{count / 2**30:.2f}"

    lines = [f"| GiB, bfloat16 | {' | '.join(rows)} |", f"| --- {'| --- ' * len(rows)}|"]
    plans = [{graph["name"]: graph for graph in row["plan"]["graphs"]} for row in rows.values()]
    for name in dict.fromkeys(name for plan in plans for name in plan):
        if all(p[name]["weights"] + p[name]["activations"] < SMALL for p in plans if name in p):
            continue
        cells = (f"{gib(p[name]['weights'])} + {gib(p[name]['activations'])}" if name in p else "" for p in plans)
        lines.append(f"| `{name}`: weights + activations | {' | '.join(cells)} |")
    for key, said in (
        ("request_state", "request state"), ("schedule_rows", "rows of the schedule"), ("loop", "the loop alone, in all"),
        ("largest", "largest graph, in all"), ("resident", "all graphs resident, in all"),
    ):  # fmt: skip
        lines.append(f"| {said} | {' | '.join(gib(row['plan'][key]) for row in rows.values())} |")
    for index, fit in enumerate(next(iter(rows.values()))["plan"]["fits"]):
        says = (row["lines"][index].partition(": ")[2] for row in rows.values())
        lines.append(f"| **{fit['gib']} GB** | {' | '.join(says)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS, nargs="?")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--table", action="store_true", help="print the newest memory plans as Markdown, and nothing else")
    parser.add_argument("--layers", type=int, help="fewer blocks of CogVideoX; no row is written")
    parser.add_argument("--memory", action="store_true", help="the memory plan as well")
    parser.add_argument("--no-row", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    if arguments.model is None or arguments.frames is None:
        parser.error("a model and --frames are needed")
    rows, plan = reports(arguments.model, arguments.frames, arguments.layers, arguments.memory)
    keep = not arguments.no_row and arguments.layers is None
    for row in rows:
        show(row)
        if keep:
            print(append_row("partition_report", row))
    if plan is not None:
        print("\n".join(plan["lines"]))
        if keep:
            print(append_row("memory_plan", plan))


def reports(model: str, frames: int, layers: int | None, plan: bool) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The rows of a model's steps, and that of its memory plan where it is asked for."""
    if model == "motion-i2v":
        with sparse_system(model, frames) as system:
            rows, cuts = steps_of(system, frames)
            return rows, planned(model, frames, system_sizes(system, cuts), system_roles(system, cuts)) if plan else None
    row, cut = report(model, frames, layers)
    return [row], memory(model, frames, cut) if plan else None


def show(row: dict[str, Any]) -> None:
    """Print the classes of a row as a table."""
    model = row["classes"]["model"]
    print(f"{row['model']}, {row['frames']} frames: {model['parameters'] / 1e6:.2f} M parameters, {row['dtype']}")
    print(f"{'class':10} {'tensors':>8} {'M params':>10} {'% params':>9} {'MB':>9} {'GFLOP':>11}")
    for kind, size in row["classes"].items():
        share = 100 * size["parameters"] / model["parameters"]
        print(
            f"{kind:10} {size['tensors']:8} {size['parameters'] / 1e6:10.2f} {share:9.2f} {size['bytes'] / 1e6:9.1f} "
            f"{size['flops'] / 1e9:11.2f}"
        )
    if (decoder := row.get("decode_flops")) is not None:
        step = row["classes"]["step"]["flops"]
        shares = ", ".join(f"{decoder / (decoder + runs * step):.1%} at {runs}" for runs in (50, 25, 8, 4))
        print(f"decoder, all frames: {decoder / 1e12:.1f} TFLOP, of loop and decoder by runs of the network: {shares}")
    print(f"into the step: {row['hoisted_bytes']} bytes; {row['seconds']} s, {row['peak_rss_mb']} MB")


if __name__ == "__main__":
    main()
