"""The graphs of a bundle in float16 or bfloat16 for ONNX Runtime on a GPU: converted as for an engine, sizes left open.

What such a form is, and what is checked before one is loaded, is in runtime/backends/onnx_form.py. A form appears whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

import motionrt
from motionrt.export.engines.build import Options, chosen_graphs, locked, recipe_sha256, workplace
from motionrt.export.engines.graph import engine_graph, save
from motionrt.export.engines.process import Event, Listener
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.backends.tensorrt.engine_file import Span
from motionrt.runtime.errors import EngineError, InputError
from motionrt.runtime.bundle.manifest import GraphSpec
from motionrt.runtime.files import sha256_of
from motionrt.runtime.backends.onnx_form import DTYPES, FLAVOR, OnnxForm, form_folder
from motionrt.runtime.backends.onnx_weights import package_weights
from motionrt.runtime.files import replacing


@dataclass(frozen=True)
class Formed:
    """One form in place, and its bytes. `cached`: it was there already."""

    form: OnnxForm
    cached: bool
    bytes: int


def build_forms(path: Path, options: Options, listen: Listener = lambda event: None) -> Iterator[Formed]:
    """Write the forms of the bundle `path` in `options.dtype`, one after the other, each in place before it is yielded.

    Raises `InputError` for options that make no sense here, `EngineError` where one cannot be written.
    """
    if options.dtype not in DTYPES:
        raise InputError(f"--dtype is {options.dtype!r}; --flavor {FLAVOR} takes {' or '.join(DTYPES)}: float32 is the bundle.")
    if options.targets or options.profiles:
        raise InputError(f"--target and --profile are for engines; --flavor {FLAVOR} runs on every GPU, at every size.")
    bundle = Bundle.open(path)
    names = chosen_graphs(bundle, options)
    folder = form_folder(path, options.dtype)
    with locked(folder):
        for name in names:
            yield _one(bundle, name, folder, options.dtype, listen)


def _one(bundle: Bundle, name: str, folder: Path, dtype: str, listen: Listener) -> Formed:
    spec, source = bundle.graph(name), bundle.graph_path(name)
    identity = {
        "graph": name, "dtype": dtype, "motionrt": motionrt.__version__, "onnx_sha256": spec.sha256,
        "weights_sha256": spec.weights_sha256, "recipe_sha256": recipe_sha256(),
    }  # fmt: skip
    sidecar = folder / f"{name}.form"
    if (there := _cached(sidecar, spec, identity)) is not None:
        return Formed(there, True, sum((folder / file).stat().st_size for file in there.files))
    listen(Event(name, "converting"))
    external = package_weights(spec, source, bundle.path) if spec.weights is not None else None
    every = {
        port.name: Span(*(tuple(getattr(dim, side) for dim in port.dims) for side in ("min", "opt", "max")))
        for port in spec.inputs
    }
    model = engine_graph(ir.load(source), (every,), dtype, external, wide=spec.wide)
    with workplace(folder) as place:
        try:
            save(model, place / f"{name}.onnx")
            files = {file.name: sha256_of(file) for file in sorted(place.iterdir())}
            sidecar.unlink(missing_ok=True)  # what it names is replaced now
            for file in files:
                os.replace(place / file, folder / file)
        except OSError as error:
            raise EngineError(f"cannot write {folder}: {error.strerror or error}. Free some space.") from None
    form = OnnxForm(folder=folder, files=files, **identity)
    form.check(spec)
    with replacing(sidecar, EngineError) as temporary:
        temporary.write_text(form.to_json(), encoding="utf-8")
    return Formed(form, False, sum((folder / file).stat().st_size for file in files))


def _cached(sidecar: Path, spec: GraphSpec, identity: dict[str, str]) -> OnnxForm | None:
    """The form that is there, if it is whole and of this identity."""
    if not sidecar.is_file():
        return None
    try:
        form = OnnxForm.read(sidecar)
        form.check(spec)
    except EngineError:
        return None
    return form if all(getattr(form, key) == value for key, value in identity.items()) else None
