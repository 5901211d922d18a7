"""Rows of benchmarks/results into docs/performance.md and its figures: nothing in the page is written by hand.

    make report                                        # or .venv-dev/bin/python benchmarks/report/report.py

One section for each question. A section shows the newest run (all rows that one process appended) of each model and
device, and names the rows, their commit, date and command under it; older rows stay in the files. A question without rows
says "not run" and which command would answer it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from motionrt.benchmarks.harness import RESULTS, ROOT
from motionrt.benchmarks.report import approximate, serving, text, warp
from motionrt.benchmarks.report import sections as render
from motionrt.benchmarks.report.rows import Report

PAGE = ROOT / "docs" / "performance.md"


@dataclass(frozen=True)
class Section:
    """A heading, one sentence, what renders its rows, and the command that would make them."""

    title: str
    says: str
    lines: Callable[[Report], list[str]]
    command: str


SUITE = "benchmarks/gpu/gpu_suite.py"
SECTIONS = (
    Section(
        "The adapter per step",
        "What the Motion-Adapter adds to a step of the base model: as released, folded, fused, switched off; and the base step "
        "after the same pass.",
        render.adapter, "benchmarks/questions/bench_adapter.py",
    ),
    Section(
        "One adapter layer at full width", "CogVideoX-5B's Motion-Adapter on 17 frames of 480x720, plain PyTorch.",
        render.plain("bench_kernel", "what"), "benchmarks/questions/bench_kernel.py",
    ),
    Section(
        "The step", "One denoising step: ours, the same step as it was written, diffusers eager and compiled.",
        render.step, "benchmarks/questions/bench_step.py",
    ),
    Section(
        "Where a step's time goes",
        "Our step by kind of work, from ONNX Runtime's own profiler; `motion` is what the folded adapters take in it.",
        render.kinds, "benchmarks/questions/profile_graph.py",
    ),
    Section(
        "Motion-I2V's warp",
        "Frame 0 warped for every frame and then projected, by a splat (released) or by tables (gathered), or projected once "
        "and gathered (ours): one attention at the release's sizes in ONNX Runtime, in turns, and a step counted.",
        warp.warp, "benchmarks/warp/bench_warp.py",
    ),
    Section(
        "Conditioning",
        "Motion tokens of K references: encoded when they are asked for, as the release does, or read from the memory.",
        render.conditioning, "benchmarks/questions/bench_conditioning.py",
    ),
    Section(
        "The memory at scale", "One search with the tokens of 9 clips.",
        render.memory, "benchmarks/questions/bench_memory.py",
    ),
    Section(
        "End to end", "A request by its stages; sizes and steps are in the rows.",
        render.stages("bench_end_to_end"), "benchmarks/questions/bench_end_to_end.py",
    ),
    Section(
        "Cold start", "From nothing to the first and the second video.",
        render.stages("bench_cold_start"), "benchmarks/questions/bench_cold_start.py",
    ),
    Section(
        "Serving",
        "Jobs of the pipeline itself, of the server's queue and worker without HTTP, and over HTTP.",
        serving.serve, "benchmarks/serving/bench_serve.py",
    ),
    Section(
        "Serving: half an hour of kills",
        "Two keys, one of them flooding; worker and server killed, the disk filled, jobs stopped and deleted.",
        serving.soak, "benchmarks/serving/bench_serve_soak.py",
    ),
    Section(
        "Serving: replicas",
        "Jobs that are ordered at once, made by workers of the server and by replicas in Ray Serve on the same machine, one "
        "thread each; and the same with a replica killed while two are at work.",
        serving.replicas, "benchmarks/serving/bench_replicas.py",
    ),
    Section(
        "Scaling",
        "How a step's cost grows, and what was fitted to it: four blocks at the width of cogvideox-mid, with adapters (`ours`) "
        "and without. K does not reach the step: it is the demo's CAMA.",
        render.scaling, "benchmarks/questions/bench_scaling.py",
    ),
    Section(
        "Export and build", "Time, memory, sizes; nothing of it needs a GPU.",
        render.build, "benchmarks/questions/bench_build.py",
    ),
    Section(
        "Where weights and FLOPs belong",
        "Counted on the structure at full size: what the loop needs, and what leaves it.",
        render.classes, "benchmarks/models/partition_report.py cogvideox-5b-i2v --frames 17",
    ),
    Section(
        "Speed against quality", "The demo with fewer steps and coarser weights.", render.quality, "demo/evaluate.py --keep"
    ),
    Section(
        "Approximations: what they cost",
        "The demo with every recipe that the machine has, against the exact loop of as many steps (dB of all pixels) and "
        "against the target (path error EPE, its change paired by target), 48 targets of each split. "
        "`docs/approximations.md` says what recipes are. A processor without bfloat16 has no rows of it here; the file has "
        "those of an earlier run.",
        approximate.quality, "benchmarks/approximate/bench_quality.py",
    ),
    Section(
        "Precisions of MotionClone and Motion-I2V: what they cost",
        "Their demos in 8 and 16 bits, every step of them, against the exact video (dB of all pixels) and what was asked for "
        "(path error, its change paired by target), on targets that no training saw.",
        approximate.precision, "benchmarks/approximate/bench_precision.py motionclone",
    ),
    Section(
        "Approximations: the whole loop",
        "The same recipes as whole loops, in turns with the exact one and with diffusers compiled in bfloat16. The mid models "
        "have random weights: they say speed, and nothing of quality.",
        approximate.loop, "benchmarks/approximate/bench_loop.py --model cogvideox-mid --steps 25 50",
    ),
    Section(
        "What no GPU can beat", "Static bounds by vendors' peaks: nothing of it was measured.",
        render.bounds, "benchmarks/questions/roofline.py",
    ),
    Section(
        "On a GPU: environment and ceilings", "What the chip copies and multiplies; all below is measured against it.",
        render.plain("gpu_ceilings", gpu=True), SUITE,
    ),
    Section(
        "On a GPU: the kernel", "Motion-cross-attention against all that computes the same.",
        render.plain("gpu_kernel", "what", gpu=True), SUITE,
    ),
    Section(
        "On a GPU: Motion-I2V's attention", "Frame 0 moved inside the kernel, against all that computes the same.",
        render.plain("gpu_augmented", "what", gpu=True), SUITE,
    ),
    Section(
        "On a GPU: the step at full size",
        "CogVideoX and SVD: base, released adapter, ours; each eager, compiled, and ours as a CUDA graph.",
        render.plain("gpu_step", "what", gpu=True), SUITE,
    ),
    Section(
        "On a GPU: conditioning, decoder, a whole request", "Random weights.",
        render.plain("gpu_request", "what", gpu=True), SUITE,
    ),
    Section(
        "On a GPU: the demo", "Its step in each backend against the processor's.",
        render.plain("gpu_demo", "what", gpu=True), SUITE,
    ),
    Section(
        "On a GPU: engines", "TensorRT engines of the demo, host to host.",
        render.plain("gpu_engines", "what", gpu=True), f"{SUITE} --engines",
    ),
)  # fmt: skip


def page(folder: Path = RESULTS) -> tuple[str, dict[str, str]]:
    """(the page, figures by file name) of the rows in `folder`."""
    report = Report(folder)
    parts = [text.INTRODUCTION]
    for section in SECTIONS:
        body = section.lines(report) or [text.not_run(render.PYTHON + section.command), ""]
        parts += [f"## {section.title}", "", section.says, "", *body]
    return "\n".join(parts).rstrip() + "\n", report.figures


def main(arguments: list[str] | None = None) -> None:
    """Write the page and the figures, each beside its place and renamed into it."""
    parser = argparse.ArgumentParser(description="docs/performance.md and its figures from the rows.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of rows, and of figures")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    written, figures = page(options.results)
    for path, content in {options.page: written, **{options.results / name: svg for name, svg in figures.items()}}.items():
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, path)
    print(f"{options.page.name}: {written.count('Not run:')} parts not run; {len(figures)} figures")


if __name__ == "__main__":
    main()
