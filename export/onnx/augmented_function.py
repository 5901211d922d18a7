"""Motion-augmented attention as a function of standard ops: what its node in ONNX means to whoever has no kernel for it."""

from __future__ import annotations

import re
from typing import Any

import onnx
from onnx import helper

NAME = "motion_augmented_attention"
DOMAIN = "motionrt"
END = 2**31 - 1


def augmented_name(levels: int, crossed: bool) -> str:
    """The node's name: `levels` of chunks, and whether branches are given each other's frame 0 in even frames."""
    return f"{NAME}_{levels}{'_crossed' if crossed else ''}"


def augmented_function(name: str, opset: int) -> onnx.FunctionProto | None:
    """The function of a node called `name`, None for other names; shapes as in kernels/motion_augmented_attention.py.

    Keys and values of frame 0 stand side by side, and both branches of a request: every row of the table is read once. All of
    it is computed in fp32, and the attention on [B P, N, F, d], so that a builder finds it.
    """
    found = re.fullmatch(rf"{NAME}_([1-9])(_crossed)?", name)
    if found is None:
        return None
    levels, crossed, body = int(found[1]), found[2] is not None, list[onnx.NodeProto]()

    def node(op: str, inputs: str, outputs: str, **attributes: Any) -> None:
        body.append(helper.make_node(op, inputs.split(), outputs.split(), **attributes))

    def constant(name: str, *values: int) -> None:
        node("Constant", "", name, value_ints=list(values))

    for value, start in (("places", 1), ("frames", 2), ("width", 4)):
        node("Shape", "query", value, start=start, end=start + 1)
    node("Shape", "query", "heads_width", start=3, end=5)
    for name_of, number in (("minus", -1), ("zero", 0), ("one", 1), ("two", 2), ("end", END)):
        constant(name_of, number)
    node("Sub", "frames one", "others")
    node("Shape", "beyond", "targets")
    node("Mul", "places others", "targets_of_one")
    node("Div", "targets targets_of_one", "requests")
    node("ReduceProd", "heads_width", "inner", keepdims=1)
    node("Mul", "inner two", "both")

    # Frame 0 of all branches, a row a place
    for rows in ("keys", "values"):
        node("Slice", f"{rows} zero one two", f"first_{rows}")
    node("Concat", "first_keys first_values", "first", axis=2)
    node("Concat", "requests minus places both", "by_request", axis=0)
    node("Reshape", "first by_request", "branched")
    node("Transpose", "branched", "beside", perm=[0, 2, 1, 3])
    node("Mul", "requests places", "rows_of_all")
    node("Concat", "rows_of_all minus", "flat", axis=0)
    node("Reshape", "beside flat", "source_rows")

    # Summed by slots, then up the tree
    node("Gather", "source_rows sources", "slots", axis=0)
    node("Cast", "slots", "slots32", to=onnx.TensorProto.FLOAT)
    node("Cast", "weights", "weights32", to=onnx.TensorProto.FLOAT)
    node("Unsqueeze", "weights32 one", "weights_row")
    node("MatMul", "weights_row slots32", "sums_row")
    node("Squeeze", "sums_row one", "all_sums")
    node("Slice", "all_sums zero targets zero", "own")
    node("Slice", "all_sums targets end zero", "chunks_1")
    for level in range(2, levels + 1):
        node("Gather", f"chunks_{level - 1} sums_{level}", f"slots_{level}", axis=0)
        node("ReduceSum", f"slots_{level} one", f"chunks_{level}", keepdims=0)
    node("Concat", " ".join(f"chunks_{level}" for level in range(1, levels + 1)), "chunks", axis=0)
    node("Gather", "chunks beyond", "more", axis=0)
    node("Add", "own more", "moved_rows")
    node("Concat", "requests places others minus both", "by_branch", axis=0)
    node("Reshape", "moved_rows by_branch", "moved_own" if crossed else "moved")
    if crossed:
        constant("three", 3)
        constant("before", -END)
        node("Slice", "moved_own minus before three minus", "moved_other")
        node("Squeeze", "others", "count")
        for scalar, number in (("scalar_1", 1), ("scalar_2", 2)):
            node("Constant", "", scalar, value_int=number)
        node("Add", "count scalar_1", "stop")
        node("Range", "scalar_1 stop scalar_1", "numbers")
        node("Mod", "numbers scalar_2", "odd")
        node("Cast", "odd", "is_odd", to=onnx.TensorProto.BOOL)
        constant("behind", 1, 2)
        node("Unsqueeze", "is_odd behind", "mask")
        node("Where", "mask moved_own moved_other", "moved")
    node("Transpose", "moved", "moved_by_row", perm=[0, 3, 1, 2, 4])
    node("Split", "moved_by_row", "moved_keys moved_values", axis=-1, num_outputs=2)

    # [B P, N, F or 2 F - 1, d]
    node("Concat", "minus frames heads_width", "as_own", axis=0)
    node("Concat", "minus others heads_width", "as_moved", axis=0)
    for rows in ("query", "keys", "values"):
        node("Cast", rows, f"{rows}32", to=onnx.TensorProto.FLOAT)
        node("Cast", f"at_{rows}", f"at_{rows}32", to=onnx.TensorProto.FLOAT)
        node("Reshape", f"{rows}32 as_own", f"own_{rows}")
        if rows != "query":
            node("Reshape", f"moved_{rows} as_moved", f"arrived_{rows}")
            node("Concat", f"own_{rows} arrived_{rows}", f"every_{rows}", axis=1)
        node("Add", f"{'own' if rows == 'query' else 'every'}_{rows} at_{rows}32", f"placed_{rows}")
        node("Transpose", f"placed_{rows}", f"by_head_{rows}", perm=[0, 2, 3, 1] if rows == "keys" else [0, 2, 1, 3])
    node("Cast", "width", "width32", to=onnx.TensorProto.FLOAT)
    node("Sqrt", "width32", "root")
    node("Div", "by_head_query root", "scaled")
    node("MatMul", "scaled by_head_keys", "scores")
    node("Softmax", "scores", "shares", axis=-1)
    node("MatMul", "shares by_head_values", "found")
    node("Transpose", "found", "rows", perm=[0, 2, 1, 3])
    node("Shape", "query", "like_query")
    node("Reshape", "rows like_query", "out32")
    node("CastLike", "out32 query", "out")
    sums = [f"sums_{level}" for level in range(2, levels + 1)]
    inputs = ["query", "keys", "values", "at_query", "at_keys", "at_values", "sources", "weights", *sums, "beyond"]
    return helper.make_function(DOMAIN, name, inputs, ["out"], body, [helper.make_opsetid("", opset)])
