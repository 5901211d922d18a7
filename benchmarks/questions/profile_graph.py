"""Where does the time of a step go in ONNX Runtime? Its own profiler, node by node, summed by kind of work.

    .venv-dev/bin/python benchmarks/questions/profile_graph.py --model cogvideox-mid

The step with adapters after the compiler pass (`folded`), which must equal the step as released first. What the motion op's
nodes take, against all other nodes of the very same runs, is what motion costs: two sessions need not be compared for it, and
where their weights lie and what else the machine did falls on both. And what matrix products and attention take is what no
exact rewrite of the rest can save.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from motionrt.benchmarks import harness
from motionrt.benchmarks.models.mid_graphs import WORK, Saved, graphs_of
from motionrt.benchmarks.models.mid_models import MODELS
from motionrt.benchmarks.models.onnx_graph import open_session
from motionrt.benchmarks.questions.bench_adapter import GOAL, TOLERANCE

MOTION, PRODUCTS, ATTENTION, NORMS, REST = "motion", "matrix products, convolutions", "attention", "norms", "the rest"
KINDS: Mapping[str, str] = {
    **dict.fromkeys(("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv", "ConvTranspose"), PRODUCTS),
    **dict.fromkeys(("Attention", "MultiHeadAttention"), ATTENTION),
    **dict.fromkeys(("LayerNormalization", "SkipLayerNormalization", "GroupNorm", "InstanceNormalization"), NORMS),
    **dict.fromkeys(("Gelu", "FastGelu", "QuickGelu", "Sigmoid", "Softmax"), "activations"),
    "RotaryEmbedding": "rotations",
    **dict.fromkeys(
        ("Transpose", "Reshape", "Concat", "Split", "Slice", "Expand", "Squeeze", "Unsqueeze", "ReorderInput", "ReorderOutput"),
        "layout",
    ),
    **dict.fromkeys(("Add", "Mul", "Sub", "Div"), "additions, scales"),
}
Seconds = NDArray[np.float64]  # [rounds]
NUMBERED = re.compile(r"_\d+$")
MARK = "motionrt_part_"  # in the name of every node that the fused op is made of


def kind_of(name: str, op: str) -> str:
    """The kind of node `name`. One that has no name is called `<op>_<number>` by ONNX Runtime: a part of GroupNormalization,
    which it takes apart."""
    if MARK in name:
        return MOTION
    return NORMS if name.startswith(op) and NUMBERED.fullmatch(name, len(op)) else KINDS.get(op, REST)


def marked(path: Path) -> onnx.ModelProto:
    """The graph, its weights where they are, with `MARK` in the names of the nodes that the fused op's function is made of."""
    model = onnx.load(path, load_external_data=False)
    for function in model.functions:
        for index, node in enumerate(function.node):
            node.name = f"{MARK}{index}"
    return model


def check_names(path: Path) -> None:
    """Raise ValueError where a node of the graph itself has no name: it would be taken for a part of a norm.

    A node that reads weights alone does not count: it is computed when the graph is loaded, and no call runs it.
    """
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    runs = [node for node in graph.node if not weights.issuperset(node.input)]
    unnamed = sorted({node.op_type for node in runs if node.domain != "motionrt" and not node.name})
    if unnamed:
        raise ValueError(f"{path.name} has nodes without a name ({', '.join(unnamed)}); only parts of norms may have none")


def profile(saved: Saved, threads: int, warmups: int, rounds: int) -> dict[str, Seconds]:
    """What each kind of node took in each of `rounds` calls, the longest first."""
    check_names(saved.path)
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile(dir=saved.path.parent, suffix=".onnx") as named:
        onnx.save(marked(saved.path), named.name)  # beside the weights
        session = open_session(Path(named.name), threads, Path(folder) / "profile")
        for _ in range(warmups + rounds):
            session.run(None, saved.feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    starts = np.sort([event["ts"] for event in events if event["name"] == "model_run"])
    found: dict[str, Seconds] = {}
    for event in events:
        call = int(np.searchsorted(starts, event["ts"], side="right")) - 1 - warmups
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and call >= 0:
            kind = kind_of(event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
            found.setdefault(kind, np.zeros(rounds))[call] += event["dur"] / 1e6
    return dict(sorted(found.items(), key=lambda item: -float(np.median(item[1]))))


def main(arguments: list[str] | None = None) -> None:
    """Check the step against the released form, profile it, append one row for each kind of work."""
    parser = argparse.ArgumentParser(description="The time of a step in ONNX Runtime by kind of work.")
    parser.add_argument("--model", choices=list(MODELS), default="cogvideox-mid")
    parser.add_argument("--work", type=Path, default=WORK, help="folder where exported graphs are kept")
    harness.add_options(parser, rounds=20, warmups=2, threads=1)
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.warmups < 0:
        parser.error(f"--rounds is {options.rounds}, --warmups {options.warmups}; at least 1 round and 0 warm-ups are needed")

    model = MODELS[options.model]
    saved = graphs_of(model, ("released", "folded"), options.work)
    want, got = (saved[form].open(options.threads)(saved[form].feed) for form in ("released", "folded"))
    error = harness.difference(got, want)
    allowed = harness.allowance(TOLERANCE, want)
    if error > allowed:
        raise harness.ParityError(f"folded differs from released by {error:.3g}; allowed is {allowed:.3g}")
    del want, got

    seconds = profile(saved["folded"], options.threads, options.warmups, options.rounds)
    whole: Seconds = np.sum(list(seconds.values()), axis=0)
    parity = {"max_abs_difference": error, "to": "released", "allowed": allowed}
    same = {"model": model.name, "shape": dict(model.shape), "dtype": "float32", "threads": options.threads}
    for kind, taken in {"all nodes": whole, **seconds}.items():
        turns = {"kind": taken, "whole": whole, "rest": whole - taken}
        against = harness.Comparison("whole", 0.0, options.warmups, {}, turns)
        row = {**same, "what": kind, "warmups": options.warmups, "error": parity, "note": options.note}
        row |= harness.summary(taken)
        if kind != "all nodes":
            for name, other in (("of_the_step", "whole"), ("over_the_rest", "rest")):
                ratio = against.ratio("kind", other)
                row[name] = ratio.as_row()
        harness.append_row("profile_graph", row, folder=options.results)
        share = harness.said(row["of_the_step"], "{:.2%}") + " of the step" if "of_the_step" in row else ""
        print("{what:>30}: p50 {p50_ms:.2f} ms ".format(**row), share)
        if kind == MOTION:
            over = harness.said(row["over_the_rest"], "{:.2%}")
            print(f"{'':>30}  {over} on top of all other nodes; the goal of bench_adapter.py is at most {GOAL} %")
    products = sum(seconds.get(kind, np.zeros(options.rounds)) for kind in (PRODUCTS, ATTENTION))
    print(f"matrix products and attention are {float(np.median(products / whole)):.1%} of it")


if __name__ == "__main__":
    main()
