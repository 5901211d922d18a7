"""A step without the network: v is extrapolated from the two last steps that ran it, and the solver goes on with that.

On the straight line through v of two steps, v = (1 + a) v_last - a v_earlier, where a is how far the step lies behind the last
one, in distances between the two (TaylorSeer, arXiv 2503.06923, of order 1, on the output of the whole network). A step keeps x
and x0, and x0 = p0 x + p1 v with the p0 and p1 of its own row, so v is a sum of these two; the four weights of the sum are
numbers of the row (`runtime/schedules.py`), and the graph holds no weights at all.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from motionrt.export.onnx.from_torch import Range
from motionrt.export.systems.rows import like, solved
from motionrt.export.systems.system import Array, Network, Step

SUFFIX = "_extrapolated"
NAME = f"step{SUFFIX}"
KEPT = ("last_x0", "last_latents", "earlier_x0", "earlier_latents")  # ports, and the columns of their weights
HISTORY = {"x0": ("last_x0", "earlier_x0"), "latents": ("last_latents", "earlier_latents")}
FRAMES = ("latents", "previous_x0", "noise")


class Extrapolated(nn.Module):
    """The update of a step (rows.py) with a v that is a weighted sum of what earlier steps read and gave."""

    def forward(
        self,
        latents: Tensor,
        previous_x0: Tensor,
        noise: Tensor,
        coefficients: Tensor,
        kept: Tensor,
        last_x0: Tensor,
        last_latents: Tensor,
        earlier_x0: Tensor,
        earlier_latents: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`coefficients [B, 6]`; `kept [B, 4]`, the weights of the four tensors behind it; all others `[B, F, C, H, W]`
        -> (next latents, x0), as the step that it stands in for."""
        parts = zip(kept.unbind(1), (last_x0, last_latents, earlier_x0, earlier_latents), strict=True)
        first, *others = (like(weight, latents) * part for weight, part in parts)
        return solved(coefficients, latents, sum(others, first), previous_x0, noise)


def extrapolated_step(inputs: Mapping[str, Array], sizes: Mapping[str, Range]) -> Step:
    """The graph of it beside a step with `inputs`, for as many requests."""
    arrays = {name: inputs[name] for name in (*FRAMES, "coefficients")}
    arrays |= {"kept": Array(("batch", len(KEPT))), **dict.fromkeys(KEPT, inputs["latents"])}
    batch = {"batch": sizes["batch"]}
    return Step(
        Network(Extrapolated().eval()), dict.fromkeys(arrays, "step"), arrays, ("next_latents", "x0"), batch, suffix=SUFFIX
    )
