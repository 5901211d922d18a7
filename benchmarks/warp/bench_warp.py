"""What does it save to project frame 0 once and gather, where Motion-I2V's release warps it for every frame and projects that?

    .venv-dev/bin/python benchmarks/warp/bench_warp.py                    # motion-i2v-mid: see forms.py
    .venv-dev/bin/python benchmarks/warp/bench_warp.py --model motion-i2v-toy --rounds 2
    .venv-dev/bin/python benchmarks/warp/bench_warp.py --count            # FLOPs and bytes at full size: no weights, no times

The whole step of stage 2 with guidance in each of `forms.FORMS`, after the same compiler pass and in ONNX Runtime on the CPU,
in turns. Before anything is timed all must agree with the release's form, and the fields must matter: with fields of zeros the
step must give something else. Rows also have what a step writes: bytes of all values that its operators make, nothing fused,
and of those that live at once.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from motionrt.benchmarks import harness
from motionrt.benchmarks.models.full_step import known_values
from motionrt.benchmarks.models.mid_graphs import WORK, digest
from motionrt.benchmarks.models.mid_models import arrays, export
from motionrt.benchmarks.models.onnx_graph import Arrays, Graph, open_graph
from motionrt.benchmarks.warp import forms
from motionrt.benchmarks.warp.forms import FORMS, FULL, OUTPUTS, SIZES, Size
from motionrt.export.compiler.liveness import live_bytes, made_bytes
from motionrt.export.compiler.partition import Partition, partition
from motionrt.export.compiler.weightless import fake_partition

QUESTION = "bench_warp"
TOLERANCE = 1e-4  # of the largest value of an output
STILL = "still"  # what the request's step reads where nothing moves


@dataclass(frozen=True)
class Counts:
    """Of a step after the pass: FLOPs; bytes of all values that it makes, and of those that live at once."""

    flops: int
    written_bytes: int
    live_bytes: int


def counts(cut: Partition) -> Counts:
    """Of the step of a cut, in the dtype that it was traced in."""
    graph = cut.step.module.graph
    return Counts(cut.classes["step"].flops, made_bytes(graph), live_bytes(graph))


@dataclass(frozen=True)
class Saved:
    """A step's graph on disk, what it reads, and what it reads where nothing moves."""

    path: Path
    feed: Arrays
    still: Arrays
    counts: Counts


def saved(size: Size, name: str, work: Path) -> Saved:
    """The graph of the form `name`, from `work` or made now; it is made again when a file that it comes from has changed."""
    folder = work / f"{size.name}-{digest(Path(forms.__file__))}"
    folder.mkdir(parents=True, exist_ok=True)
    path, done = folder / f"{name}.onnx", folder / f"{name}.json"
    if not done.exists():
        print(f"{size.name}: exporting {name} ...", flush=True)
        form = FORMS[name]
        module, changes = form.step(size), form.changes(size)
        values, still = form.feed(size), form.feed(size, torch.zeros_like(forms.turning(size)))
        cut = partition(module, tuple(values.values()), changes, outputs=OUTPUTS)
        for kind, given in (("feed", values), (STILL, still)):
            known = known_values(cut, given)
            reads = {port: known[port].contiguous() for port in cut.step.inputs}
            np.savez(folder / f"{name}.{kind}.npz", **arrays(reads))  # type: ignore[arg-type]
            if kind == "feed":
                export(path, cut.step.module, reads, cut.step.outputs)
        partial = done.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(counts(cut))))
        os.replace(partial, done)  # last: it says that the others are whole

    def feed(kind: str) -> Arrays:
        with np.load(folder / f"{name}.{kind}.npz") as stored:
            return {key: stored[key] for key in stored.files}

    return Saved(path, feed("feed"), feed(STILL), Counts(**json.loads(done.read_text())))


def counted(size: Size, name: str) -> Counts:
    """Of the step at `size`, from its structure alone."""
    form = FORMS[name]
    module, values = form.weightless(size), form.feed(size)
    return counts(fake_partition(module, tuple(values.values()), form.changes(size), outputs=OUTPUTS, batch=1))


def gate(moved: Mapping[str, Any], still: Mapping[str, Any], allowed: float) -> None:
    """ParityError where fields change the outputs by so little that equality of two ways to warp would prove nothing."""
    effect = harness.difference(moved, still)
    if effect < 10 * allowed:
        raise harness.ParityError(f"fields change the outputs by {effect:.3g} only; {10 * allowed:.3g} is the least")


def over(counts: Mapping[str, Counts]) -> dict[str, dict[str, float]]:
    """What the release's form counts of ours, by kind of count, for each form."""
    ours = asdict(counts["ours"])
    return {name: {kind: value / ours[kind] for kind, value in asdict(one).items()} for name, one in counts.items()}


def count(size: Size) -> None:
    """Print and nothing more: FLOPs and bytes of all forms."""
    found = {name: counted(size, name) for name in FORMS}
    for name, ratios in over(found).items():
        said = ", ".join(f"{kind} {value:,} ({ratios[kind]:.3f} of ours)" for kind, value in asdict(found[name]).items())
        print(f"{size.name}, {name}: {said}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Export what is missing, check, time in turns, append a row for each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name, size in SIZES.items() if size is not FULL], default=forms.MID.name)
    parser.add_argument("--work", type=Path, default=WORK, help="folder where exported graphs are kept")
    parser.add_argument("--count", action="store_true", help="count at full size, and time nothing")
    harness.add_options(parser, rounds=15, warmups=1, threads=1)
    options = parser.parse_args(arguments)
    if options.count:
        count(FULL)
        return

    size = SIZES[options.model]
    graphs = {name: saved(size, name, options.work) for name in FORMS}
    steps = {name: open_graph(graph.path, options.threads) for name, graph in graphs.items()}
    calls = {name: _bind(step, graphs[name].feed) for name, step in steps.items()}
    wanted = calls["released"]()
    allowed = harness.allowance(TOLERANCE, wanted)
    gate(wanted, steps["released"](graphs["released"].still), allowed)
    result = harness.compare(calls, reference="released", tolerance=allowed, warmups=options.warmups, rounds=options.rounds)
    ratios = over({name: graph.counts for name, graph in graphs.items()})
    for name, graph in graphs.items():
        row: dict[str, Any] = {
            **result.row(name),
            "model": size.name,
            "what": f"{size.name} step",
            "shape": size.shape,
            "dtype": "float32",
            "threads": options.threads,
            **asdict(graph.counts),
            "counts_of_ours": ratios[name],
            "note": options.note,
        }
        said = ""
        if name != "ours":
            ratio = result.ratio(name, "ours")
            row["over_ours"] = ratio.as_row()
            said = f"; {ratio} of ours, {ratios[name]['written_bytes']:.2f}x the bytes, {ratios[name]['flops']:.3f}x the FLOPs"
        harness.append_row(QUESTION, row, folder=options.results)
        print(f"{name:>10}: {harness.times(row)}{said}")


def _bind(step: Graph, feed: Arrays) -> harness.Candidate:
    return lambda: step(feed)


if __name__ == "__main__":
    main()
