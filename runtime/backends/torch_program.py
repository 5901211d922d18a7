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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import motionrt.kernels.motion_augmented_attention  # its operator is in the programs, as is the next one's
import motionrt.kernels.motion_cross_attention  # noqa: F401
from motionrt.runtime.backends.seam import first_line
from motionrt.runtime.backends.torch_precision import to_precision
from motionrt.runtime.errors import BackendError, BundleError

_MEMBERS = re.compile(
    r"models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)|data/sample_inputs/model\.pt"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|\.data/(version|serialization_id)"
    r"|archive_format|archive_version|byteorder|extra/weights\.json"
)
WEIGHTS = "weights.json"  # in the archive: the names of its first inputs
_TARGETS = re.compile(r"torch\.ops\.(aten|prims|motionrt)\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\.sym_\w+")


@dataclass(frozen=True)
class Loaded:
    """A program with its weights in it: `module(*inputs)` gives a tuple; `examples`: fake tensors like the inputs, in order."""

    module: torch.fx.GraphModule
    examples: tuple[Tensor, ...]


def load_program(
    path: Path, name: str, data: Path | None, device: torch.device, precision: torch.dtype = torch.float32
) -> Loaded:
    """The program in `path`, on `device`, with the weights that it names from the safetensors file `data`.

    It computes in `precision` with the islands of precision.py. Inputs are float32, or of `precision` where nothing reads them
    in float32; results are of the precision that they were computed in.

    Both files have the digests that bundle.json declares (`Bundle.program_path`, `Bundle.graph_path`). Raises `BundleError`
    for an archive that is none or that would run code, and for weights that are missing or of another shape; `BackendError`
    where this torch cannot read it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            weights = _vet(archive)
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
    return _with_weights(program, name, weights, data, device, precision)


def _with_weights(
    program: torch.export.ExportedProgram, name: str, weights: Sequence[str], data: Path | None, device: torch.device,
    precision: torch.dtype,
) -> Loaded:  # fmt: skip
    """The program's graph with the first of its inputs, the weights, as buffers of a module."""
    graph = program.graph_module.graph
    if own := [*program.state_dict, *program.constants]:
        raise BundleError(f"program '{name}' of the bundle holds weights of its own ({own[0]}). Export the bundle again.")
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if len(placeholders) < len(weights):
        raise BundleError(f"program '{name}' takes {len(placeholders)} values, and {len(weights)} weights. Export it again.")
    if weights and data is None:
        raise BundleError(f"program '{name}' takes weights, and its graph has no file of them. Export the bundle again.")
    held = {} if data is None else _read(data, set(weights), name)
    stored = {}
    for number, (key, node) in enumerate(zip(weights, placeholders, strict=False)):
        value, wanted = held[key], node.meta["val"]
        if tuple(value.shape) != tuple(wanted.shape):
            raise BundleError(
                f"weight `{key}` of program '{name}' is {list(value.shape)}; {list(wanted.shape)} is expected. Export it again."
            )
        stored[f"weight_{number}"] = value
        with graph.inserting_before(node):
            new = graph.create_node("get_attr", f"weight_{number}")
        new.meta["val"] = wanted
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    if precision != torch.float32:
        to_precision(graph, precision)
    root = torch.nn.Module()
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        kind = node.meta["val"].dtype
        place = f"{node.target}_{str(kind).removeprefix('torch.')}"
        if not hasattr(root, place):
            root.register_buffer(place, stored[node.target].to(device, kind), persistent=False)
        node.target = place
    return Loaded(torch.fx.GraphModule(root, graph), tuple(node.meta["val"] for node in placeholders[len(weights) :]))


def _read(path: Path, names: set[str], program: str) -> dict[str, Tensor]:
    """Those tensors of a safetensors file, mapped: nothing is read before it is looked at."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if missing := sorted(names - set(file.keys())):
                raise BundleError(f"{path} lacks `{missing[0]}`, which program '{program}' takes. Export the bundle again.")
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise BundleError(f"the weights {path} cannot be read ({error}). Copy or export the bundle again.") from None


def _vet(archive: zipfile.ZipFile) -> list[str]:
    """The names of the program's weights. Raises ValueError (or what zipfile, json and ast raise) unless loading the archive
    only reads tensors and a graph."""
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
    names = json.loads(archive.read(entries[f"extra/{WEIGHTS}"]))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its list of weights is none")
    return names


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
