"""Small motion memories of random clips, for the tests of the memory. Load it by path: the tests are not a package."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

from motionrt.runtime.bundle.manifest import Part
from motionrt.runtime.memory.memory import Clip, MotionMemory

E, M, D = 16, 3, 4
RECORD = (Part("motion", "float16", (M, D)), Part("appearance", "float16", (M, D)))
KEPT = {"embedding": E, "record": RECORD, "fingerprint": "a" * 64}  # what `MotionMemory.create` is told


def clip(number: int, **changes: object) -> Clip:
    """Clip `number` with some of its fields, or of the parts of its record, changed."""
    random = np.random.default_rng(number)
    values: dict[str, object] = {
        "caption": f"caption {number}", "source": f"video{number % 7}.mp4", "start": number / 8, "duration": 2.125,
        "fps": 8.0, "source_sha256": f"{number:064x}", "embedding": random.standard_normal(E).astype(np.float32),
        "metadata": {"licence": "CC0"},
    }  # fmt: skip
    record = {part.name: random.standard_normal((M, D)).astype(np.float32) for part in RECORD}
    values["record"] = {name: changes.pop(name, array) for name, array in record.items()}
    return Clip(**(values | changes))  # type: ignore[arg-type]


def filled(path: Path, count: int, **options: int) -> Path:
    with MotionMemory.create(path, **KEPT, **options) as memory:
        memory.add(clip(i) for i in range(count))
    return path


def query(number: int = 1000) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(E).astype(np.float32)


def ranked(count: int, q: np.ndarray, without: str | None = None) -> list[tuple[int, float]]:
    """(id, cosine) best first, the slow way."""
    scores = []
    for number in range(count):
        item = clip(number)
        vector = item.embedding.astype(np.float64)
        if item.source != without:
            scores.append((number + 1, float(vector @ q / np.linalg.norm(vector) / np.linalg.norm(q))))
    return sorted(scores, key=lambda pair: (-pair[1], pair[0]))


def names(path: Path) -> list[str]:
    """What is in the directory; an index file without its digest."""
    return sorted("index.usearch" if item.suffix == ".usearch" else item.name for item in path.iterdir())


def stamped(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def index_of(path: Path) -> Path:
    return path / json.loads((path / "index.json").read_text())["file"]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def environment() -> dict[str, str]:
    """For a child process: motionrt is found where it was found here."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
