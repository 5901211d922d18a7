"""Parts of the base models with their preprocessing, in torch, against diffusers' own pipelines' functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from PIL import Image  # noqa: E402

from motionrt.export import svd_bundle  # noqa: E402
from motionrt.export.checkpoints import CheckpointError  # noqa: E402
from motionrt.export.parts import picked  # noqa: E402
from motionrt.runtime.demo import load_by_path  # noqa: E402

models = load_by_path(Path(__file__).parent / "real_models.py")
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
    part = svd_bundle.encode_part(folder, (HEIGHT, WIDTH), torch.float32)
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
    video = svd_bundle.decode_part(folder, torch.float32).loaded()(latents)
    want = pipe.decode_latents(latents, 9, 8).transpose(1, 2)
    torch.testing.assert_close(video, want, atol=1e-4, rtol=1e-4)
    whole = pipe.decode_latents(latents, 9, 9).transpose(1, 2)
    assert (whole - want).abs().max() > 1e-3  # the decoder looks along time: chunks are seen, and are the release's


def test_svd_sizes_that_the_unet_cannot_halve_are_refused(svd: tuple[Path, Any], tmp_path: Path) -> None:
    from motionrt.export.real import Sources

    sources = Sources(svd[0], tmp_path, tmp_path, tmp_path, tmp_path / "converted")
    with pytest.raises(CheckpointError, match="the size 20x32; allowed: 2 frames or more, multiples of 16 pixels"):
        svd_bundle.export_svd(sources, tmp_path / "out", frames=9, height=20, width=32)


@pytest.mark.parametrize(
    ("frames", "want"), [(16, [*range(16)]), (17, [*range(8), *range(9, 17)]), (9, [0, 1, 1, 2, 2, 3, 3, 4])]
)
def test_frames_for_videomae_are_those_of_the_release(frames: int, want: list[int]) -> None:
    assert picked(frames, 16)[: len(want)] == want
