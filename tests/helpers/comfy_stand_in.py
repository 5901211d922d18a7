"""A stand-in for the V3 classes of ComfyUI, as far as our nodes use them. `comfy_runner.py` runs workflows on it.

It is written from what ComfyUI documents and does, and takes no argument that ComfyUI does not take.
"""

from __future__ import annotations

import io as bytesio
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import av
import numpy as np
import torch
from PIL import Image

from motionrt.runtime.media.video import write_video

WIDGETS = ("INT", "FLOAT", "STRING", "COMBO", "BOOLEAN")


# --- comfy_api.latest -------------------------------------------------------------------------------------------------


@dataclass
class Put:
    """An input: what a node takes."""

    id: str
    display_name: str | None = None
    optional: bool = False
    tooltip: str | None = None
    lazy: bool | None = None
    io_type: ClassVar[str]

    @property
    def widget(self) -> bool:
        return self.io_type in WIDGETS and not getattr(self, "force_input", None)

    def check(self, value: Any) -> str | None:
        """What ComfyUI says of a value that is written in a workflow; None: nothing."""
        return None if self.widget else "it has no widget"


@dataclass
class _Widget(Put):
    default: Any = None
    socketless: bool | None = None
    force_input: bool | None = None


@dataclass
class _Number(_Widget):
    min: float | None = None
    max: float | None = None
    step: float | None = None

    def check(self, value: Any) -> str | None:
        low, high = (-np.inf if self.min is None else self.min), (np.inf if self.max is None else self.max)
        return super().check(value) or (None if low <= value <= high else f"{value} is not from {low} to {high}")


@dataclass
class _Int(_Number):
    control_after_generate: bool | None = None


@dataclass
class _String(_Widget):
    multiline: bool = False
    placeholder: str | None = None


@dataclass
class _Combo(_Widget):
    options: list[str] = field(default_factory=list)

    def check(self, value: Any) -> str | None:
        return None if value in self.options else f"{value!r} is not in {self.options}"


@dataclass
class Given:
    """An output."""

    id: str | None = None
    display_name: str | None = None
    tooltip: str | None = None
    is_output_list: bool = False
    io_type: ClassVar[str]


def kind(io_type: str, put: type[Put] = Put) -> Any:
    """A type of ComfyUI: `.Input` and `.Output`."""
    bases: dict[str, type] = {"Input": put, "Output": Given}
    return SimpleNamespace(**{name: type(f"{io_type}.{name}", (base,), {"io_type": io_type}) for name, base in bases.items()})


@dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Put] = field(default_factory=list)
    outputs: list[Given] = field(default_factory=list)
    hidden: list[Any] = field(default_factory=list)
    description: str = ""
    is_output_node: bool = False

    def __post_init__(self) -> None:
        for ids in ([put.id for put in self.inputs], [given.id for given in self.outputs]):
            assert len(ids) == len({*ids}), f"{self.node_id} has an id twice: {ids}"


class NodeOutput:
    def __init__(self, *values: Any, ui: Any = None) -> None:
        self.values, self.ui = values, ui


class ComfyNode:
    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        return None

    @classmethod
    def execute(cls, **inputs: Any) -> NodeOutput:
        raise NotImplementedError


class ComfyExtension:
    async def on_load(self) -> None:
        pass

    async def get_node_list(self) -> list[type[ComfyNode]]:
        raise NotImplementedError


io = SimpleNamespace(
    ComfyNode=ComfyNode, Schema=Schema, NodeOutput=NodeOutput, Custom=kind, Input=Put, Output=Given, Image=kind("IMAGE"),
    Mask=kind("MASK"), Video=kind("VIDEO"), Int=kind("INT", _Int), Float=kind("FLOAT", _Number), String=kind("STRING", _String),
    Combo=kind("COMBO", _Combo),
)  # fmt: skip


@dataclass
class VideoComponents:
    images: torch.Tensor
    frame_rate: Fraction
    audio: Any = None


class VideoFromComponents:
    def __init__(self, components: VideoComponents) -> None:
        self._parts = components

    def get_components(self) -> VideoComponents:
        return self._parts

    def save_to(self, path: str) -> None:
        assert isinstance(self._parts.frame_rate, Fraction)
        pixels = (self._parts.images * 255).clamp(0, 255).byte().numpy()
        write_video(path, pixels, self._parts.frame_rate)


class VideoFromFile:
    def __init__(self, file: str | bytesio.BytesIO) -> None:
        assert isinstance(file, str | bytesio.BytesIO)
        self._data = Path(file).read_bytes() if isinstance(file, str) else file.getvalue()

    def get_components(self) -> VideoComponents:
        with av.open(bytesio.BytesIO(self._data)) as container:
            rate = Fraction(container.streams.video[0].average_rate or 1)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return VideoComponents(torch.from_numpy(np.stack(frames).astype(np.float32) / 255), rate)

    def save_to(self, path: str) -> None:
        Path(path).write_bytes(self._data)


# --- comfy ------------------------------------------------------------------------------------------------------------


class InterruptProcessingException(Exception):
    pass


class ProgressBar:
    """What is shown of it is kept: (done, total, whether with a picture)."""

    shown: ClassVar[list[tuple[int, int, bool]]] = []

    def __init__(self, total: int) -> None:
        self.total = total

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        assert preview is None or preview[0] == "JPEG" and isinstance(preview[1], Image.Image)
        self.shown.append((value, total or self.total, preview is not None))
