"""Motion-I2V (arXiv 2401.15977) as a system: an image and words in; where everything goes, and a video in which it goes there.

    export_system(motion_system(Parts(...)), out)                                          # modules in memory: the demo

Two loops in one plan: latents of the fields, which a request may draw on or give whole, then latents of the pictures behind the
first. What is drawn takes the ControlNet; where nothing is, the steps run without it.

Graphs of steps are for one request at a time, as MotionClone's are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from motionrt.export.checkpoints.files import KeyReport, Lazy
from motionrt.export.onnx.from_torch import Range
from motionrt.export.systems.decoding import Decoding
from motionrt.export.systems.motion_i2v.augmented import Tables
from motionrt.export.systems.motion_i2v.fields import Held, Joined, Strides
from motionrt.export.systems.motion_i2v.networks import FlowUNet, Trajectories, VideoUNet
from motionrt.export.systems.motion_i2v.rows import COLUMNS, FLOW, RELEASED
from motionrt.export.systems.motion_i2v.step import (
    DRAWN_CHANGES,
    FLOW_CHANGES,
    GUIDED,
    VIDEO_CHANGES,
    DrawnStep,
    FlowStep,
    Times,
    VideoStep,
)
from motionrt.export.systems.motionclone.system import Draw
from motionrt.export.systems.system import Array, Graph, Network, Schedules, Step, System, TokenizerText, lengths
from motionrt.runtime.bundle.manifest import (
    ColumnInput,
    FieldInput,
    ImageInput,
    Input,
    Loop,
    MaskInput,
    Node,
    NumberInput,
    Output,
    TextInput,
    TracksInput,
    Without,
)

MOTION, VIDEO, FPS = "motion", "video", 8  # the loops
STRIDE = 8.0  # pictures of the training videos from one field of the release to the next
STRENGTH = (0.25, 4.0)  # allowed
UNIT = 8  # pixels from where a drag begins that follow it: those of the ControlNet's training
BOTH, PLAIN = (-1.0, 1.0), (0.0, 1.0)


@dataclass(frozen=True)
class Parts:
    """What a Motion-I2V system is made of.

    `latents` F, C, h, w of the video, `scale`: pixels of a latent; `encode`: pictures `[1, 3, H, W]` to latents; `seen`: the
    range of the picture that stage 1 sees, (0, 1) as released: the other sees it in (-1, 1); `fields`: from `motion_latents` to
    `field`, displacements in pixels; `sparse`: a `Sparse`; without `drawn`, the ControlNet, nothing can be dragged.
    `schedules`, `guidance`: of the loops MOTION and VIDEO; guidance None: no branch without the prompt. `default`: steps of
    both. `weights`: of "stage1", "stage2" and "drawn", by their names, where the modules have none (released files).

    Where `stage2` has the released form, the ControlNet runs always; else only where something is drawn.
    """

    name: str
    stage1: FlowUNet
    stage2: VideoUNet
    text: Network
    text_size: tuple[int, int]
    vocabulary: int
    tokenizer: TokenizerText
    encode: Network
    fields: Decoding
    decoding: Decoding
    latents: tuple[int, int, int, int]
    scale: int
    schedules: Mapping[str, Schedules]
    drawn: Trajectories | None = None
    sparse: Network | None = None
    seen: tuple[float, float] = PLAIN
    guidance: tuple[float | None, float | None] = (7.0, 7.0)
    unit: int = UNIT
    stride: float = STRIDE
    default: int = RELEASED
    weights: Mapping[str, Mapping[str, Lazy]] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    reports: tuple[KeyReport, ...] = ()

    def network(self, module: nn.Module, **places: str) -> Network:
        """Of `module`, which has the networks of these names at `places`."""
        if self.weights is None:
            return Network(module.eval())
        found = {
            f"{place}.{name}": lazy for which, place in places.items() for name, lazy in self.weights.get(which, {}).items()
        }
        return Network(module.eval(), found)


def motion_system(parts: Parts) -> System:
    """The system of `parts`."""
    frames, _, height, width = parts.latents
    size, fields = (height * parts.scale, width * parts.scale), frames - 1
    grids = parts.stage2.grids(height, width)
    tables = Tables(grids).sizes(fields)
    steps, times = _steps(parts, fields, size, {
        name: Array(shape, torch.int64 if below else torch.float32, below) for name, (shape, below) in tables.items()
    })  # fmt: skip
    text = Array((1, *parts.text_size))
    latents, first, field_ = (
        Array((1, fields, *parts.latents[1:])),
        Array((1, *parts.latents[1:])),
        Array((1, fields, 2, *size)),
    )
    mask = Array((1, 1, *size))
    graphs = {
        "text": Graph(parts.text, {"input_ids": Array((1, text.dims[1]), torch.int64, parts.vocabulary)}, ("text",)),  # type: ignore[arg-type]
        "encode": Graph(parts.encode, {"image": Array((1, 3, *size))}, ("reference",)),
        "strides": Graph(Network(Strides(fields, parts.stride).eval()), {"strength": Array((1,))}, ("strides",)),
        "times": times,
        "warp": Graph(Network(Tables(grids).eval()), {"moves": field_}, tuple(tables)),
        "held": Graph(Network(Held().eval()), {"field": field_, "brush": mask}, ("moves",)),
        "start": Graph(Network(Draw().eval()), {"noise": latents}, ("start",)),
        "joined": Graph(Network(Joined().eval()), {"reference": first, "moved": latents}, ("latents",)),
        **parts.fields.graphs,
        **parts.decoding.graphs,
    }
    if parts.sparse is not None:
        graphs["sparse"] = Graph(parts.sparse, {"flow": field_, "mask": mask}, ("hint",))
    one = parts.seen == BOTH
    seen = {"image_latents": "reference"} if one else {}
    plan: tuple[str | Node, ...] = (
        Node("text", {"input_ids": "prompt.input_ids"}),
        *([Node("text", {"input_ids": "negative_prompt.input_ids"}, {"text": "negative_text"})] if any(parts.guidance) else []),
        "strides",
        "encode",
        *([] if one else [Node("encode", {"image": "image_01"}, {"reference": "image_latents"})]),
        *([Node("sparse", {"flow": "drag.flow", "mask": "drag.mask"})] if parts.sparse is not None else []),
        *(Node(f"request{step.suffix}", seen) for step in steps[:-1]),
        "request_video", MOTION, parts.fields.name, "held", "warp", "start", VIDEO, "joined", parts.decoding.name,
    )  # fmt: skip
    loops = _loops(parts, tuple(f"step{step.suffix}" for step in steps[:-1]))
    return System(
        parts.name,
        inputs=_inputs(parts, fields, size),
        graphs=graphs,
        steps=steps,
        plan=plan,
        loops={**loops, **parts.fields.loops, **parts.decoding.loops},
        schedules={**parts.schedules, **parts.fields.schedules, **parts.decoding.schedules},
        output=Output("video", frames, *size, float(FPS), field="field"),
        tokenizers={"text": parts.tokenizer},
        approximations=(*parts.fields.approximations, *parts.decoding.approximations),
        provenance={**parts.provenance, "form": parts.stage2.form},
        reports=parts.reports,
    )


def _steps(parts: Parts, fields: int, size: tuple[int, int], tables: Mapping[str, Array]) -> tuple[tuple[Step, ...], Graph]:
    """The steps of the fields, the drawn ones first, and of the video, which reads `tables`; and the graph of their times."""
    text, latents = Array((1, *parts.text_size)), Array((1, fields, *parts.latents[1:]))
    first, one, steps = Array((1, *parts.latents[1:])), Array((1,)), Range(1, 25, 1000)
    arrays = {
        "text": text, "negative_text": text, "latents": latents, "start": latents, "reference": first, "image_latents": first,
        "brush": Array((1, 1, *size)), **tables,
        "hint": Array((1, fields, parts.latents[1] + 1, *parts.latents[2:])),
    }  # fmt: skip
    nets: dict[str, FlowUNet | Trajectories] = {
        "times": parts.stage1,
        **({} if parts.drawn is None else {"drawn_times": parts.drawn}),
    }
    for name, net in nets.items():
        arrays[name] = Array((1, fields, sum(block.time_emb_proj.out_features for block in net.resnets())))

    def step(module: nn.Module, changes: Mapping[str, str], suffix: str, places: Mapping[str, str]) -> Step:
        guided, columns = parts.guidance[suffix == "_video"] is not None, len(COLUMNS if suffix == "_video" else FLOW) - 3
        changes = {**changes, **GUIDED} if guided else dict(changes)
        own = {**arrays, "coefficients": Array((1, columns))}
        return Step(
            parts.network(module, **places), changes, {name: own.get(name, one) for name in changes}, ("next_latents",),
            {"steps": steps}, suffix, weights_of="step_drawn" if suffix == "_plain" and parts.drawn is not None else None,
        )  # fmt: skip

    found = [
        step(FlowStep(parts.stage1), FLOW_CHANGES, "_plain", {"stage1": "net"}),
        step(
            VideoStep(parts.stage2, fused=True), {**VIDEO_CHANGES, **dict.fromkeys(tables, "step")}, "_video",
            {"stage2": "net"},
        ),
    ]
    if parts.drawn is not None:
        drawn = DrawnStep(parts.stage1, parts.drawn)
        found.insert(0, step(drawn, DRAWN_CHANGES, "_drawn", {"stage1": "net", "drawn": "drawn"}))
    network = parts.network(Times(*nets.values()), **dict(zip(("stage1", "drawn"), ("nets.0", "nets.1"), strict=True)))
    inputs = {"timestep": Array(("steps",)), "strides": Array((1, fields))}
    return tuple(found), Graph(network, inputs, tuple(nets), {"steps": steps})


def _loops(parts: Parts, motion: tuple[str, ...]) -> dict[str, Loop]:
    """The loops over latents of fields, by the graphs `motion`, and of pictures."""
    found = {}
    for name, graphs, columns, guidance in zip(
        (MOTION, VIDEO), (motion, ("step_video",)), (FLOW, COLUMNS), parts.guidance, strict=True
    ):
        schedules = parts.schedules[name]
        default = next(iter(schedules))
        feeds = {"timestep": ("timestep",), "coefficients": columns[3:]}
        found[name] = Loop(
            graphs=graphs,
            columns=columns,
            schedules=lengths(schedules),
            default=(default, parts.default),
            feeds=feeds | ({} if guidance is None else {"guidance": ("guidance",)}),
            carry={"next_latents": "latents"},
            start={"latents": "noise" if name == MOTION else "start"},
            gives={"latents": "motion_latents" if name == MOTION else "moved"},
            tables=("times",) if name == MOTION else (),
            without=_without(parts) if name == MOTION else {},
        )
    return found


def _without(parts: Parts) -> dict[str, Without]:
    """What runs in place of the drawn steps where nothing is drawn."""
    if parts.drawn is None or parts.stage2.form == "released":
        return {}
    return {"step_drawn": Without("step_plain", ("drag", "brush"))}


def _inputs(parts: Parts, fields: int, size: tuple[int, int]) -> dict[str, Input]:
    """What a request gives."""
    gives = {"image": BOTH} | ({} if parts.seen == BOTH else {"image_01": parts.seen})
    motion, video = parts.guidance
    found: dict[str, Input] = {
        "image": ImageInput(*size, gives, "The picture that the video begins with."),
        "prompt": TextInput("text", None, "What the video shows."),
    }
    if any(parts.guidance):
        found["negative_prompt"] = TextInput("text", "", "What the video should not show.")
    if parts.drawn is not None:
        found["drag"] = TracksInput(
            "image", fields, parts.unit, parts.scale, "brush", "Where things go: points of the picture, the first where it is."
        )
    found["brush"] = MaskInput("image", "What may move; all else stands still.")
    found["field"] = FieldInput("image", fields, "Where every pixel goes, in place of what would be found.")
    found["strength"] = NumberInput(1.0, *STRENGTH, "How far things move.")
    if motion is not None:
        found["motion_guidance"] = ColumnInput(
            MOTION, "guidance", motion, "How strongly motion follows the prompt; 1: not more."
        )
    if video is not None:
        found["guidance"] = ColumnInput(VIDEO, "guidance", video, "How strongly the prompt is followed; 1: no guidance.")
    return found
