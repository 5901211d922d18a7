"""What approximations cost and gain: a small run of each benchmark, and what the page makes of its rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from motionrt.benchmarks.harness import ROOT
from motionrt.benchmarks.report import approximate
from motionrt.benchmarks.report.rows import Report


def run(script: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "benchmarks" / "approximate" / f"{script}.py"), "--results", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / f"{script}.jsonl").read_text().splitlines()]


def clean(folder: Path) -> Report:
    """The rows of a folder as if their tree had been clean."""
    for file in folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({**row, "commit": "0123456789ab"}) + "\n" for row in rows))
    return Report(folder)


@pytest.mark.slow
def test_quality_has_a_row_for_each_recipe_and_split_and_exact_is_exact(tmp_path: Path) -> None:
    rows = run("bench_quality", tmp_path, "--steps", "25", "--targets", "4")
    exact = [row for row in rows if row["what"] == "exact"]
    assert [row["split"] for row in exact] == ["seen", "unseen kinds"]
    assert all(row["db_lowest"] == 61.14 and row["epe_change_px"] == [0, 0, 0] for row in exact)
    left = {row["what"]: row for row in rows if row["what"].startswith("float32, steps left out")}
    assert set(left) == {"float32, steps left out for 50 dB", "float32, steps left out for 40 dB"}
    dear, cheap = (left[f"float32, steps left out for {budget} dB"] for budget in (50, 40))
    assert 25 > dear["network_runs"] > cheap["network_runs"] >= 2 and dear["db_mean"] > cheap["db_mean"] > 35
    assert dear["pattern"].count("F") == dear["network_runs"] and len(dear["pattern"]) == 25
    report = clean(tmp_path)
    page = "\n".join(approximate.quality(report))
    assert "### 25 steps" in page and f"| {dear['network_runs']} of 25 |" in page and "approximations.svg" in report.figures


@pytest.mark.slow
def test_loops_take_turns_and_say_how_many_runs_they_made(tmp_path: Path) -> None:
    options = ("--model", "cogvideox-toy", "--steps", "25", "--rounds", "2", "--rivals", "eager")
    found = run("bench_loop", tmp_path, *options, "--work", str(tmp_path / "work"))
    rows = {row["backend"]: row for row in found}
    assert {"exact", "eager", "float32, steps left out for 50 dB", "float32, steps left out for 40 dB"} <= set(rows)
    assert rows["exact"]["network_runs"] == rows["eager"]["network_runs"] == 25
    left_out = rows["float32, steps left out for 40 dB"]
    assert left_out["network_runs"] < rows["exact"]["network_runs"] and left_out["over_exact"] > 0  # a toy on a busy machine
    page = "\n".join(approximate.loop(clean(tmp_path)))
    assert "### cogvideox-toy, 25 steps, 2 threads" in page and "x exact | x eager" in page


@pytest.mark.slow
def test_other_demos_have_a_row_for_each_precision(tmp_path: Path) -> None:
    rows = run("bench_precision", tmp_path, "motion-i2v", "--targets", "2")
    for way in ("true field", "prompt, seen kinds of motion", "1 drag"):
        every = {row["what"]: row for row in rows if row["way"] == way}
        assert {"exact", "onnxruntime int8", "openvino int8"} <= set(every)
        assert every["exact"]["db_lowest"] == 61.14 and every["exact"]["path_change_px"] == [0, 0, 0]
        for name in ("onnxruntime int8", "openvino int8"):
            assert 35 < every[name]["db_lowest"] < 61 and 0 < abs(every[name]["path_change_px"][0]) < 0.5
    page = "\n".join(approximate.precision(clean(tmp_path)))
    assert page.count("### motion-i2v, ") == 3 and "| openvino int8 |" in page
