"""The shipped bundle keeps the demo's promise, measured anew on a few fixed targets; and the published table is that file's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from by_path import load_by_path

from motionrt.runtime.files import sha256_of

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo"
TARGETS = 16
evaluation: Any = load_by_path(DEMO / "evaluate.py")


@pytest.fixture(scope="module")
def scores() -> dict[tuple[str, str], Any]:
    """(split, row) -> METRICS [TARGETS, 5]."""
    rows = ("motion_scale 0", "random references", "CAMA K=4", "ground-truth tokens")
    jobs = [evaluation.Job(split, row, DEMO / "bundle") for split in evaluation.SPLITS[:2] for row in rows]
    result = evaluation.evaluate(jobs, TARGETS, 2)
    return {(job.split.name, job.row): score for job, score in zip(jobs, result, strict=True)}


@pytest.mark.parametrize("split", ["seen", "unseen kinds"])
def test_retrieved_motion_decides_the_path(scores: dict[tuple[str, str], Any], split: str) -> None:
    """End-point error: true tokens <= retrieved (with slack) << no motion, and << the wrong clips."""
    epe = {row: float(scores[split, row][:, 0].mean()) for name, row in scores if name == split}
    assert epe["ground-truth tokens"] < epe["CAMA K=4"] + 0.5
    assert epe["CAMA K=4"] < 0.6 * epe["motion_scale 0"]
    assert epe["CAMA K=4"] < 0.5 * epe["random references"]


@pytest.mark.parametrize("split", ["seen", "unseen kinds"])
def test_the_object_stays_itself(scores: dict[tuple[str, str], Any], split: str) -> None:
    """PSNR of the still's object through the clip: above a floor that a blurred blob misses by far."""
    assert float(scores[split, "CAMA K=4"][:, 1].mean()) > 20


def test_measures_know_a_perfect_and_a_frozen_clip() -> None:
    domain = evaluation.domain
    spec = domain.sample_spec(np.random.default_rng(3), "slide_left")
    truth = domain.render(spec)[0]
    epe, psnr, ssim, size, turn = evaluation.measure(truth, truth, spec)
    assert epe < 0.3 and psnr > 30 and ssim > 0.95 and size < 3 and turn < 2
    frozen = np.repeat(truth[:1], len(truth), axis=0)
    moved = np.linalg.norm(spec.centres - spec.centres[0], axis=1)[1:].mean()
    assert abs(evaluation.measure(frozen, truth, spec)[0] - moved) < 0.3
    recoloured = np.ascontiguousarray(truth[..., ::-1])
    assert evaluation.measure(recoloured, truth, spec)[1] < 15


def test_targets_are_fixed_and_not_in_the_memories() -> None:
    for split in evaluation.SPLITS:
        specs = evaluation.targets(split, 40)
        assert specs == evaluation.targets(split, 40)
        assert {spec.family for spec in specs} <= set(split.families)
        assert not set(specs) & set(evaluation.domain.reference_specs(split.families))


def test_the_published_figures_are_of_the_shipped_checkpoint() -> None:
    result = json.loads(evaluation.RESULT.read_text(encoding="utf-8"))
    assert result["checkpoint"] == sha256_of(DEMO / "checkpoint.safetensors")
    assert result["targets_per_split"] >= 200
    assert evaluation.table(result) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_bundle_and_memories_stay_small() -> None:
    """At most 16 MB of generated data in the repository."""
    folders = [DEMO / name for name in ("bundle", "memory", "memory_unseen")]
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    assert size < 16e6
