"""Reading a torch program of a bundle: verified, vetted, and only then given to `torch.export.load`.

That loader unpickles and evaluates text where an archive asks for it, so an archive that does is refused: programs that
`motionrt.export` writes hold plain bytes, a graph of ATen operators and sizes such as `Mul(Integer(2), Symbol('s1'))`.
This keeps the promise that reading a bundle executes nothing. It is no sandbox for what the operators themselves do.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import motionrt.kernels.motion_cross_attention  # noqa: F401  # its operators are in the programs
from motionrt.runtime.errors import BackendError, BundleError

_MEMBERS = re.compile(
    r"models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)|data/sample_inputs/model\.pt"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|\.data/(version|serialization_id)"
    r"|archive_format|archive_version|byteorder"
)
_TARGETS = re.compile(r"torch\.ops\.(aten|prims|motionrt)\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\.sym_\w+")


def load_program(path: Path, name: str, device: torch.device) -> torch.export.ExportedProgram:
    """The program in `path`, on `device`. `path` has the digest that bundle.json declares (`Bundle.program_path`).

    Raises `BundleError` for an archive that is none or that would run code, `BackendError` where this torch cannot read it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _vet(archive)
    except (zipfile.BadZipFile, KeyError, ValueError, SyntaxError, RecursionError) as error:
        raise BundleError(
            f"program '{name}' of the bundle is not one that motionrt writes ({error}). Export the bundle again."
        ) from None
    try:
        program = torch.export.load(path)
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, str(device))
    except Exception as error:  # whatever a newer or older format makes it stumble over
        raise BackendError(
            f"torch {torch.__version__} cannot load program '{name}' ({first_line(error)}). "
            "Install the torch version that the bundle names, or export the bundle again."
        ) from None
    return program


def first_line(error: BaseException) -> str:
    """An exception in one line, for a sentence."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]


def _vet(archive: zipfile.ZipFile) -> None:
    """Raise ValueError (or what zipfile, json and ast raise) unless loading the archive only reads tensors and a graph."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        member = info.filename.partition("/")[2]
        if not _MEMBERS.fullmatch(member) or member in entries:
            raise ValueError(f"it holds {info.filename!r}")
        entries[member] = info
    for member, info in entries.items():
        if member == "data/sample_inputs/model.pt" and info.file_size:
            raise ValueError("it holds pickled sample inputs")
        if not member.endswith(".json"):
            continue
        for key, value in _items(json.loads(archive.read(info))):
            if key == "use_pickle" and value is not False:
                raise ValueError("it holds pickled tensors")
            if key == "expr_str" and not _is_size(ast.parse(str(value), mode="eval").body):
                raise ValueError(f"it holds the size {value!r:.60}")
            if key == "target" and isinstance(value, str) and not _TARGETS.fullmatch(value):
                raise ValueError(f"it calls {value!r:.60}")


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from value.items()
        for inner in value.values():
            yield from _items(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _items(inner)


def _is_size(node: ast.expr) -> bool:
    """Whether an expression is a SymPy size: numbers, and named constructors over sizes; text names symbols only."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int)
    if isinstance(node, ast.Name):
        return re.fullmatch(r"[A-Za-z]\w*", node.id) is not None
    if isinstance(node, ast.UnaryOp):
        return _is_size(node.operand)
    if isinstance(node, ast.BinOp):
        return _is_size(node.left) and _is_size(node.right)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    if not all(isinstance(keyword.value, ast.Constant) and keyword.arg for keyword in node.keywords):
        return False
    if node.func.id == "Symbol":
        return all(isinstance(a, ast.Constant) and re.fullmatch(r"\w+", str(a.value)) for a in node.args)
    return re.fullmatch(r"[A-Z]\w*", node.func.id) is not None and all(map(_is_size, node.args))
