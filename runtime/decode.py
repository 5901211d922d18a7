"""Latents to pictures in pieces that bound memory: chunks of frames and tiles of the picture, as the graphs declare them.

Graph `decode` takes `latents [B, f, C, h, w]`. With f < F it is run for chunk after chunk along the frames: the first chunk by
`decode`, the others by `decode_next` if the bundle has one, else by `decode` again. A later chunk's input `x` is the output
`next_x` of the chunk before (the last rows of a causal convolution's input): so chunks are exact, there is no seam. With h < H
or w < W the picture is cut into overlapping tiles of one size, blended linearly: a tile's group norms see the tile alone, so
tiles are an approximation that an export opts into.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.backends.seam import Array, fetch
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import BackendError, BundleError

Call = Callable[[str, Mapping[str, Any]], dict[str, Any]]
OVERLAP = 1 / 6  # of a tile, at least


def decode_video(call: Call, bundle: Bundle, latents: Any) -> Array:
    """`latents [B, F, C, H, W]` (on the host or a device) -> `[B, T, 3, H', W']` float32 on the host.

    `call(graph, inputs)` runs a graph of `bundle`. `BundleError` where its graphs' sizes do not add up.
    """
    frames, _, height, width = (dim.max for dim in _latents(bundle, "decode")[1:])
    if (frames, height, width) == (latents.shape[1], *latents.shape[3:]):
        whole: Array = fetch(call("decode", {"latents": latents})["video"])  # in one piece: nothing leaves the device before
        return whole
    latents = fetch(latents)
    if frames > latents.shape[1] or height > latents.shape[3] or width > latents.shape[4]:
        raise _unfit(bundle, "decode", latents.shape)
    total: Array | None = None
    for top, rows in tiles(latents.shape[3], height):
        for left, columns in tiles(latents.shape[4], width):
            video = _chunks(call, bundle, latents[..., top : top + height, left : left + width], frames)
            if total is None:
                scale = video.shape[-1] // width
                total = np.zeros((*video.shape[:3], latents.shape[3] * scale, latents.shape[4] * scale), np.float32)
            weight = ramp(rows, scale)[:, None] * ramp(columns, scale)
            total[..., top * scale : (top + height) * scale, left * scale : (left + width) * scale] += video * weight
    assert total is not None
    return total


def to_frames(video: Array) -> NDArray[np.uint8]:
    """Float [1, F, 3, H, W] in [-1, 1] to uint8 [F, H, W, 3]; `BackendError` if a value is not finite."""
    if not np.isfinite(video).all():
        raise BackendError("the decoder gave NaN or infinite values; export the bundle again, or lower the guidance.")
    pixels = np.clip(np.rint((video[0] + 1) * 127.5), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def tiles(length: int, size: int) -> list[tuple[int, tuple[int, int, int]]]:
    """Tiles of `size` that cover `length`: start, and (size, overlap with the tile before, overlap with the next)."""
    count = 1 + math.ceil((length - size) / (size * (1 - OVERLAP)))
    starts = [round(i * (length - size) / max(1, count - 1)) for i in range(count)]
    ends = [start + size for start in starts]
    before = [0, *(end - start for end, start in zip(ends, starts[1:], strict=False))]
    return [(start, (size, a, b)) for start, a, b in zip(starts, before, [*before[1:], 0], strict=True)]


def tile_size(length: int, count: int) -> int:
    """The smallest size of which `count` tiles cover `length` with the least overlap."""
    return math.ceil(length / (count - (count - 1) * OVERLAP))


def ramp(span: tuple[int, int, int], scale: int) -> NDArray[np.float32]:
    """Weights of a tile's pixels along one axis: rising over the overlap before, falling over the next; sums are 1."""
    size, before, after = (scale * value for value in span)
    weight = np.ones(size, np.float32)
    weight[:before] = (np.arange(before) + 0.5) / max(1, before)
    weight[size - after :] = 1 - (np.arange(after) + 0.5) / max(1, after)
    return weight


def _chunks(call: Call, bundle: Bundle, latents: Array, first: int) -> Array:
    """One tile's frames, chunk after chunk."""
    name, size, start, kept, videos = "decode", first, 0, dict[str, Any](), list[Array]()
    while start < latents.shape[1]:
        if start + size > latents.shape[1]:
            raise _unfit(bundle, name, latents.shape)
        results = call(name, {"latents": np.ascontiguousarray(latents[:, start : start + size]), **kept})
        videos.append(fetch(results.pop("video")))
        start += size
        if "decode_next" in bundle.graphs:
            name, size = "decode_next", _latents(bundle, "decode_next")[1].max
            wanted = [port.name for port in bundle.graph(name).inputs if port.name != "latents"]
            if any(f"next_{port}" not in results for port in wanted):
                raise BundleError(f"bundle {bundle.path}: graph 'decode_next' needs what graph 'decode' does not give.")
            kept = {port: results[f"next_{port}"] for port in wanted}
    return np.concatenate(videos, axis=1)


def _latents(bundle: Bundle, graph: str) -> Any:
    dims = bundle.port(graph, "latents").dims
    if len(dims) != 5:
        raise BundleError(f"bundle {bundle.path}: `latents` of graph '{graph}' has {len(dims)} dimensions; it must have 5.")
    return dims


def _unfit(bundle: Bundle, graph: str, shape: tuple[int, ...]) -> BundleError:
    return BundleError(
        f"bundle {bundle.path}: graph '{graph}' takes latents [{', '.join(map(str, _latents(bundle, graph)))}], which do not "
        f"make up {list(shape)}. Export it again."
    )
