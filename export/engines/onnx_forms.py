"""The graphs of a bundle in other dtypes for backends that read ONNX: converted as for an engine, sizes left open.

Flavor onnxruntime: float16 or bfloat16 for GPUs, all graphs; int8 for the CPU, the steps of loops, each activation measured
when it is there (quantised.py). Flavor openvino: int8, the steps, with scales that were measured before (calibration.py). What
such a form is, and what is checked before one is loaded, is in runtime/backends/onnx_form.py. Each appears whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

import motionrt
from motionrt.export.engines.build import Options, chosen_graphs, locked, quantised_recipe, recipe_sha256, workplace
from motionrt.export.engines.calibration import Scales, find_scales, form_graph, measure
from motionrt.export.engines.graph import save
from motionrt.export.engines.process import Event, Listener
from motionrt.export.engines.quantised import NothingToQuantise, dynamic, static
from motionrt.runtime.backends.onnx_form import DTYPES, FLAVOR, FORMS, OnnxForm, form_folder
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.manifest import GraphSpec
from motionrt.runtime.errors import EngineError, InputError
from motionrt.runtime.files import replacing, sha256_of


@dataclass(frozen=True)
class Formed:
    """One form in place, and its bytes. `cached`: it was there already."""

    form: OnnxForm
    cached: bool
    bytes: int


def build_forms(path: Path, options: Options, listen: Listener = lambda event: None) -> Iterator[Formed]:
    """Write the forms of the bundle `path` in `options.dtype` or `.precision`, each in place before it is yielded.

    With `options.calibrate` the quality of those in 8 bits is measured and written beside them. Raises `InputError` for options
    that make no sense here, `EngineError` where one cannot be written.
    """
    flavor, precision = options.flavor, options.precision
    if precision is None and options.dtype not in DTYPES:
        raise InputError(f"--dtype is {options.dtype!r}; --flavor {FLAVOR} takes {' or '.join(DTYPES)}: float32 is the bundle.")
    if (precision or options.dtype) not in FORMS[flavor]:
        got = f"--precision is {precision!r}" if precision else "no --precision is given"
        raise InputError(f"{got}; --flavor {flavor} takes --precision int8. fp8 is for engines: --flavor rtx.")
    if options.targets or options.profiles:
        raise InputError(f"--target and --profile are for engines; --flavor {flavor} runs on every machine, at every size.")
    bundle = Bundle.open(path)
    names = chosen_graphs(bundle, options)
    with locked(form_folder(path, precision or options.dtype, flavor)):
        if precision is None:
            for name in names:
                yield _one(bundle, name, options, None, listen)
            return
        scales = find_scales(bundle, names, options.calibrate, options.requests, listen) if flavor != FLAVOR else {}
        made = dict[str, Formed]()
        for name in names:
            try:
                made[name] = _one(bundle, name, options, scales.get(name), listen)
            except NothingToQuantise as error:
                if options.graphs or name == names[-1] and not made:
                    raise EngineError(f"graph '{name}' cannot be in {precision}: {error}. Nothing was replaced.") from None
                listen(Event(name, f"left as it is: {error}"))
        forms = {name: item.form for name, item in made.items()}
        if options.calibrate is not None and any(form.quality is None for form in forms.values()):
            quality = measure(bundle, options.calibrate, forms, options.requests, listen)
            for name, item in made.items():
                form = msgspec.structs.replace(item.form, quality=quality)
                _write(form)
                made[name] = Formed(form, item.cached, item.bytes)
        yield from made.values()


def _one(bundle: Bundle, name: str, options: Options, scales: Scales | None, listen: Listener) -> Formed:
    spec, dtype = bundle.graph(name), options.precision or options.dtype
    folder = form_folder(bundle.path, dtype, options.flavor)
    identity: dict[str, Any] = {
        "graph": name, "flavor": options.flavor, "dtype": dtype, "motionrt": motionrt.__version__, "onnx_sha256": spec.sha256,
        "weights_sha256": spec.weights_sha256, "recipe_sha256": quantised_recipe() if options.precision else recipe_sha256(),
        "scales_sha256": scales.sha256 if scales is not None else "",
    }  # fmt: skip
    sidecar = folder / f"{name}.form"
    if (there := _cached(sidecar, spec, identity)) is not None:
        return Formed(there, True, sum((folder / file).stat().st_size for file in there.files))
    listen(Event(name, "converting"))
    products = 0
    if options.precision is None:
        model = form_graph(bundle, name, dtype)
    else:
        model = form_graph(bundle, name, "float32")
        if options.flavor == FLAVOR:
            products = dynamic(model)
        else:
            products = static(model, scales.of(dtype) if scales is not None else {}, dtype)
    with workplace(folder) as place:
        try:
            save(model, place / f"{name}.onnx")
            files = {file.name: sha256_of(file) for file in sorted(place.iterdir())}
            sidecar.unlink(missing_ok=True)  # what it names is replaced now
            for file in files:
                os.replace(place / file, folder / file)
        except OSError as error:
            raise EngineError(f"cannot write {folder}: {error.strerror or error}. Free some space.") from None
    form = OnnxForm(folder=folder, files=files, products=products, **identity)
    form.check(spec)
    _write(form)
    return Formed(form, False, sum((folder / file).stat().st_size for file in files))


def _write(form: OnnxForm) -> None:
    with replacing(form.folder / f"{form.graph}.form", EngineError) as temporary:
        temporary.write_text(form.to_json(), encoding="utf-8")


def _cached(sidecar: Path, spec: GraphSpec, identity: dict[str, Any]) -> OnnxForm | None:
    """The form that is there, if it is whole and of this identity."""
    if not sidecar.is_file():
        return None
    try:
        form = OnnxForm.read(sidecar)
        form.check(spec)
    except EngineError:
        return None
    return form if all(getattr(form, key) == value for key, value in identity.items()) else None
