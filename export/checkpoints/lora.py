"""Low-rank additions to weights (LoRA, Hu et al. 2021, arXiv 2106.09685), made part of the weights as these are read.

Keys of diffusers' old attention processors, which AnimateDiff's released adapter has, and of PEFT:

    ...attn1.processor.to_q_lora.down.weight        [r, in]      unet. ...attn1.to_q.lora_A.weight
    ...attn1.processor.to_q_lora.up.weight          [out, r]     unet. ...attn1.to_q.lora_B.weight
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from motionrt.export.checkpoints.files import CheckpointError, KeyReport, Lazy, check_keys
from motionrt.export.onnx.stored import Computed

_KEY = re.compile(
    r"(?:unet\.)?(?P<path>.+\.(?:to_q|to_k|to_v|to_out))(?:\.0)?(?:_lora\.|\.lora\.|\.lora_)(?P<side>down|up|A|B)\.weight"
)
_TWINS = {"down": "up", "up": "down", "A": "B", "B": "A"}


def adapted(
    weights: Mapping[str, Lazy],
    tensors: Mapping[str, Lazy],
    *,
    what: str,
    file: Path,
    ignored: Mapping[str, str] | None = None,
    scale: float = 1.0,
) -> tuple[dict[str, Lazy], KeyReport]:
    """`weights` with the pairs of `tensors` added: W + scale up down, computed in float32, in W's dtype.

    `CheckpointError` for half a pair, another shape, a key of no weight of these, and where there is no pair at all.
    """
    pairs: dict[str, tuple[str, str]] = {}
    for key in tensors:
        if match := _KEY.fullmatch(key):
            path = match["path"].replace(".processor.", ".")
            name = f"{path}.0.weight" if path.endswith(".to_out") else f"{path}.weight"
            twin = key[: match.start("side")] + _TWINS[match["side"]] + key[match.end("side") :]
            if name in weights:
                pairs[name] = (key, twin) if match["side"] in ("down", "A") else (twin, key)
    if not pairs:
        raise CheckpointError(f"{what} ({file}) has no LoRA of an attention of this base. Check that it is the right file.")
    wanted: dict[str, tuple[int, ...]] = {}
    for name, (down, up) in pairs.items():
        rows, columns = weights[name].shape
        rank = tensors[down].shape[0] if down in tensors else tensors[up].shape[-1]
        wanted |= {down: (rank, columns), up: (rows, rank)}
    found, report = check_keys(tensors, wanted, what=what, file=file, ignored=ignored)
    made = dict(weights)
    for name, (down, up) in pairs.items():
        read = partial(_sum, weights[name], found[down], found[up], scale)
        made[name] = Computed(weights[name].dtype, tuple(weights[name].shape), read)
    return made, report


def _sum(weight: Lazy, down: Lazy, up: Lazy, scale: float) -> Tensor:
    value = weight.read()
    return (value.float() + scale * (up.read().float() @ down.read().float())).to(value.dtype)
