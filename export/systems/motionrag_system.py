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

from motionrt.export.checkpoints.encoders import appearance_encoder, feature_encoder, motion_encoder
from motionrt.export.checkpoints.files import CheckpointError, KeyReport
from motionrt.export.checkpoints.motionrag_files import MotionRAG, SosToken, open_motionrag
from motionrt.export.checkpoints.sources import AS_STORED, Keeping
from motionrt.export.checkpoints.text_query import SentenceEncoder
from motionrt.export.compiler.weightless import meta
from motionrt.export.onnx.from_torch import Range
from motionrt.export.systems.cogvideox_step import ENDINGS
from motionrt.export.systems.decoding import Decoding
from motionrt.export.systems.extrapolated import HISTORY, KEPT, NAME, extrapolated_step
from motionrt.export.systems.fusion import RULES, Fusion
from motionrt.export.systems.split import UNCONDITIONAL, WHERE, Branch
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
CAMA = "cama"  # the fusion that is a network of its own
VIDEO = "video"  # the loop that denoises, and the value that it makes the frames of
COEFFICIENTS = ("p0", "p1", "c0", "c1", "c2", "c3")
COLUMNS = ("graph", "timestep", "guidance", *COEFFICIENTS, *KEPT)
PENDING = "0" * 64  # a fingerprint that the exporter fills in


@dataclass(frozen=True)
class Sources(Keeping):
    """Where an export of a published model finds its files, and the choices that change numbers.

    `base`: diffusers folder; `motionrag`: folder with its files; `videomae`, `dinov2`: transformers folders. `fusion`: how
    clips become motion, "cama" or one of `fusion.RULES` (A10), which need no `dinov2`. `target_range`: what DINOv2 sees of the
    still, "correct" [-1, 1] or as CogVideoX was "released" [0, 1] (quirk A14.1). `positions`: see
    `cogvideox_step.fix_positions` (A7). `ending`: of CogVideoX's solvers, see `cogvideox_step.solver_rows`. `text_query`,
    `dtype`: see `Keeping`. `split`: guidance in parts (split.py). `tiles` along either side of the picture in which latents are
    decoded: an approximation, for small devices. `steps`: numbers of steps that there are rows for.
    """

    base: Path
    motionrag: Path
    videomae: Path
    dinov2: Path | None = None
    dtype: str = AS_STORED
    sos: SosToken | None = None
    target_range: str = "correct"
    positions: str = "released"
    ending: str = "x0"
    text_query: Path | None = None
    steps: tuple[int, ...] = tuple(range(2, 51))
    tiles: int = 1
    fusion: str = CAMA
    split: bool = False

    def __post_init__(self) -> None:
        self.check(
            target_range=("correct", "released"), positions=("released", "learned"), ending=ENDINGS, fusion=(CAMA, *RULES)
        )
        if self.fusion == CAMA and self.dinov2 is None:
            raise CheckpointError("dinov2 is None, and CAMA reads what it sees. Give its folder, or choose another fusion.")
        own = {"dinov2": self.dinov2, "sos_token": self.sos, "target_range": self.target_range != "correct"}
        if self.fusion != CAMA and (given := ", ".join(name for name, value in own.items() if value)):
            raise CheckpointError(f"{given}: for fusion cama, and fusion is {self.fusion}. Leave that out, or choose cama.")
        if not 1 <= self.tiles <= 8:
            raise CheckpointError(f"decode tiles is {self.tiles}; allowed: 1 (the whole picture) to 8 along either side.")

    def files(self, blocks: Mapping[str, int], *, overlay: bool) -> MotionRAG:
        """MotionRAG's files, opened and checked; see `open_motionrag`."""
        return open_motionrag(self.motionrag, blocks, overlay=overlay, sos=self.sos, cama=self.fusion == CAMA)

    def provenance(self, files: MotionRAG) -> dict[str, Any]:
        """What a bundle tells of these choices."""
        own = {"sos_token": dict(files.sos), "target_range": self.target_range} if self.fusion == CAMA else {}
        return {"dtype": self.dtype, "fusion": self.fusion, "split_guidance": self.split, **own}


def motionrag_networks(sources: Sources, files: MotionRAG, frames: int, size: tuple[int, int]) -> dict[str, Network]:
    """`motion`, `appearance` and `cama` for clips of `frames` pictures of `size` (H, W); of another fusion `motion`, `fusion`,
    and `features` where these are fused and not motion tokens."""
    networks = {"motion": motion_encoder(sources.videomae, files, frames, size)}
    if sources.fusion == CAMA:
        assert sources.dinov2 is not None and files.cama_size is not None  # checked when they were made
        with meta():
            cama = files.cama_size.build()
        networks |= {"appearance": appearance_encoder(sources.dinov2, files, size), CAMA: Network(cama.eval(), files.cama)}
    elif sources.fusion == "top1":
        networks["fusion"] = Network(Fusion(sources.fusion, files.tokens).eval())
    else:
        features, dims = feature_encoder(networks["motion"])
        with meta():
            fusion = Fusion(sources.fusion, dims, files.motion_size.build())
        weights = {f"proj.{name}": lazy for name, lazy in files.motion_proj.items()}
        networks |= {"features": features, "fusion": Network(fusion.eval(), weights)}
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
    `negative`: another text beside it; `numbers`: what else a request gives; `branch`: where guidance is split."""

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
    branch: Branch | None = None

    def loop(self, steps: int, plain: bool = False) -> Loop:
        """The loop that denoises, of `steps` unless a request says otherwise, or the most that there are rows for."""
        name, rows = next(iter(self.solvers.items()))
        return motionrag_loop(self.solvers, (name, steps if steps in rows else max(rows)), plain, self.branch)

    def steps(self, sizes: Mapping[str, Range], plain: bool = False) -> tuple[Step, ...]:
        """The graphs of the loop's steps, before they are cut; `plain`: with that of the step as it was."""
        if self.branch is not None:
            return *self.branch.steps(self.inputs, sizes), extrapolated_step(self.inputs, sizes)
        step = Step(self.step, self.changes, self.inputs, ("next_latents", "x0"), sizes, plain=plain)
        return step, extrapolated_step(self.inputs, sizes)


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
    """The system of `base` with MotionRAG's `networks` (see `motionrag_networks`) and `tokens` M, D of a clip.

    A request takes `references` clips unless it says otherwise, and at `most` that many (one, of fusion `top1`), and `steps`,
    or the most that there are rows for; `released_range`: DINOv2 sees the still in [0, 1] (A14.1); `plain`: with the graph of
    the step as it was.
    """
    frames, *size = base.clip
    video, still, one = Array(("batch", frames, 3, *size)), Array(("batch", 3, *size)), Array(("batch", *tokens))
    fusion = "fusion" if "fusion" in networks else CAMA
    if fusion == CAMA:
        pair = Array(("batch", "references" if most > 1 else 1, *tokens))
        reads = {"reference_motion": pair, "reference_appearance": pair, "appearance": one}
        record = {"motion": tokens, "appearance": tokens}
    else:
        module = networks["fusion"].module
        assert isinstance(module, Fusion)
        if module.rule == "top1":
            references = most = 1
        reads = {name: Array(("batch", "references" if most > 1 else 1, *dims)) for name, dims in module.reads.items()}
        record = {module.part: module.clip}
    counts = {"batch": BATCH, "references": Range(1, references, most)} if most > 1 else {"batch": BATCH}
    encoders = {name: {"image": still} if name == "appearance" else {"video": video} for name in record}
    graphs = {
        "text_query": query.graph(),
        **{name: Graph(networks[name], inputs, (name,), {"batch": CLIPS}) for name, inputs in encoders.items()},
        fusion: Graph(networks[fusion], reads, ("motion",), counts),
        "encode": base.encode,
        **base.decoding.graphs,
    }
    tokenizers, plan = {"text_query": query.tokenizer}, list[str | Node]()
    if base.text is not None and base.tokenizer is not None:
        graphs, tokenizers = {"text": base.text, **graphs}, {"text": base.tokenizer, **tokenizers}
        plan.append(Node("text", {"input_ids": "prompt.input_ids"}))
        if base.negative:
            plan.append(Node("text", {"input_ids": "negative_prompt.input_ids"}, {"text": "negative_text"}))
    if fusion == CAMA:
        plan.append(Node("appearance", {"image": "appearance_image"}) if released_range else "appearance")
    asked: list[str | Node] = ["request"]
    if base.branch is not None:
        graphs |= {UNCONDITIONAL: base.branch.unconditional(BATCH)}
        asked = base.branch.plan()
    plan += [fusion, "encode", *asked, VIDEO, base.decoding.name]
    memory = MemorySpec(
        text="prompt",
        query="text_query",
        tokenizer="text_query",
        default=references,
        max=most,
        clip=ClipSize(*base.clip, float(base.fps)),
        record=tuple(Part(name, "float16", dims) for name, dims in record.items()),
        fingerprint=PENDING,
        graphs=tuple(record),
        absent={"motion": "zeros", "motion_scale": 0},
        calibration=query.calibration,
    )
    sizes = {"batch": BATCH, "steps": Range(1, steps, 1000)}
    return System(
        base.name,
        inputs=inputs_of(base, guidance, released_range),
        graphs=graphs,
        steps=base.steps(sizes, plain),
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


def motionrag_loop(solvers: Schedules, default: tuple[str, int], plain: bool = False, branch: Branch | None = None) -> Loop:
    """The loop around `step` and the step that does without its network; `default`: a solver and a number of steps."""
    apart = {} if branch is None else branch.ahead()
    return Loop(
        graphs=tuple(dict.fromkeys(("step", *apart, NAME))),
        ahead=apart,
        where=WHERE if apart else {},
        columns=COLUMNS,
        schedules=lengths(solvers),
        default=default,
        feeds={"timestep": ("timestep",), "guidance": ("guidance",), "coefficients": COEFFICIENTS, "kept": KEPT},
        carry={"next_latents": "latents", "x0": "previous_x0"},
        start={"latents": "noise", "previous_x0": "zeros"},
        noise="c3",
        gives={"latents": "latents"},
        plain="step_plain" if plain else None,
        history=HISTORY,
        extrapolates=NAME,
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
    """Rows of `COLUMNS`, float32 `[T, 13]`, of a solver's timesteps `[T]` and coefficients `[T, 6]`: the network in every step.

    ValueError for a timestep that float32 does not hold.
    """
    times = timesteps.astype(np.float32)
    if not np.array_equal(times.astype(np.float64), timesteps.astype(np.float64)):
        raise ValueError("a timestep is no float32")
    fixed, kept = np.full(len(times), guidance, np.float32), np.zeros((len(times), len(KEPT)))
    return np.column_stack([np.zeros_like(times), times, fixed, coefficients, kept]).astype(np.float32)
