"""What `make release` makes, without its environments: a wheel from the sdist, and a list of all that is locked."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from by_path import load_by_path

import motionrt

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".venv-docs/bin"
packaging = load_by_path(ROOT / "tests/test_packaging.py")
pytestmark = pytest.mark.slow
needs_tools = pytest.mark.skipif(not (TOOLS / "twine").exists(), reason="no .venv-docs: `make test-slow` makes it")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with sdist and wheel, the wheel from the sdist, of a copy of the repository's files."""
    source = tmp_path_factory.mktemp("release") / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.partial", "*.tmp", "benchmarks")
    source.mkdir()
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in (*packaging.FOLDERS, "src", "tests"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=skip)
    out = source.parent / "out"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source.parent, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_sdist_is_enough_to_make_the_wheel(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == packaging.expected_files()
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        names = [name.partition("/")[2] for name in tar.getnames()]
    assert sdist.name == f"motionrt-{motionrt.__version__}.tar.gz"
    assert "LICENSE" in names and not [name for name in names if name.startswith("tests")]


@needs_tools
def test_metadata_and_readme_pass_the_index_checks(built: Path) -> None:
    command = [str(TOOLS / "twine"), "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


@needs_tools
def test_the_list_of_parts_has_what_is_locked(tmp_path: Path) -> None:
    command = [str(TOOLS / "cyclonedx-py"), "requirements", "--pyproject", str(ROOT / "pyproject.toml")]
    command += ["--output-file", str(tmp_path / "sbom.json"), str(ROOT / "requirements/runtime.txt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    sbom = json.loads((tmp_path / "sbom.json").read_text())
    listed = {re.sub(r"[-_.]+", "-", part["name"]).lower(): part["version"] for part in sbom["components"]}
    assert sbom["bomFormat"] == "CycloneDX" and listed == packaging.pinned("runtime")
