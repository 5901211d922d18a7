"""What every export of a published base model shares: MotionRAG's graphs, the three programs of the step, the report.

Weights are streamed: the largest thing in memory is one tensor, or VideoMAE for the one clip that is encoded at export.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from motionrt.export.checkpoints.files import CheckpointError, KeyReport, Lazy
from motionrt.export.checkpoints.motionrag_files import MotionRAG, SosToken
from motionrt.export.checkpoints.packaged_text import packaged_encoder
from motionrt.export.checkpoints.parts import Part, appearance_part, cama_part, motion_part
from motionrt.export.compiler.partition import Partition
from motionrt.export.compiler.weightless import BATCH, fake_partition, meta, weights_by_class
from motionrt.export.onnx.from_torch import Example, Range
from motionrt.export.onnx.stored import stored_as
from motionrt.export.onnx.streamed import stream_module, stream_program, stream_real
from motionrt.export.onnx.torch_programs import FOLDER as PROGRAMS
from motionrt.export.write import Solvers, Tokenizers, write_manifest
from motionrt.runtime.dtypes import WEIGHTS

AS_STORED = "checkpoint"  # weights are kept in the dtype of their file
GUIDANCE, DEFAULT_STEPS = 3.0, 25  # a request's where it names none; the most steps there are if 25 are not among them
RANGES = {
    "batch": Range(1, 1, BATCH), "clips": Range(1, 4, 32), "references": Range(1, 9, 9), "steps": Range(1, 25, 1000),
    "tokens": Range(1, 16, 256),
}  # fmt: skip


@dataclass(frozen=True)
class Sources:
    """Where an export finds its parts, and the choices that change numbers.

    `base`: diffusers folder; `motionrag`: folder with its files; `videomae`, `dinov2`: transformers folders; `converted`:
    where `.ckpt` files become safetensors, once. `target_range`: what DINOv2 sees of the still, "correct" [-1, 1] or as
    CogVideoX was "released" [0, 1] (quirk A14.1). `positions`: see `cogvideox.fix_positions` (A7). `text_query`: folder of a
    sentence-transformers model to search with; None for the packaged one. `tiles` along either side of the picture in which
    latents are decoded: an approximation, for small devices. `dtype`: what weights are kept in, "checkpoint" (as they are)
    or one of `WEIGHTS`, which may lose digits; graphs compute in what a backend is asked for. `programs`: with the torch
    programs of the loop.
    """

    base: Path
    motionrag: Path
    videomae: Path
    dinov2: Path
    converted: Path
    dtype: str = AS_STORED
    sos: SosToken | None = None
    target_range: str = "correct"
    positions: str = "released"
    text_query: Path | None = None
    steps: tuple[int, ...] = tuple(range(2, 51))
    tiles: int = 1
    programs: bool = True

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

    @property
    def kind(self) -> torch.dtype | None:
        """What weights are kept in; None for as they are."""
        kind: torch.dtype | None = None if self.dtype == AS_STORED else getattr(torch, self.dtype)
        return kind


@dataclass(frozen=True)
class Encoders:
    """Makers of MotionRAG's own graphs: each call builds the part anew, because streaming one uses it up."""

    motion: Callable[[], Part]
    appearance: Callable[[], Part]
    cama: Callable[[], Part]


def encoders(sources: Sources, files: MotionRAG, frames: int, size: tuple[int, int]) -> Encoders:
    """MotionRAG's graphs for clips of `frames` pictures of `size` (H, W)."""

    def motion() -> Part:
        with meta():
            proj = files.motion_size.build()
        return motion_part(sources.videomae, proj, files.motion_proj, frames, size).stored_as(sources.kind)

    def appearance() -> Part:
        with meta():
            proj = files.appearance_size.build()
        part = appearance_part(sources.dinov2, proj, files.appearance_proj, size, short=256, crop=224)
        return part.stored_as(sources.kind)

    def cama() -> Part:
        with meta():
            module = files.cama_size.build()
        return cama_part(module, files.cama).stored_as(sources.kind)

    return Encoders(motion, appearance, cama)


def unconditional_tokens(part: Part, frames: int, size: tuple[int, int]) -> Tensor:
    """Motion tokens of the all-zero (mid grey) clip, `[1, M, D]` float32: a constant of the checkpoint (A6)."""
    module = part.loaded()
    with torch.no_grad():
        tokens: Tensor = module(torch.zeros(1, frames, 3, *size))
    return tokens


def digest_of(weights: Mapping[str, Lazy], choices: str) -> str:
    """SHA-256 of weights as they are stored, and of the choices that change what they give."""
    digest = hashlib.sha256(choices.encode())
    for name in sorted(weights):
        value = weights[name].read().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if value.numel():
            digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Stage:
    """Graphs of one bundle, added one after the other, with their weights kept in the dtype that `sources` says."""

    def __init__(self, folder: Path, say: Callable[[str], None], sources: Sources) -> None:
        self.folder, self.say, self.sources = folder, say, sources
        self.graphs: dict[str, Any] = {}
        self.programs: dict[str, Any] = {}
        self.widths: dict[str, int] = {}  # of the step's weights, bytes of an element
        self.reports: list[KeyReport] = []

    def path(self, name: str) -> Path:
        self.say(name)
        return self.folder / "graphs" / f"{name}.onnx"

    def add(self, name: str, part: Part, examples: Sequence[Example], outputs: Sequence[str], **sizes: Range) -> None:
        """Stream a part; sizes in which the examples differ are dynamic, with the ranges given."""
        part = part.stored_as(self.sources.kind)
        entry = stream_module(self.path(name), part.module, examples, outputs, part.weights.get, sizes)
        self.graphs[name] = {**entry, **({"wide": list(part.wide)} if part.wide else {})}
        self.reports += part.reports
        gc.collect()

    def add_batched(self, name: str, part: Part, feed: Mapping[str, Tensor], outputs: Sequence[str]) -> None:
        """Stream a part that takes several requests in a call; `feed`: its inputs for one, of which axis 0 is the batch."""

        def of(batch: int) -> Example:
            wide = {key: torch.empty((batch, *x.shape[1:]), dtype=x.dtype, device="meta") for key, x in feed.items()}
            return Example({"batch": batch}, wide)

        self.add(name, part, [of(2), of(3)], outputs, batch=RANGES["batch"])

    def add_encoders(self, made: Encoders, model: Mapping[str, Any]) -> dict[str, str]:
        """The graphs motion, appearance and cama; digests of the first two."""
        frames, size = model["frames"], (model["height"], model["width"])
        pair = tuple(model["motion_tokens"])
        digests = {}
        for name, part, shape in (
            ("motion", made.motion(), (frames, 3, *size)),
            ("appearance", made.appearance(), (3, *size)),
        ):
            digests[name] = digest_of(part.weights, f"{name} {shape}")
            port = "video" if name == "motion" else "image"
            examples = [Example({"clips": n}, {port: torch.empty(n, *shape, device="meta")}) for n in (2, 3)]
            self.add(name, part, examples, (name,), clips=RANGES["clips"])
            del part
        stacked = [
            Example(
                {"batch": batch, "references": n},
                {
                    "reference_motion": torch.empty(batch, n, *pair, device="meta"),
                    "reference_appearance": torch.empty(batch, n, *pair, device="meta"),
                    "appearance": torch.empty(batch, *pair, device="meta"),
                },
            )
            for batch, n in ((2, 4), (3, 7))
        ]
        self.add("cama", made.cama(), stacked, ("motion",), batch=RANGES["batch"], references=RANGES["references"])
        return digests

    def add_text_query(self) -> tuple[str, str]:
        """The packaged sentence encoder: (its tokenizer's JSON, its digest). Real weights: it is small."""
        encoder = packaged_encoder()
        draw = torch.Generator().manual_seed(1)
        examples = []
        for batch, length in ((2, 12), (3, 7), (1, 1)):
            ids = torch.randint(1, 30000, (batch, length), generator=draw)
            feed = {"input_ids": ids, "attention_mask": torch.ones(batch, length, dtype=torch.int64)}
            examples.append(Example({"batch": batch, "tokens": length}, feed))
        entry = stream_real(
            self.path("text_query"), encoder.module, examples, ("embedding",), RANGES, external=encoder.tensors
        )
        self.graphs["text_query"] = {**entry, "weights": encoder.weights}
        return encoder.tokenizer, encoder.weights["sha256"]

    def add_step(
        self,
        step: nn.Module,
        args: Mapping[str, Tensor],
        inputs: Mapping[str, str],
        weights: Mapping[str, Lazy],
    ) -> Partition:
        """The graphs of the loop, of a step module that lies on meta, and their torch programs; `weights` by the module's
        names."""
        stored = stored_as(weights, self.sources.kind)
        find, self.widths = stored.get, {name: lazy.dtype.itemsize for name, lazy in stored.items()}
        self.say("partition")
        cut = fake_partition(step, tuple(args.values()), inputs, outputs=("next_latents", "x0"))

        def program(name: str) -> Path | None:
            return self.folder / PROGRAMS / f"{name}.pt2" if self.sources.programs else None

        for name in cut.programs:
            entry = stream_program(self.path(name), cut, name, find, RANGES, program(name))
            if "program" in entry:
                self.programs[name] = entry.pop("program")
            self.graphs[name] = entry
        return cut

    def finish(
        self, name: str, model: Mapping[str, Any], cut: Partition, reports: Sequence[KeyReport], *,
        solvers: Solvers, tokenizers: Tokenizers, digests: Mapping[str, str], chosen: Mapping[str, Any],
    ) -> list[str]:  # fmt: skip
        """Write the manifest, and `keys.json`: every key of every file, by what became of it; its lines for people.

        The first of `solvers` is the default; `chosen`: what the provenance says of this kind of model alone.
        """
        text = json.dumps([asdict(report) for report in reports], indent=1) + "\n"
        (self.folder / "keys.json").write_text(text, encoding="utf-8")
        lines, sources = [report.summary() for report in reports], self.sources
        memory = memory_plan(self.folder, self.graphs, cut)
        weights = {kind: asdict(size) for kind, size in weights_by_class(cut, self.widths).items()}
        write_manifest(
            self.folder, name=name, model=model, graphs=self.graphs, solvers=solvers,
            default_solver=(next(iter(solvers)), DEFAULT_STEPS if DEFAULT_STEPS in sources.steps else max(sources.steps)),
            tokenizers=tokenizers, guidance=GUIDANCE, defaults={"target_range": sources.target_range}, digests=digests,
            partition={**cut.report(), "weights": weights}, programs=self.programs,
            provenance={"dtype": sources.dtype, **chosen, "keys": lines, "memory": memory, "torch": torch.__version__},
        )  # fmt: skip
        return lines


def memory_plan(stage: Path, graphs: Mapping[str, Any], cut: Partition) -> dict[str, Any]:
    """Bytes that each graph keeps resident, and of the request's state and the schedule's tables (per step)."""
    weights = {name: (stage / entry["data"]["file"]).stat().st_size if "data" in entry else 0 for name, entry in graphs.items()}
    return {
        "weights": weights,
        "request_state": sum(h.bytes for h in cut.hoisted if h.kind == "request"),
        "schedule_row": sum(h.bytes for h in cut.hoisted if h.kind == "schedule"),
    }
