"""The Triton kernels under Triton's interpreter against fp64: error <= 2x plain torch's in the same dtype + 1e-6.

The cases are in kernel_cases.py, which runs once, in a process of its own, and prints a line for each.
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
SCRIPT = Path(__file__).resolve().parents[2] / "tests/helpers/kernel_cases.py"


def names() -> list[str]:
    """Case names, read without decorating a kernel: the interpreter is not chosen in this process."""
    return [case.name for case in load_by_path(SCRIPT).cases()]


@pytest.fixture(scope="module")
def lines() -> dict[str, dict[str, Any]]:
    """What the script said of each case."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, timeout=550)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.timeout(600)  # a minute of work for one processor; CI machines are shared
@pytest.mark.parametrize("name", names(), ids=lambda name: re.sub(r"\W+", "-", name))
def test_launch_obeys_the_tolerance_law(lines: dict[str, dict[str, Any]], name: str) -> None:
    line = lines[name]
    assert line["error"] <= 2 * line["torch"] + 1e-6, line  # NaN, of a poisoned output, fails too
    assert line["unchanged"] == ("scale 0" in name), "scale 0 gives h bit for bit"
