"""A bundle of MotionRAG's conditioning alone, at the released sizes with random weights, and videos and a memory for it.

Graphs: text_query (the packaged sentence encoder, its real weights), motion (VideoMAE-base and Resampler), appearance
(DINOv2-large and Resampler), cama. The structure is the exporter's own, of files of the released shapes; only the values
are drawn. Times do not depend on values; parity does not either, because both ways read the same weights.
"""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motionrt.benchmarks.models.sparse_models import MOTIONRAG, MotionSizes, write_encoders, write_motionrag
from motionrt.export.checkpoints.motionrag_files import SosToken, open_motionrag
from motionrt.export.checkpoints.text_query import packaged_encoder
from motionrt.export.exporter import export_system
from motionrt.export.systems.decoding import Decoding
from motionrt.export.systems.extrapolated import FRAMES
from motionrt.export.systems.motionrag_system import Base, Sources, motionrag_networks, motionrag_system
from motionrt.export.systems.system import Array, Graph, Network, System
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.indexing.clips import ClipEncoders, index_clips
from motionrt.runtime.media.video import write_video
from motionrt.runtime.memory.memory import MotionMemory

FPS = 8
BLOCK = {"transformer.transformer_blocks.0.attn1": 64}  # an adapter must be there to be opened; nothing here uses it
SUBJECTS = ("a red kite", "two white horses", "the old ferry", "a paper lantern", "thick smoke", "a small dog")
MOTIONS = ("drifts slowly to the left", "turns around on the spot", "rises and falls again", "runs towards the camera")


@dataclass(frozen=True)
class Sizes(MotionSizes):
    """And frames and (height, width) of a clip."""

    frames: int
    picture: tuple[int, int]


RELEASED = Sizes(**vars(MOTIONRAG), frames=17, picture=(480, 720))


@dataclass(frozen=True)
class Drawn:
    """A weight that is drawn from its name and shape: N(0, 1 / fan-in), scales around 1, biases small. float32."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def read(self) -> Tensor:
        draw = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        value = torch.randn(self.shape, generator=draw)
        if len(self.shape) > 1:
            return value * float(max(1, value[0].numel()) ** -0.5)
        return 0.02 * value + (0.0 if self.name.endswith("bias") else 1.0)


def drawn(network: Network) -> Network:
    """`network` with drawn weights in the place of those of its files."""
    return replace(network, weights={name: Drawn(name, tuple(lazy.shape)) for name, lazy in (network.weights or {}).items()})


def drawn_system(folder: Path, sizes: Sizes) -> System:
    """text_query, motion, appearance and cama of files of `sizes` (of zeros, in `folder`), with drawn weights in float32.

    It has no step, and cannot generate: its output is the motion that cama predicts.
    """
    write_encoders(folder, sizes, torch.float32)
    write_motionrag(folder / "rag", BLOCK, sizes, torch.float32)
    sos = SosToken(seed=42)
    files = open_motionrag(folder / "rag", BLOCK, overlay=False, sos=sos)
    sources = Sources(folder, folder / "rag", folder / "videomae", folder / "dinov2", dtype="float32", sos=sos)
    networks = motionrag_networks(sources, files, sizes.frames, sizes.picture)
    nothing = Network(torch.nn.Identity())  # in the place of what is taken out again
    graph, read = Graph(nothing, {}, ()), dict.fromkeys((*FRAMES, "coefficients"), Array(("batch",)))
    base = Base(
        "full-encoders", (sizes.frames, *sizes.picture), FPS, graph, Decoding({"decode": graph}), nothing, {}, read,
        {"none": {1: np.zeros((1, 9), np.float32)}},
    )  # fmt: skip
    whole = motionrag_system(
        base, {name: drawn(network) for name, network in networks.items()}, packaged_encoder(),
        (sizes.cama.num_queries, sizes.cama.dim), provenance={"weights": "random"},
    )  # fmt: skip
    graphs = {name: graph for name, graph in whole.graphs.items() if graph.outputs}
    inputs = {name: entry for name, entry in whole.inputs.items() if name in ("image", "prompt")}
    output = msgspec.structs.replace(whole.output, value="motion")
    return replace(
        whole, inputs=inputs, graphs=graphs, steps=(), plan=("appearance", "cama"), loops={}, schedules={}, output=output
    )


def moving_picture(number: int, frames: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A textured picture that moves and brightens, uint8 [F, H, W, 3]: something for a video codec to do."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (size[0] // 16 + 1, size[1] // 16 + 1, 3), np.uint8)
    picture = coarse.repeat(16, 0).repeat(16, 1)[: size[0], : size[1]]
    picture = np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
    shifts = rng.integers(-6, 7, 2)
    return np.stack([np.roll(picture, tuple(shifts * index), (0, 1)) for index in range(frames)])


def write_clips(folder: Path, count: int, size: tuple[int, int], rate: int = 24, seconds: float = 3) -> list[tuple[Path, str]]:
    """`count` H.264 files of `size`. At the model's own size they are the cheapest to decode. (file, caption)"""
    clips = []
    for number in range(count):
        path = folder / f"{number:03d}.mp4"
        write_video(path, moving_picture(number, round(rate * seconds), size), rate)
        clips.append((path, f"{SUBJECTS[number % len(SUBJECTS)]} {MOTIONS[number % len(MOTIONS)]}"))
    return clips


def write_memory(path: Path, bundle: Path, clips: Sequence[tuple[Path, str]], threads: int, say: Callable[[str], None]) -> None:
    """Index `clips` with the graphs of `bundle` into the memory `path`."""
    opened = Bundle.open(bundle)
    with MotionMemory.for_bundle(path, opened) as memory:
        made = ClipEncoders.from_bundle(opened, OnnxRuntimeBackend(threads))
        items = [(file, caption, None) for file, caption in clips]
        report = index_clips(memory, made, items, progress=lambda done, name: say(f"clip {done} of {len(items)} read"))
    if report.failed:
        raise RuntimeError(f"could not index: {report.failed}")


def prepare(folder: Path, count: int, threads: int, say: Callable[[str], None], videos: tuple[int, int] | None = None) -> Path:
    """Bundle, videos and memory in `folder`, made once: what is whole is kept. The folder of the videos' memory.

    videos: their height and width, for each of which there is another folder; the model's own if not given.
    """
    sizes = RELEASED
    if not (folder / "bundle" / "bundle.json").exists():
        with tempfile.TemporaryDirectory(prefix="motionrt-encoders-") as work:
            export_system(drawn_system(Path(work), sizes), folder / "bundle", say=say)
    height, width = videos or sizes.picture
    place = folder / f"{height}x{width}"
    if not (place / "done").exists():
        shutil.rmtree(place, ignore_errors=True)  # of a run that was stopped
        clips = write_clips(place / "clips", count, (height, width))
        write_memory(place / "memory", folder / "bundle", clips, threads, say)
        (place / "done").touch()
    return place
