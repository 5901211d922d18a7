from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_runner import Comfy

ROOT = Path(__file__).resolve().parents[3]
NODES = ROOT / "integrations/comfyui"


@pytest.fixture
def comfy(tmp_path: Path) -> Iterator[Comfy]:
    """ComfyUI's stand-in with empty folders and without our nodes: `comfy.load(NODES)`."""
    (tmp_path / "ComfyUI").mkdir()
    with Comfy(tmp_path / "ComfyUI").installed() as made:
        yield made


@pytest.fixture
def demo(comfy: Comfy) -> Comfy:
    """The same, set up by the commands of docs/comfyui.md, but for those that install and start it."""
    page = (ROOT / "docs/comfyui.md").read_text()
    lines = page.split("```bash\n")[1].split("```")[0].splitlines()
    typed = [line for line in lines if line.startswith(("ln ", "mkdir ", "cp "))]
    assert len(typed) == len(lines) - 2 and len(lines) <= 10
    home = {"HOME": str(comfy.folder.parent)}
    subprocess.run(["bash", "-euc", "\n".join(typed)], check=True, cwd=ROOT, env={**os.environ, **home})
    comfy.load(comfy.folder / "custom_nodes/motionrt")
    return comfy
