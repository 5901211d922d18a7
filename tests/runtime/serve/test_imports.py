"""What the server costs those who do not run it, and what its process does not load."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from serving import Served

EXTRA = ("starlette", "uvicorn", "python_multipart", "prometheus_client")


def loaded(code: str) -> set[str]:
    """Modules of a process that ran `code`."""
    told = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", told], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("code", ["import motionrt", "from motionrt import MotionPipeline, MotionMemory, Result"])
def test_the_library_loads_nothing_of_the_server(code: str) -> None:
    modules = loaded(code)
    assert not [name for name in modules if name.startswith("motionrt.runtime.serve") or name.split(".")[0] in EXTRA]


def test_the_command_line_loads_nothing_of_the_server_before_it_is_asked_to_serve() -> None:
    modules = loaded("from motionrt.runtime.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass")
    assert "motionrt.runtime.cli.main" in modules and not [name for name in modules if name.split(".")[0] in EXTRA]


def test_the_application_loads_no_numbers_and_no_pictures() -> None:
    modules = loaded("import motionrt.runtime.serve.run")
    assert {"starlette", "uvicorn"} <= modules
    assert not {"torch", "numpy", "onnxruntime", "PIL", "av", "usearch"} & modules


def test_the_process_of_a_server_has_no_engine_in_it(served: Served) -> None:
    """By the libraries that the kernel has mapped; its worker has them. NumPy comes with the command line, for its options."""
    (worker,) = served.workers()
    libraries = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in (served.process.pid, worker)}
    assert "/onnxruntime" in libraries[worker]
    for name in ("torch", "onnxruntime"):
        assert f"/{name}" not in libraries[served.process.pid], name


@pytest.mark.slow
def test_the_extra_takes_at_most_12_mib() -> None:
    """Files of the four packages and of what they need and the run side does not, as installed here."""
    project = tomllib.loads((Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    extra = closure(here(extras["serve"])) - closure(here(project["dependencies"] + extras["cpu"]))
    assert {canonicalize_name(name) for name in EXTRA} <= extra
    sizes = {name: size(name) for name in extra}
    assert sum(sizes.values()) <= 12 << 20, sizes
    assert len(sizes) <= 9, sizes  # nothing heavier has come in by a side door


def closure(names: set[str]) -> set[str]:
    """These distributions and all that they need."""
    found: set[str] = set()
    todo = set(names)
    while todo:
        name = todo.pop()
        found.add(name)
        todo |= here(importlib.metadata.requires(name) or []) - found
    return found


def here(requirements: list[str]) -> set[str]:
    """Which distributions these are on this machine, without extras, by normal names."""
    wanted = map(Requirement, requirements)
    return {canonicalize_name(one.name) for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})}


def size(name: str) -> int:
    """Bytes of a distribution's files."""
    files = importlib.metadata.files(name)
    assert files, name
    return sum(path.stat().st_size for file in files if (path := Path(str(file.locate()))).is_file())
