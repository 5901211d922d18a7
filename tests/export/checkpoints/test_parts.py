"""Parts of the base models with their preprocessing, in torch, against diffusers' own pipelines' functions."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from PIL import Image  # noqa: E402

from motionrt.export.checkpoints.files import CheckpointError  # noqa: E402
from motionrt.export.checkpoints.parts import picked  # noqa: E402
from motionrt.export.systems import cogvideox as cogvideox_bundle  # noqa: E402
from motionrt.export.systems import svd as svd_bundle  # noqa: E402
from motionrt.runtime.bundle.bundle import Dim  # noqa: E402
from motionrt.runtime.by_path import load_by_path  # noqa: E402
from motionrt.runtime.decode import decode_video  # noqa: E402

models = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/tiny_models.py")
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
    part = svd_bundle.encode_part(folder, (HEIGHT, WIDTH))
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
    video = svd_bundle.decode_part(folder).loaded()(latents)
    want = pipe.decode_latents(latents, 9, 8).transpose(1, 2)
    torch.testing.assert_close(video, want, atol=1e-4, rtol=1e-4)
    whole = pipe.decode_latents(latents, 9, 9).transpose(1, 2)
    assert (whole - want).abs().max() > 1e-3  # the decoder looks along time: chunks are seen, and are the release's


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a CogVideoX VAE, and diffusers' VAE."""
    folder = tmp_path_factory.mktemp("cogvideox")
    return folder, models.write_cogvideox(folder)["vae"]


class Weightless:
    """In the place of `real.Stage`: the graphs as torch modules, and a bundle as far as `decode_video` looks at it."""

    path = "here"

    def __init__(self) -> None:
        self.graphs: dict[str, Any] = {}

    def add(self, name: str, part: Any, examples: Any, outputs: Any) -> None:
        ports = {port: tuple(Dim("", n, n, n) for n in value.shape) for port, value in examples[0].feed.items()}
        self.graphs[name] = (part.loaded(), ports, outputs)

    def graph(self, name: str) -> Any:
        return SimpleNamespace(inputs=[SimpleNamespace(name=port, dims=dims) for port, dims in self.graphs[name][1].items()])

    def port(self, name: str, port: str) -> Any:
        return SimpleNamespace(dims=self.graphs[name][1][port])

    def call(self, name: str, inputs: Any) -> Any:
        module, ports, outputs = self.graphs[name]
        assert {port: tuple(value.shape) for port, value in inputs.items()} == {
            port: tuple(dim.max for dim in dims) for port, dims in ports.items()
        }
        results = module(*(torch.as_tensor(inputs[port]) for port in ports))
        return dict(zip(outputs, (value.numpy() for value in results), strict=True))


@torch.no_grad()
def decoded(folder: Path, latents: Any, tiles: int) -> Any:
    stage = Weightless()
    cogvideox_bundle.add_decoder(stage, folder, tuple(latents.shape[1:]), tiles)
    return torch.from_numpy(decode_video(stage.call, stage, latents.numpy()))


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 6, 13])
def test_causal_decoder_has_no_seam_between_chunks_of_frames(causal: tuple[Path, Any], frames: int) -> None:
    folder, vae = causal
    latents = torch.randn(1, frames, 4, 6, 8, generator=torch.Generator().manual_seed(frames))
    want = vae.decode(latents.transpose(1, 2) / vae.config.scaling_factor).sample.transpose(1, 2)
    assert cogvideox_bundle.chunks(frames) == {1: (1, 0), 2: (2, 0), 3: (3, 0), 5: (3, 2), 6: (2, 2), 13: (3, 2)}[frames]
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


def test_svd_sizes_that_the_unet_cannot_halve_are_refused(svd: tuple[Path, Any], tmp_path: Path) -> None:
    from motionrt.export.systems.stage import Sources

    sources = Sources(svd[0], tmp_path, tmp_path, tmp_path, tmp_path / "converted")
    with pytest.raises(CheckpointError, match="the size 20x32; allowed: 2 frames or more, multiples of 16 pixels"):
        svd_bundle.export_svd(sources, tmp_path / "out", frames=9, height=20, width=32)


@pytest.mark.parametrize(
    ("frames", "want"), [(16, [*range(16)]), (17, [*range(8), *range(9, 17)]), (9, [0, 1, 1, 2, 2, 3, 3, 4])]
)
def test_frames_for_videomae_are_those_of_the_release(frames: int, want: list[int]) -> None:
    assert picked(frames, 16)[: len(want)] == want
