"""requirements/audit.py: what was not looked up is said, and only a known vulnerability fails."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from by_path import load_by_path

ROOT = Path(__file__).resolve().parents[2]
audit = load_by_path(ROOT / "requirements/audit.py")
GOOD: dict[str, Any] = {"name": "a", "version": "1.0", "vulns": []}
BAD = {"name": "b", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}]}
SKIPPED = {"name": "c", "skip_reason": "Dependency not found"}


def test_a_known_vulnerability_fails_and_is_named() -> None:
    status, lines = audit.verdict({"dependencies": [GOOD, BAD]}, "x.txt")
    assert status == 1
    assert lines == ["x.txt: 2 of 2 packages were looked up in the advisory database.", "b 2.0: PYSEC-1, fixed in 2.1"]


def test_what_was_not_looked_up_is_no_success() -> None:
    status, lines = audit.verdict({"dependencies": [GOOD, SKIPPED]}, "x.txt")
    assert status == 0
    assert lines[0].startswith("x.txt: 1 of 2 packages") and lines[1].startswith("x.txt: NOT AUDITED: 1 packages")


@pytest.mark.parametrize("stderr, why", [("Traceback\nConnectionError: no name", "Error: no name"), ("", "said nothing")])
def test_no_answer_is_said(stderr: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    status, (line,) = audit.audit("x.txt")
    assert status == 0 and line.startswith("x.txt: NOT AUDITED") and why in line
