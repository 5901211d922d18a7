"""What does motion cost in a step? The step without adapters against the step with them, as released and as ours, one run.

    .venv-dev/bin/python benchmarks/questions/bench_adapter.py --model cogvideox-mid
    .venv-dev/bin/python benchmarks/questions/bench_adapter.py --model svd-mid
    .venv-dev/bin/python benchmarks/questions/bench_adapter.py --model dynamicrafter-mid
    .venv-dev/bin/python benchmarks/questions/bench_adapter.py --model cogvideox-layer  # a block at full width, in PyTorch

In ONNX Runtime on the CPU (or in PyTorch eager, `--runtime torch`), in turns: `base` (no adapter, as written), `base_ours`
(no adapter, after the compiler pass), `released` (with adapters, as written), `folded` (with adapters, after the pass: what
a bundle holds) and `scale_0` (folded at motion_scale 0). Before anything is timed: folded must equal released, base_ours
and scale_0 must equal base, and released must differ from base, or these random adapters would prove nothing.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from motionrt.benchmarks import harness
from motionrt.benchmarks.models.full_step import known_values
from motionrt.benchmarks.models.mid_graphs import FORMS, WORK, Saved, flop_shares, graphs_of
from motionrt.benchmarks.models.mid_models import MODELS, Model
from motionrt.benchmarks.models.onnx_graph import Arrays
from motionrt.export.compiler.partition import partition

SAME_AS = {"base": "base", "base_ours": "base", "released": "released", "folded": "released", "scale_0": "base"}
TOLERANCE = 1e-4  # of the largest value of an output
NOT_RUN = "fused: not run: there is no CPU kernel of the op; what it stands for runs instead, and that is `folded`"
GOAL = 2.5  # percent of the base step, folded over base_ours


Calls = dict[str, harness.Candidate]


def onnx_calls(model: Model, options: argparse.Namespace) -> tuple[Calls, dict[str, int]]:
    """One call for each variant and FLOPs; scale_0 is the folded graph with another input.

    Each has `options.sessions` sessions that take turns: where a session's weights come to lie in memory moves its time by a
    few percent, which rounds of one session do not show.
    """

    def bind(saved: Saved, feed: Arrays) -> harness.Candidate:
        turns = itertools.cycle([saved.open(options.threads) for _ in range(options.sessions)])
        return lambda: next(turns)(feed)

    saved = graphs_of(model, FORMS, options.work)
    calls = {form: bind(graph, graph.feed) for form, graph in saved.items()}
    silent = saved["folded"].silent
    assert silent is not None
    calls["scale_0"] = bind(saved["folded"], silent)
    return calls, {form: graph.flops for form, graph in saved.items()}


def torch_calls(model: Model, options: argparse.Namespace) -> tuple[Calls, dict[str, int]]:
    """The same in PyTorch eager, without any export; the fused op runs as its reference in plain torch."""
    import torch

    torch.set_num_threads(options.threads)

    def bind(module: Any, feed: Sequence[Any]) -> harness.Candidate:
        def run() -> Arrays:
            with torch.inference_mode():
                results = module(*feed)
            return {name: value.numpy() for name, value in zip(model.outputs, results, strict=True)}

        return run

    values = model.feed()
    silent = {**values, "motion_scale": torch.zeros_like(values["motion_scale"])}
    calls: Calls = {}
    flops: dict[str, int] = {}
    for adapter, plain, ours in ((False, "base", "base_ours"), (True, "released", "folded")):
        module = model.step(adapter=adapter)
        cut = partition(module, tuple(values.values()), model.inputs, outputs=model.outputs)
        calls[plain] = bind(module, list(values.values()))
        for name, inputs in {ours: values, **({"scale_0": silent} if adapter else {})}.items():
            known = known_values(cut, inputs)
            calls[name] = bind(cut.step.module, [known[read] for read in cut.step.inputs])
        flops |= {plain: cut.original.flops, ours: cut.classes["step"].flops}
    return calls, flops


def gate(calls: Mapping[str, harness.Candidate]) -> dict[str, dict[str, Any]]:
    """The `error` of every variant's row; ParityError where one is not what it should equal, or motion changes nothing."""
    outputs = {name: {key: np.array(x) for key, x in call().items()} for name, call in calls.items()}
    allowed = {name: harness.allowance(TOLERANCE, outputs[name]) for name in ("base", "released")}
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
    parser.add_argument("--runtime", choices=["onnxruntime", "torch"], help="default: the model's own")
    parser.add_argument("--work", type=Path, default=WORK, help="folder where exported graphs are kept")
    harness.add_options(parser, rounds=15, warmups=1, threads=1)
    parser.add_argument("--sessions", type=int, default=1, help="sessions of each graph that take turns (ONNX Runtime)")
    options = parser.parse_args(arguments)

    model = MODELS[options.model]
    runtime = options.runtime or model.runtime
    if options.sessions < 1 or (options.sessions > 1 and runtime == "torch"):
        parser.error(f"--sessions is {options.sessions}; allowed: 1 or more in ONNX Runtime, 1 in PyTorch")
    calls, flops = (torch_calls if runtime == "torch" else onnx_calls)(model, options)
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
        warmups=max(options.warmups, options.sessions),
        rounds=options.rounds,
    )
    counted = flop_shares(model, flops, options.work)
    for name in calls:
        row: dict[str, Any] = {
            **result.row(name),
            "error": errors[name],
            "model": model.name,
            "what": f"{model.name} step",
            "shape": dict(model.shape),
            "dtype": "float32",
            "threads": options.threads,
            "sessions": options.sessions,
            "runtime": runtime,
            "flops": flops[name if name in flops else "folded"],
            "flops_over_base": counted,
            "note": options.note,
        }
        ratios = {other: result.ratio(name, other) for other in ("base", "base_ours") if other != name}
        row |= {f"over_{other}": ratio.as_row() for other, ratio in ratios.items()}
        harness.append_row("bench_adapter", row, folder=options.results)
        over = ", ".join(
            harness.said([100 * (x - 1) for x in ratios[r].numbers()], "{:+.2f}", " %") + f" of {r}"
            for r in ratios
        )
        print(f"{row['backend']:>10}: {harness.times(row)}", over)
    print(NOT_RUN)
    print(f"FLOPs over base: {counted}")
    percent = 100 * (result.ratio("folded", "base_ours").value - 1)
    print(f"motion costs {percent:+.2f} % of the base step, both after the pass; the goal is at most {GOAL} %")


if __name__ == "__main__":
    main()
