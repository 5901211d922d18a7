"""The motion-cross-attention kernel inside an engine of full TensorRT: a plugin that is nothing but our PTX.

    register(90)              # once, on the machine that builds; 90 is the GPU's compute capability
    use_plugin(model)         # nodes of our domain become the plugin's

`tensorrt.plugin` asks for three functions: what comes out of what goes in, which types it takes, and (`aot_impl`) the kernel
ahead of time: entry name, PTX, launch parameters, extra scalars. The engine keeps the PTX, so that running it needs neither
Triton nor Python. TensorRT-RTX has no such plugins: `available` says so, and a build takes the operation's standard body.

TensorRT passes a kernel its inputs, then the extra scalars, then its outputs, and nothing else: the kernel has that order,
and `strip_scratch` removes the two pointers that Triton adds at the end for memory which this kernel does not use.
It takes A as [B or 1, N*M, D], D contiguous; `use_plugin` puts the transpose before it.

Not tried on a GPU: whether TensorRT allows the kernel more than 48 KiB of shared memory per program, as its tiles for sm_80
and sm_90 at the released sizes ask for. Where it does not, the operation's body is the way.

Source: NVIDIA TensorRT documentation, "tensorrt.plugin" (register, autotune, aot_impl), versions 10.8 to 11.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DOMAIN = "motionrt"
NAMES = ("motion_cross_attention", "motion_cross_attention_residual")
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")  # those of artefacts.PTX_VERSION, without its imports
# The names of tensorrt.DataType, and those of Triton
TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}
# hidden, A, V and out have one type; scale has its own, which is read as fp32
COMBINATIONS = ", ".join(["FP32|FP16|BF16"] * 3 + ["FP32*FP16*BF16", "FP32|FP16|BF16"])
SCALARS = (
    "length", "inner", "heads", "groups", "s_hidden_b", "s_hidden_l", "s_folded_b", "s_folded_c", "s_values_b", "s_values_n",
    "s_values_m", "s_out_b", "s_out_l",
)  # fmt: skip


def available(flavor: str, targets: Sequence[str] = ()) -> str | None:
    """Why an engine of `flavor` ("tensorrt" or "rtx") for `targets` ("sm_90") cannot hold the kernel, or None if it can."""
    if flavor != "tensorrt":
        return "TensorRT-RTX has no plugins that Python can register, and its parser aborts at an unknown domain"
    if unknown := [target for target in targets if target not in TARGETS]:
        return f"it has no tiles for {', '.join(unknown)}, only for {', '.join(TARGETS)}"
    for package, why in (("triton", "Triton compiles the kernel"), ("torch", "the kernel's rules are written with PyTorch")):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed, and {why}"
    if importlib.util.find_spec("tensorrt") is None:
        return "TensorRT is not installed: `pip install motionrt[tensorrt]`"
    try:
        plugin = importlib.import_module("tensorrt.plugin")
    except Exception as error:  # an old TensorRT, or its libraries are missing
        return f"tensorrt.plugin cannot be loaded ({(str(error).splitlines() or [''])[0][:200]})"
    if not hasattr(plugin, "aot_impl"):
        version = getattr(importlib.import_module("tensorrt"), "__version__", "of this machine")
        return f"TensorRT {version} has no plugins ahead of time; use 10.8 or newer"
    return None


@dataclass(frozen=True)
class Compiled:
    """A kernel for TensorRT: `entry` of `ptx`; a program has `warps` warps, `shared` bytes, `rows` rows of `heads` heads."""

    entry: str
    ptx: str
    warps: int
    shared: int
    rows: int
    heads: int


def compile_kernel(
    target: int, hidden: str, scale: str, shape: Sequence[int], residual: bool, ptx_version: int | None = None
) -> Compiled:
    """The kernel for compute capability `target` (89), types "fp16", "bf16" or "fp32" and shape (D, N, M, d).

    `ptx_version`: the newest PTX that the drivers load which will run the engine, such as 80 (CUDA 12.0); None: the oldest
    that knows the target. ValueError for a target that the kernel has no tile for, or PTX that is too old for it.
    """
    from motionrt.kernels import aot, artefacts

    inner, heads, tokens, width = shape
    sizes = aot.Shape(inner, heads, tokens, width, residual)
    tile, made = aot.compile_kernel(target, hidden, sizes, scale=scale, ptx_version=ptx_version)
    if getattr(made.metadata, "global_scratch_size", 0):
        raise ValueError("this kernel asks for scratch memory, which a TensorRT plugin cannot give it.")
    ptx = strip_scratch(made.asm["ptx"], made.metadata.name, 4 + len(SCALARS) + 1)
    found = re.search(r"\.version (\d+)\.(\d+)", ptx)
    newest = artefacts.PTX_VERSION[target] if ptx_version is None else ptx_version
    if found is None or int(found[1]) * 10 + int(found[2]) > newest:
        raise ValueError(f"the kernel became PTX {found and found[0]}; allowed is at most {newest // 10}.{newest % 10}.")
    return Compiled(made.metadata.name, ptx, tile.warps, int(made.metadata.shared), tile.rows, tile.heads)


def strip_scratch(ptx: str, entry: str, count: int) -> str:
    """`ptx` with the first `count` parameters of `entry` only; ValueError if one of the others is read, or there are fewer."""
    head = re.search(rf"\.entry {re.escape(entry)}\((.*?)\)", ptx, re.DOTALL)
    if head is None:
        raise ValueError(f"the PTX has no entry {entry}.")
    parameters = [line for line in head[1].split(",") if line.strip()]
    names = [line.split()[-1] for line in parameters]
    rest = ptx[head.end() :]
    read = [name for name in names[count:] if re.search(rf"{re.escape(name)}\b", rest)]
    if len(names) < count or read:
        raise ValueError(
            f"the kernel {entry} has {len(names)} parameters and reads {', '.join(read) or 'no other'}; not {count}."
        )
    return ptx[: head.start(1)] + ",".join(parameters[:count]) + "\n" + ptx[head.end(1) :]


def register(target: int, *, ptx_version: int | None = None, plugin: Any = None) -> None:
    """Register both plugins with TensorRT in this process, for GPUs of `target`. `plugin`: `tensorrt.plugin`, or a test's.

    Call it once, before the parser sees the graph: TensorRT refuses a second plugin of the same name.
    """
    if plugin is None:
        plugin = importlib.import_module("tensorrt.plugin")
    for residual, name in enumerate(NAMES):
        _register(plugin, f"{DOMAIN}::{name}", bool(residual), target, ptx_version)


def _register(plugin: Any, identifier: str, residual: bool, target: int, ptx_version: int | None) -> None:
    def describe(hidden, folded, values, scale):  # type: ignore[no-untyped-def]  # annotated below, with TensorRT's classes
        out = hidden.like()
        out.shape_expr[2] = values.shape_expr[1] * values.shape_expr[3]
        return out

    def autotune(hidden, folded, values, scale, outputs):  # type: ignore[no-untyped-def]
        return [plugin.AutoTuneCombination(COMBINATIONS)]

    def aot(hidden, folded, values, scale, outputs, tactic):  # type: ignore[no-untyped-def]
        sizes = {
            "D": hidden.shape_expr[2], "N": values.shape_expr[1], "M": values.shape_expr[2], "d": values.shape_expr[3],
        }  # fmt: skip
        for size, expression in sizes.items():
            if not expression.is_constant:
                raise ValueError(f"{identifier}: {size} must be the same in every profile of an engine; it is not.")
        shape = [int(expression.constant_value()) for expression in sizes.values()]
        kernel = compile_kernel(target, TYPES[hidden.dtype.name], TYPES[scale.dtype.name], shape, residual, ptx_version)
        launch = plugin.KernelLaunchParams()
        groups = -(-shape[1] // kernel.heads)
        launch.grid_x = plugin.cdiv(hidden.shape_expr[1], kernel.rows) * groups
        launch.grid_y = hidden.shape_expr[0]
        launch.block_x = kernel.warps * 32
        launch.shared_mem = kernel.shared
        scalars = scalar_arguments(shape, groups, hidden.shape_expr[1], _is_one(folded), _is_one(values))
        extra = plugin.SymIntExprs(len(SCALARS))
        for index, name in enumerate(SCALARS):
            extra[index] = plugin.SymInt32(scalars[name])
        return kernel.entry, kernel.ptx, launch, extra

    # TensorRT reads the annotations themselves: text, as this file's would be, is refused
    tensors = dict.fromkeys(("hidden", "folded", "values", "scale"), plugin.TensorDesc)
    describe.__annotations__ = {**tensors, "return": plugin.TensorDesc}
    autotune.__annotations__ = {"return": list[plugin.AutoTuneCombination]}
    aot.__annotations__ = {"return": tuple[str, str, plugin.KernelLaunchParams, plugin.SymExprs]}
    plugin.register(identifier)(describe)
    plugin.autotune(identifier)(autotune)
    plugin.aot_impl(identifier)(aot)


def _is_one(tensor: Any) -> bool:
    """Whether all of a batch read the same one."""
    batch = tensor.shape_expr[0]
    return bool(batch.is_constant) and int(batch.constant_value()) == 1


def scalar_arguments(shape: Sequence[int], groups: int, length: Any, one_folded: bool, one_values: bool) -> Mapping[str, Any]:
    """The values of `SCALARS` for contiguous tensors; `length`, L, may be a symbol of TensorRT's."""
    inner, heads, tokens, width = shape
    return {
        "length": length, "inner": inner, "heads": heads, "groups": groups,
        "s_hidden_b": length * inner, "s_hidden_l": inner,
        "s_folded_b": 0 if one_folded else heads * tokens * inner, "s_folded_c": inner,
        "s_values_b": 0 if one_values else heads * tokens * width, "s_values_n": tokens * width, "s_values_m": width,
        "s_out_b": length * (heads * width), "s_out_l": heads * width,
    }  # fmt: skip


def use_plugin(model: Any) -> int:
    """Make the nodes of our domain in `model` (an `onnx_ir.Model`) the plugin's, in place; how many there were.

    A is transposed before each node (once where several share it); the functions that would have been their bodies go.
    """
    import onnx_ir as ir

    turned: dict[Any, Any] = {}
    found = 0
    for node in list(model.graph):
        if node.domain != DOMAIN or node.op_type not in NAMES:
            continue
        folded = node.inputs[1]
        if folded not in turned:
            transpose = ir.node("Transpose", [folded], {"perm": [0, 2, 1]}, name=f"{folded.name}.rows")
            (rows,) = transpose.outputs
            rows.name, rows.type = transpose.name, folded.type
            if folded.shape is not None:
                rows.shape = ir.Shape([folded.shape[0], folded.shape[2], folded.shape[1]])
            model.graph.insert_before(node, transpose)
            turned[folded] = transpose.outputs[0]
        node.replace_input_with(1, turned[folded])
        node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", DOMAIN)
        node.attributes["plugin_version"] = ir.AttrString("plugin_version", "1")
        found += 1
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    return found
