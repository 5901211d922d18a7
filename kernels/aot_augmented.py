"""Motion-augmented attention's kernel ahead of time; aot.py is the command. Needs Triton and no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from motionrt.kernels.artefacts import DTYPES, Report, ptx_for, reported
from motionrt.kernels.launching import OPTIONS
from motionrt.kernels.motion_augmented_attention_triton import constants, motion_augmented_attention_kernel
from motionrt.kernels.tiles import Strip, choose_strip


@dataclass(frozen=True)
class Shape:
    """What the kernel is compiled for: N heads of width d, F frames, levels of the table's tree."""

    heads: int
    width: int
    frames: int
    levels: int
    crossed: bool = False

    @classmethod
    def of(cls, text: str) -> Shape:
        """The shape of NxdxFxL."""
        heads, width, frames, levels = (int(number) for number in text.split("x"))
        return cls(heads, width, frames, levels)

    def __str__(self) -> str:
        return f"{self.heads}x{self.width}x{self.frames}x{self.levels}"


# Motion-I2V at 320 x 512: levels of 40 x 64, 20 x 32, 10 x 16 and 5 x 8 places
SHAPES = (Shape(8, 40, 16, 6), Shape(8, 80, 16, 5), Shape(8, 160, 16, 4), Shape(8, 160, 16, 3))


def compile_kernel(target: int, dtype: str, shape: Shape, *, ptx_version: int | None = None) -> tuple[Strip, Any]:
    """(strip, compiled kernel of Triton) for compute capability `target` (89), `dtype` of `DTYPES`, and one shape.

    Tensors are contiguous and begin where an allocator puts them, weights are fp32, whole numbers int64; `ptx_version` as
    `aot.compile_kernel`. ValueError for a target that has no tile, or PTX that is too old for it.
    """
    version = ptx_for(target, ptx_version)
    kernel, kind = motion_augmented_attention_kernel, DTYPES[dtype]
    strip = choose_strip(target, kind, shape.frames, shape.width)
    fixed = constants(strip, shape.frames, shape.width, shape.levels, kind, shape.crossed)

    def type_of(name: str) -> str:
        if name in fixed:
            return "constexpr"
        if not name.startswith("p_"):
            return "fp32" if name == "scale" else "i32"
        whole = name in ("p_sources", "p_beyond") or name.startswith("p_sums")
        return "*i64" if whole else "*fp32" if name == "p_weights" else f"*{dtype}"

    # A load of several numbers at once needs to know what is a multiple of 16: pointers, and strides as far as the sizes are.
    row = shape.heads * shape.width
    sizes = {name: row for name in kernel.arg_names if name.startswith("s_")}
    sizes |= {name: 16 for name in kernel.arg_names if name.startswith("p_")}
    source = ASTSource(
        fn=kernel,
        signature={name: type_of(name) for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in fixed.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name, size in sizes.items() if size % 16 == 0},
    )
    options = {**OPTIONS, "num_warps": strip.warps, "num_stages": strip.stages, "ptx_version": version}
    return strip, triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def compile_one(target: int, dtype: str, shape: Shape) -> tuple[Report, str, bytes]:
    """(report, PTX, cubin) for one target, such as 90, and one shape."""
    strip, compiled = compile_kernel(target, dtype, shape)
    name = f"motion_augmented_attention_{'crossed' if shape.crossed else 'own'}_{dtype}"
    name += f"_N{shape.heads}_d{shape.width}_F{shape.frames}_L{shape.levels}_sm{target}"
    return reported(name, target, strip.warps, compiled)
