"""The README's figures of the demos are those of the checkpoints that are shipped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from by_path import load_by_path

ROOT = Path(__file__).resolve().parents[2]
PLACES = (("motionclone", "evaluate.py"), ("motion_i2v", "judge.py"))
MEASURES = {system: load_by_path(ROOT / "demo" / system / file) for system, file in PLACES}  # now: names must not change later


@pytest.mark.parametrize("system", MEASURES)
def test_the_readme_shows_the_measured_figures_of_this_checkpoint(system: str) -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / f"demo_{system}.json").read_text(encoding="utf-8"))
    shown = MEASURES[system].table(result["rows"])
    assert shown in (ROOT / "README.md").read_text(encoding="utf-8")
    assert result["checkpoint"] == hashlib.sha256((ROOT / "demo" / system / "checkpoint.safetensors").read_bytes()).hexdigest()
