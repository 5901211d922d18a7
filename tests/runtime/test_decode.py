"""Decoding in chunks and tiles: exact where it says so, no seam where a decoder looks at one place, plain errors."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from motionrt.runtime.bundle.bundle import Dim
from motionrt.runtime.decode import OVERLAP, decode_video, ramp, tile_size, tiles
from motionrt.runtime.errors import BundleError


def bundle(**graphs: dict[str, tuple[int, ...]]) -> Any:
    """A bundle as far as the decoder looks at it: graph -> input -> sizes."""
    specs = {
        name: {port: SimpleNamespace(name=port, dims=tuple(Dim("", n, n, n) for n in shape)) for port, shape in inputs.items()}
        for name, inputs in graphs.items()
    }
    return SimpleNamespace(
        path="here",
        graphs=specs,
        graph=lambda name: SimpleNamespace(inputs=list(specs[name].values())),
        port=lambda name, port: specs[name][port],
    )


def running_sum(name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A decoder that looks back in time: pictures are sums of all latents so far, each shown twice as large."""
    assert (name == "decode") == ("cache.sum" not in inputs)
    sums = np.cumsum(inputs["latents"], axis=1) + inputs.get("cache.sum", 0)
    return {"video": sums.repeat(2, axis=3).repeat(2, axis=4), "next_cache.sum": sums[:, -1:]}


@pytest.mark.parametrize(("frames", "first"), [(5, 3), (13, 3), (4, 2)], ids=["17 frames", "49 frames", "even"])
@pytest.mark.parametrize("size", [(4, 6), (3, 6), (3, 4), (2, 2)], ids=str)
def test_chunks_and_tiles_give_the_whole_video(frames: int, first: int, size: tuple[int, int]) -> None:
    latents = np.random.default_rng(0).standard_normal((1, frames, 3, 4, 6)).astype(np.float32)
    shape = (3, *size)
    made = bundle(decode={"latents": (1, first, *shape)}, decode_next={"latents": (1, 2, *shape), "cache.sum": (1, 1, *shape)})
    video = decode_video(running_sum, made, latents)
    np.testing.assert_allclose(video, running_sum("decode", {"latents": latents})["video"], atol=1e-5)


def test_one_graph_decodes_chunks_that_do_not_know_each_other() -> None:
    calls: list[Any] = []

    def negative(name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        calls.append((name, inputs["latents"].shape))
        return {"video": -inputs["latents"]}

    latents = np.random.default_rng(0).standard_normal((1, 16, 3, 2, 2)).astype(np.float32)
    np.testing.assert_array_equal(decode_video(negative, bundle(decode={"latents": (1, 8, 3, 2, 2)}), latents), -latents)
    assert calls == [("decode", (1, 8, 3, 2, 2))] * 2


@pytest.mark.parametrize("length", [7, 13, 60, 90])
def test_tiles_cover_a_side_with_weights_that_sum_to_1(length: int) -> None:
    for size in {1 + length // 4, tile_size(length, 2), tile_size(length, 3), length}:
        total = np.zeros(3 * length)
        for start, span in tiles(length, size):
            assert 0 <= start <= length - size
            total[3 * start : 3 * (start + size)] += ramp(span, 3)
        np.testing.assert_allclose(total, 1, atol=1e-6)
    assert len(tiles(length, tile_size(length, 2))) == 2 and tiles(length, length) == [(0, (length, 0, 0))]
    if length > 7:
        assert all(after >= int(OVERLAP * size) for _, (size, _, after) in tiles(length, tile_size(length, 3))[:-1])


@pytest.mark.parametrize(
    ("graphs", "message"),
    [
        ({"decode": {"latents": (1, 4, 3, 2, 2)}}, r"'decode' takes latents \[1, 4, 3, 2, 2\], which do not make up \[1, 5,"),
        ({"decode": {"latents": (1, 8, 3, 2, 2)}}, "do not make up"),
        ({"decode": {"latents": (1, 5, 3, 4, 2)}}, "do not make up"),
        ({"decode": {"latents": (5, 3, 2, 2)}}, "has 4 dimensions"),
        (
            {"decode": {"latents": (1, 3, 3, 2, 2)}, "decode_next": {"latents": (1, 2, 3, 2, 2), "cache.x": (1,)}},
            "'decode_next' needs what graph 'decode' does not give",
        ),
    ],
    ids=["rest", "more frames", "larger", "rank", "cache"],
)
def test_graphs_that_do_not_make_up_the_video_are_refused(graphs: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        decode_video(lambda name, inputs: {"video": inputs["latents"]}, bundle(**graphs), np.zeros((1, 5, 3, 2, 2), np.float32))
