"""What MotionRAG adds to a base model, whichever it is: with it, the base model is a system.

    files = open_motionrag(...)
    networks = motionrag_networks(sources, files, frames, (480, 720))
    system = motionrag_system(base, networks, sources.sentence_encoder(), (25, 1024), provenance={...}, reports=...)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motionrt.export.checkpoints.encoders import appearance_encoder, motion_encoder
from motionrt.export.checkpoints.files import CheckpointError, KeyReport
from motionrt.export.checkpoints.motionrag_files import MotionRAG, SosToken
from motionrt.export.checkpoints.sources import AS_STORED, Keeping
from motionrt.export.checkpoints.text_query import SentenceEncoder
from motionrt.export.compiler.weightless import meta
from motionrt.export.onnx.from_torch import Range
from motionrt.export.systems.decoding import Decoding
from motionrt.export.systems.system import Array, Graph, Network, Schedules, Step, System, TokenizerText, lengths
from motionrt.runtime.bundle.manifest import (
    ClipSize,
    ColumnInput,
    ImageInput,
    Input,
    Loop,
    MemorySpec,
    Node,
    NumberInput,
    Output,
    Part,
    TextInput,
)

GUIDANCE, DEFAULT_STEPS, REFERENCES = 3.0, 25, 9  # of a published model's request that names none
BATCH = Range(1, 1, 4)
CLIPS = Range(1, 4, 32)  # of the memory, encoded at once
VIDEO = "video"  # the loop that denoises, and the value that it makes the frames of
COLUMNS = ("graph", "timestep", "guidance", "p0", "p1", "c0", "c1", "c2", "c3")
PENDING = "0" * 64  # a fingerprint that the exporter fills in


@dataclass(frozen=True)
class Sources(Keeping):
    """Where an export of a published model finds its files, and the choices that change numbers.

    `base`: diffusers folder; `motionrag`: folder with its files; `videomae`, `dinov2`: transformers folders. `target_range`:
    what DINOv2 sees of the still, "correct" [-1, 1] or as CogVideoX was "released" [0, 1] (quirk A14.1). `positions`: see
    `cogvideox_step.fix_positions` (A7). `text_query`, `dtype`: see `Keeping`. `tiles` along either side of the picture in which
    latents are decoded: an approximation, for small devices. `steps`: numbers of steps that there are rows for.
    """

    base: Path
    motionrag: Path
    videomae: Path
    dinov2: Path
    dtype: str = AS_STORED
    sos: SosToken | None = None
    target_range: str = "correct"
    positions: str = "released"
    text_query: Path | None = None
    steps: tuple[int, ...] = tuple(range(2, 51))
    tiles: int = 1

    def __post_init__(self) -> None:
        self.check(target_range=("correct", "released"), positions=("released", "learned"))
        if not 1 <= self.tiles <= 8:
            raise CheckpointError(f"decode tiles is {self.tiles}; allowed: 1 (the whole picture) to 8 along either side.")


def motionrag_networks(sources: Sources, files: MotionRAG, frames: int, size: tuple[int, int]) -> dict[str, Network]:
    """`motion`, `appearance` and `cama` for clips of `frames` pictures of `size` (H, W)."""
    with meta():
        cama = files.cama_size.build()
    networks = {
        "motion": motion_encoder(sources.videomae, files, frames, size),
        "appearance": appearance_encoder(sources.dinov2, files, size),
        "cama": Network(cama.eval(), files.cama),
    }
    return {name: sources.keeping(network) for name, network in networks.items()}


def unconditional_tokens(motion: Network, frames: int, size: tuple[int, int]) -> Tensor:
    """Motion tokens of the all-zero (mid grey) clip, `[1, M, D]` float32: a constant of the checkpoint (A6)."""
    with torch.no_grad():
        tokens: Tensor = motion.loaded()(torch.zeros(1, frames, 3, *size))
    return tokens


@dataclass(frozen=True)
class Base:
    """What a base model brings. `clip`: F, H, W of its videos, at `fps`; `encode`: the graph of the still; `changes`, `inputs`:
    of its `step`, see `Step`; `solvers`: their rows, the default's first; `text`, `tokenizer`: where it reads the prompt, and
    `negative`: another text beside it; `numbers`: what else a request gives."""

    name: str
    clip: tuple[int, int, int]
    fps: int
    encode: Graph
    decoding: Decoding
    step: Network
    changes: Mapping[str, str]
    inputs: Mapping[str, Array]
    solvers: Schedules
    text: Graph | None = None
    tokenizer: TokenizerText | None = None
    negative: bool = True
    numbers: Mapping[str, Input] = field(default_factory=dict)

    def loop(self, steps: int, plain: bool = False) -> Loop:
        """The loop that denoises, of `steps` unless a request says otherwise, or the most that there are rows for."""
        name, rows = next(iter(self.solvers.items()))
        return Loop(
            graphs=("step",),
            columns=COLUMNS,
            schedules=lengths(self.solvers),
            default=(name, steps if steps in rows else max(rows)),
            feeds={"timestep": ("timestep",), "guidance": ("guidance",), "coefficients": COLUMNS[3:]},
            carry={"next_latents": "latents", "x0": "previous_x0"},
            start={"latents": "noise", "previous_x0": "zeros"},
            noise="c3",
            gives={"latents": "latents"},
            plain="step_plain" if plain else None,
        )


def motionrag_system(
    base: Base,
    networks: Mapping[str, Network],
    query: SentenceEncoder,
    tokens: tuple[int, int],
    *,
    guidance: float = GUIDANCE,
    steps: int = DEFAULT_STEPS,
    references: int = REFERENCES,
    most: int = REFERENCES,
    released_range: bool = False,
    plain: bool = False,
    provenance: Mapping[str, Any],
    reports: tuple[KeyReport, ...] = (),
) -> System:
    """The system of `base` with MotionRAG's `networks` (motion, appearance, cama) and `tokens` M, D of a clip.

    A request takes `references` clips unless it says otherwise, and at `most` that many, and `steps`, or the most that there
    are rows for; `released_range`: DINOv2 sees the still in [0, 1] (A14.1); `plain`: with the graph of the step as it was.
    """
    frames, *size = base.clip
    video, still, pair = Array(("batch", frames, 3, *size)), Array(("batch", 3, *size)), Array(("batch", "references", *tokens))
    one = Array(("batch", *tokens))
    counts = {"batch": BATCH, "references": Range(1, references, most)}
    graphs = {
        "text_query": query.graph(),
        "motion": Graph(networks["motion"], {"video": video}, ("motion",), {"batch": CLIPS}),
        "appearance": Graph(networks["appearance"], {"image": still}, ("appearance",), {"batch": CLIPS}),
        "cama": Graph(
            networks["cama"], {"reference_motion": pair, "reference_appearance": pair, "appearance": one}, ("motion",), counts
        ),
        "encode": base.encode,
        **base.decoding.graphs,
    }
    tokenizers, plan = {"text_query": query.tokenizer}, list[str | Node]()
    if base.text is not None and base.tokenizer is not None:
        graphs, tokenizers = {"text": base.text, **graphs}, {"text": base.tokenizer, **tokenizers}
        plan.append(Node("text", {"input_ids": "prompt.input_ids"}))
        if base.negative:
            plan.append(Node("text", {"input_ids": "negative_prompt.input_ids"}, {"text": "negative_text"}))
    plan.append(Node("appearance", {"image": "appearance_image"}) if released_range else "appearance")
    plan += ["cama", "encode", "request", VIDEO, base.decoding.name]
    memory = MemorySpec(
        text="prompt",
        query="text_query",
        tokenizer="text_query",
        default=references,
        max=most,
        clip=ClipSize(*base.clip, float(base.fps)),
        record=(Part("motion", "float16", tokens), Part("appearance", "float16", tokens)),
        fingerprint=PENDING,
        graphs=("motion", "appearance"),
        absent={"motion": "zeros", "motion_scale": 0},
    )
    sizes = {"batch": BATCH, "steps": Range(1, steps, 1000)}
    return System(
        base.name,
        inputs=inputs_of(base, guidance, released_range),
        graphs=graphs,
        steps=(Step(base.step, base.changes, base.inputs, ("next_latents", "x0"), sizes, plain=plain),),
        plan=tuple(plan),
        loops={VIDEO: base.loop(steps, plain), **base.decoding.loops},
        schedules={VIDEO: base.solvers, **base.decoding.schedules},
        output=Output("video", *base.clip, float(base.fps)),
        memory=memory,
        tokenizers=tokenizers,
        approximations=base.decoding.approximations,
        provenance=provenance,
        reports=(*reports, *(report for graph in graphs.values() for report in graph.network.reports)),
    )


def inputs_of(base: Base, guidance: float, released_range: bool = False, moving: bool = True) -> dict[str, Input]:
    """What a request gives; `moving`: motion is retrieved, and so has a scale."""
    gives = {"image": (-1.0, 1.0), **({"appearance_image": (0.0, 1.0)} if released_range else {})}
    inputs: dict[str, Input] = {"image": ImageInput(*base.clip[1:], gives, "The still that the video begins with.")}
    if base.text is not None:
        found = "; clips of the memory are found by it." if moving else "."
        inputs["prompt"] = TextInput("text", None, f"What the video shows and how it moves{found}")
        if base.negative:
            inputs["negative_prompt"] = TextInput("text", "", "What the video should not show.")
        guided = f"How strongly prompt and {'motion' if moving else 'still'} are followed; 1: no guidance."
    else:
        prompt = "How it is to move: clips of the memory are found by it, and the model itself reads no text."
        inputs["prompt"] = TextInput(None, None, prompt)
        guided = "How strongly still and motion are followed in the last frame; in the first it is 1."
    if moving:
        inputs["motion_scale"] = NumberInput(1.0, help="How strongly the motion of the clips is followed; 0: not at all.")
    inputs["guidance"] = ColumnInput(VIDEO, "guidance", guidance, guided)
    return {**inputs, **base.numbers}


def solver_table(timesteps: NDArray[Any], coefficients: NDArray[np.float32], guidance: float) -> NDArray[np.float32]:
    """Rows of `COLUMNS`, float32 `[T, 9]`, of a solver's timesteps `[T]` and coefficients `[T, 6]`; every row of one graph.

    ValueError for a timestep that float32 does not hold.
    """
    times = timesteps.astype(np.float32)
    if not np.array_equal(times.astype(np.float64), timesteps.astype(np.float64)):
        raise ValueError("a timestep is no float32")
    fixed = np.full(len(times), guidance, np.float32)
    return np.column_stack([np.zeros_like(times), times, fixed, coefficients]).astype(np.float32)
