"""Compile the kernels ahead of time, for GPUs that are not here.

    python kernels/aot.py                          # table: registers, shared memory, spills for every target
    python kernels/aot.py --out DIR --targets 80,90 --dtypes bf16 --shapes 3072x48x25x64
    python kernels/aot.py --kernel motion_augmented_attention --shapes 8x40x16x6

With --out, DIR/<name>.{ptx,cubin,json} are written: what an engine or a C++ host loads. Run by path, never as a module of the
root folder. Needs Triton and no GPU. Exit status 1 where a kernel spills registers or asks for more shared memory than its
target has. Source of the limits: tiles.SHARED_LIMIT.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from motionrt.kernels import aot_augmented
from motionrt.kernels.artefacts import DTYPES, Report, ptx_for, reported, write
from motionrt.kernels.launching import OPTIONS
from motionrt.kernels.motion_cross_attention_triton import constants, motion_cross_attention_kernel
from motionrt.kernels.tiles import LAYOUTS, SHARED_LIMIT, Tile, choose_tile

KERNELS = ("motion_cross_attention", "motion_augmented_attention")


@dataclass(frozen=True)
class Shape:
    """What the kernel is compiled for: D, N heads, M tokens, head width d, and whether h is added."""

    inner: int
    heads: int
    tokens: int
    width: int
    residual: bool = True


RELEASED = Shape(3072, 48, 25, 64)  # CogVideoX-5B; DynamiCrafter's three widths follow
SHAPES = (RELEASED, Shape(320, 5, 25, 64), Shape(640, 10, 25, 64), Shape(1280, 20, 25, 64))


def compile_kernel(
    target: int, dtype: str, shape: Shape, *, layout: str | None = None, scale: str = "", ptx_version: int | None = None
) -> tuple[Tile, Any]:
    """(tile, compiled kernel of Triton) for compute capability `target` (89), `dtype` of `DTYPES`, and one shape.

    `layout`: padded, packed, or the rule's choice; `scale`: the dtype of that input, else `dtype`; `ptx_version`: the newest
    PTX that the drivers load, such as 80 (CUDA 12.0), else the oldest that knows the target. The tensors are contiguous and
    begin where an allocator puts them. ValueError for a target that has no tile, or PTX that is too old for it.
    """
    version = ptx_for(target, ptx_version)
    kernel, kind = motion_cross_attention_kernel, DTYPES[dtype]
    tile = choose_tile(target, kind, shape.inner, shape.heads, shape.tokens, shape.width, layout)
    fixed = constants(tile, shape.tokens, shape.width, shape.inner, kind, shape.residual)

    def type_of(name: str) -> str:
        if name in fixed:
            return "constexpr"
        return f"*{scale or dtype}" if name == "p_scale" else f"*{dtype}" if name.startswith("p_") else "i32"

    # A load of several numbers at once needs to know what is a multiple of 16: pointers, and strides as far as the sizes are.
    sizes = dict.fromkeys(("inner", "s_hidden_l", "s_hidden_b", "s_folded_c", "s_folded_b"), shape.inner)
    sizes |= dict.fromkeys(("s_values_m", "s_values_n", "s_values_b"), shape.width)
    sizes |= dict.fromkeys(("s_out_l", "s_out_b"), shape.heads * shape.width)
    sizes |= {name: 16 for name in kernel.arg_names if name.startswith("p_") and name != "p_scale"}
    source = ASTSource(
        fn=kernel,
        signature={name: type_of(name) for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in fixed.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name, size in sizes.items() if size % 16 == 0},
    )
    options = {**OPTIONS, "num_warps": tile.warps, "num_stages": tile.stages, "ptx_version": version}
    return tile, triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def compile_one(target: int, dtype: str, shape: Shape, layout: str | None = None) -> tuple[Report, str, bytes]:
    """(report, PTX, cubin) for one target, such as 90, and one shape; `layout` padded, packed, or the rule's choice."""
    tile, compiled = compile_kernel(target, dtype, shape, layout=layout)
    name = f"motion_cross_attention_{'packed' if tile.packed else 'padded'}_{dtype}"
    name += f"_D{shape.inner}_N{shape.heads}_M{shape.tokens}_d{shape.width}_sm{target}"
    return reported(name, target, tile.warps, compiled)


def shape_of(text: str) -> Shape:
    """The shape of DxNxMxd, with the residual where N*d = D."""
    inner, heads, tokens, width = (int(number) for number in text.split("x"))
    return Shape(inner, heads, tokens, width, residual=inner == heads * width)


def main(arguments: list[str] | None = None) -> int:
    """Compile, print one line each, write where asked; 1 where one may not be shipped."""
    parser = argparse.ArgumentParser(description="Compile the kernels for GPUs that are not here.")
    parser.add_argument("--targets", default=",".join(map(str, SHARED_LIMIT)), help="compute capabilities: 80,90")
    parser.add_argument("--dtypes", default="bf16", help="of " + ", ".join(DTYPES))
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="of the cross attention: " + ", ".join(LAYOUTS))
    parser.add_argument("--kernel", default=KERNELS[0], choices=KERNELS)
    parser.add_argument("--shapes", help="DxNxMxd or, of the augmented attention, NxdxFxL; by default the released models'")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parser.add_argument("--out", type=Path, help="folder for PTX, cubin and facts")
    options = parser.parse_args(arguments)
    targets = [int(text) for text in options.targets.split(",")]
    for name, got, allowed in (
        ("--targets", targets, SHARED_LIMIT),
        ("--dtypes", options.dtypes.split(","), DTYPES),
        ("--layouts", options.layouts.split(","), LAYOUTS),
    ):
        if unknown := set(got) - set(allowed):
            parser.error(f"{name} has {', '.join(map(str, unknown))}; allowed: {', '.join(map(str, allowed))}")
    texts, dtypes, failed = options.shapes and options.shapes.split(","), options.dtypes.split(","), False
    makes: Iterator[Callable[[], tuple[Report, str, bytes]]]
    if options.kernel == KERNELS[0]:
        crossing = product(targets, dtypes, [shape_of(text) for text in texts] if texts else SHAPES, options.layouts.split(","))
        makes = (functools.partial(compile_one, *one) for one in crossing)
    else:
        shapes = [aot_augmented.Shape.of(text) for text in texts] if texts else aot_augmented.SHAPES
        makes = (functools.partial(aot_augmented.compile_one, *one) for one in product(targets, dtypes, shapes))
    for make in makes:
        report, ptx, cubin = make()
        failed |= bool(report.faults)
        if options.out is not None and not report.faults:
            write(options.out, report, ptx, cubin)
        facts = dataclasses.asdict(report)
        line = "{name}: {registers} registers, {shared} B shared, {spills} B spilled, PTX {ptx_version}"
        print(json.dumps(facts) if options.json else line.format(**facts), flush=True)
        for fault in report.faults:
            print(f"{report.name}: {fault}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
