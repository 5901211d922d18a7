"""The time that no implementation can beat, for each target GPU: static, nothing is run on one.

    .venv-dev/bin/python benchmarks/questions/roofline.py

A bound is the larger of FLOPs / peak and bytes / bandwidth, with vendors' peaks, which nobody reaches. Bytes are the
compulsory ones: every weight, input and output once, and nothing in between. FLOPs are those of matrix products and
attention (a multiply-add is two), counted by `export.classify` on the exported step at its full widths.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motionrt.benchmarks import harness

if TYPE_CHECKING:
    from motionrt.benchmarks.models.full_step import Size

BYTES = 2  # bf16


@dataclass(frozen=True)
class Gpu:
    """Peak dense bf16 with fp32 accumulation in TFLOP/s and memory bandwidth in GB/s, as the vendor states them."""

    name: str
    arch: str
    tflops: float
    bandwidth: float
    source: str


GPUS = (
    Gpu("A100 SXM 80GB", "sm_80", 312, 2039, "NVIDIA A100 datasheet"),
    Gpu("A10", "sm_86", 125, 600, "NVIDIA A10 datasheet"),
    Gpu("L4", "sm_89", 121, 300, "NVIDIA L4 datasheet, half of the sparse 242"),
    Gpu("L40S", "sm_89", 362, 864, "NVIDIA L40S datasheet"),
    Gpu("RTX 4090", "sm_89", 165.2, 1008, "NVIDIA Ada whitepaper, fp32 accumulation"),
    Gpu("H100 SXM", "sm_90", 989, 3350, "NVIDIA H100 datasheet, half of the sparse 1979"),
    Gpu("H200", "sm_90", 989, 4800, "NVIDIA H200 datasheet, half of the sparse 1979"),
    Gpu("B200", "sm_100", 2250, 7700, "NVIDIA HGX B200, half of the sparse 4500; 8.0 TB/s in some editions"),
    Gpu("RTX 5090", "sm_120", 209.5, 1792, "NVIDIA RTX Blackwell whitepaper, fp32 accumulation"),
)


@dataclass(frozen=True)
class Work:
    """FLOPs and compulsory bytes of something."""

    flops: int
    bytes: int

    def times(self, count: int) -> Work:
        return Work(count * self.flops, count * self.bytes)

    def bound(self, gpu: Gpu) -> tuple[float, str]:
        """Milliseconds that `gpu` needs at the least, and what holds it: "compute" or "memory"."""
        compute, memory = self.flops / (gpu.tflops * 1e9), self.bytes / (gpu.bandwidth * 1e6)
        return max(compute, memory), "compute" if compute >= memory else "memory"


def folded_kernel(batch: int, length: int, width: int, heads: int, head_width: int, tokens: int, folded_batch: int = 0) -> Work:
    """Fused motion-cross-attention, out = h + s concat_n softmax(h A_n) V_n, in bf16: one layer.

    FLOPs: scores 2 B L D (N M), values 2 B L (N M) d. Bytes: h read and out written, A [b, D, N M] and V [b, N, M, d]
    read once; b is `folded_batch`, or B.
    """
    rows, columns, inner = folded_batch or batch, heads * tokens, heads * head_width
    flops = 2 * batch * length * columns * (width + head_width)
    return Work(flops, BYTES * (batch * length * (width + inner) + rows * columns * (width + head_width)))


def released_adapter(batch: int, length: int, width: int, heads: int, head_width: int, tokens: int) -> Work:
    """The same as released, with keys and values given: the query projection h Wq^T, then attention. Bytes as if fused."""
    inner, columns = heads * head_width, heads * tokens
    flops = 2 * batch * length * (width * inner + 2 * columns * head_width)
    return Work(flops, BYTES * (batch * length * (width + inner) + width * inner + 2 * batch * columns * head_width))


def kernel_of(size: Size) -> Work:
    """The fused kernel in all layers of a step: both halves of the guidance, each with its own motion tokens."""
    one = folded_kernel(2, size.tokens, size.model_width, size.heads, size.head_width, size.motion_tokens)
    return one.times(size.layers)


def released_of(size: Size) -> Work:
    """The adapter as released in all layers of a step."""
    one = released_adapter(2, size.tokens, size.model_width, size.heads, size.head_width, size.motion_tokens)
    return one.times(size.layers)


def counted_step(size: Size) -> dict[str, Work]:
    """The whole step "rewritten" and as it is "plain", counted on the export of exactly this size."""
    import torch

    from motionrt.benchmarks.models.full_step import cut

    partition = cut(size, torch.bfloat16)
    video = BYTES * size.frames * size.channels * size.height * size.width
    loop = 5 * video + BYTES * (6 + 1)  # latents, previous x0 and noise in, latents and x0 out; coefficients, guidance
    hoisted = sum(item.bytes for item in partition.hoisted)
    text = BYTES * (2 * size.text_tokens * size.text_width + size.motion_tokens * size.motion_width) + video
    step, whole = partition.classes["step"], partition.original
    return {
        "rewritten": Work(step.flops, step.weight_bytes + hoisted + loop),
        "plain": Work(whole.flops, whole.weight_bytes + text + loop),
    }


def step_of(size: Size) -> dict[str, Work]:
    """As `counted_step`, from exports with one and two layers: every further layer adds what the second one did."""
    one, two = (counted_step(replace(size, layers=layers)) for layers in (1, 2))
    return {name: _line(one[name], two[name], size.layers) for name in one}


def _line(one: Work, two: Work, layers: int) -> Work:
    more = layers - 1
    return Work(one.flops + more * (two.flops - one.flops), one.bytes + more * (two.bytes - one.bytes))


def table(works: Mapping[str, Work]) -> str:
    """The bounds in milliseconds as a Markdown table."""
    lines = [f"| ms at the least | {' | '.join(works)} |", "| --- |" + " ---: |" * len(works)]
    lines.append("| TFLOP | " + " | ".join(f"{work.flops / 1e12:.2f}" for work in works.values()) + " |")
    lines.append("| GB | " + " | ".join(f"{work.bytes / 1e9:.2f}" for work in works.values()) + " |")
    for gpu in GPUS:
        cells = []
        for work in works.values():
            milliseconds, held = work.bound(gpu)
            cells.append(f"{milliseconds:.2f} {held}")
        lines.append(f"| {gpu.name} ({gpu.arch}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Count, print the tables, append one row for each size and thing."""
    parser = argparse.ArgumentParser(description="Lower bounds of the motion kernel and of the step, by GPU.")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for rows")
    parser.add_argument("--sizes", nargs="+", default=["full", "full49"], help="names in full_step.SIZES")
    options = parser.parse_args(arguments)
    from motionrt.benchmarks.models.full_step import SIZES

    unknown = sorted(set(options.sizes) - set(SIZES))
    if unknown:
        parser.error(f"size {unknown[0]} is not one of {', '.join(SIZES)}")
    for name in options.sizes:
        size = SIZES[name]
        steps = step_of(size)
        works = {
            "motion, fused": kernel_of(size),
            "motion, as released": released_of(size),
            "step, rewritten": steps["rewritten"],
            "step, plain": steps["plain"],
        }
        print(f"\n{size.name}: B 2, L {size.tokens}, D {size.model_width}, N {size.heads}, {size.layers} layers, bf16\n")
        print(table(works))
        base = steps["plain"].flops - works["motion, as released"].flops  # the step of the model without motion
        share = {key: work.flops / base for key, work in works.items() if key.startswith("motion")}
        print("\non top of the base step's FLOPs: " + ", ".join(f"{key} {value:.2%}" for key, value in share.items()))
        for what, work in works.items():
            harness.append_row("roofline", row(size, what, work), folder=options.results)


def row(size: Size, what: str, work: Work) -> dict[str, Any]:
    """One row: the bounds of one thing on every GPU. Nothing in it was measured."""
    bounds = []
    for gpu in GPUS:
        milliseconds, held = work.bound(gpu)
        bounds.append({**vars(gpu), "bound_ms": milliseconds, "bound_by": held})
    return {
        "what": f"{size.name} {what}",
        "shape": {"B": 2, "L": size.tokens, "D": size.model_width, "N": size.heads, "M": size.motion_tokens},
        "dtype": "bfloat16",
        "flops": work.flops,
        "bytes": work.bytes,
        "bounds": bounds,
        "note": "static lower bound, not a measurement",
    }


if __name__ == "__main__":
    main()
