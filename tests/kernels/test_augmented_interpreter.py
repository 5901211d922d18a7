"""Motion-augmented attention under Triton's interpreter against fp64: error <= 2x plain torch's in the same dtype + 1e-6.

The cases are in augmented_cases.py, which runs once, in a process of its own, and prints a line for each.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from by_path import load_by_path

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("torch")
SCRIPT = Path(__file__).resolve().parents[2] / "tests/helpers/augmented_cases.py"
QUICK = "3x3"  # what every run tries: slots that suffice, and that do not


def names() -> list[str]:
    """Case names, read without decorating a kernel: the interpreter is not chosen in this process."""
    return [case.name for case in load_by_path(SCRIPT).cases()]


def lines_of(*options: str) -> dict[str, dict[str, Any]]:
    """What the script said of each case."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, env=environment, timeout=550)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def lines() -> dict[str, dict[str, Any]]:
    return lines_of()


def lawful(line: dict[str, Any]) -> bool:
    return bool(line["error"] <= 2 * line["torch"] + 1e-6)  # NaN, of a poisoned output, is not


@pytest.mark.slow
def test_the_kernel_obeys_the_tolerance_law_with_chunks_and_without() -> None:
    found = lines_of("--only", QUICK)
    assert len(found) == 3 and all(map(lawful, found.values())), found
    assert any(line["beyond"] for line in found.values()) and not all(line["beyond"] for line in found.values())


@pytest.mark.slow
@pytest.mark.timeout(600)  # a minute of work for one processor; CI machines are shared
@pytest.mark.parametrize("name", names(), ids=lambda name: re.sub(r"\W+", "-", name))
def test_launch_obeys_the_tolerance_law(lines: dict[str, dict[str, Any]], name: str) -> None:
    assert lawful(lines[name]), lines[name]


@pytest.mark.slow
def test_the_cases_are_what_they_are_called(lines: dict[str, dict[str, Any]]) -> None:
    """Chunks are needed, on several levels, and targets are empty: else a case tries nothing of the kind."""
    for name, line in lines.items():
        assert bool(line["beyond"]) or "one point" not in name or "1x2" in name, line
        assert bool(line["empty"]) or "nothing arrives" not in name, line
    assert {line["levels"] for line in lines.values()} >= {1, 2, 3, 4}
