"""MotionClone (arXiv 2406.05338) on AnimateDiff as a system: words and a clip in, a video that moves like the clip.

    export_system(motionclone_system(MotionCloneSources(base=..., motion=...)), out)       # released files
    export_system(clone_system(Parts(...)), out)                                           # modules in memory: the demo

The memory keeps a clip's latents. What is read of them depends on the noise that they are mixed with, which must be the noise
that the video begins with: `start` draws it for both, and `extract` reads the references once a request. The loop's first steps
run `step_guided`, which differentiates, the others `step_plain`; without a reference all of them run `step_plain`. A memory
may keep what is read instead, with one noise for every clip (`fixed_noise`): a clip then costs a request nothing, and the video
follows it less closely.

Graphs of steps are for one request at a time: what a trace with a batch of any size costs, no schedule of the release repays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import SparseControlNetModel
from tokenizers import Tokenizer
from torch import Tensor, nn

from motionrt.export.checkpoints.animatediff_files import AnimateDiff, MotionCloneSources, open_animatediff
from motionrt.export.checkpoints.files import CheckpointError
from motionrt.export.compiler.weightless import meta
from motionrt.export.onnx.from_torch import Range
from motionrt.export.systems.decoding import decoding
from motionrt.export.systems.motionclone.frames import DecodeFrames, EncodeFrames, EncodeImage
from motionrt.export.systems.motionclone.parts import (
    EXTRACT,
    EXTRACTED,
    FUSE,
    REPRESENT,
    Parts,
    latents_record,
    motion_record,
)
from motionrt.export.systems.motionclone.rows import COLUMNS, RELEASED, noise_schedule, released_schedules
from motionrt.export.systems.motionclone.semantic import REGIONS, SEMANTIC, SemanticStep
from motionrt.export.systems.motionclone.sparse import FIRST, IMAGE, OF_REFERENCES, TABLE, WINDOW, Control
from motionrt.export.systems.motionclone.step import CHANGES, GUIDED, GuidedStep, PlainStep
from motionrt.export.systems.motionclone.unet import TappedUNet, motion_unet, prepared
from motionrt.export.systems.system import Array, Graph, Network, Step, System, TokenizerText, lengths
from motionrt.runtime.bundle.manifest import (
    ClipSize,
    ColumnInput,
    Input,
    Loop,
    MemorySpec,
    Node,
    NumberInput,
    Output,
    TextInput,
)

VIDEO, FPS = "video", 8
ONE_CLIP = Range(1, 1, 8)  # where frames are large
DECODED = 4  # frames that the decoder sees at once, at most
LEAST_CHANGE = 0.1  # grey levels between pictures of a clip that shows motion; a small thing that moves slowly has 0.4
COEFFICIENTS = COLUMNS[5:]
COMPOSITION = (
    "Of several clips, how far each has places of its own: 0: all share every place; 1: those behind the first (things) have "
    "the places where they move, and the first (the camera) has the rest."
)
PENDING = "0" * 64  # a fingerprint that the exporter fills in


class Draw(nn.Module):
    """The noise that a video begins with, as a value that others may read too."""

    def forward(self, noise: Tensor) -> Tensor:
        """`[B, F, C, h, w]`, standard normal; the same."""
        return noise * 1.0


def clone_system(parts: Parts) -> System:
    """The system of `parts`."""
    frames, channels, height, width = parts.latents
    clip = (frames, height * parts.scale, width * parts.scale)
    latents, one = Array((1, *parts.latents)), Array((1,))
    text = Array((1, *parts.text_size))
    motion = Array((1, *parts.motion, frames))
    arrays = {"latents": latents, "coefficients": Array((1, len(COEFFICIENTS))), "text": text, "negative_text": text}
    arrays |= {"motion_weights": motion, "motion_targets": motion, "timestep": one}
    counts, control = {"references": Range(1, parts.references, parts.most)}, parts.control
    shapes = {} if control is None else control.shapes(parts.latents)
    arrays |= {name: Array((1, 2, *shape)) for name, shape in shapes.items()}
    residuals = dict.fromkeys(shapes, "step")
    guided: tuple[nn.Module, Mapping[str, str], tuple[str, ...]]
    guided = GuidedStep(parts.unet), {**GUIDED, **residuals}, ("next_latents", "energy")
    if parts.semantic:
        arrays |= {"app": latents, **dict.fromkeys(REGIONS, Array((1, frames, parts.motion[1])))}
        guided = SemanticStep(parts.unet), SEMANTIC, ("next_latents", "energy", "next_app")
    controlled: dict[str, Graph] = {}
    if control is not None:
        controlled = control.graphs(parts.latents, clip[1:], text, parts.null_text, EXTRACTED, parts.clips, counts)
    record = motion_record(parts, counts) if parts.fixed_noise else latents_record(parts, shapes, counts)
    graphs = {
        "text_query": parts.query.graph(),
        "encode": Graph(parts.encode, {"video": Array(("batch", frames, 3, *clip[1:]))}, ("latents",), {"batch": parts.clips}),
        "text": Graph(
            parts.text, {"input_ids": Array((1, parts.text_size[0]), torch.int64, parts.vocabulary)}, ("text",)
        ),
        "start": Graph(Network(Draw().eval()), {"noise": latents}, ("start",)),
        **record.graphs,
        **controlled,
        **parts.decoding.graphs,
    }
    steps = tuple(
        Step(
            parts.network(module), changes, {name: arrays.get(name, one) for name in changes}, outputs,
            {"steps": Range(1, 25, 1000)}, suffix, gradient=suffix == "_guided",
            weights_of=None if suffix == "_guided" else "step_guided",
        )
        for module, changes, outputs, suffix in (
            (*guided, "_guided"),
            (PlainStep(parts.unet), {**CHANGES, **residuals}, ("next_latents",), "_plain"),
        )
    )  # fmt: skip
    name, rows = next(iter(parts.schedules.items()))
    loop = Loop(
        graphs=("step_guided", "step_plain"),
        columns=COLUMNS,
        schedules=lengths(parts.schedules),
        default=parts.default or (name, max(rows)),
        feeds={**{n: (n,) for n in ("timestep", "guidance", "motion_scale", "weight")}, "coefficients": COEFFICIENTS},
        carry={"next_latents": "latents", **({"next_app": "app"} if parts.semantic else {})},
        start={"latents": "start", **({"app": "start"} if parts.semantic else {})},
        gives={"latents": "latents"},
        tables=() if control is None else (TABLE,),
        windows={} if control is None else {TABLE: WINDOW},
        absent={"step_guided": "step_plain"},
    )
    memory = MemorySpec(
        text="prompt",
        query="text_query",
        tokenizer="text_query",
        default=parts.references,
        max=parts.most,
        clip=ClipSize(*clip, float(FPS)),
        record=(*record.parts, *(() if control is None else control.parts(clip[1:]))),
        fingerprint=PENDING,
        graphs=("encode", *(name for name in (FIRST, REPRESENT) if name in graphs)),
        absent={"motion_scale": 0},
        least_change=LEAST_CHANGE,
        calibration=parts.query.calibration,
    )
    return System(
        parts.name,
        inputs={
            **({} if control is None else {"image": control.image(clip[1:])}),
            "prompt": TextInput("text", None, "What the video shows; a clip to move like is found by it."),
            "negative_prompt": TextInput("text", "", "What the video should not show."),
            "motion_scale": ColumnInput(
                VIDEO, "motion_scale", 1.0, "How strongly the motion of the clips is followed; 0: not at all."
            ),
            **({"composition": NumberInput(0.0, 0.0, 1.0, COMPOSITION)} if parts.composed else {}),
            **(semantic_inputs(parts.text_size[0]) if parts.semantic else {}),
            "guidance": ColumnInput(VIDEO, "guidance", parts.guidance, "How strongly the prompt is followed; 1: no guidance."),
        },
        graphs=graphs,
        steps=steps,
        plan=(
            Node("text", {"input_ids": "prompt.input_ids"}),
            Node("text", {"input_ids": "negative_prompt.input_ids"}, {"text": "negative_text"}),
            *([Node("text", {"input_ids": "clip_prompt.input_ids"}, {"text": "clip_text"})] if parts.semantic else []),
            "request_guided", "request_plain", "start",
            *(name for name in (IMAGE, OF_REFERENCES, EXTRACT, FUSE) if name in graphs), VIDEO, parts.decoding.name,
        ),
        loops={VIDEO: loop, **parts.decoding.loops},
        schedules={VIDEO: parts.schedules, **parts.decoding.schedules},
        output=Output("video", *clip, float(FPS)),
        memory=memory,
        tokenizers={"text": parts.tokenizer, "text_query": parts.query.tokenizer},
        approximations=(*parts.decoding.approximations, *record.approximations),
        provenance=parts.provenance,
        reports=parts.reports,
    )  # fmt: skip


def semantic_inputs(tokens: int) -> dict[str, Input]:
    """What a request says of semantic guidance; texts have so many tokens."""
    token = "Place of the thing's word among the tokens of the {} (the first word has 1); 0: no thing, all places are compared."
    return {
        "semantic": NumberInput(0.0, 0.0, None, "How strongly it keeps looking as it would without a clip; 0: not at all."),
        "object_token": NumberInput(0.0, 0.0, tokens - 1.0, token.format("prompt")),
        "clip_prompt": TextInput("text", "", "What the clip shows."),
        "clip_token": NumberInput(0.0, 0.0, tokens - 1.0, token.format("clip's prompt")),
    }


def motionclone_system(
    sources: MotionCloneSources,
    *,
    frames: int = 16,
    height: int = 512,
    width: int = 512,
    say: Callable[[str], None] = lambda text: None,
) -> System:
    """The system of the files that `sources` names: every file is opened and every key checked, and nothing is written.

    Unless it says otherwise a request runs a schedule of the release, `camera`, or with SparseCtrl `image` or `sketch`: those
    of fewer steps have a weight that is an estimate. `CheckpointError` names what does not fit; `say` is told what takes its
    time.
    """
    files = open_animatediff(sources)
    config, vae = files.unet_config, files.vae.module
    scale = 2 ** (len(vae.config.block_out_channels) - 1)  # type: ignore[union-attr, arg-type]
    grid, most = scale * 2 ** (len(config["block_out_channels"]) - 1), config["motion_max_seq_length"]
    if not 2 <= frames <= most or min(height, width) < grid or height % grid or width % grid:
        raise CheckpointError(
            f"frames is {frames} and the size {height}x{width}; allowed: 2 to {most} frames, for which the motion modules have "
            f"positions, and multiples of {grid} pixels."
        )
    try:
        alphas, prediction = noise_schedule(files.scheduler)
    except ValueError as error:
        raise CheckpointError(f"{sources.base / 'scheduler'}: {error}. Give the folder of a Stable Diffusion 1.5.") from None
    latents = (frames, config["in_channels"], height // scale, width // scale)
    with meta():
        unet = TappedUNet(motion_unet(config, sources.group_norm), semantic=sources.semantic)
    video, text, query = replace(files.vae, reports=()), sources.keeping(files.text), sources.sentence_encoder()
    names: tuple[str, ...] = ("camera", "object")
    fixed = sources.record == "representation"
    if (control := _control(sources, files, unet.unet, frames)) is not None:
        names = ("image" if control.encode is not None else "sketch", *names)
    say("text of the empty prompt")
    ids = tokenized(files.tokenizer, "")
    with torch.no_grad():
        null_text: Tensor = files.text.loaded()(ids)
    count = max(n for n in range(1, DECODED + 1) if frames % n == 0)
    decoder = sources.keeping(replace(video, module=DecodeFrames(vae).eval()))
    decode = Graph(decoder, {"latents": Array((1, count, *latents[1:]))}, ("video",))
    return clone_system(
        Parts(
            name="motionclone",
            unet=unet,
            null_text=null_text,
            text=text,
            text_size=(null_text.shape[1], null_text.shape[2]),
            vocabulary=text.module.model.config.vocab_size,  # type: ignore[union-attr, arg-type]
            tokenizer=files.tokenizer,
            encode=sources.keeping(replace(video, module=EncodeFrames(vae).eval())),
            decoding=decoding({"decode": decode}, [(count, count)] * (frames // count), latents, scale),
            latents=latents,
            scale=scale,
            query=query,
            schedules=released_schedules(alphas, prediction, names),
            alphas=alphas,
            weights={f"unet.{name}": lazy for name, lazy in sources.kept(files.unet).items()},
            clips=ONE_CLIP,
            default=(names[0], RELEASED[names[0]].steps),
            control=control,
            composed=not (fixed or sources.semantic),
            fixed_noise=fixed,
            semantic=sources.semantic,
            provenance={
                "dtype": sources.dtype, "group_norm": sources.group_norm, "extracted_at": EXTRACTED, "record": sources.record
            },
            reports=files.reports,
        )
    )  # fmt: skip


def _control(sources: MotionCloneSources, files: AnimateDiff, unet: Any, frames: int) -> Control | None:
    """SparseCtrl of the files, if it is there; `CheckpointError` where it is not for the UNet."""
    if (found := files.sparsectrl) is None:
        return None
    with meta():
        net = prepared(SparseControlNetModel(**found.config), sources.group_norm)
    for name in ("block_out_channels", "layers_per_block", "cross_attention_dim"):
        if _listed(net.config[name]) != _listed(unet.config[name]):
            raise CheckpointError(
                f"{sources.sparsectrl}: {name} is {net.config[name]}, and the UNet's is {unet.config[name]}; they must be "
                "equal. Give SparseCtrl for this base."
            )
    if frames > (most := net.config["motion_max_seq_length"]):
        raise CheckpointError(f"frames is {frames}; {sources.sparsectrl} has positions for {most}. Give that many or fewer.")
    encode = replace(files.vae, module=EncodeImage(files.vae.module).eval(), reports=())
    return Control(net, sources.kept(found.weights), sources.keeping(encode) if found.mode == "rgb" else None)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def tokenized(text: TokenizerText, words: str) -> Tensor:
    """Token ids of `words`, padded, `[1, L]` int64."""
    made = Tokenizer.from_str(text.json)
    made.no_padding()
    made.no_truncation()
    ids = made.encode(words).ids
    return torch.tensor([ids + [text.pad_id] * (text.max_length - len(ids))])
