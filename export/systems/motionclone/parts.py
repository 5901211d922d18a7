"""What a MotionClone system is made of, and what its memory keeps of a clip: latents, or the motion that one noise shows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from motionrt.export.checkpoints.files import KeyReport, Lazy
from motionrt.export.checkpoints.text_query import SentenceEncoder
from motionrt.export.onnx.from_torch import Range
from motionrt.export.systems.decoding import Decoding
from motionrt.export.systems.motionclone.rows import GUIDANCE
from motionrt.export.systems.motionclone.semantic import REGIONS, SemanticExtract
from motionrt.export.systems.motionclone.sparse import Control
from motionrt.export.systems.motionclone.step import Extract, Fuse, Represent
from motionrt.export.systems.motionclone.unet import TappedUNet
from motionrt.export.systems.system import Array, Graph, Network, Schedules, TokenizerText
from motionrt.runtime.bundle.manifest import Approximation, Part
from motionrt.runtime.noise import noise

CLIPS = Range(1, 4, 32)  # of the memory, encoded at once
EXTRACTED = 400  # the timestep that a clip's motion is read at, as released
TEMPERATURE = 0.05  # of the softmax that makes shares of K references' scores
EXTRACT, REPRESENT, FUSE = "extract", "represent", "fuse"  # graphs
MOTION = ("motion_weights", "motion_targets")
# what is known of it; tests/benchmarks/guided/test_fixed_noise.py holds it
FIXED_NOISE_ERROR = "not measured with released weights; the demo's mean path error: 4.2 px for 2.5 px, 24 targets"


@dataclass(frozen=True)
class Parts:
    """What a MotionClone system is made of.

    `latents` F, C, h, w; `scale`: pixels of a latent; `weights`: of `unet.` names where the modules have none (released files);
    `encode`: pictures of clips `[K, F, 3, H, W]` to latents, `clips` at once; `decoding`: of `latents`; `alphas`: share of
    signal by timestep; `control`: for a video that begins with an image; `composed`: whether a request may give its clips
    places of their own; `fixed_noise`: whether the memory keeps motion and not latents; `semantic`: whether what the video
    shows may be guided too (semantic.py), for which the UNet is tapped. Either goes with neither SparseCtrl nor composition.
    """

    name: str
    unet: TappedUNet
    null_text: Tensor
    text: Network
    text_size: tuple[int, int]
    vocabulary: int
    tokenizer: TokenizerText
    encode: Network
    decoding: Decoding
    latents: tuple[int, int, int, int]
    scale: int
    query: SentenceEncoder
    schedules: Schedules
    alphas: np.ndarray[Any, Any]
    weights: Mapping[str, Lazy] | None = None
    clips: Range = CLIPS
    guidance: float = GUIDANCE
    default: tuple[str, int] | None = None
    control: Control | None = None
    composed: bool = False
    fixed_noise: bool = False
    semantic: bool = False
    references: int = 1
    most: int = 8
    provenance: Mapping[str, Any] = field(default_factory=dict)
    reports: tuple[KeyReport, ...] = ()

    def __post_init__(self) -> None:
        if self.fixed_noise + self.semantic + (self.composed or self.control is not None) > 1:
            raise ValueError("of fixed_noise, semantic, and composition or SparseCtrl a system has one")

    @property
    def motion(self) -> tuple[int, int, int, int]:
        """Layers, places, heads and frames of a motion representation."""
        config, (frames, _, height, width) = self.unet.unet.config, self.latents
        factor, heads = self.unet.factor, config["motion_num_attention_heads"]
        if isinstance(heads, tuple | list):
            heads = heads[::-1][self.unet.block]
        return self.unet.layers, (height // factor) * (width // factor), heads, frames

    def network(self, module: nn.Module) -> Network:
        """Of a module that has the UNet as `net`."""
        weights = None if self.weights is None else {f"net.{name}": lazy for name, lazy in self.weights.items()}
        return Network(module.eval(), weights)


@dataclass(frozen=True)
class Record:
    """What a memory keeps of a clip, and the graphs that make it and read it."""

    parts: tuple[Part, ...]
    graphs: Mapping[str, Graph]
    approximations: tuple[Approximation, ...] = ()


def latents_record(parts: Parts, shapes: Mapping[str, tuple[int, ...]], counts: Mapping[str, Range]) -> Record:
    """Latents, whose motion is read once a request; `shapes` of SparseCtrl's residuals."""
    kind = SemanticExtract if parts.semantic else Extract
    extract = kind(parts.unet, parts.null_text, EXTRACTED, float(parts.alphas[EXTRACTED]), TEMPERATURE, parts.composed)
    inputs = {
        "reference_latents": Array((1, "references", *parts.latents)),
        "reference_scores": Array((1, "references")),
        "start": Array((1, *parts.latents)),
        **({"composition": Array((1,))} if parts.composed else {}),
        **{f"reference_{name}": Array((1, "references", *shape)) for name, shape in shapes.items()},
        **({"clip_text": Array((1, *parts.text_size)), "clip_token": Array((1,))} if parts.semantic else {}),
    }
    outputs = (*MOTION, *REGIONS) if parts.semantic else MOTION
    graph = Graph(parts.network(extract), inputs, outputs, counts, weights_of="step_guided")
    return Record((Part("latents", "float16", parts.latents),), {EXTRACT: graph})


def motion_record(parts: Parts, counts: Mapping[str, Range]) -> Record:
    """The motion itself, read with one noise when a clip is indexed."""
    level, fixed = float(parts.alphas[EXTRACTED]), torch.from_numpy(noise(0, 0, 0, (1, *parts.latents)))
    represent = Represent(parts.unet, parts.null_text, EXTRACTED, level, fixed)
    made_by = hashlib.sha256(repr((parts.unet, EXTRACTED, level)).encode())  # the modules say what kind of norm they have
    for value in (fixed, parts.null_text):
        made_by.update(value.numpy().tobytes())
    kept = (Part("values", "float16", parts.motion), Part("indices", "uint8", parts.motion))
    inputs = {
        "reference_values": Array((1, "references", *parts.motion)),
        "reference_indices": Array((1, "references", *parts.motion), torch.uint8, parts.latents[0]),
        "reference_scores": Array((1, "references")),
    }
    graphs = {
        REPRESENT: Graph(
            replace(parts.network(represent), choices=made_by.hexdigest()), {"latents": Array(("batch", *parts.latents))},
            ("values", "indices"), {"batch": parts.clips}, weights_of="step_guided",
        ),
        FUSE: Graph(Network(Fuse(TEMPERATURE).eval()), inputs, MOTION, counts),
    }  # fmt: skip
    return Record(kept, graphs, (Approximation("fixed noise", (REPRESENT,), {"error": FIXED_NOISE_ERROR}),))
