from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import Served, serving


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A still as a file."""
    path = tmp_path_factory.mktemp("still") / "still.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of the demo's bundle and memory."""
    demo = Path(__file__).resolve().parents[3] / "demo"
    with serving(tmp_path_factory.mktemp("served") / "store", demo / "bundle", demo / "memory") as running:
        yield running
