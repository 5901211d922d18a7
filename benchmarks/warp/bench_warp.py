"""What does it save to project frame 0 once and gather, where Motion-I2V's release warps it for every frame and projects that?

    .venv-dev/bin/python benchmarks/warp/bench_warp.py                    # motion-i2v-mid: see forms.py
    .venv-dev/bin/python benchmarks/warp/bench_warp.py --model motion-i2v-toy --rounds 2
    .venv-dev/bin/python benchmarks/warp/bench_warp.py --model motion-i2v-attention-40x64     # one attention, see layers.py
    .venv-dev/bin/python benchmarks/warp/bench_warp.py --count            # FLOPs and bytes at full size: no weights, no times

The whole step of stage 2 with guidance, or one attention of it, in each of `forms.FORMS`, after the same compiler pass and in
ONNX Runtime on the CPU, in turns. Before anything is timed all must agree with the release's form, and the fields must matter:
with fields of zeros there must come something else. Rows also have what the traced graph writes (bytes of all values that its
operators make, nothing fused, our attention one operator; and of those that live at once), and, as ONNX Runtime's profiler
tells it, what its nodes write and how long those of each operator take.

One thread: where several things move to one place, ONNX Runtime adds them up (ScatterND) with as many threads as it has and no
lock, and some are lost (onnxruntime issue 18048). So the release's graph is not compared with PyTorch when it is exported, as
the others are: it must equal them here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from motionrt.benchmarks import harness
from motionrt.benchmarks.models.full_step import known_values
from motionrt.benchmarks.models.mid_graphs import WORK, digest
from motionrt.benchmarks.models.mid_models import arrays, export
from motionrt.benchmarks.models.onnx_graph import Arrays, Graph, open_graph, open_session
from motionrt.benchmarks.warp import forms, layers
from motionrt.benchmarks.warp.forms import FORMS, FULL, SIZES, Size
from motionrt.benchmarks.warp.layers import LAYERS, Layer
from motionrt.export.compiler.liveness import live_bytes, made_bytes
from motionrt.export.compiler.partition import Partition, partition
from motionrt.export.compiler.weightless import fake_partition

QUESTION = "bench_warp"
TOLERANCE = 1e-4  # of the largest value of an output
STILL = "still"  # what the request's step reads where nothing moves
SILENT = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")  # operators that ONNX Runtime writes nothing for
PROFILED = 3  # calls
LONGEST = 8  # operators that a row names
MODELS: Mapping[str, Size | Layer] = {**{name: size for name, size in SIZES.items() if size is not FULL}, **LAYERS}


@dataclass(frozen=True)
class Counts:
    """Of a step after the pass: FLOPs; bytes of all values that it makes, of those that live at once, of its weights, and of
    keys and values in its temporal attentions, as they are projected."""

    flops: int
    written_bytes: int
    live_bytes: int
    weight_bytes: int
    keys_values_bytes: int


def counts(cut: Partition) -> Counts:
    """Of the step of a cut, in the dtype that it was traced in."""
    graph, step = cut.step.module.graph, cut.classes["step"]
    return Counts(step.flops, made_bytes(graph), live_bytes(graph), step.weight_bytes, _keys_values(cut))


def _keys_values(cut: Partition) -> int:
    """Bytes of the products with weights `to_k` and `to_v` of motion modules, or of the one attention of a layer."""
    found = 0
    for node in cut.step.module.graph.nodes:
        names = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
        if any(re.search(r"(motion_modules_.*|^attn)_to_[kv]_weight$", name) for name in names):
            value = node.meta["val"]
            found += value.numel() * value.element_size()
    return int(found)


@dataclass(frozen=True)
class Saved:
    """A step's graph on disk, what it reads, and what it reads where nothing moves."""

    path: Path
    feed: Arrays
    still: Arrays
    counts: Counts


def ways(model: Size | Layer, *, counted: bool = False) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The forms of a step or of a layer, those that are only counted too, and the names of its outputs."""
    if isinstance(model, Layer):
        return layers.COUNTED if counted else layers.FORMS, layers.OUTPUTS
    return forms.COUNTED if counted else FORMS, forms.OUTPUTS


def saved(size: Size | Layer, name: str, work: Path) -> Saved:
    """The graph of the form `name`, from `work` or made now; it is made again when a file that it comes from has changed."""
    folder = work / f"{size.name}-{digest(Path(forms.__file__), Path(layers.__file__))}"
    folder.mkdir(parents=True, exist_ok=True)
    path, done = folder / f"{name}.onnx", folder / f"{name}.json"
    if not done.exists():
        print(f"{size.name}: exporting {name} ...", flush=True)
        known_forms, outputs = ways(size)
        form = known_forms[name]
        module, changes = form.step(size), form.changes(size)
        values, still = form.feed(size), form.still(size)
        cut = partition(module, tuple(values.values()), changes, outputs=outputs)
        for kind, given in (("feed", values), (STILL, still)):
            known = known_values(cut, given)
            reads = {port: known[port].contiguous() for port in cut.step.inputs}
            np.savez(folder / f"{name}.{kind}.npz", **arrays(reads))  # type: ignore[arg-type]
            if kind == "feed":
                export(path, cut.step.module, reads, cut.step.outputs, math.inf if name == "released" else 1e-3)
        partial = done.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(counts(cut))))
        os.replace(partial, done)  # last: it says that the others are whole

    def feed(kind: str) -> Arrays:
        with np.load(folder / f"{name}.{kind}.npz") as stored:
            return {key: stored[key] for key in stored.files}

    return Saved(path, feed("feed"), feed(STILL), Counts(**json.loads(done.read_text())))


def counted(size: Size | Layer, name: str) -> Counts:
    """Of the step or layer, from its structure alone."""
    known_forms, outputs = ways(size, counted=True)
    form = known_forms[name]
    module, values = form.weightless(size), form.feed(size)
    return counts(fake_partition(module, tuple(values.values()), form.changes(size), outputs=outputs, batch=1))


class Profile(NamedTuple):
    """Of a call in ONNX Runtime: bytes that its nodes write, and milliseconds of the operators that take longest."""

    node_bytes: int
    operators_ms: dict[str, float]


def profiled(path: Path, feed: Arrays, threads: int, rounds: int = PROFILED) -> Profile:
    """By the profiler of ONNX Runtime, the mean of `rounds` calls behind one that does not count."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(path, threads, Path(folder) / "profile", shared=True)
        for _ in range(1 + rounds):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    begun = sorted(event["ts"] for event in events if event["name"] == "model_run")[1]
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time") and e["ts"] >= begun]
    written, taken = 0, dict[str, float]()
    for event in nodes:
        operator = event["args"]["op_name"]
        taken[operator] = taken.get(operator, 0.0) + event["dur"] / 1e3 / rounds
        written += 0 if operator in SILENT else int(event["args"]["output_size"])
    longest = sorted(taken.items(), key=lambda item: -item[1])[:LONGEST]
    return Profile(written // rounds, {operator: round(value, 2) for operator, value in longest})


def gate(moved: Mapping[str, Any], still: Mapping[str, Any], allowed: float) -> None:
    """ParityError where fields change the outputs by so little that equality of two ways to warp would prove nothing."""
    effect = harness.difference(moved, still)
    if effect < 10 * allowed:
        raise harness.ParityError(f"fields change the outputs by {effect:.3g} only; {10 * allowed:.3g} is the least")


def over(counts: Mapping[str, Counts]) -> dict[str, dict[str, float]]:
    """What each form counts of ours, by kind of count."""
    ours = asdict(counts["ours"])
    return {name: {kind: value / ours[kind] for kind, value in asdict(one).items()} for name, one in counts.items()}


def count(size: Size | Layer, results: Path, note: str) -> None:
    """Append a row for each form with its FLOPs and bytes, and with what it adds to attention that no field reaches, in TFLOP
    for one branch of guidance."""
    known_forms, _ = ways(size, counted=True)
    found = {name: counted(size, name) for name in known_forms}
    for name, ratios in over(found).items():
        more = (found[name].flops - found["plain"].flops) / size.shape["B"] / 1e12
        same = {"model": size.name, "what": f"{size.name} counted", "shape": size.shape, "dtype": "float32", "note": note}
        row = {**same, "backend": name, **asdict(found[name]), "counts_of_ours": ratios, "tflop_over_plain": round(more, 4)}
        if isinstance(size, Layer):
            row["times_in_a_step"] = size.times
        harness.append_row(QUESTION, row, folder=results)
        said = ", ".join(f"{kind} {value:,} ({ratios[kind]:.3f} of ours)" for kind, value in asdict(found[name]).items())
        print(f"{size.name}, {name}: {more:+.4f} TFLOP a branch; {said}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Export what is missing, check, time in turns, append a row for each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default=forms.MID.name)
    parser.add_argument("--work", type=Path, default=WORK, help="folder where exported graphs are kept")
    parser.add_argument("--count", action="store_true", help="count at full size, step and layers, and time nothing")
    harness.add_options(parser, rounds=15, warmups=1, threads=1)
    options = parser.parse_args(arguments)
    if options.threads != 1:
        parser.error(f"--threads is {options.threads}; allowed: 1. With more, ONNX Runtime's ScatterND loses what it adds")
    if options.count:
        full: tuple[Size | Layer, ...] = (FULL, *(layer for layer in LAYERS.values() if layer.size is FULL))
        for size in full:
            count(size, options.results, options.note)
        return

    size = MODELS[options.model]
    graphs = {name: saved(size, name, options.work) for name in ways(size)[0]}
    result = timed(graphs, options)
    ratios = over({name: graph.counts for name, graph in graphs.items()})
    profiles = {name: profiled(graph.path, graph.feed, options.threads) for name, graph in graphs.items()}
    for name, graph in graphs.items():
        row: dict[str, Any] = {
            **result.row(name),
            "model": size.name,
            "what": size.name if isinstance(size, Layer) else f"{size.name} step",
            "shape": size.shape,
            "dtype": "float32",
            "threads": options.threads,
            **asdict(graph.counts),
            **profiles[name]._asdict(),
            "counts_of_ours": ratios[name],
            "note": options.note,
        }
        said = ""
        if name != "ours":
            ratio, written = result.ratio(name, "ours"), profiles[name].node_bytes / profiles["ours"].node_bytes
            row["over_ours"] = ratio.as_row()
            said = f"; {ratio} of ours, {written:.2f}x the bytes, {ratios[name]['flops']:.3f}x the FLOPs"
        harness.append_row(QUESTION, row, folder=options.results)
        print(f"{name:>10}: {harness.times(row)}{said}\n{'':>12}{profiles[name].operators_ms}")


def timed(graphs: Mapping[str, Saved], options: argparse.Namespace) -> harness.Comparison:
    """All forms in turns, that must agree with the release's before, and see the fields."""
    steps = {name: open_graph(graph.path, options.threads, shared=True) for name, graph in graphs.items()}
    calls = {name: _bind(step, graphs[name].feed) for name, step in steps.items()}
    calls["ours"]()  # which needs most room: the others find it there
    wanted = calls["released"]()
    allowed = harness.allowance(TOLERANCE, wanted)
    gate(wanted, steps["released"](graphs["released"].still), allowed)
    return harness.compare(calls, reference="released", tolerance=allowed, warmups=options.warmups, rounds=options.rounds)


def _bind(step: Graph, feed: Arrays) -> harness.Candidate:
    return lambda: step(feed)


if __name__ == "__main__":
    main()
