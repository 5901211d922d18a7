from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_runner import Comfy

ROOT = Path(__file__).resolve().parents[3]
NODES = ROOT / "integrations/comfyui"


@pytest.fixture
def comfy(tmp_path: Path) -> Iterator[Comfy]:
    """ComfyUI's stand-in with empty folders and without our nodes: `comfy.load(NODES)`."""
    (tmp_path / "comfy").mkdir()
    with Comfy(tmp_path / "comfy").installed() as made:
        yield made


@pytest.fixture
def demo(comfy: Comfy) -> Comfy:
    """The same as docs/comfyui.md sets it up: a link to the demo, pictures, and our nodes."""
    home = comfy.folder / "models/motionrt"
    home.mkdir()
    (home / "demo").symlink_to(ROOT / "demo")
    for picture in ("demo/inputs/red_star.png", "demo/motion_i2v/inputs/star_circles.png"):
        shutil.copy(ROOT / picture, comfy.folder / "input")
    comfy.load(NODES)
    return comfy
