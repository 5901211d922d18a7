"""What does motion cost in a step? The step without adapters against the step with them, as released and as ours, one run.

    .venv-dev/bin/python benchmarks/bench_adapter.py --model cogvideox-mid
    .venv-dev/bin/python benchmarks/bench_adapter.py --model svd-mid

In ONNX Runtime on the CPU, in turns: `base` (no adapter, as written), `base_ours` (no adapter, after the compiler pass),
`released` (with adapters, as written), `folded` (with adapters, after the pass: what a bundle holds) and `scale_0` (folded at
motion_scale 0). Before anything is timed: folded must equal released, base_ours and scale_0 must equal base, and released
must differ from base, or the adapters of these random weights would prove nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import harness
from mid_graphs import FORMS, WORK, Saved, flop_shares, graphs_of
from mid_models import MODELS
from onnx_graph import Arrays, Graph

SAME_AS = {"base": "base", "base_ours": "base", "released": "released", "folded": "released", "scale_0": "base"}
TOLERANCE = 1e-4  # of the largest value of an output
NOT_RUN = "fused: not run: ONNX Runtime's CPU provider has no kernel for the op; it runs what the op stands for, `folded`"
GOAL = 2.5  # percent of the base step, folded over base_ours


def candidates(saved: Mapping[str, Saved], threads: int) -> dict[str, harness.Candidate]:
    """One call for each variant, each in a session of its own; scale_0 is the folded graph with another input."""

    def bind(graph: Graph, feed: Arrays) -> harness.Candidate:
        return lambda: graph(feed)

    calls = {form: bind(graph.open(threads), graph.feed) for form, graph in saved.items()}
    silent = saved["folded"].silent
    assert silent is not None
    return {**calls, "scale_0": bind(saved["folded"].open(threads), silent)}


def gate(calls: Mapping[str, harness.Candidate]) -> dict[str, dict[str, Any]]:
    """The `error` of every variant's row; ParityError where one is not what it should equal, or motion changes nothing."""
    outputs = {name: {key: np.array(x) for key, x in call().items()} for name, call in calls.items()}
    allowed = {
        name: TOLERANCE * max(1.0, *(float(np.abs(x).max()) for x in outputs[name].values())) for name in ("base", "released")
    }
    errors = {}
    for name, output in outputs.items():
        to = SAME_AS[name]
        error = harness.difference(output, outputs[to])
        if error > allowed[to]:
            raise harness.ParityError(f"{name} differs from {to} by {error:.3g}; allowed is {allowed[to]:.3g}")
        errors[name] = {"max_abs_difference": error, "to": to, "allowed": allowed[to]}
    effect = harness.difference(outputs["released"], outputs["base"])
    if effect < 10 * allowed["released"]:
        raise harness.ParityError(f"motion changes the outputs by {effect:.3g} only: equality with it would prove nothing")
    return errors


def main(arguments: list[str] | None = None) -> None:
    """Export what is missing, check, time in turns, append one row for each variant."""
    parser = argparse.ArgumentParser(description="Overhead of the Motion-Adapter per step.")
    parser.add_argument("--model", choices=list(MODELS), default="cogvideox-mid")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for rows")
    parser.add_argument("--work", type=Path, default=WORK, help="folder where exported graphs are kept")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmups", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="")
    options = parser.parse_args(arguments)

    model = MODELS[options.model]
    saved = graphs_of(model, FORMS, options.work)
    calls = candidates(saved, options.threads)
    errors = gate(calls)

    def quiet(call: harness.Candidate) -> harness.Candidate:
        def run() -> Arrays:
            call()
            return {}  # checked above: base and released are two references, `compare` knows one

        return run

    result = harness.compare(
        {name: quiet(call) for name, call in calls.items()},
        reference="base",
        tolerance=0.0,
        warmups=options.warmups,
        rounds=options.rounds,
    )
    counted = flop_shares(model, saved, options.work)
    for name in calls:
        row: dict[str, Any] = {
            **result.row(name),
            "error": errors[name],
            "model": model.name,
            "what": f"{model.name} step",
            "shape": dict(model.shape),
            "dtype": "float32",
            "threads": options.threads,
            "flops": saved[name if name in saved else "folded"].flops,
            "flops_over_base": counted,
            "note": options.note,
        }
        for reference in ("base", "base_ours"):
            if name != reference:
                ratio = result.ratio(name, reference)
                row[f"over_{reference}"] = [ratio.value, ratio.low, ratio.high]
        harness.append_row("bench_adapter", row, folder=options.results)
        over = ", ".join(
            "{:+.2f} % [{:+.2f}, {:+.2f}] of {}".format(*(100 * (x - 1) for x in row[f"over_{r}"]), r)
            for r in ("base", "base_ours")
            if f"over_{r}" in row
        )
        print("{backend:>10}: p50 {p50_ms:.2f} ms, p95 {p95_ms:.2f} ms, p99 {p99_ms:.2f} ms, n {n}".format(**row), over)
    print(NOT_RUN)
    print(f"FLOPs over base: {counted}")
    percent = 100 * (result.ratio("folded", "base_ours").value - 1)
    print(f"motion costs {percent:+.2f} % of the base step, both after the pass; the goal is at most {GOAL} %")


if __name__ == "__main__":
    main()
