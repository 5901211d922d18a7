"""Encoders and decoders of the base models in torch against diffusers' own pipelines; the rows of chunks and tiles."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from by_path import load_by_path  # noqa: E402
from PIL import Image  # noqa: E402

from motionrt.export.checkpoints.encoders import picked  # noqa: E402
from motionrt.export.checkpoints.files import CheckpointError  # noqa: E402
from motionrt.export.systems import cogvideox as cogvideox_system  # noqa: E402
from motionrt.export.systems import svd as svd_system  # noqa: E402
from motionrt.export.systems.decoding import OVERLAP, decoding, tile_size, tiles_of  # noqa: E402
from motionrt.export.systems.motionrag_system import Sources  # noqa: E402
from motionrt.export.systems.system import Array, Graph, Network  # noqa: E402

models = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/tiny_models.py")
plain = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/plain_run.py")
HEIGHT, WIDTH = 16, 32


@pytest.fixture(scope="module")
def svd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder, and diffusers' pipeline of the same modules."""
    from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
    from transformers import CLIPImageProcessor

    folder = tmp_path_factory.mktemp("svd")
    parts = models.write_svd(folder)
    scheduler = EulerDiscreteScheduler(**models.EULER)
    pipe = StableVideoDiffusionPipeline(parts["vae"], parts["image_encoder"], parts["unet"], scheduler, CLIPImageProcessor())
    return folder, pipe


@torch.no_grad()
def test_svd_reads_the_still_as_diffusers_does(svd: tuple[Path, Any]) -> None:
    folder, pipe = svd
    still = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    noise = torch.randn(1, 3, HEIGHT, WIDTH)
    part = svd_system.still_encoder(folder, *svd_system.open_vae(folder), (HEIGHT, WIDTH))
    assert [report.what for report in part.reports] == ["image_encoder", "vae"]
    image = torch.from_numpy(still).permute(2, 0, 1)[None].float() / 127.5 - 1
    context, latents = part.loaded()(image, noise)
    torch.testing.assert_close(context, pipe._encode_image(Image.fromarray(still), "cpu", 1, False), atol=2e-5, rtol=1e-4)
    want = pipe._encode_vae_image(image + 0.02 * noise, "cpu", 1, False)
    torch.testing.assert_close(latents, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_svd_decodes_in_chunks_as_diffusers_does(svd: tuple[Path, Any]) -> None:
    folder, pipe = svd
    latents = torch.randn(1, 9, 4, HEIGHT // 2, WIDTH // 2)
    vae, network = svd_system.open_vae(folder)
    video = Network(svd_system.DecodeTemporal(vae), network.weights).loaded()(latents)
    want = pipe.decode_latents(latents, 9, 8).transpose(1, 2)
    torch.testing.assert_close(video, want, atol=1e-4, rtol=1e-4)
    whole = pipe.decode_latents(latents, 9, 9).transpose(1, 2)
    assert (whole - want).abs().max() > 1e-3  # the decoder looks along time: chunks are seen, and are the release's


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a CogVideoX VAE, and diffusers' VAE."""
    folder = tmp_path_factory.mktemp("cogvideox")
    return folder, models.write_cogvideox(folder)["vae"]


@torch.no_grad()
def decoded(folder: Path, latents: Any, tiles: int) -> Any:
    """Video of the decoder's graphs as torch modules, by the plan's loop where there is one."""
    made = cogvideox_system.decoder(*cogvideox_system.open_vae(folder), tuple(latents.shape[1:]), tiles)
    modules = {name: graph.network.loaded() for name, graph in made.graphs.items()}
    ports = {
        name: {port: ("float32", (1, *array.dims[1:])) for port, array in graph.inputs.items()}
        for name, graph in made.graphs.items()
    }

    def call(name: str, inputs: Any) -> Any:
        assert {port: value.shape for port, value in inputs.items()} == {port: ports[name][port][1] for port in ports[name]}
        results = modules[name](*(torch.from_numpy(inputs[port]) for port in ports[name]))
        return dict(zip(made.graphs[name].outputs, (value.numpy() for value in results), strict=True))

    if not made.loops:
        return torch.from_numpy(call("decode", {"latents": latents.numpy()})["video"])
    (rows,) = made.schedules["pictures"]["chunks"].values()
    loop, values = made.loops["pictures"], {"latents": latents.numpy()}
    return torch.from_numpy(plain.run_loop("pictures", loop, rows, values, ports, call, plain.drawn(0))["video"])


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 6, 13])
def test_causal_decoder_has_no_seam_between_chunks_of_frames(causal: tuple[Path, Any], frames: int) -> None:
    folder, vae = causal
    latents = torch.randn(1, frames, 4, 6, 8, generator=torch.Generator().manual_seed(frames))
    want = vae.decode(latents.transpose(1, 2) / vae.config.scaling_factor).sample.transpose(1, 2)
    assert cogvideox_system.chunks(frames) == {1: (1, 0), 2: (2, 0), 3: (3, 0), 5: (3, 2), 6: (2, 2), 13: (3, 2)}[frames]
    torch.testing.assert_close(decoded(folder, latents, 1), want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_seams_of_tiles_are_no_worse_than_diffusers_own(causal: tuple[Path, Any]) -> None:
    folder, vae = causal
    latents = torch.randn(1, 5, 4, 24, 40, generator=torch.Generator().manual_seed(0))
    scaled = latents.transpose(1, 2) / vae.config.scaling_factor
    whole = vae.decode(scaled).sample.transpose(1, 2)
    tiled = copy.deepcopy(vae)
    tiled.enable_tiling(48, 80)  # half of the picture, as at 480x720; its seams close at multiples of these sizes only
    theirs = (tiled.decode(scaled).sample.transpose(1, 2) - whole).square().mean().sqrt()
    ours = (decoded(folder, latents, 2) - whole).square().mean().sqrt()
    assert 0 < ours <= theirs < whole.std()
    assert ours < 0.05 * whole.std()  # 2 % with these random weights: a tile's group norms see the tile alone


@pytest.mark.parametrize("length", [7, 13, 60, 90])
def test_tiles_cover_a_side_with_weights_that_sum_to_1(length: int) -> None:
    for size in {1 + length // 4, tile_size(length, 2), tile_size(length, 3), length}:
        total = np.zeros(3 * length)
        for tile in tiles_of(length, size):
            assert 0 <= tile.start <= length - size and tile.size == size
            total[3 * tile.start : 3 * (tile.start + size)] += plain.ramp(3 * size, 3 * tile.before, 3 * tile.after)
        np.testing.assert_allclose(total, 1, atol=1e-6)
    assert len(tiles_of(length, tile_size(length, 2))) == 2
    (whole,) = tiles_of(length, length)
    assert (whole.start, whole.size, whole.before, whole.after) == (0, length, 0, 0)
    if length > 7:
        assert all(tile.after >= int(OVERLAP * tile.size) for tile in tiles_of(length, tile_size(length, 3))[:-1])


def test_each_tile_has_all_its_chunks_in_turn_and_its_first_one_has_a_graph_of_its_own() -> None:
    graph = Graph(Network(torch.nn.Identity()), {"latents": Array(("batch", 3, 16, 6, 3))}, ("video",))
    graphs = {"decode": graph, "decode_next": graph}
    made = decoding(graphs, [(3, 9), (2, 8)], (5, 16, 6, 4), 8, caches=("cache.a",), tiles_error="small")
    assert made.name == "pictures" and [(a.name, a.quality) for a in made.approximations] == [
        ("tiles", {"tiles": 2, "error": "small"})
    ]
    loop, (rows,) = made.loops["pictures"], made.schedules["pictures"]["chunks"].values()
    assert rows.dtype == np.float32 and loop.schedules == {"chunks": (4,)} and loop.carry == {"next_cache.a": "cache.a"}
    named = [dict(zip(loop.columns, row.tolist(), strict=True)) for row in rows]
    assert [row["graph"] for row in named] == [0, 1, 0, 1] and [row["frame"] for row in named] == [0, 3, 0, 3]
    assert [row["out_frame"] for row in named] == [0, 9, 0, 9] and [row["out_left"] for row in named] == [0, 0, 8, 8]
    assert [row["left_after"] for row in named] == [16, 16, 0, 0] and {row["top_before"] for row in named} == {0}
    assert loop.collect["video"].dims == (17, 3, 48, 32)
    with pytest.raises(ValueError, match="do not make up 6 latent frames"):
        decoding(graphs, [(3, 9), (2, 8)], (6, 16, 6, 4), 8)


def test_svd_sizes_that_the_unet_cannot_halve_are_refused(svd: tuple[Path, Any], tmp_path: Path) -> None:
    sources = Sources(svd[0], tmp_path, tmp_path, tmp_path)
    with pytest.raises(CheckpointError, match="the size 20x32; allowed: 2 frames or more, multiples of 16 pixels"):
        svd_system.svd_system(sources, frames=9, height=20, width=32)


@pytest.mark.parametrize(
    ("frames", "want"), [(16, [*range(16)]), (17, [*range(8), *range(9, 17)]), (9, [0, 1, 1, 2, 2, 3, 3, 4])]
)
def test_frames_for_videomae_are_those_of_the_release(frames: int, want: list[int]) -> None:
    assert picked(frames, 16)[: len(want)] == want
