"""What else in a step is worth a kernel? The candidates' share of it, by torch.profiler.

    .venv-dev/bin/python benchmarks/profile_step.py                         # CPU, middle size: decides nothing for a GPU
    .venv-dev/bin/python benchmarks/profile_step.py --device cuda --size full

The rewritten step is run node by node with each node's time booked on a candidate; on CUDA also compiled, where each
kernel of Inductor is listed by its name. RULE says what is done with the figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.fx import GraphModule, Interpreter, Node
from torch.profiler import ProfilerActivity, profile, record_function

import harness
from full_step import OUTPUTS, SIZES, Size, cut, feed

RULE = (
    "A kernel is written for a candidate only where, on a GPU at full size, the candidate takes 2 % or more of the step "
    "under torch.compile and 1.1 times or more what its compulsory bytes take at the measured bandwidth; it is kept only "
    "if it beats torch.compile by 10 % or more there. A CPU's shares decide nothing for a GPU."
)
MODULATE, ROPE, SOLVER = "AdaLN modulate (LayerNorm, scale, shift, gate)", "qk-norm + RoPE", "guidance + solver update"
GROUPNORM, MOTION, PRODUCTS = "GroupNorm + SiLU", "motion-cross-attention", "matrix products, convolutions"
ATTENTION, GELU, REST = "attention", "GELU", "layout and the rest"
CANDIDATES = (MODULATE, ROPE, SOLVER, GROUPNORM)
_PREFIX = "candidate: "

aten = torch.ops.aten
_PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default}
_PRODUCTS |= {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default}
_ELEMENTWISE = {aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.layer_norm.default, aten.native_layer_norm.default}
_TAIL_INPUTS = {"guidance", "coefficients", "previous_x0", "noise"}


def classify(module: GraphModule, size: Size) -> dict[Node, str]:
    """Each call of the step's graph and the candidate (or other group) that it belongs to, by what it does to which shape.

    Whatever follows the guidance is the solver's; normalisation and arithmetic at the model's width is the modulation's,
    and anything on `[.., head width]` with a head axis that is no product is qk-norm and RoPE.
    """
    groups: dict[Node, str] = {}
    tail: set[Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" and node.name in _TAIL_INPUTS or tail & set(node.all_input_nodes):
            tail.add(node)
        if node.op != "call_function":
            continue
        shape = tuple(getattr(node.meta.get("val"), "shape", ()))
        name = str(node.target)
        if node in tail:
            groups[node] = SOLVER
        elif node.target in _PRODUCTS:
            groups[node] = PRODUCTS
        elif "motion_cross_attention" in name:
            groups[node] = MOTION
        elif "scaled_dot_product" in name:
            groups[node] = ATTENTION
        elif "group_norm" in name or node.target == aten.silu.default:
            groups[node] = GROUPNORM
        elif "gelu" in name:
            groups[node] = GELU
        elif len(shape) >= 4 and shape[1] == size.heads and shape[-1] in (size.head_width, size.head_width // 2, 2):
            groups[node] = ROPE
        elif node.target in _ELEMENTWISE and shape and shape[-1] == size.model_width:
            groups[node] = MODULATE
        else:
            groups[node] = REST
    return groups


class _Booked(Interpreter):
    """Runs a graph with each node inside a `record_function` of its group's name."""

    def __init__(self, module: GraphModule, groups: Mapping[Node, str]) -> None:
        super().__init__(module)
        self.groups = groups

    def run_node(self, n: Node) -> Any:
        if n not in self.groups:
            return super().run_node(n)
        with record_function(_PREFIX + self.groups[n]):
            return super().run_node(n)


def _record(call: Callable[[], object], device: str, rounds: int) -> Sequence[Any]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with torch.no_grad():
        call()  # warm-up
        with profile(activities=activities, acc_events=True) as profiler:
            for _ in range(rounds):
                call()
            if device == "cuda":
                torch.cuda.synchronize()
    events: Sequence[Any] = profiler.key_averages()
    return events


def shares(module: GraphModule, inputs: Sequence[Tensor], size: Size, device: str, rounds: int) -> dict[str, float]:
    """Milliseconds of each group in one eager step: the device's own on CUDA, the processor's otherwise."""
    booked = _Booked(module, classify(module, size))
    total = dict.fromkeys((*CANDIDATES, MOTION, PRODUCTS, ATTENTION, GELU, REST), 0.0)
    for event in _record(lambda: booked.run(*inputs), device, rounds):
        if event.key.startswith(_PREFIX) and event.device_type == DeviceType.CPU:
            microseconds = event.device_time_total if device == "cuda" else event.cpu_time_total
            total[event.key.removeprefix(_PREFIX)] += microseconds / 1e3 / rounds
    return total


def kernels(call: Callable[[], object], rounds: int) -> dict[str, float]:
    """Milliseconds of each CUDA kernel in one call, the longest first."""
    found: dict[str, float] = {}
    for event in _record(call, "cuda", rounds):
        if event.device_type == DeviceType.CUDA:
            found[event.key] = found.get(event.key, 0.0) + event.self_device_time_total / 1e3 / rounds
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure(
    size: Size, module: GraphModule, inputs: Sequence[Tensor], *, device: str, dtype: torch.dtype, rounds: int, results: Path
) -> None:
    """Profile the step, print the table and append its row (and on CUDA that of the compiled step's kernels)."""
    groups = shares(module, inputs, size, device, rounds)
    whole = sum(groups.values())
    note = "CUDA, eager" if device == "cuda" else "CPU: decides nothing for a GPU"
    print(f"\n{size.name}, {str(dtype).removeprefix('torch.')}, one eager step ({note})\n")
    print("| group | ms | share |\n| --- | ---: | ---: |")
    for name, milliseconds in sorted(groups.items(), key=lambda item: -item[1]):
        mark = " (candidate)" if name in CANDIDATES else ""
        absent = " - not in this network" if not milliseconds else ""
        print(f"| {name}{mark}{absent} | {milliseconds:.3f} | {milliseconds / whole:.1%} |")
    print(f"\n{RULE}")
    row = {
        "what": f"{size.name} rewritten step by candidate, eager",
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "n": rounds,
        "milliseconds": groups,
        "shares": {name: milliseconds / whole for name, milliseconds in groups.items()},
        "decides": False,  # eager: only the compiled step's row may decide
        "rule": RULE,
        "note": note,
    }
    harness.append_row("profile_step", row, folder=results)
    if device == "cuda":
        compiled = torch.compile(module, fullgraph=True, dynamic=False)
        longest = dict(list(kernels(lambda: compiled(*inputs), rounds).items())[:40])
        for name, milliseconds in longest.items():
            print(f"{milliseconds:9.3f} ms  {name[:110]}")
        row |= {"what": f"{size.name} rewritten step by kernel, compiled", "milliseconds": longest, "decides": True}
        row |= {"shares": {}, "note": "CUDA, torch.compile; the 40 longest kernels"}
        harness.append_row("profile_step", row, folder=results)


def main(arguments: list[str] | None = None) -> None:
    """Build the step with random weights, profile it, keep the rows."""
    parser = argparse.ArgumentParser(description="The share of each candidate for a kernel in a CogVideoX step.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=list(SIZES), default="mid")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for rows")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("not run: no CUDA device")
        return
    size, dtype = SIZES[options.size], torch.bfloat16 if options.device == "cuda" else torch.float32
    partition = cut(size, dtype, options.device)
    inputs = step_inputs(partition, feed(size, dtype, options.device))
    assert partition.step.outputs == OUTPUTS
    measure(
        size, partition.step.module, inputs, device=options.device, dtype=dtype, rounds=options.rounds, results=options.results
    )


def step_inputs(partition: Any, values: Mapping[str, Tensor]) -> list[Tensor]:
    """What the step program reads, from what the plain step reads."""
    known = dict(values)
    with torch.no_grad():
        for program in (partition.schedule, partition.request):
            known.update(zip(program.outputs, program.module(*(known[name] for name in program.inputs)), strict=True))
    return [known[name] for name in partition.step.inputs]


if __name__ == "__main__":
    main()
