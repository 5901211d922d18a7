"""DynamiCrafter (arXiv 2310.12190) as a system, alone or with MotionRAG's files: a still and a prompt in, a video out.

    export_system(dynamicrafter_system(DynamiCrafterSources(base=Path("DynamiCrafter_1024"), tokenizer=...)), out)

Three models of one network. What guidance leads away from is the empty prompt with a grey picture (and a grey clip): constants
of the checkpoint, computed once at export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from motionrt.export.checkpoints.dynamicrafter_files import DynamiCrafter, open_dynamicrafter
from motionrt.export.checkpoints.files import CheckpointError, KeyReport
from motionrt.export.checkpoints.motionrag_files import DYNAMICRAFTER, MotionRAG, SosToken, open_motionrag
from motionrt.export.checkpoints.sources import AS_STORED, Keeping
from motionrt.export.checkpoints.tokenizers import clip_tokenizer_json
from motionrt.export.compiler.weightless import meta
from motionrt.export.onnx.from_torch import Range
from motionrt.export.systems.decoding import decoding, tile_size
from motionrt.export.systems.dynamicrafter.parts import EncodeStill, ImageTokens
from motionrt.export.systems.dynamicrafter.rows import schedules
from motionrt.export.systems.dynamicrafter.step import DynamiCrafterStep, MotionStep
from motionrt.export.systems.dynamicrafter.unet import FRAME_TOKENS, DynamiCrafterUNet, adapted
from motionrt.export.systems.motionclone.frames import DecodeFrames
from motionrt.export.systems.motionrag_system import (
    BATCH,
    CAMA,
    VIDEO,
    Base,
    Sources,
    inputs_of,
    motionrag_networks,
    motionrag_system,
    unconditional_tokens,
)
from motionrt.export.systems.system import Array, Graph, Network, System, TokenizerText
from motionrt.runtime.bundle.manifest import Node, NumberInput, Output

FPS = 8  # of the videos, whatever `fs` is
FRAMES = 16  # that the models were trained on
DECODED = 4  # frames that the decoder sees at once, at most
PASSES = (2, 3)


@dataclass(frozen=True)
class Model:
    """A published model, and what a request of it is unless it says otherwise. `size` H, W; `prediction`, `zero_terminal` and
    `base`: see rows.py; `learned`: the image's part in cross-attention; `fs`, and what that number says; `rescale`: of
    guidance; `spacing`, `steps`, `guidance`: of the sampler."""

    size: tuple[int, int]
    prediction: str
    zero_terminal: bool
    base: float | None
    learned: bool
    fs: int
    says: str
    rescale: float
    spacing: str
    steps: int = 50
    guidance: float = 7.5


_FPS = "Frames per second that the motion is of: fewer move further from frame to frame. The file always has 8."
_STRIDE = "How many frames of a real video lie between two of this one: more move further."
MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "1024": Model((576, 1024), "v_prediction", True, 0.3, False, 10, _FPS, 0.7, "trailing"),
        "512": Model((320, 512), "v_prediction", True, 0.7, False, 24, _FPS, 0.7, "trailing"),
        "256": Model((256, 256), "epsilon", False, None, True, 3, _STRIDE, 0.0, "uniform"),
    }
)
# What MotionRAG changes: of 30 uniform steps the release makes 31.
MOTIONRAG: Mapping[str, Any] = MappingProxyType({"fs": 15, "rescale": 0.0, "spacing": "uniform", "steps": 31, "guidance": 2.0})


@dataclass(frozen=True)
class DynamiCrafterSources(Keeping):
    """Where an export of DynamiCrafter finds its files, and the choices that change numbers.

    `base`: `model.ckpt` or its folder; `tokenizer`: folder of a CLIP tokenizer, which that file lacks; `model`: one of MODELS.
    With `motionrag` (folder of its files for DynamiCrafter) also `videomae` and `dinov2`, transformers folders, `fusion` (see
    `Sources`), and `sos` and `queries`, seeds of what its files may lack: see `open_motionrag`. `frame_tokens`: see `Size`;
    `passes` of guidance, 2 or 3; `text_query`, `dtype`: see `Keeping`; `steps`, `tiles`: see `Sources`.
    """

    base: Path
    tokenizer: Path
    model: str = "1024"
    motionrag: Path | None = None
    videomae: Path | None = None
    dinov2: Path | None = None
    dtype: str = AS_STORED
    sos: SosToken | None = None
    queries: int | None = None
    frame_tokens: str = "split"
    passes: int = 2
    text_query: Path | None = None
    steps: tuple[int, ...] = tuple(range(2, 51))
    tiles: int = 1
    fusion: str = CAMA

    def __post_init__(self) -> None:
        self.check(model=tuple(MODELS), frame_tokens=FRAME_TOKENS)
        if self.passes not in PASSES:
            raise CheckpointError(f"passes is {self.passes}; allowed: 2, or 3 with a guidance of its own for the image.")
        if self.motionrag is None and (self.videomae, self.dinov2, self.sos, self.queries, self.text_query) != (None,) * 5:
            raise CheckpointError(
                "videomae, dinov2, sos token, adapter queries and text query are MotionRAG's: give its folder too."
            )
        if self.motionrag is None and self.fusion != CAMA:
            raise CheckpointError(f"fusion is {self.fusion}, of MotionRAG's clips: give its folder too.")
        if self.motionrag is not None and (self.videomae is None or (self.dinov2 is None and self.fusion == CAMA)):
            raise CheckpointError("MotionRAG's files are given without videomae or dinov2; give these folders too.")

    def retrieval(self) -> Sources | None:
        """What MotionRAG's own part of an export is told; None without it."""
        if self.motionrag is None or self.videomae is None:
            return None
        return Sources(
            self.base, self.motionrag, self.videomae, self.dinov2, self.dtype, self.sos, text_query=self.text_query,
            steps=self.steps, tiles=self.tiles, fusion=self.fusion,
        )  # fmt: skip


def dynamicrafter_system(
    sources: DynamiCrafterSources,
    *,
    frames: int = FRAMES,
    height: int | None = None,
    width: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> System:
    """The system of the files that `sources` names: every file is opened and every key checked, and nothing is written.

    `CheckpointError` names what does not fit; `say` is told what takes its time.
    """
    files, rag = open_dynamicrafter(sources.base), sources.retrieval()
    model = MODELS[sources.model]
    check_model(files, sources.model)
    if rag is not None:
        model = replace(model, **MOTIONRAG)
    size = (height or model.size[0], width or model.size[1])
    latents = geometry(files, sources, frames, size)
    moving: MotionRAG | None = None
    if rag is not None:
        blocks = {f"model.diffusion_model.{path}": channels for path, channels in adapted(files.size).items()}
        moving = open_motionrag(
            rag.motionrag, blocks, overlay=False, sos=sources.sos, cama=rag.fusion == CAMA, names=DYNAMICRAFTER,
            queries=sources.queries,
        )  # fmt: skip
    words, _ = clip_tokenizer_json(sources.tokenizer)
    text = sources.keeping(files.text)
    length, vocabulary = _text(text).max_position_embeddings, _text(text).vocab_size
    parts = _networks(sources, files, size)
    networks = None if rag is None or moving is None else motionrag_networks(rag, moving, frames, size)
    query = None if rag is None else rag.sentence_encoder()
    say("unconditional tokens")
    unconditional = _unconditional(text, words, parts["tokens"], size)
    motion = None if networks is None else unconditional_tokens(networks["motion"], frames, size)
    with meta():
        motion_width = None if motion is None else motion.shape[-1]
        unet = DynamiCrafterUNet(replace(files.size, frame_tokens=sources.frame_tokens, motion=motion_width))
    three = sources.passes == 3
    step = DynamiCrafterStep(unet, *unconditional, three) if motion is None else MotionStep(unet, *unconditional, motion, three)
    released, weights = "model.diffusion_model.", dict(files.unet)
    if moving is not None:
        weights |= {f"unet.{key.removeprefix(released)}": lazy for key, lazy in moving.adapter.items()}
    picture, drawn = Array(("batch", 3, *size)), Array(("batch", *latents[1:]))
    count = max(n for n in range(1, DECODED + 1) if frames % n == 0)
    tile = tuple(tile_size(length, sources.tiles) for length in latents[2:])
    decode = Graph(parts["decode"], {"latents": Array(("batch", count, latents[1], *tile))}, ("video",), {"batch": BATCH})
    base = Base(
        name=f"dynamicrafter-{sources.model}",
        clip=(frames, *size),
        fps=FPS,
        encode=Graph(
            parts["encode"], {"image": picture, "noise": drawn}, ("image_context", "image_latents"), {"batch": BATCH}
        ),
        decoding=decoding({"decode": decode}, [(count, count)] * (frames // count), latents, size[0] // latents[2]),
        step=Network(step.eval(), sources.kept(weights)),
        changes=step.changes,
        inputs=step.inputs(latents),
        solvers=schedules(
            model.zero_terminal, model.prediction, model.base, sources.steps, model.guidance, model.spacing
        ),
        text=Graph(text, {"input_ids": Array(("batch", length), torch.int64, vocabulary)}, ("text",), {"batch": BATCH}),
        tokenizer=TokenizerText(words, length, 0),
        negative=False,
        numbers=_numbers(model, sources.passes),
    )  # fmt: skip
    told = {"dtype": sources.dtype, "frame_tokens": sources.frame_tokens, "passes": sources.passes}
    if moving is None or networks is None or query is None or rag is None:
        return alone(base, model, told, files.reports)
    told |= rag.provenance(moving) | {"adapter_queries": "checkpoint" if sources.queries is None else sources.queries}
    return motionrag_system(
        base, networks, query, moving.tokens, guidance=model.guidance, steps=model.steps,
        provenance=told, reports=(*files.reports, *moving.reports),
    )  # fmt: skip


def alone(base: Base, model: Model, provenance: Mapping[str, Any], reports: tuple[KeyReport, ...]) -> System:
    """The system of `base` without a memory."""
    assert base.text is not None and base.tokenizer is not None
    sizes = {"batch": BATCH, "steps": Range(1, model.steps, 1000)}
    return System(
        base.name,
        inputs=inputs_of(base, model.guidance, moving=False),
        graphs={"text": base.text, "encode": base.encode, **base.decoding.graphs},
        steps=base.steps(sizes),
        plan=(Node("text", {"input_ids": "prompt.input_ids"}), "encode", "request", VIDEO, base.decoding.name),
        loops={VIDEO: base.loop(model.steps), **base.decoding.loops},
        schedules={VIDEO: base.solvers, **base.decoding.schedules},
        output=Output("video", *base.clip, float(base.fps)),
        tokenizers={"text": base.tokenizer},
        approximations=base.decoding.approximations,
        provenance=provenance,
        reports=reports,
    )


def check_model(files: DynamiCrafter, name: str) -> None:
    """`CheckpointError` unless the file is that of the model `name`, as far as a file tells: it may lack the noise schedule."""
    model = MODELS[name]
    scale = None if files.scale is None else round(files.scale, 2)
    if files.size.learned != model.learned or scale not in (None, model.base):
        like = [other for other, at in MODELS.items() if (at.learned, at.base) == (files.size.learned, scale)]
        raise CheckpointError(
            f"{files.file} is not the file of dynamicrafter-{name}: its scale_arr ends at {scale}, and it has "
            f"{'' if files.size.learned else 'no '}alpha in its cross-attention; {model.base} and "
            f"{'some' if model.learned else 'none'} are expected. "
            f"{f'Export it as dynamicrafter-{like[0]}.' if like else 'Give the file of a published model.'}"
        )


def geometry(
    files: DynamiCrafter, sources: DynamiCrafterSources, frames: int, size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Latents F, C, h, w of `frames` pictures of `size`; `CheckpointError` for what the network cannot do."""
    vae: Any = files.vae.module
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    multiple = factor * files.size.factor
    if size[0] % multiple or size[1] % multiple or min(size) < multiple:
        raise CheckpointError(f"the size is {size[0]}x{size[1]}; allowed: multiples of {multiple} pixels.")
    projector: Any = files.projector.module
    tokens = projector.latents.shape[1]
    if frames < 2 or (sources.frame_tokens == "split" and tokens % frames):
        raise CheckpointError(
            f"frames is {frames}; allowed: 2 or more that share the {tokens} image tokens evenly ({FRAMES} were trained), or "
            "any with --frame-tokens all."
        )
    return frames, vae.config.latent_channels, size[0] // factor, size[1] // factor


def _networks(sources: DynamiCrafterSources, files: DynamiCrafter, size: tuple[int, int]) -> dict[str, Network]:
    """`tokens` (picture to tokens), `encode` and `decode`."""
    tokens = ImageTokens(files.clip.module, files.projector.module, size).eval()  # type: ignore[arg-type]
    found = {**(files.clip.weights or {}), **(files.projector.weights or {})}
    vae, own = files.vae.module, dict(files.vae.weights or {})
    inside = {f"tokens.{name}": lazy for name, lazy in found.items()}
    made = {
        "tokens": Network(tokens, found),
        "encode": Network(EncodeStill(tokens, vae).eval(), inside | own),
        "decode": Network(DecodeFrames(vae).eval(), own),
    }
    return {name: sources.keeping(network) for name, network in made.items()}


def _unconditional(text: Network, words: str, tokens: Network, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What the pass without conditions reads, `[1, n, D]` and `[1, m, D]` float32: the empty prompt, and a grey picture."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(words)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = tokenizer.encode("").ids
    padded = torch.tensor([ids + [0] * (_text(text).max_position_embeddings - len(ids))])
    with torch.no_grad():
        empty: Tensor = text.loaded()(padded)
        grey: Tensor = tokens.loaded()(torch.zeros(1, 3, *size))
    return empty, grey


def _text(text: Network) -> Any:
    """The config of the text tower."""
    return text.module.model.config  # type: ignore[union-attr]


def _numbers(model: Model, passes: int) -> dict[str, NumberInput]:
    """What a request of DynamiCrafter's gives besides."""
    rescale = "How far guidance keeps the spread of what it guides, from 0 to 1: against colours that are too strong."
    found = {
        "fs": NumberInput(float(model.fs), 1.0, None, model.says),
        "guidance_rescale": NumberInput(model.rescale, 0.0, 1.0, rescale),
    }
    if passes == 3:
        help_ = "How strongly the still alone is followed, where guidance is of the prompt."
        found["image_guidance"] = NumberInput(model.guidance, help=help_)
    return found
