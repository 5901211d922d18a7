"""What all bundles of MotionRAG share: its own graphs, the inputs that a request gives, the record of a clip, the denoising loop.

    files = open_motionrag(...)
    networks = motionrag_networks(sources, files, frames, (480, 720))
    graphs = motionrag_graphs(networks, encoder.graph(), (17, 480, 720), (25, 1024))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motionrt.export.checkpoints.encoders import appearance_encoder, motion_encoder
from motionrt.export.checkpoints.files import CheckpointError, Lazy
from motionrt.export.checkpoints.motionrag_files import MotionRAG, SosToken
from motionrt.export.checkpoints.text_query import SentenceEncoder, packaged_encoder, sentence_encoder
from motionrt.export.compiler.weightless import meta
from motionrt.export.onnx.from_torch import Range
from motionrt.export.onnx.stored import stored_as
from motionrt.export.systems.system import Array, Graph, Network, Schedules, lengths
from motionrt.runtime.bundle.manifest import (
    ClipSize,
    ColumnInput,
    ImageInput,
    Input,
    Loop,
    MemorySpec,
    Node,
    NumberInput,
    Part,
    TextInput,
)
from motionrt.runtime.dtypes import WEIGHTS

AS_STORED = "checkpoint"  # weights are kept in the dtype of their file
GUIDANCE, DEFAULT_STEPS, REFERENCES = 3.0, 25, 9  # of a published model's request that names none
BATCH = Range(1, 1, 4)
CLIPS = Range(1, 4, 32)  # of the memory, encoded at once
VIDEO = "video"  # the loop that denoises, and the value that it makes the frames of
COLUMNS = ("graph", "timestep", "guidance", "p0", "p1", "c0", "c1", "c2", "c3")
STEP_OUTPUTS, STEP_SIZES = ("next_latents", "x0"), {"batch": BATCH, "steps": Range(1, DEFAULT_STEPS, 1000)}
PENDING = "0" * 64  # a fingerprint that the exporter fills in


@dataclass(frozen=True)
class Sources:
    """Where an export of a published model finds its files, and the choices that change numbers.

    `base`: diffusers folder; `motionrag`: folder with its files; `videomae`, `dinov2`: transformers folders. `target_range`:
    what DINOv2 sees of the still, "correct" [-1, 1] or as CogVideoX was "released" [0, 1] (quirk A14.1). `positions`: see
    `cogvideox_step.fix_positions` (A7). `text_query`: folder of a sentence-transformers model to search with; None for the
    packaged one. `tiles` along either side of the picture in which latents are decoded: an approximation, for small devices.
    `dtype`: what weights are kept in, "checkpoint" (as they are) or one of `WEIGHTS`, which may lose digits; graphs compute in
    what a backend is asked for. `steps`: numbers of steps that there are rows for.
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
        for name, value, allowed in (
            ("dtype", self.dtype, (AS_STORED, *WEIGHTS)),
            ("target_range", self.target_range, ("correct", "released")),
            ("positions", self.positions, ("released", "learned")),
        ):
            if value not in allowed:
                raise CheckpointError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.")
        if not 1 <= self.tiles <= 8:
            raise CheckpointError(f"decode tiles is {self.tiles}; allowed: 1 (the whole picture) to 8 along either side.")

    def kept(self, weights: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """`weights` in the dtype that they are kept in."""
        return stored_as(weights, None if self.dtype == AS_STORED else getattr(torch, self.dtype))

    def keeping(self, network: Network) -> Network:
        """`network` with its weights in the dtype that they are kept in; those in a package stay as they are."""
        if network.weights is None or network.package is not None:
            return network
        return replace(network, weights=self.kept(network.weights))

    def sentence_encoder(self) -> SentenceEncoder:
        """What captions and prompts are searched with."""
        if self.text_query is None:
            return packaged_encoder()
        found = sentence_encoder(self.text_query)
        return replace(found, network=self.keeping(found.network))


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


def motionrag_graphs(
    networks: Mapping[str, Network], text_query: Graph, clip: tuple[int, int, int], tokens: tuple[int, int],
    references: int = REFERENCES, most: int = REFERENCES,
) -> dict[str, Graph]:  # fmt: skip
    """MotionRAG's own graphs; `clip` F, H, W; `tokens` M, D; `references` K, of a request
    that says nothing, and at `most`.

    `motion`: `video [B, F, 3, H, W]` -> `[B, M, D]`; `appearance`: `image [B, 3, H, W]` -> `[B, M, D]`; `cama`:
    `reference_motion`, `reference_appearance` `[B, K, M, D]`, `appearance [B, M, D]` -> `motion [B, M, D]`.
    """
    frames, *size = clip
    pair = ("batch", "references", *tokens)
    return {
        "text_query": text_query,
        "motion": Graph(networks["motion"], {"video": Array(("batch", frames, 3, *size))}, ("motion",), {"batch": CLIPS}),
        "appearance": Graph(networks["appearance"], {"image": Array(("batch", 3, *size))}, ("appearance",), {"batch": CLIPS}),
        "cama": Graph(
            networks["cama"],
            {"reference_motion": Array(pair), "reference_appearance": Array(pair), "appearance": Array(("batch", *tokens))},
            ("motion",),
            {"batch": BATCH, "references": Range(1, references, most)},
        ),
    }


def motionrag_inputs(
    size: tuple[int, int], guidance: float, *, prompted: bool = True, released_range: bool = False
) -> dict[str, Input]:
    """What a request gives. `prompted`: the base model reads the prompt too, not the search alone; `released_range`: DINOv2 sees
    the still in [0, 1] (A14.1)."""
    gives = {"image": (-1.0, 1.0), **({"appearance_image": (0.0, 1.0)} if released_range else {})}
    prompt = "What the video shows and how it moves; clips of the memory are found by it."
    search = "How it is to move: clips of the memory are found by it, and the model itself reads no text."
    tokenizer = "text" if prompted else None
    inputs: dict[str, Input] = {
        "image": ImageInput(*size, gives, "The still that the video begins with."),
        "prompt": TextInput(tokenizer, None, prompt if prompted else search),
        "negative_prompt": TextInput(tokenizer, "", "What the video should not show."),
        "motion_scale": NumberInput(1.0, help="How strongly the motion of the clips is followed; 0: not at all."),
        "guidance": ColumnInput(VIDEO, "guidance", guidance, "How strongly prompt and motion are followed; 1: no guidance."),
    }
    if not prompted:
        del inputs["negative_prompt"]
        inputs["guidance"] = ColumnInput(
            VIDEO, "guidance", guidance, "How strongly still and motion are followed, for the last frame; the first has 1."
        )
    return inputs


def motionrag_memory(
    clip: tuple[int, int, int], fps: float, tokens: tuple[int, int], references: int = REFERENCES, most: int = REFERENCES
) -> MemorySpec:
    """What the memory keeps of a clip (F, H, W at `fps`): its motion and appearance tokens. A request takes `references` clips
    unless it says otherwise, and at `most` that many; without any, no adapter has a say."""
    return MemorySpec(
        text="prompt",
        query="text_query",
        tokenizer="text_query",
        default=references,
        max=most,
        clip=ClipSize(*clip, float(fps)),
        record=(Part("motion", "float16", tokens), Part("appearance", "float16", tokens)),
        fingerprint=PENDING,
        graphs=("motion", "appearance"),
        absent={"motion": "zeros", "motion_scale": 0},
    )


def motionrag_plan(*, prompted: bool = True, released_range: bool = False, decode: str = "decode") -> tuple[str | Node, ...]:
    """From the inputs to the video; arguments as of `motionrag_inputs`, and the graph or loop that makes the pictures."""
    text: list[str | Node] = [
        Node("text", {"input_ids": "prompt.input_ids"}),
        Node("text", {"input_ids": "negative_prompt.input_ids"}, {"text": "negative_text"}),
    ]
    appearance = Node("appearance", {"image": "appearance_image"}) if released_range else "appearance"
    return (*(text if prompted else ()), appearance, "cama", "encode", "request", VIDEO, decode)


def solver_table(timesteps: NDArray[Any], coefficients: NDArray[np.float32], guidance: float) -> NDArray[np.float32]:
    """Rows of `COLUMNS`, float32 `[T, 9]`, of a solver's timesteps `[T]` and coefficients `[T, 6]`; every row of one graph.

    ValueError for a timestep that float32 does not hold.
    """
    times = timesteps.astype(np.float32)
    if not np.array_equal(times.astype(np.float64), timesteps.astype(np.float64)):
        raise ValueError("a timestep is no float32")
    fixed = np.full(len(times), guidance, np.float32)
    return np.column_stack([np.zeros_like(times), times, fixed, coefficients]).astype(np.float32)


def denoising_loop(schedules: Schedules, default: tuple[str, int], plain: str | None = None) -> Loop:
    """The loop `video`: from noise to `latents`, with a solver's rows. The exporter fills in `tables`."""
    return Loop(
        graphs=("step",),
        columns=COLUMNS,
        schedules=lengths(schedules),
        default=default,
        feeds={"timestep": ("timestep",), "guidance": ("guidance",), "coefficients": COLUMNS[3:]},
        carry={"next_latents": "latents", "x0": "previous_x0"},
        start={"latents": "noise", "previous_x0": "zeros"},
        noise="c3",
        gives={"latents": "latents"},
        plain=plain,
    )


def default_steps(sources: Sources) -> int:
    """25, or the most that there are rows for."""
    return DEFAULT_STEPS if DEFAULT_STEPS in sources.steps else max(sources.steps)
