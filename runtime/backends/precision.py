"""Where a graph that is typed in float32 may compute in float16 or bfloat16, and where it must not: the islands, declared once.

ONNX graphs (engines, ONNX Runtime on a GPU: export/engines/precision.py) and torch programs (torch_precision.py) are
converted by the same rules. Every floating-point value gets one of two precisions, and a cast stands wherever they meet:

- heavy ops (matrix products, convolutions, attention) read and write the low precision; tensor cores and ONNX Runtime alike
  accumulate them in float32, a fused attention keeps its softmax there, and the motion-cross-attention its scores too;
- norms, softmax, reductions, sines and exponentials, rotations, sampling by coordinates and comparisons are float32 (`FULL`);
- what only feeds the graph's outputs after the last heavy op is float32: guidance, the solver's update, an energy;
- a pointwise or moving op whose operands are all float32 stays there (timesteps, modulation right after a norm, positions);
- weights whose results leave the range of float16 are named by the graph (`GraphSpec.wide`: T5's second feed-forward
  projection, the encoder of SVD's VAE): where float16 is asked for, their op is float32, and so is what is computed from its
  result up to the next heavy op, the residual stream of T5 among it;
- everything else is low, other residual streams among it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

# By the names of ONNX, then of ATen and of our own op, in which a plugin or kernel computes.
HEAVY = frozenset({
    "MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "Einsum", "motion_cross_attention_residual",
    "mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "einsum", "convolution", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention", "motion_cross_attention",
    "motion_augmented_attention",  # of a torch program; in ONNX its body is inlined before precisions are chosen
})  # fmt: skip
FULL = frozenset({
    "LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization",
    "LpNormalization", "Softmax", "LogSoftmax", "Softplus", "Sin", "Cos", "Exp", "Log", "Pow", "Sqrt", "Reciprocal",
    "CumSum", "ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "ReduceProd",
    "GridSample", "RotaryEmbedding", "Range", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf",
    "ArgMax", "ArgMin",
    "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "native_group_norm", "instance_norm", "batch_norm",
    "softmax", "_softmax", "log_softmax", "softplus", "sin", "cos", "exp", "log", "pow", "sqrt", "rsqrt", "reciprocal",
    "cumsum", "sum", "mean", "var", "var_mean", "std", "prod", "amax", "amin", "norm", "linalg_vector_norm", "logsumexp",
    "grid_sampler", "grid_sampler_2d", "arange", "linspace", "eq", "gt", "ge", "lt", "le", "isnan", "isinf", "argmax", "argmin",
})  # fmt: skip
SAMPLING = frozenset({"GridSample", "grid_sampler", "grid_sampler_2d"})
TABLES = frozenset({"Gather", "embedding", "index_select"})


@dataclass(frozen=True)
class Op:
    """One node: floating-point values that it `reads` and `writes`, constants aside; the names of constants (`weights`) that it
    reads as numbers. `widens`: a cast from integers, which is float32 whatever else is."""

    name: str
    reads: tuple[Hashable, ...]
    writes: tuple[Hashable, ...]
    weights: tuple[str, ...] = ()
    widens: bool = False


def low_ops(ops: Sequence[Op], outputs: Sequence[Hashable], wide: Sequence[str] = ()) -> list[bool]:
    """For each of `ops`, in an order in which a graph can run, whether it computes in the low precision.

    `outputs`: the values that the graph gives. `wide`: patterns (`fnmatch`) of weights whose results overflow the low
    precision; empty where it has float32's range (bfloat16). Values that no op writes, the graph's inputs, are float32.
    """
    late = _late(ops, set(outputs))
    low: set[Hashable] = set()
    spread: set[Hashable] = set()  # values that come of a wide weight
    chosen = []
    for number, op in enumerate(ops):
        touched = any(value in spread for value in op.reads)
        if op.widens:
            here = False
        elif op.name in HEAVY:
            named = any(fnmatch.fnmatchcase(name, pattern) for name in op.weights for pattern in wide)
            touched = named or (not op.weights and bool(op.reads) and all(value in spread for value in op.reads))
            here = not touched
        elif op.name in FULL or number in late or touched:
            here = False
        else:
            table = not op.reads and op.name in TABLES and bool(op.weights)  # of embeddings: half the bytes
            here = table or any(value in low for value in op.reads)
        chosen.append(here)
        if here:
            low.update(op.writes)
        if touched:
            spread.update(op.writes)
    return chosen


def _late(ops: Sequence[Op], outputs: set[Hashable]) -> set[int]:
    """Ops after the last heavy one on every way to the outputs: all that reads them is such an op, or the caller."""
    readers: dict[Hashable, list[int]] = {}
    for number, op in enumerate(ops):
        for value in op.reads:
            readers.setdefault(value, []).append(number)
    late: set[int] = set()
    for number in reversed(range(len(ops))):
        op = ops[number]
        if op.name in HEAVY or op.name in FULL - SAMPLING:
            continue
        reading = [reader for value in op.writes for reader in readers.get(value, ())]
        ends = any(value in outputs for value in op.writes)
        if (reading or ends) and all(reader in late or ops[reader].name in SAMPLING for reader in reading):
            late.add(number)
    return late
