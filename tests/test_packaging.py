"""The house stands as pyproject.toml says: one wheel with every module, links that hold, the right `kernels`."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("export", "kernels", "runtime")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built from a copy: a build in place would leave `build/` behind, which a later build would pick up."""
    source = tmp_path_factory.mktemp("packaging") / "source"
    source.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.partial", "*.tmp")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in (*FOLDERS, "src"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=skip)
    out = source.parent / "dist"
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


def expected_files() -> set[str]:
    """Every Python file of the four packages in the working tree, as the wheel should name it, the server's page, the words."""
    files = {
        f"motionrt/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
    }
    files |= {f"motionrt/{path.relative_to(ROOT)}" for path in (ROOT / "runtime/serve/page").iterdir() if path.is_file()}
    files.add("motionrt/runtime/memory/motion_words.txt")
    return files | {f"motionrt/{path.name}" for path in (ROOT / "src/motionrt").glob("*.py")} | {"motionrt/py.typed"}


def test_wheel_holds_exactly_the_modules_of_the_repository(wheel: zipfile.ZipFile) -> None:
    got = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert got == expected_files()
    for name in sorted(got):
        source = ROOT / ("src" if name.count("/") == 1 else "") / (name if name.count("/") == 1 else name[9:])
        assert wheel.read(name) == source.read_bytes(), name


def test_wheel_declares_version_licence_extras_and_command(wheel: zipfile.ZipFile) -> None:
    from motionrt import __version__

    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) == {
        *("export", "torch", "cpu", "gpu", "openvino", "flow", "tables", "lancedb", "otel", "ray", "tensorrt", "rtx", "serve"),
        "dev",
    }
    assert "motionrt = motionrt.__main__:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


def test_wheel_is_bound_to_no_architecture_and_no_version_of_python(wheel: zipfile.ZipFile) -> None:
    assert str(wheel.filename).endswith("-py3-none-any.whl")
    (kind,) = (name for name in wheel.namelist() if name.endswith(".dist-info/WHEEL"))
    told = Parser().parsestr(wheel.read(kind).decode())
    assert told["Root-Is-Purelib"] == "true" and told.get_all("Tag") == ["py3-none-any"]


PIP = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--dry-run", "--ignore-installed",
       "--no-deps", "--only-binary=:all:"]  # fmt: skip


@pytest.fixture(scope="module")
def index() -> None:
    """The package index of this machine: skipped where none can be reached."""
    line = next(f"{package}=={version}" for package, version in pinned("runtime").items())
    done = subprocess.run([*PIP, "--retries", "0", "--timeout", "20", line], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no package index can be reached that has {line}: {done.stderr.strip().splitlines()[-1]}")


@pytest.mark.slow
@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_run_side_resolves_to_wheels(wheel: zipfile.ZipFile, tmp_path: Path, python: str, machine: str) -> None:
    """The wheel and all that is locked for it, for CPython on Linux with glibc 2.28 (RHEL 8, Debian 10) or newer."""
    tags = [f"manylinux2014_{machine}", *(f"manylinux_2_{minor}_{machine}" for minor in range(17, 29))]
    target = ["--implementation", "cp", "--python-version", python, *(f"--platform={tag}" for tag in tags)]
    files = ["--target", str(tmp_path / "none"), "--report", str(tmp_path / "report.json")]
    command = [*PIP, *target, *files, "-r", str(ROOT / "requirements/runtime.txt"), str(wheel.filename)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())["install"]
    assert all(item["download_info"]["url"].endswith(".whl") for item in found)
    got = {re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower(): item["metadata"]["version"] for item in found}
    assert got.pop("motionrt") and got == pinned("runtime")


def test_wheel_runs_from_elsewhere(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Its packages import without the repository: no link, no editable finder, no PYTHONPATH."""
    wheel.extractall(tmp_path / "site")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import motionrt.runtime, motionrt.kernels as k; print(k.__file__)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "site")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "site/motionrt/kernels/__init__.py")


# Runs every line of commands that it is given, all in one process, and says which commands there are. What opens a file of
# the repository, or lists a folder of it, ends it: an installed command has none.
INSTALLED = """
import json, os, sys
site, root, lines = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path[:] = [site, *(path for path in sys.path if "__editable__" not in path)]  # as if it were not installed from here
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
def watch(event, arguments):
    if event in ("open", "os.listdir", "os.scandir", "import") and arguments:
        for name in arguments[:2]:
            path = os.fsdecode(name) if isinstance(name, (str, bytes)) else ""
            if path.startswith(root + os.sep) and not path.startswith(sys.prefix + os.sep):  # the environment may lie in it
                os.write(2, f"{event}: {path}".encode())
                os._exit(3)
sys.addaudithook(watch)
import typer.main
from motionrt.runtime.cli.main import app, main, register
register()
assert sys.modules["motionrt.runtime.cli.main"].__file__.startswith(site)

def leaves(command, *names):
    inner = getattr(command, "commands", None)
    return [names] if inner is None else [leaf for key in inner for leaf in leaves(inner[key], *names, key)]

commands = [" ".join(names) for names in leaves(typer.main.get_command(app))]
for line in [["--help"], *(name.split() + ["--help"] for name in commands), *lines]:
    try:
        main(line)
    except SystemExit as end:
        print(json.dumps([line, end.code or 0]), file=sys.stderr)
print(json.dumps(commands), file=sys.stderr)
"""


def test_installed_commands_need_no_repository(
    wheel: zipfile.ZipFile, fake_bundle: Path, fake_clips: dict[str, Path], still: NDArray[np.uint8], tmp_path: Path
) -> None:
    """From the wheel, outside the repository: the help of every command, and then each at work, or refusing."""
    wheel.extractall(tmp_path / "site")
    Image.fromarray(still).save(tmp_path / "still.png")
    bundle, clip = str(fake_bundle), str(next(iter(fake_clips.values())))
    lines = [
        ["verify", bundle],
        ["memory", "create", "m", "-b", bundle],
        ["memory", "add", "m", clip, "-b", bundle, "--caption", "a ball"],
        ["memory", "search", "m", "a ball", "-b", bundle, "-k", "1"],
        ["memory", "verify", "m"],
        ["memory", "stats", "m"],
        ["memory", "export", "m", "m.mrtm"],
        ["memory", "import", "m.mrtm", "n"],
        ["memory", "remove", "n", "1"],
        ["memory", "compact", "n"],
        ["generate", "-b", bundle, "-m", "m", "-i", "still.png", "-p", "a ball", "-o", "out.mp4", "-k", "1"],
        ["bench", bundle, "-m", "m", "-n", "1"],
        ["inspect", bundle],
        ["deploy", "triton", "-b", bundle, "-m", "m", "-o", "repository"],
        ["doctor", bundle],
        ["keys", "create", "keys.json", "a"],
        ["keys", "list", "keys.json"],
        ["keys", "revoke", "keys.json", "a"],
        ["deploy", "ray", "-b", bundle, "-m", "m", "-o", "ray.yaml"],
    ]
    refused = [
        ["export", "svd", "-o", "exported"],
        ["build", bundle, "-t", "sm_1"],
        ["schedule", "calibrate", bundle, "-m", "m"],
        ["schedule", "remove", bundle, "quick"],
        ["preview", "calibrate", bundle],
        ["serve", "-b", "none", "--store", "store"],
        ["replay", "none.json", "-b", bundle],
        *(["client", *words, "--server", "none"] for words in (["create"], ["list"])),
        *(["client", name, "job", "--server", "none"] for name in ("watch", "get", "record", "cancel", "delete")),
    ]
    lines += refused
    done = subprocess.run(
        [sys.executable, "-P", "-c", INSTALLED, str(tmp_path / "site"), str(ROOT), json.dumps(lines)],
        capture_output=True, text=True, cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *ends, last = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[")]
    untried = [name for name in last if not any(f"{' '.join(line)} ".startswith(f"{name} ") for line in lines)]
    assert untried == [], "add a line for it above"
    wrong = [(line, status) for line, status in ends if status != (2 if line in refused else 0)]
    assert wrong == [], done.stderr


@pytest.mark.parametrize("folder", (*FOLDERS, "benchmarks"))
def test_link_is_relative_and_leads_to_the_root_folder(folder: str) -> None:
    link = ROOT / "src/motionrt" / folder
    assert link.is_symlink(), f"src/motionrt/{folder} is not a link: clone with symbolic links on (git core.symlinks)"
    assert os.readlink(link) == f"../../{folder}"
    assert link.resolve() == ROOT / folder


@pytest.mark.parametrize("folder", (*FOLDERS, "benchmarks"))
def test_no_folder_is_crowded(folder: str) -> None:
    """A folder per concept, of about a dozen files: more hide what belongs together."""
    files = Counter(path.parent.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py")
    assert {str(place): count for place, count in files.items() if count > 13} == {}


def test_kernels_init_is_empty() -> None:
    assert (ROOT / "kernels/__init__.py").read_bytes() == b""


def test_repository_root_is_not_on_sys_path() -> None:
    entries = [entry for entry in sys.path if Path(entry or ".").resolve() == ROOT]
    assert entries == [], "the root hides Hugging Face's `kernels`: run `pytest`, not `python -m pytest`"


def test_no_top_level_kernels_of_ours() -> None:
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).resolve().parents


@pytest.mark.parametrize("path", ["conftest.py", "tests/__init__.py", "__init__.py", "setup.py", "setup.cfg"])
def test_file_that_would_put_the_root_on_sys_path_is_absent(path: str) -> None:
    assert not (ROOT / path).exists()


def pinned(name: str) -> dict[str, str]:
    """{package: version} of a requirements file; every line is a pin, a comment or an inclusion."""
    pins = {}
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        if line.startswith(("#", "-r ")):
            continue
        package, separator, version = line.partition("==")
        assert separator and package and version and "*" not in version, f"{name}.txt: {line!r} is not pinned"
        pins[package] = version
    return pins


def names(requirements: list[str]) -> set[str]:
    return {requirement.split(">")[0].split("=")[0] for requirement in requirements}


def test_locks_pin_what_the_project_asks_for() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    runtime, dev, triton = pinned("runtime"), pinned("dev"), pinned("triton")
    assert names(PROJECT["project"]["dependencies"] + extras["cpu"]) | {"tritonclient"} <= triton.keys()
    assert {name for name in triton.keys() & runtime.keys() if triton[name] != runtime[name]} <= {"protobuf"}
    assert names(PROJECT["project"]["dependencies"] + extras["cpu"] + extras["serve"]) <= runtime.keys()
    assert names(extras["export"] + extras["torch"] + extras["rtx"] + extras["flow"] + extras["dev"]) <= dev.keys()
    assert "ray" in pinned("ray") and "ray" not in dev, "half a gigabyte, in an environment of its own"
    for name in ("dev", "ray"):
        assert not runtime.keys() & pinned(name).keys(), f"{name}.txt includes runtime.txt: a package in both could differ"


def test_run_side_lock_has_no_build_side_package() -> None:
    runtime = pinned("runtime")
    assert not {"torch", "transformers", "diffusers", "onnx", "onnxscript", "onnxruntime-gpu"} & runtime.keys()
    assert not any(package.startswith("nvidia") for package in {**runtime, **pinned("dev")})


def test_no_extra_brings_both_onnx_runtimes() -> None:
    project = PROJECT["project"]
    for extra, requirements in {"base": project["dependencies"], **project["optional-dependencies"]}.items():
        assert not {"onnxruntime", "onnxruntime-gpu"} <= names(requirements), extra
    assert not {"onnxruntime", "onnxruntime-gpu"} & names(project["dependencies"])


BUILD_SIDE = ("torch", "transformers", "diffusers", "onnx", "onnxscript", "motionrt.export")


@pytest.mark.parametrize("module", ["motionrt", "motionrt.runtime", "motionrt.runtime.cli.main", "motionrt.runtime.pipeline"])
def test_run_side_import_pulls_in_no_build_side(module: str, tmp_path: Path) -> None:
    assert imported_of(BUILD_SIDE, module, tmp_path) == "[]"


def test_command_line_imports_none_of_what_the_build_side_needs(tmp_path: Path) -> None:
    assert imported_of(BUILD_SIDE[:-1], "motionrt.runtime.cli.main", tmp_path) == "[]"


def imported_of(names: tuple[str, ...], module: str, place: Path) -> str:
    """Which of `names` a process has imported once it has imported `module`."""
    code = f"import sys, {module}; print([name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Imported only where the torch backend was asked for.
TORCH_FILES = ("torch_backend.py", "torch_precision.py", "torch_program.py")
ONNX_FILE = "runtime/backends/openvino/graph.py"  # the extra `openvino` brings onnx; imported only where a graph is read


def imports(source: str) -> Iterator[str]:
    """Every module that `source` names in an import, at any depth, or in a call that imports a literal name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


@pytest.mark.parametrize("path", sorted((ROOT / "runtime").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_run_side_names_no_build_side_module(path: Path) -> None:
    """Nowhere, so also where an import hides in a function."""
    forbidden = {*BUILD_SIDE} - ({"torch"} if path.name in TORCH_FILES else set())
    forbidden -= {"onnx"} if path == ROOT / ONNX_FILE else set()
    named = {name for name in imports(path.read_text()) for wrong in forbidden if f"{name}.".startswith(f"{wrong}.")}
    assert named == set()


def test_imports_sees_every_way_to_import() -> None:
    source = """
import a.b, c as d
def f():
    from motionrt import export
    if g(): from e.f import (h, i)
    importlib.import_module("j.k"); import_module(l); __import__("m", globals())
"""
    assert set(imports(source)) == {"a.b", "c", "motionrt.export", "e.f.h", "e.f.i", "j.k", "m"}
