"""docs/models.md as a newcomer types it: its blocks run, on small models in the folders that it names.

Files of MotionClone, Motion-I2V and DynamiCrafter do not say for which size they are: there `motionrt export` is told a small
one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("tensorrt_rtx")

from by_path import load_by_path  # noqa: E402
from PIL import Image  # noqa: E402

from motionrt.export.checkpoints.motionrag_files import DYNAMICRAFTER  # noqa: E402
from motionrt.export.systems import svd_step as svd  # noqa: E402
from motionrt.runtime.media.video import read_clip, write_video  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/models.md"
models = load_by_path(Path(__file__).resolve().parents[1] / "tests/helpers/tiny_models.py")
shared = load_by_path(Path(__file__).resolve().parents[1] / "tests/helpers/shared_graphs.py")
animatediff = load_by_path(Path(__file__).resolve().parents[1] / "tests/helpers/animatediff_models.py")
motion_i2v = load_by_path(Path(__file__).resolve().parents[1] / "tests/helpers/motion_i2v_models.py")
crafter = load_by_path(Path(__file__).resolve().parents[1] / "tests/helpers/dynamicrafter_models.py")
readme = load_by_path(Path(__file__).resolve().parents[1] / "tests/test_readme.py")
BLOCKS = readme.blocks((ROOT / PAGE).read_text(encoding="utf-8"), PAGE)
FRAMES, HEIGHT, WIDTH = 17, 16, 32
SMALL, CRAFTER = (4, 16, 16), (8, 16, 32)  # frames, height, width of the systems whose files do not say
MADE = ("both", "begins-with", "boat", "left", "follows", "sails")  # videos of sections 9 to 11
MOTIONRT = """#!/bin/sh
case "$1 $2" in
    "export motion"*) set -- "$@" --frames {} --height {} --width {} ;;
    "export dynamicrafter-"*) set -- "$@" --frames {} --height {} --width {} ;;
esac
case "$1" in
    export) exec "{python}" -P "{export}" "$@" ;;
esac
exec "{python}" -P -c "from motionrt.runtime.cli.main import main; main()" "$@"
"""
EXPORT = """
import sys
from pathlib import Path
sys.path.insert(0, {helpers!r})
from shared_graphs import shared_graphs
from motionrt.runtime.cli.main import main
with shared_graphs(Path({store!r}), packaged=True):
    main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the downloads of section 1 (CogVideoX's in bfloat16, all others in float32), videos and a still."""
    folder = tmp_path_factory.mktemp("newcomer")
    models.write_cogvideox(folder / "CogVideoX-5b-I2V", models.cogvideox_config(2), torch.bfloat16)
    parts = models.write_svd(folder / "svd")
    adapted: dict[str, Any] = {
        "CogVideoX": {f"transformer.transformer_blocks.{i}.attn1": 64 for i in range(2)},
        "SVD": {f"unet.{path}": a.to_q.in_features for path, a in svd.spatial_attentions(parts["unet"])},
    }
    for name, blocks in adapted.items():
        states = models.release.motionrag_states(blocks, overlay=name != "SVD")
        kept = models.release.rounded(states, torch.bfloat16) if name == "CogVideoX" else states
        models.release.save(folder / "motionrag" / name, kept)
    models.write_encoders(folder)
    (folder / "videomae").rename(folder / "videomae-base-ssv2")
    (folder / "dinov2").rename(folder / "dinov2-large")
    draw = np.random.default_rng(0)
    (folder / "my-videos").mkdir()
    captions = {f"{name}.mp4": f"{name} rolls in" for name in ("wave", "cloud", "ball")}
    for file in captions:
        frames = np.roll(draw.integers(0, 256, (60, HEIGHT, WIDTH, 3), np.uint8), 1, axis=1)
        write_video(folder / "my-videos" / file, frames, 24)
    (folder / "my-videos" / "captions.json").write_text(json.dumps(captions))
    Image.fromarray(draw.integers(0, 256, (90, 120, 3), np.uint8)).save(folder / "still.png")
    (folder / "bin").mkdir()
    script = folder / "bin" / "motionrt"
    export = folder / "bin" / "export.py"
    export.write_text(EXPORT.format(helpers=str(ROOT / "tests/helpers"), store=str(shared.store(tmp_path_factory))))
    script.write_text(MOTIONRT.format(*SMALL, *CRAFTER, python=sys.executable, export=export))
    script.chmod(0o755)
    write_other_systems(folder, draw)
    return folder


def write_other_systems(folder: Path, draw: np.random.Generator) -> None:
    """The downloads of sections 9 to 11 under the names there, two clips, and a picture with a mask."""
    for name in ("1024", "512"):
        crafter.write(folder / f"DynamiCrafter_{name}", name)
    (folder / "DynamiCrafter_512" / "tokenizer").rename(folder / "clip-tokenizer")
    adapters = models.release.motionrag_states(crafter.blocks(), overlay=False, names=DYNAMICRAFTER)
    models.release.save(folder / "motionrag" / "DynamiCrafter", adapters)
    files = animatediff.small_animatediff(folder)
    for path, name in (
        (files.base, "stable-diffusion-v1-5"), (files.adapter, "v3_sd15_adapter.ckpt"),
        (files.sparsectrl, "v3_sd15_sparsectrl_rgb.ckpt"),
    ):  # fmt: skip
        path.rename(folder / name)
    motion_i2v.released_files(folder / "Motion-I2V")
    for name in ("clip", "pan"):
        write_video(folder / f"{name}.mp4", draw.integers(0, 256, (8, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2), 8)
    Image.fromarray(draw.integers(0, 256, (20, 32, 3), np.uint8)).resize((512, 320)).save(folder / "boat.png")
    mask = np.zeros((320, 512), np.uint8)
    mask[120:280, 100:300] = 255
    Image.fromarray(mask).save(folder / "boat-mask.png")


@pytest.mark.parametrize("block", [block for block in BLOCKS if not block.excluded], ids=str)
def test_block_runs_as_typed(block: Any, place: Path) -> None:
    environment = {**os.environ, "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120"}
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", block.text], cwd=place, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{PAGE} line {block.line}:\n{done.stdout}\n{done.stderr}"


def test_what_the_blocks_made_is_there(place: Path) -> None:
    video = read_clip(place / "waves.mp4", FRAMES, HEIGHT, WIDTH, 8)
    assert video.shape == (FRAMES, 3, HEIGHT, WIDTH) and float(video.std()) > 0.01
    assert read_clip(place / "torch.mp4", FRAMES, HEIGHT, WIDTH, 8).shape == video.shape
    graphs = json.loads((place / "cogvideox" / "bundle.json").read_text())["graphs"]
    assert {path.stem for path in (place / "cogvideox" / "engines" / "rtx-sm_89-float16").glob("*.json")} == set(graphs)
    assert json.loads((place / "svd-motion" / "bundle.json").read_text())["output"]["frames"] == 16
    made = {name: (place / f"{name}.mp4").read_bytes() for name in MADE}
    assert len(set(made.values())) == len(made) and (place / "boat-field.mp4").is_file()
    for name in made:
        size = CRAFTER if name in ("follows", "sails") else SMALL
        assert read_clip(place / f"{name}.mp4", *size, 8).std() > 0.01


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.excluded], ids=str)
def test_blocks_that_are_left_out_download_or_install(block: Any) -> None:
    allowed = ("hf download ", "ln -s ", "pip install ", "python -m motionrt.export.checkpoints.files ")
    lines = [line for line in block.text.splitlines() if line.strip()]
    assert lines and all(line.startswith(allowed) for line in lines)
