"""The house: which folder may know which, no circle of imports, and four hops from the command line to the device."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# What each folder, or file beside them, of runtime/ may import of the others; `cli` stands on top of all.
MAY_KNOW = {
    "errors": "", "dtypes": "", "files": "errors", "noise": "errors", "arguments": "errors",
    "bundle": "errors arguments dtypes files",
    "media": "errors arguments files",
    "backends": "errors arguments dtypes files bundle",
    "memory": "errors arguments files bundle dtypes",
    "loop": "errors bundle",
    "inputs": "errors bundle media",
    "indexing": "errors arguments files bundle media memory backends",
    "job": "errors bundle media inputs loop memory noise indexing",
    "pipeline": "errors arguments files bundle media backends memory loop job",
    "scheduler": "errors arguments bundle loop job pipeline",
    "schedules": "errors bundle",
    "calibrate": "errors files bundle job memory indexing pipeline schedules",
    "preview": "errors bundle pipeline job calibrate",
    "deploy": "errors files bundle media backends memory pipeline",
    "adapters": "errors arguments job noise pipeline",
    "serve": "errors files noise bundle media backends memory indexing job pipeline scheduler",
}  # fmt: skip
HOPS = ["generate", "Job.__next__", "MotionPipeline.run", "Checked.run", "execute"]


def modules() -> dict[str, ast.Module]:
    """Every module of the package, by its name."""
    found = {}
    for folder in ("export", "kernels", "runtime"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(("motionrt", *(parts[:-1] if parts[-1] == "__init__" else parts)))
            found[name] = ast.parse(path.read_text())
    return found


def imported(tree: ast.AST, names: set[str]) -> Iterator[str]:
    """The modules of `names` that are imported, also inside functions; not what only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield from (name for name in (whole if whole in names else node.module,) if name in names)
        yield from imported(node, names)


def test_folders_of_the_run_side_know_only_those_below_them() -> None:
    every = modules()
    wrong = set()
    for name, tree in every.items():
        _, side, *rest = name.split(".")
        if side != "runtime" or not rest or rest[0] not in MAY_KNOW:
            continue
        allowed = {rest[0], *MAY_KNOW[rest[0]].split()}
        for other in imported(tree, set(every)):
            part = other.split(".")[2:3]
            if other.startswith("motionrt.runtime.") and part and part[0] not in allowed:
                wrong.add(f"{name} imports {other}")
    assert wrong == set()
    folders = {path.stem for path in (ROOT / "runtime").iterdir() if not path.name.startswith("__")}
    assert folders - {"cli"} == set(MAY_KNOW)


def test_there_is_no_circle_of_imports() -> None:
    every = modules()
    graph = {name: set(imported(tree, set(every))) - {name} for name, tree in every.items()}
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_four_hops_from_the_command_to_the_device(
    run: Callable[..., tuple[int, str, str]], fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CONTRIBUTING names them; here the stack is looked at where ONNX Runtime is called."""
    from motionrt.runtime.backends import onnxruntime

    stacks: list[list[str]] = []
    (executor,) = (
        kind for _, kind in inspect.getmembers(onnxruntime, inspect.isclass)
        if kind.__module__ == onnxruntime.__name__ and kind.__name__ == "OrtExecutor"
    )  # fmt: skip
    execute = executor.execute

    def watched(self: Any, inputs: Any) -> Any:
        stacks.append(list(hops(inspect.currentframe())))
        return execute(self, inputs)

    monkeypatch.setattr(executor, "execute", watched)
    still = tmp_path / "still.png"
    Image.new("RGB", (16, 16), "red").save(still)
    options = ("-i", still, "-p", "a red ball", "--motion-scale", 0, "-o", tmp_path / "a.mp4")
    status, _, err = run("generate", "-b", fake_bundle, *options)
    assert status == 0, err
    assert len(stacks) >= 6 and all(stack == HOPS for stack in stacks)
    told = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(f"`{hop}`" in told for hop in HOPS)


def hops(frame: FrameType | None) -> Iterator[str]:
    """The functions of the package on the stack, from the command on, the test's own stand-in as `execute`."""
    names: list[str] = []
    while frame is not None:
        if "motionrt" in frame.f_code.co_filename and "contextlib" not in frame.f_code.co_filename:
            names.append(frame.f_code.co_qualname)
        if frame.f_code.co_name == "generate":
            break
        frame = frame.f_back
    yield from (*reversed(names), "execute")
