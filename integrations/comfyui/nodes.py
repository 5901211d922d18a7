"""The nodes that are the same for every bundle: *Bundle*, *Motion Search* and *Remote*; and the list of all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy_api.latest import ComfyExtension, InputImpl, io
from numpy.typing import NDArray
from PIL import Image

from motionrt import MotionPipeline
from motionrt.runtime.backends.kinds import BACKENDS
from motionrt.runtime.errors import InputError, MediaError, shown
from motionrt.runtime.memory.memory import Reference
from motionrt.runtime.memory.search import Search
from motionrt.runtime.serve.client import SERVER, Client, ServerError
from motionrt.runtime.serve.work.written import write_preview

from . import found
from .borders import Watched, pixels_of_image, told
from .generate import BUNDLE, CATEGORY, REFERENCES, Generate, outputs, seed_input, steps_input

NONE = "none"
_WAIT = 0.5  # seconds between two looks at a job of a server
_GONE = 64, 64  # pixels of what stands for clips of which no video is there any more


class Bundle(io.ComfyNode):
    """A bundle, opened with the memories that it finds clips in."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        bundles, memories = found.folders(found.BUNDLE), found.folders(found.MEMORY)
        lines = "Further memories that are searched with it, a name on each line."
        return io.Schema(
            node_id="MotionRTBundle", display_name="MotionRT Bundle", category=CATEGORY,
            description="Opens a bundle of models/motionrt, once for as long as it is used.",
            inputs=[
                io.Combo.Input("bundle", options=[*bundles] or [NONE]),
                io.Combo.Input("memory", options=[NONE, *memories], default=NONE),
                io.String.Input("more_memories", default="", multiline=True, optional=True, tooltip=lines),
                io.Combo.Input("backend", options=[*BACKENDS, "auto"], default=next(iter(BACKENDS))),
            ],
            outputs=[BUNDLE.Output("bundle")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, bundle: str, memory: str, backend: str, more_memories: str = "") -> Any:
        return repr(found.stamp(bundle, _names(memory, more_memories)))

    @classmethod
    def execute(cls, bundle: str, memory: str, backend: str, more_memories: str = "") -> io.NodeOutput:
        return io.NodeOutput(found.pipeline(bundle, _names(memory, more_memories), backend))


class MotionSearch(io.ComfyNode):
    """Clips of the memory that move as a text says."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        where = "Only clips of which this holds: key=value, one on each line; a key again: any of its values."
        return io.Schema(
            node_id="MotionRTMotionSearch", display_name="MotionRT Motion Search", category=CATEGORY,
            description="Finds clips whose motion a text describes, and shows them side by side.",
            inputs=[
                BUNDLE.Input("bundle"), io.String.Input("prompt", multiline=True),
                io.Int.Input("k", default=4, min=1, max=64, tooltip="How many clips."),
                io.String.Input("where", default="", multiline=True, optional=True, tooltip=where),
            ],
            outputs=[REFERENCES.Output("references"), io.Image.Output("strip"), io.String.Output("text")],
        )  # fmt: skip

    @classmethod
    def execute(cls, bundle: MotionPipeline, prompt: str, k: int, where: str = "") -> io.NodeOutput:
        if bundle.memory is None:
            raise InputError("the bundle was opened without a memory; choose one in the node MotionRT Bundle.")
        clips = bundle.memory.search(bundle.embed(prompt), k, Search(where=_where(where)), prompt)
        looks = [_moving(bundle, clip) for clip in clips]
        shape = next((look.shape for look in looks if look is not None), (1, *_GONE, 3))
        strip = torch.cat([torch.full(shape, 0.5) if look is None else look for look in looks], dim=2)
        return io.NodeOutput(clips, strip, told(clips))


class Remote(io.ComfyNode):
    """A video that a server makes; this machine needs no bundle."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        key = (
            "Saved in workflows, and in files that carry them. Left empty it is MOTIONRT_API_KEY of ComfyUI's environment, for"
            " the server of MOTIONRT_SERVER and for this machine alone."
        )
        fields = 'What else the server\'s bundle takes, as JSON: {"motion_scale": 0.8, "references": 2}.'
        return io.Schema(
            node_id="MotionRTRemote", display_name="MotionRT Remote", category=CATEGORY,
            description="Has a MotionRT server make a video.",
            inputs=[
                io.String.Input("server", default=SERVER), io.String.Input("key", default="", optional=True, tooltip=key),
                io.String.Input("prompt", multiline=True), seed_input(), steps_input(),
                io.String.Input("fields", default="{}", multiline=True, optional=True, tooltip=fields),
                io.Image.Input("image", optional=True),
            ],
            outputs=outputs(),
        )  # fmt: skip

    @classmethod
    def execute(
        cls, server: str, prompt: str, seed: int, steps: int, key: str = "", fields: str = "", image: Any = None
    ) -> io.NodeOutput:
        client = Client(server, key or (None if server.rstrip("/") in _own() else ""))
        still = None if image is None else _png(pixels_of_image(image))
        watched = Watched(100)
        job = client.create(prompt, still, seed=seed, steps=steps or None, **_fields(fields))
        try:
            while job["status"] not in ("completed", "failed"):
                job = client.retrieve(job["id"], wait=_WAIT)
                watched.update(job["progress"])
        except BaseException:  # a stop: the server must not go on
            with contextlib.suppress(ServerError):  # it may be over already, or out of reach
                client.cancel(job["id"])
            raise
        client.wait(job["id"])  # says why, where it failed
        with tempfile.TemporaryDirectory(prefix="motionrt-") as folder:
            data = client.content(job["id"], Path(folder) / "video.mp4").read_bytes()
        video = InputImpl.VideoFromFile(BytesIO(data))
        parts = video.get_components()
        lines = [f"{clip['score'] or 0:.3f}  {clip['caption']}" for clip in job["motionrt"]["references"]]
        return io.NodeOutput(parts.images, video, float(parts.frame_rate), "\n".join(lines))


class MotionRT(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [Bundle, MotionSearch, Remote, *(Generate.of(manifest) for manifest in found.manifests())]


async def comfy_entrypoint() -> MotionRT:
    return MotionRT()


def _own() -> set[str]:
    """Servers that the environment's key is for: a workflow of somebody else may name any."""
    return {SERVER, os.environ.get("MOTIONRT_SERVER", SERVER).rstrip("/")}


def _names(memory: str, more: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in (memory, *more.splitlines()) if name.strip() not in ("", NONE)))


def _where(text: str) -> dict[str, list[str]] | None:
    """Lines `key=value` as a filter."""
    where: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        key, equals, value = line.partition("=")
        if not key or not equals:
            raise InputError(f"where is {shown(line)}; allowed is key=value on each line, such as dataset=mine.")
        where.setdefault(key, []).append(value)
    return where or None


def _fields(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text or "{}"))
    except (ValueError, TypeError):
        raise InputError(f'fields is {shown(text)}; allowed is a JSON object, such as {{"motion_scale": 0.8}}.') from None


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _moving(bundle: MotionPipeline, clip: Reference) -> torch.Tensor | None:
    """A small look at a clip as an IMAGE; None where its video is not there any more."""
    memory: Any = bundle.memory
    folder = getattr(memory, "memories", {clip.memory: memory})[clip.memory].path
    previews = Path(folder_paths.get_temp_directory()) / "motionrt"
    previews.mkdir(parents=True, exist_ok=True)
    try:
        file = previews / write_preview(bundle.bundle, folder, clip, previews)
    except MediaError:
        return None
    images: torch.Tensor = InputImpl.VideoFromFile(str(file)).get_components().images
    return images
