"""What does guidance cost a step, and what does PyTorch take for it? A step that differentiates against autograd, in turns.

    .venv-dev/bin/python benchmarks/guided/bench_guided.py                       # the demo's sizes
    .venv-dev/bin/python benchmarks/guided/bench_guided.py --model guided-mid    # widths 128 and 256, 16x16 latents

Candidates: `guided` and `plain`, the graphs of MotionClone's two steps in ONNX Runtime; `eager` and `compiled`, the guided
module in PyTorch, whose autograd takes the gradient (compiled: forward and backward by Inductor). The guided ones must first
agree on a step that guides, and whose guidance is far larger than what they may differ by. Timed is one whose weight is 0,
which costs the same and gives what `plain` gives, so that all four are checked again. Memory is of a process for each: its
peak beyond what it held once its libraries were there, weights included, and without what the compiler itself holds.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from motionrt.benchmarks import harness
from motionrt.benchmarks.models.anonymous_memory import AnonymousMemory, anonymous
from motionrt.benchmarks.models.mid_graphs import digest
from motionrt.benchmarks.models.onnx_graph import Arrays, open_graph
from motionrt.export.compiler.weightless import meta
from motionrt.export.exporter import Writer
from motionrt.export.onnx.from_torch import Range
from motionrt.export.systems.motionclone.step import CHANGES, GUIDED, GuidedStep, PlainStep
from motionrt.export.systems.motionclone.unet import TappedUNet, motion_unet
from motionrt.export.systems.system import Array, Network, Step

TOLERANCE = 1e-4  # of the largest output
WEIGHT = 2000.0  # of the energy, where a step guides
SECONDS = 2.0  # of steps whose memory is watched, at the least: it is looked at every 20 ms
NAMES = ("guided", "plain", "eager", "compiled")
ENTRIES, PARTIAL = "entries.json", "entries.json.partial"
_TWO: Mapping[str, Any] = {
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 64, "use_motion_mid_block": False,
    "num_attention_heads": 4, "motion_num_attention_heads": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A UNet with random weights: `widths` of its blocks, latents of `frames` x `size` x `size`; guided in up block `block`."""

    name: str
    widths: tuple[int, int]
    frames: int
    size: int
    block: int
    tokens: int = 12

    def unet(self) -> TappedUNet:
        torch.manual_seed(0)
        unet = motion_unet({**_TWO, "block_out_channels": self.widths})
        return TappedUNet(unet.requires_grad_(False), self.block).eval()

    def arrays(self) -> dict[str, Array]:
        """What the guided step reads."""
        with meta():
            layers = self.unet().layers
        places, text = (self.size // 2 ** (1 - self.block)) ** 2, Array((1, self.tokens, _TWO["cross_attention_dim"]))
        motion = Array((1, layers, places, _TWO["motion_num_attention_heads"], self.frames, self.frames))
        named = {"latents": Array((1, self.frames, 4, self.size, self.size)), "coefficients": Array((1, 7)), "text": text}
        named |= {"negative_text": text, "motion_weights": motion, "motion_targets": motion}
        return {name: named.get(name, Array((1,))) for name in GUIDED}

    def feed(self, weight: float) -> Arrays:
        """A step near the noisy end, and a motion of random keys."""
        draw, arrays = np.random.default_rng(0), self.arrays()
        shapes = {name: tuple(int(size) for size in array.dims) for name, array in arrays.items()}
        values = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        chosen = np.eye(self.frames, dtype=np.float32)[draw.integers(0, self.frames, shapes["motion_weights"][:-1])]
        one = np.ones(1, np.float32)
        fixed = {"coefficients": np.array([[1.9, -1.6, 0, 1, 0.5, 0.86, 0.8]], np.float32), "guidance": 2 * one}
        fixed |= {"timestep": 801 * one, "weight": weight * one, "motion_scale": one, "motion_weights": chosen}
        return {**values, **fixed, "motion_targets": 0.7 * chosen}


MODELS = {
    model.name: model
    for model in (
        Model("guided-tiny", (80, 128), 16, 8, 1),
        Model("guided-mid", (128, 256), 16, 16, 1),
        Model("guided-toy", (16, 32), 4, 8, 0, 5),
    )
}


def graphs_of(model: Model, work: Path) -> Path:
    """The folder of the graphs of both steps, exported now or by an earlier run of the same code."""
    folder = work / f"{model.name}-{digest()}"
    if not (folder / ENTRIES).exists():
        print(f"{model.name}: exporting both steps ...", flush=True)
        (folder / "graphs").mkdir(parents=True, exist_ok=True)
        unet, writer = model.unet(), Writer(folder, False, lambda text: None)
        arrays, sizes = model.arrays(), {"steps": Range(1, 25, 1000)}
        plain = {name: arrays[name] for name in CHANGES}
        writer.cut(Step(Network(GuidedStep(unet)), GUIDED, arrays, ("next_latents", "energy"), sizes, "_guided", gradient=True))
        writer.cut(Step(Network(PlainStep(unet)), CHANGES, plain, ("next_latents",), sizes, "_plain"))
        named = {name: [port["name"] for port in entry["inputs"]] for name, entry in writer.graphs.items()}
        (folder / PARTIAL).write_text(json.dumps(named))
        os.replace(folder / PARTIAL, folder / ENTRIES)  # last: it says that the others are whole
    return folder


def ours(kind: str, folder: Path, values: Arrays, threads: int) -> harness.Candidate:
    """`guided` or `plain` in ONNX Runtime, for `values`; what is made once a request or schedule is made here."""
    entries = json.loads((folder / ENTRIES).read_text())

    def graph(name: str) -> Any:
        return open_graph(folder / "graphs" / f"{name}.onnx", threads)

    known = dict(values)
    for name in (f"schedule_{kind}", f"request_{kind}"):
        known |= graph(name)({key: known[key] for key in entries[name]})
    step, feed = graph(f"step_{kind}"), {key: known[key] for key in entries[f"step_{kind}"]}
    return lambda: {"next_latents": step(feed)["next_latents"]}


@functools.cache
def guided_module(model: Model, mode: str | None) -> Any:
    """The guided step, compiled in `mode` where there is one: as one graph with the gradient in it."""
    step = GuidedStep(model.unet())
    if mode is None:
        return step
    torch._dynamo.config.trace_autograd_ops = True
    return torch.compile(step, mode=mode, dynamic=False, fullgraph=True)


def torchs(model: Model, values: Arrays, threads: int, mode: str | None) -> harness.Candidate:
    """The guided module in PyTorch, compiled in `mode` where there is one."""
    torch.set_num_threads(threads)
    step = guided_module(model, mode)
    given = {name: torch.from_numpy(value) for name, value in values.items()}

    def run() -> Arrays:
        with torch.no_grad():  # what needs a gradient says so
            return {"next_latents": step(**given)[0].numpy()}

    return run


def candidate(name: str, model: Model, weight: float, options: argparse.Namespace) -> harness.Candidate:
    values = model.feed(weight)
    if name in ("guided", "plain"):
        return ours(name, graphs_of(model, options.work), values, options.threads)
    return torchs(model, values, options.threads, options.compile_mode if name == "compiled" else None)


def peak(name: str, options: argparse.Namespace) -> int:
    """`watched` in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, "--model", options.model, "--work", str(options.work)]
    command += ["--threads", str(options.threads), "--compile-mode", options.compile_mode]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def watched(name: str, model: Model, options: argparse.Namespace) -> int:
    """Peak bytes of this process while the candidate is made and runs, beyond what its libraries hold."""
    import onnxruntime  # noqa: F401

    model.feed(WEIGHT)  # imports the rest
    with AnonymousMemory() as memory:
        before = anonymous()
        run = candidate(name, model, WEIGHT, options)
        if name == "compiled":  # what the compiler holds is not the step's
            weights = anonymous() - before
            run()
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            before = anonymous() - weights
            memory.peak()
        end, calls = perf_counter() + SECONDS, 0
        while calls < 3 or perf_counter() < end:
            run()
            calls += 1
        return memory.peak() - before


def check(model: Model, names: list[str], options: argparse.Namespace) -> tuple[dict[str, float], float]:
    """The differences of guided candidates from eager in a step that guides, and what is allowed; ParityError above it."""
    guided = {name: candidate(name, model, WEIGHT, options)() for name in names if name != "plain"}
    allowed = harness.allowance(TOLERANCE, guided["eager"])
    off = {name: harness.difference(value, guided["eager"]) for name, value in guided.items()}
    if max(off.values()) > allowed:
        raise harness.ParityError(f"guided steps differ from eager by {off}; allowed {allowed:.3g}")
    moved = harness.difference(guided["eager"], candidate("eager", model, 0.0, options)())
    if moved < 10 * allowed:
        raise harness.ParityError(f"guidance moves the latents by {moved:.3g}: that says nothing if {allowed:.3g} is allowed")
    print(f"guidance moves the latents by {moved:.1e}; the candidates differ by at most {max(off.values()):.1e}", flush=True)
    return off, allowed


def main(arguments: list[str] | None = None) -> None:
    """Check, time, print the ratios and append one row for each candidate."""
    parser = argparse.ArgumentParser(description="MotionClone's guided step in ONNX Runtime, and PyTorch's autograd.")
    parser.add_argument("--model", default="guided-tiny", choices=MODELS)
    parser.add_argument("--work", type=Path, default=harness.ROOT / "out" / "guided", help="folder where graphs are kept")
    parser.add_argument("--compile-mode", default="default", help="of torch.compile; none leaves it out")
    parser.add_argument("--peak", choices=NAMES, help=argparse.SUPPRESS)
    harness.add_options(parser, rounds=15, warmups=2, threads=1)
    options = parser.parse_args(arguments)
    model, names = MODELS[options.model], [n for n in NAMES if n != "compiled" or options.compile_mode != "none"]
    graphs_of(model, options.work)
    if options.peak:
        print(watched(options.peak, model, options))
        return
    off, allowed = check(model, names, options)
    candidates = {name: candidate(name, model, 0.0, options) for name in names}
    result = harness.compare(candidates, reference="eager", tolerance=allowed, warmups=options.warmups, rounds=options.rounds)
    shape = {"F": model.frames, "H": model.size, "W": model.size, "D": model.widths[0]}
    for name in names:
        row = {
            **result.row(name), "model": model.name, "what": f"{model.name} step", "shape": shape, "dtype": "float32",
            "threads": options.threads, "peak_bytes": peak(name, options), "note": options.note,
            "guided_difference": off.get(name),
            **({"compile": f"mode {options.compile_mode}, one graph with the gradient"} if name == "compiled" else {}),
        }  # fmt: skip
        if name != "guided":
            ratio = result.ratio(name, "guided")
            row["over_guided"] = ratio.as_row()
            print(f"{name} / guided: {ratio} (95 % of {options.rounds} rounds resampled)")
        path = harness.append_row("bench_guided", row, folder=options.results)
        print(f"{name:>9}: {harness.times(row)}, peak {row['peak_bytes'] / 1e6:,.0f} MB")
    print(f"rows appended: {path.name}")


if __name__ == "__main__":
    main()
