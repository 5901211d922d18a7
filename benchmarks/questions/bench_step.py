"""How much faster is one denoising step than in PyTorch, and what of that is the compiler pass? All in one run.

    .venv-dev/bin/python benchmarks/questions/bench_step.py                         # the demo, from its bundle
    .venv-dev/bin/python benchmarks/questions/bench_step.py --model cogvideox-mid   # or svd-mid: see mid_models.py
    .venv-dev/bin/python benchmarks/questions/bench_step.py --openvino              # `rewritten` in OpenVINO beside them

Candidates: `rewritten` and `plain` (the same step as it was written), both in ONNX Runtime, and with PyTorch installed
`eager` and `compiled`, the plain module there (step_rivals.py says how). `openvino` and `openvino_bfloat16`: the rewritten step
there, exact and rounded. All must agree first, on one step, and in the demo over a whole schedule too; what is rounded has a
tolerance of its own, ROUNDED. All have the same threads.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.benchmarks import harness
from motionrt.benchmarks.models.onnx_graph import open_graph
from motionrt.benchmarks.models.step_rivals import compiled_step, openvino_step, torch_step
from motionrt.benchmarks.pipeline import DEMO, StepRequest, open_pipeline, step_request
from motionrt.runtime.backends.seam import Graph
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.files import sha256_of

TOLERANCE = 1e-4  # of latents with unit variance, after all steps, in fp32
ROUNDED = 0.1  # the same for a candidate in bfloat16, of the largest value
OPENVINO = {"openvino": "float32", "openvino_bfloat16": "bfloat16"}
OURS = ("rewritten", *OPENVINO)  # candidates of the rewritten graph
Arrays = dict[str, NDArray[Any]]


def check_checkpoint(bundle: Bundle, checkpoint: Path) -> None:
    """Raise ParityError where the bundle was exported from another checkpoint: parity could only fail, and obscurely."""
    exported = bundle.manifest.provenance.get("checkpoint")
    if exported is not None and exported != sha256_of(checkpoint):
        raise harness.ParityError(
            f"bundle {bundle.path} was exported from another checkpoint than {checkpoint}. "
            f"Export it again: `python demo/export.py {checkpoint} {bundle.path}`."
        )


def demo_rivals(checkpoint: Path, request: StepRequest, options: argparse.Namespace) -> dict[str, Graph]:
    """`eager` and `compiled` of the demo; a word why where one is not there."""
    if importlib.util.find_spec("torch") is None:
        print("eager, compiled: not run: PyTorch is not installed")
        return {}
    check_checkpoint(request.pipeline.bundle, checkpoint)
    demo = harness.demo_module("export")
    module, example = demo.step_module(checkpoint), request.one_step(plain=True)
    return rivals(module, tuple(demo.INPUTS), demo.STEP_OUTPUTS, example, options)


def rivals(
    module: Any, inputs: Sequence[str], outputs: Sequence[str], example: Arrays, options: argparse.Namespace
) -> dict[str, Graph]:
    """The plain module in PyTorch, eager and compiled."""
    steps = {"eager": torch_step(module, inputs, outputs, threads=options.threads)}
    if options.compile_mode != "none":
        compiled = compiled_step(module, inputs, outputs, threads=options.threads, example=example, mode=options.compile_mode)
        if compiled is not None:
            steps["compiled"] = compiled
    return steps


def on_openvino(path: Path, options: argparse.Namespace) -> dict[str, Graph]:
    """The graph in OpenVINO, by the names of its candidates; none unless they are asked for."""
    return {name: openvino_step(path, options.threads, precision) for name, precision in OPENVINO.items() if options.openvino}


def check_schedule(request: StepRequest, steps: Mapping[str, Graph]) -> dict[str, float]:
    """Denoise with every form, and return the largest difference from `plain`; ParityError above the tolerance."""
    results = {name: request.denoise(step, plain=name not in OURS) for name, step in steps.items()}
    errors = {name: harness.difference(result, results["plain"]) for name, result in results.items()}
    for name, error in errors.items():
        if error > (allowed := ROUNDED if name == "openvino_bfloat16" else TOLERANCE):
            raise harness.ParityError(f"after all steps {name} differs from plain by {error:.3g}; allowed {allowed:.3g}")
    return errors


def demo(options: argparse.Namespace) -> tuple[harness.Comparison, dict[str, Any], dict[str, dict[str, Any]]]:
    """Check the demo's step over a whole schedule, then time one step: (times, what all rows say, what each one says)."""
    pipeline = open_pipeline(options.bundle, threads=options.threads)
    request, bundle = step_request(pipeline), pipeline.bundle
    forms = {"plain": request.loop(plain=True).graphs[0], "rewritten": request.loop(plain=False).graphs[0]}
    steps = {name: open_graph(bundle.graph_path(graph), options.threads) for name, graph in forms.items()}
    steps |= on_openvino(bundle.graph_path(forms["rewritten"]), options) | demo_rivals(options.checkpoint, request, options)
    whole = check_schedule(request, steps)
    print(f"after all steps they differ from plain by {', '.join(f'{name} {error:.1e}' for name, error in whole.items())}")
    candidates = {name: bind(step, request.one_step(plain=name not in OURS)) for name, step in steps.items()}
    result = compared(candidates, TOLERANCE, options)
    same = {"model": "demo", "what": f"{bundle.name} step", "shape": request.shape}
    return result, same, {name: {"max_abs_difference_after_all_steps": error} for name, error in whole.items()}


def mid(options: argparse.Namespace) -> tuple[harness.Comparison, dict[str, Any], dict[str, dict[str, Any]]]:
    """The same for a model of mid_models.py, where one step is checked."""
    from motionrt.benchmarks.models.mid_graphs import graphs_of
    from motionrt.benchmarks.models.mid_models import MODELS

    model = MODELS[options.model]
    saved = graphs_of(model, ("released", "folded"), options.work)
    forms = {"plain": saved["released"], "rewritten": saved["folded"]}
    candidates = {name: bind(graph.open(options.threads), graph.feed) for name, graph in forms.items()}
    folded = saved["folded"]
    candidates |= {name: bind(step, folded.feed) for name, step in on_openvino(folded.path, options).items()}
    feed = {name: value.numpy() for name, value in model.feed().items()}
    module = model.step(adapter=True)
    for name, step in rivals(module, tuple(model.inputs), model.outputs, feed, options).items():
        candidates[name] = bind(step, feed)
    result = compared(candidates, harness.allowance(TOLERANCE, candidates["plain"]()), options)
    same = {"model": model.name, "what": f"{model.name} step", "shape": dict(model.shape)}
    flops = {name: {"flops": forms.get(name, forms["plain"]).flops} for name in candidates}
    return result, same, flops


def compared(
    candidates: Mapping[str, harness.Candidate], tolerance: float, options: argparse.Namespace
) -> harness.Comparison:
    """The comparison with `plain`, in which what is rounded has its own tolerance."""
    rounded = {"openvino_bfloat16": harness.allowance(ROUNDED, candidates["plain"]())} if options.openvino else {}
    return harness.compare(
        candidates, reference="plain", tolerance=tolerance, warmups=options.warmups, rounds=options.rounds, rounded=rounded
    )


def bind(step: Graph, inputs: Arrays) -> harness.Candidate:
    """A step and its inputs as a candidate."""
    return lambda: step(inputs)


def main(arguments: list[str] | None = None) -> None:
    """Check, time, print the ratios and append one row for each candidate."""
    parser = argparse.ArgumentParser(description="The rewritten step against the plain step and PyTorch, eager and compiled.")
    parser.add_argument("--model", default="demo", help="demo, or a name in mid_models.MODELS")
    parser.add_argument("--bundle", type=Path, default=DEMO / "bundle")
    parser.add_argument("--checkpoint", type=Path, default=DEMO / "checkpoint.safetensors")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for rows")
    parser.add_argument("--work", type=Path, default=harness.ROOT / "out" / "mid", help="folder where exported graphs are kept")
    parser.add_argument("--compile-mode", default="max-autotune", help="of torch.compile; none leaves it out")
    parser.add_argument("--openvino", action="store_true", help="time the rewritten step in OpenVINO as well")
    parser.add_argument("--rounds", type=int, help="50 for the demo, 9 for the others")
    parser.add_argument("--warmups", type=int, help="5 for the demo, 1 for the others")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="")
    options = parser.parse_args(arguments)
    rounds, warmups = (50, 5) if options.model == "demo" else (9, 1)
    options.rounds = rounds if options.rounds is None else options.rounds
    options.warmups = warmups if options.warmups is None else options.warmups

    result, same, each = demo(options) if options.model == "demo" else mid(options)
    for name in result.seconds:
        row = {
            **result.row(name),
            **same,
            "dtype": OPENVINO.get(name, "float32"),
            "threads": options.threads,
            **each[name],
            **({"compile": f"mode {options.compile_mode}, freezing"} if name == "compiled" else {}),
            "note": options.note,
        }
        if name != "rewritten":
            ratio = result.ratio(name, "rewritten")
            row["over_rewritten"] = ratio.as_row()
            print(f"{name} / rewritten: {ratio} (95 % of {options.rounds} rounds resampled)")
        path = harness.append_row("bench_step", row, folder=options.results)
        print(f"{row['backend']:>10}: {harness.times(row)}")
    print(f"rows appended: {path.name}")
    others = [name for name in ("eager", "compiled") if name in result.seconds]
    if others:
        best = min(others, key=lambda name: float(np.median(result.seconds[name])))
        print(f"the better rival is {best}: {result.ratio(best, 'rewritten')} of rewritten; the goal is 1.5x or more")


if __name__ == "__main__":
    main()
