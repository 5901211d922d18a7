"""MotionClone's guided step at its published size, counted from its traced graph: FLOPs by part, bytes that live at once.

    .venv-dev/bin/python benchmarks/guided/guided_full.py         # half a minute; one row, no weight is ever allocated

Bytes are those of `live_bytes`, in the order of the trace and with nothing fused, in float16 with the float32 islands of
runtime/backends/precision.py. `kept` is what attention's probabilities would add if they were kept from the forward pass for
the backward one, as PyTorch does where it has no fused attention; the graph computes them again, in parts.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch.fx import Graph, Node

from motionrt.benchmarks import harness
from motionrt.benchmarks.models.sparse_models import ANIMATEDIFF
from motionrt.export.compiler.classify import flops
from motionrt.export.compiler.gradients import differentiated
from motionrt.export.compiler.graph_edit import value
from motionrt.export.compiler.liveness import live_bytes
from motionrt.export.compiler.weightless import faked, meta
from motionrt.export.systems.motionclone.step import GUIDED, GuidedStep
from motionrt.export.systems.motionclone.unet import TappedUNet, motion_unet
from motionrt.runtime.backends.precision import Op, low_ops

aten = torch.ops.aten
FRAMES, SIZE, TOKENS = 16, 64, 77
ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Counted:
    """FLOPs of the conditioned first half, its gradient, the unconditioned first half, and the second half of both; bytes of
    weights, of what lives at once, and of the probabilities that are not kept; nodes; seconds of the trace."""

    head: int
    gradient: int
    other: int
    tail: int
    weights: int
    live: int
    kept: int
    nodes: int
    seconds: float

    @property
    def total(self) -> int:
        """FLOPs of the step."""
        return self.head + self.gradient + self.other + self.tail


def counted(frames: int = FRAMES, size: int = SIZE) -> Counted:
    """The step at latents of `frames` x `size` x `size`."""
    with meta():
        unet = TappedUNet(motion_unet(ANIMATEDIFF))
        step = GuidedStep(unet).eval()
    config, one, start = unet.unet.config, (1,), perf_counter()
    factor = 2 ** (len(config["block_out_channels"]) - 1 - unet.block)
    motion = (1, unet.layers, (size // factor) ** 2, config["motion_num_attention_heads"], frames, frames)
    text = (1, TOKENS, config["cross_attention_dim"])
    shapes = {"latents": (1, frames, 4, size, size), "coefficients": (1, 7), "text": text, "negative_text": text}
    shapes |= {"motion_weights": motion, "motion_targets": motion}
    with faked(step):
        module = differentiated(step, tuple(torch.empty(shapes.get(name, one)) for name in GUIDED))
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    place = {node: number for number, node in enumerate(nodes)}

    def first(target: object, weight: str = "", which: int = 0) -> int:
        reads = [n for n in nodes if n.target == target and any(str(a.target).endswith(weight) for a in n.all_input_nodes)]
        return place[reads[which]]

    convolution = aten.convolution.default
    behind = f"unet.up_blocks.{unet.block + 1}.resnets.0.conv1.weight"
    marks = [0, first(aten.full_like.default), first(convolution, "unet.conv_in.weight", -1), first(convolution, behind)]
    head, gradient, other, tail = (
        sum(flops(n, {}) for n in nodes[a:b]) for a, b in zip(marks, [*marks[1:], len(nodes)], strict=True)
    )
    again = [n for n in nodes[: marks[1]] if n.target == ATTENTION and any(place[user] > marks[1] for user in n.users)]
    kept = sum(2 * math.prod(value(n.args[0]).shape[:3]) * value(n.args[1]).shape[2] for n in again)
    weights = sum(2 * weight.numel() for weight in module.parameters())
    seconds = perf_counter() - start
    live = live_bytes(in_float16(module.graph))
    return Counted(head, gradient, other, tail, weights, live, kept, len(nodes), seconds)


def in_float16(graph: Graph) -> Graph:
    """The graph with values of the dtypes that a float16 engine gives them."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    outside = ("placeholder", "get_attr")

    def op(node: Node) -> Op:
        name = str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")
        reads = tuple(n for n in node.all_input_nodes if n.op != "get_attr")
        return Op(name, reads, (node,), tuple(str(n.target) for n in node.all_input_nodes if n.op == "get_attr"))

    results = [node for node in graph.output_node().all_input_nodes if node.op not in outside]
    for node, low in zip(nodes, low_ops([op(node) for node in nodes], results), strict=True):
        if low:
            node.meta["val"] = torch.utils._pytree.tree_map(_half, node.meta["val"])
    return graph


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=torch.float16, device="meta")


def main(arguments: list[str] | None = None) -> None:
    """Count, print and append a row."""
    parser = argparse.ArgumentParser(description="FLOPs and bytes of MotionClone's guided step at full size.")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for rows")
    options = parser.parse_args(arguments)
    found = counted()
    for name in ("head", "gradient", "other", "tail", "total"):
        print(f"{name:>9}: {getattr(found, name) / 1e12:.2f} TFLOP")
    for name in ("weights", "live", "kept"):
        print(f"{name:>9}: {getattr(found, name) / 1e9:.2f} GB")
    shape = {"F": FRAMES, "H": SIZE, "W": SIZE}
    row = {**asdict(found), "total": found.total, "what": "MotionClone's guided step", "shape": shape, "dtype": "float16"}
    print(f"row appended: {harness.append_row('guided_full', row, folder=options.results).name}")


if __name__ == "__main__":
    main()
