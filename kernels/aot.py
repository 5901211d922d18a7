"""Compile the motion-cross-attention kernel ahead of time, for GPUs that are not here.

    python kernels/aot.py                          # table: registers, shared memory, spills for every target
    python kernels/aot.py --out DIR --targets 80,90 --dtypes bf16 --shapes 3072x48x25x64

With --out, DIR/<name>.{ptx,cubin,json} are written: what an engine or a C++ host loads. Run by path, never as a module of the
root folder. Needs Triton and no GPU. Exit status 1 where a kernel spills registers or asks for more shared memory than its
target has. Source of the limits: tiles.SHARED_LIMIT.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from motionrt.kernels.launching import OPTIONS
from motionrt.kernels.motion_cross_attention_triton import constants, motion_cross_attention_kernel
from motionrt.kernels.tiles import LAYOUTS, SHARED_LIMIT, Tile, choose_tile

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# The oldest PTX that knows the target: a driver loads PTX no newer than itself (8.0: CUDA 12.0; 8.6: 12.7; 8.7: 12.8).
# Triton refuses or crashes below these; the cubin beside it needs no PTX at all.
PTX_VERSION = {80: 80, 86: 80, 89: 80, 90: 80, 100: 86, 120: 87}


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


@dataclass(frozen=True)
class Report:
    """One compiled kernel: bytes of shared memory per program, registers per thread, bytes spilled per thread."""

    name: str
    target: int
    registers: int
    shared: int
    spills: int
    warps: int
    ptx_version: str
    entry: str

    @property
    def faults(self) -> list[str]:
        """Why it must not be shipped; empty where it may."""
        limit = SHARED_LIMIT[self.target]
        faults = [f"{self.spills} bytes of registers spilled; allowed: 0"] if self.spills else []
        return faults + ([f"{self.shared} bytes of shared memory; sm_{self.target} has {limit}"] if self.shared > limit else [])


def compile_kernel(
    target: int, dtype: str, shape: Shape, *, layout: str | None = None, scale: str = "", ptx_version: int | None = None
) -> tuple[Tile, Any]:
    """(tile, compiled kernel of Triton) for compute capability `target` (89), `dtype` of `DTYPES`, and one shape.

    `layout`: padded, packed, or the rule's choice; `scale`: the dtype of that input, else `dtype`; `ptx_version`: the newest
    PTX that the drivers load, such as 80 (CUDA 12.0), else the oldest that knows the target. The tensors are contiguous and
    begin where an allocator puts them. ValueError for a target that has no tile, or PTX that is too old for it.
    """
    if target not in PTX_VERSION:
        raise ValueError(f"the kernel is asked for sm_{target}; allowed: {', '.join(f'sm_{known}' for known in PTX_VERSION)}.")
    version = PTX_VERSION[target] if ptx_version is None else ptx_version
    if version < PTX_VERSION[target]:  # said here: Triton would abort the process
        raise ValueError(f"ptx_version is {version}; sm_{target} needs {PTX_VERSION[target]} or newer (a newer driver).")
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
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    version = re.search(r"\.version (\S+)", ptx)
    registers, spills = _resources(cubin)
    shared, entry = int(compiled.metadata.shared), compiled.metadata.name
    return Report(name, target, registers, shared, spills, tile.warps, version[1] if version else "?", entry), ptx, cubin


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) per thread, as the cubin itself declares them; cuobjdump comes with Triton.

    These kernels have no arrays, so whatever is on the stack is a spilled register.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (used,) = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)
    return int(used[0]), int(used[1]) + int(used[2])


def write(folder: Path, report: Report, ptx: str, cubin: bytes) -> None:
    """PTX, cubin and facts, each written beside its place and renamed into it."""
    facts = json.dumps({**dataclasses.asdict(report), "triton": triton.__version__}, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in (("ptx", ptx.encode()), ("cubin", cubin), ("json", facts.encode())):
        partial = folder / f"{report.name}.{suffix}.partial"
        partial.write_bytes(content)
        os.replace(partial, folder / f"{report.name}.{suffix}")


def shape_of(text: str) -> Shape:
    """The shape of DxNxMxd, with the residual where N*d = D."""
    inner, heads, tokens, width = (int(number) for number in text.split("x"))
    return Shape(inner, heads, tokens, width, residual=inner == heads * width)


def main(arguments: list[str] | None = None) -> int:
    """Compile, print one line each, write where asked; 1 where one may not be shipped."""
    parser = argparse.ArgumentParser(description="Compile the kernels for GPUs that are not here.")
    parser.add_argument("--targets", default=",".join(map(str, SHARED_LIMIT)), help="compute capabilities: 80,90")
    parser.add_argument("--dtypes", default="bf16", help="of " + ", ".join(DTYPES))
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="of " + ", ".join(LAYOUTS))
    released = ",".join(f"{s.inner}x{s.heads}x{s.tokens}x{s.width}" for s in SHAPES)
    parser.add_argument("--shapes", default=released, help="DxNxMxd, by default the released models'")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parser.add_argument("--out", type=Path, help="folder for PTX, cubin and facts")
    options = parser.parse_args(arguments)
    shapes = [shape_of(text) for text in options.shapes.split(",")]
    targets = [int(text) for text in options.targets.split(",")]
    for name, got, allowed in (
        ("--targets", targets, SHARED_LIMIT),
        ("--dtypes", options.dtypes.split(","), DTYPES),
        ("--layouts", options.layouts.split(","), LAYOUTS),
    ):
        if unknown := set(got) - set(allowed):
            parser.error(f"{name} has {', '.join(map(str, unknown))}; allowed: {', '.join(map(str, allowed))}")
    failed = False
    for target, dtype, shape, layout in product(targets, options.dtypes.split(","), shapes, options.layouts.split(",")):
        report, ptx, cubin = compile_one(target, dtype, shape, layout)
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
