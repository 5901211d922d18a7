"""The graphs of a bundle in other dtypes for backends that read ONNX: converted as for an engine, sizes left open.

Flavor onnxruntime: float16 or bfloat16 for GPUs, all graphs; int8 for the CPU, the steps of loops, each activation measured
when it is there (quantised.py). Flavor openvino: int8, the steps, with scales that were measured before (calibration.py). What
such a form is, and what is checked before one is loaded, is in runtime/backends/onnx_form.py. Each appears whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir

import motionrt
from motionrt.export.engines.build import Options, chosen_graphs, locked, quantised_recipe, recipe_sha256, workplace
from motionrt.export.engines.calibration import Scales, find_scales, form_graph, measure
from motionrt.export.engines.graph import save
from motionrt.export.engines.process import Event, Listener
from motionrt.export.engines.quantised import NothingToQuantise, dynamic, static
from motionrt.export.engines.sensitivity import ranked
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
    if options.least_db is not None and (precision is None or options.calibrate is None):
        raise InputError("--least-db is for --precision with --calibrate: without a memory no quality is measured.")
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
                left = _left(bundle, name, options)
                made[name] = _one(bundle, name, options, scales.get(name), listen, left)
            except NothingToQuantise as error:
                if options.graphs or name == names[-1] and not made:
                    raise EngineError(f"graph '{name}' cannot be in {precision}: {error}. Nothing was replaced.") from None
                listen(Event(name, f"left as it is: {error}"))
        if options.calibrate is not None and any(item.form.quality is None for item in made.values()):
            made = _measured(bundle, made, options, listen)
        worst = min((item.form.quality.db for item in made.values() if item.form.quality is not None), default=0.0)
        if options.least_db is not None and worst < options.least_db:
            made = _better(bundle, made, options, scales, listen)
        yield from made.values()


def _measured(bundle: Bundle, made: dict[str, Formed], options: Options, listen: Listener) -> dict[str, Formed]:
    """Forms with their quality, which is that of all together."""
    assert options.calibrate is not None
    quality = measure(bundle, options.calibrate, {name: item.form for name, item in made.items()}, options.requests, listen)
    forms = {name: msgspec.structs.replace(item.form, quality=quality) for name, item in made.items()}
    for form in forms.values():
        _write(form)
    return {name: Formed(forms[name], item.cached, item.bytes) for name, item in made.items()}


def _better(
    bundle: Bundle, made: dict[str, Formed], options: Options, scales: dict[str, Scales], listen: Listener
) -> dict[str, Formed]:
    """Forms without the products that cost most, as few as give `options.least_db`, by halving; `EngineError` if none do."""
    assert options.calibrate is not None and options.least_db is not None
    worst = ranked(
        bundle, options.calibrate, options.requests,
        {name: partial(_quantise, options=options, scales=scales.get(name)) for name in made}, listen,
    )  # fmt: skip
    low, high, best = 0, len(worst), dict[str, Formed]()
    while high - low > 1:
        count = (low + high) // 2
        skipped = {name: tuple(sorted(weight for graph, weight in worst[:count] if graph == name)) for name in made}
        try:
            tried = {name: _one(bundle, name, options, scales.get(name), listen, skipped[name]) for name in made}
        except NothingToQuantise:  # all products of one of several graphs
            high = count
            continue
        tried = _measured(bundle, tried, options, listen)
        quality = next(iter(tried.values())).form.quality
        assert quality is not None
        if quality.db >= options.least_db:
            high, best = count, tried
        else:
            low = count
    left = {name: best[name].form.left if best else () for name in made}
    last = {name: _one(bundle, name, options, scales.get(name), listen, left[name]) for name in made}
    if any(item.form.quality is None for item in last.values()):  # another one was tried after it
        last = _measured(bundle, last, options, listen)
    if not best:
        raise EngineError(
            f"no choice of products gives {options.least_db:g} dB in {options.precision}: with all of them it is "
            f"{last[next(iter(last))].form.quality}, and that stays. Ask for less: --least-db."
        )
    return {name: Formed(item.form, False, item.bytes) for name, item in last.items()}


def _left(bundle: Bundle, name: str, options: Options) -> tuple[str, ...]:
    """What the form that is there leaves out, if it has the quality that is asked for: it need not be looked for again."""
    try:
        form = OnnxForm.read(form_folder(bundle.path, options.precision or "", options.flavor) / f"{name}.form")
    except EngineError:
        return ()
    good = options.least_db is not None and form.quality is not None and form.quality.db >= options.least_db
    return form.left if good else ()


def _quantise(model: ir.Model, skip: Collection[str], *, options: Options, scales: Scales | None) -> int:
    if options.flavor == FLAVOR:
        return dynamic(model, skip)
    return static(model, scales.of("int8") if scales is not None else {}, "int8", skip, "int7")


def _one(
    bundle: Bundle, name: str, options: Options, scales: Scales | None, listen: Listener, left: tuple[str, ...] = ()
) -> Formed:
    spec, dtype = bundle.graph(name), options.precision or options.dtype
    folder = form_folder(bundle.path, dtype, options.flavor)
    identity: dict[str, Any] = {
        "graph": name, "flavor": options.flavor, "dtype": dtype, "motionrt": motionrt.__version__, "onnx_sha256": spec.sha256,
        "weights_sha256": spec.weights_sha256, "recipe_sha256": quantised_recipe() if options.precision else recipe_sha256(),
        "scales_sha256": scales.sha256 if scales is not None else "", "left": left,
    }  # fmt: skip
    sidecar = folder / f"{name}.form"
    if (there := _cached(sidecar, spec, identity)) is not None:
        return Formed(there, True, sum((folder / file).stat().st_size for file in there.files))
    listen(Event(name, "converting"))
    model = form_graph(bundle, name, "float32" if options.precision else dtype)
    products = _quantise(model, left, options=options, scales=scales) if options.precision else 0
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
