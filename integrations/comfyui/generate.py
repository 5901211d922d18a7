"""The node *Generate* of each bundle: its inputs are those that the bundle declares, and nothing here names one."""

from __future__ import annotations

import re
import tempfile
from typing import Any, ClassVar

from comfy_api.latest import io

from motionrt import MotionPipeline
from motionrt.runtime.bundle.manifest import (
    ChoiceInput,
    ColumnInput,
    FieldInput,
    ImageInput,
    Input,
    Manifest,
    MaskInput,
    NumberInput,
    TextInput,
    TracksInput,
)  # fmt: skip
from motionrt.runtime.noise import MAX_SEED

from .borders import file_of_video, image_of_pixels, pixels_of_image, run, told, tracks_of_text, video_of_image

CATEGORY = "MotionRT"
BUNDLE = io.Custom("MOTIONRT_BUNDLE")  # an open MotionPipeline
REFERENCES = io.Custom("MOTIONRT_REFERENCES")  # a list of References, most similar first
OWN = "as the bundle"  # the first solver in the list
_STEP = 0.05  # of a number, by a click


def seed_input() -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True)


def steps_input() -> io.Int.Input:
    return io.Int.Input("steps", default=0, min=0, max=1000, tooltip="Denoising steps; 0: as many as is usual.")


def outputs() -> list[io.Output]:
    """Of every node that makes a video."""
    return [
        io.Image.Output("frames"), io.Video.Output("video"), io.Float.Output("fps"),
        io.String.Output("references", tooltip="The clips whose motion was used, and what else is to be said."),
    ]  # fmt: skip


class Generate(io.ComfyNode):
    """A video of what the bundle declares; see `of`."""

    manifest: ClassVar[Manifest]

    @classmethod
    def of(cls, manifest: Manifest) -> type[Generate]:
        """The node for bundles of this name."""
        return type(f"{cls.__name__}_{re.sub(r'[^A-Za-z0-9]+', '_', manifest.name)}", (cls,), {"manifest": manifest})

    @classmethod
    def define_schema(cls) -> io.Schema:
        declared, loops = cls.manifest.inputs, cls.manifest.loops.values()
        solvers = sorted({name for loop in loops for name in loop.schedules})
        inputs = [BUNDLE.Input("bundle"), *(_input(name, spec) for name, spec in declared.items())]
        inputs += [seed_input(), steps_input(), io.Combo.Input("solver", options=[OWN, *solvers], default=OWN)]
        if cls.manifest.memory is not None:
            inputs += [
                REFERENCES.Input("references", optional=True, tooltip="Of Motion Search; else they are found by the prompt."),
                io.Video.Input("reference_video", optional=True, tooltip="A clip to take the motion from, in place of these."),
            ]
        return io.Schema(
            node_id=f"MotionRT{cls.__name__}", display_name=f"MotionRT Generate ({cls.manifest.name})",
            category=CATEGORY, inputs=inputs, outputs=outputs(), description="Makes a video whose motion is that of clips.",
        )  # fmt: skip

    @classmethod
    def execute(
        cls, bundle: MotionPipeline, seed: int, steps: int, solver: str, references: Any = None, reference_video: Any = None,
        **given: Any,
    ) -> io.NodeOutput:  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="motionrt-") as folder:
            asked = {name: _value(name, cls.manifest.inputs[name], value, folder) for name, value in given.items()}
            if reference_video is not None:
                references = [file_of_video(reference_video, folder, "reference_video")]
            asked |= {"references": references, "steps": steps or None, "solver": None if solver == OWN else solver}
            job = bundle.start(bundle.request(seed=seed, **asked))
            run(job)
        result = bundle.result(job)
        frames = image_of_pixels(result.frames)
        notes = [note for note in (told(result.references), result.fallback, *result.notes) if note]
        return io.NodeOutput(frames, video_of_image(frames, result.fps), result.fps, "\n".join(notes))


def _input(name: str, spec: Input) -> io.Input:
    """The input of a node for one that a bundle declares."""
    tip = spec.help or None
    match spec:
        case ImageInput():
            return io.Image.Input(name, tooltip=tip)
        case MaskInput():
            return io.Mask.Input(name, optional=True, tooltip=tip)
        case FieldInput():
            return io.Video.Input(name, optional=True, tooltip=tip)
        case TracksInput():
            lines = f'{tip or ""} A line "x,y x,y" for each, in pixels of the picture.'.lstrip()
            return io.String.Input(name, default="", multiline=True, optional=True, tooltip=lines)
        case TextInput():
            return io.String.Input(name, default=spec.default or "", multiline=True, tooltip=tip)
        case ChoiceInput():
            return io.Combo.Input(name, options=list(spec.options), default=spec.default, tooltip=tip)
        case NumberInput():
            return io.Float.Input(name, default=spec.default, min=spec.min, max=spec.max, step=_STEP, tooltip=tip)
        case ColumnInput():  # without a default there is nothing that a widget could show: only a link gives it
            there = spec.default is not None
            return io.Float.Input(
                name, default=spec.default, step=_STEP, tooltip=tip, optional=not there, force_input=not there or None
            )


def _value(name: str, spec: Input, value: Any, folder: str) -> Any:
    """What the pipeline takes for what ComfyUI passes; None is the bundle's own."""
    match spec:
        case _ if value is None:
            return None
        case ImageInput() | MaskInput():
            return pixels_of_image(value)
        case FieldInput():
            return file_of_video(value, folder, name)
        case TracksInput():
            return tracks_of_text(name, value) or None
        case ColumnInput():
            return None if value == spec.default else value  # the rows may hold another number in some steps
        case _:
            return value
