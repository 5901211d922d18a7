"""What the products of a step multiply, measured on requests made of a motion memory; and what 8 bits do to their videos.

    engines/scales/<graph>.scales        for each weight the largest absolute value of what is multiplied by it

Nothing but a memory is needed: a request has a clip's caption for a prompt, its first picture for a still, and the motion of
*other* clips (those of the same source are left out). Every step of the default schedule counts, both branches of guidance too.
The few values that stick out of an activation would cost all others most of their digits in int8, whose grid is even: there a
percentile of each call counts, and of all calls the largest; in fp8 the largest value does. Every form and engine with static
scales takes the same file. Quality is measured on clips that were not calibrated with.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

import motionrt
from motionrt.export.engines.graph import engine_graph, save
from motionrt.export.engines.process import Event, Listener
from motionrt.export.engines.quantised import products
from motionrt.runtime.backends.onnx_form import OnnxForm, Quality
from motionrt.runtime.backends.onnx_weights import package_weights
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend, OrtExecutor
from motionrt.runtime.backends.seam import Checked
from motionrt.runtime.backends.sidecar import Sidecar
from motionrt.runtime.backends.tensorrt.engine_file import Span
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.calibrate import decibels, requests_of, some_clips
from motionrt.runtime.errors import EngineError, InputError
from motionrt.runtime.files import replacing
from motionrt.runtime.memory.memory import MotionMemory
from motionrt.runtime.pipeline import MotionPipeline, Request

PERCENTILE = 99.9  # of the absolute values of one activation in one call; on the demo 3 dB better than the largest
QUALITY_REQUESTS = 4
FOLDER = "scales"


class Scales(Sidecar, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The scales of one graph, by the names of weights: `amax`, the largest absolute values of what is multiplied by them, and
    `top`, the `percentile` of it. `clips`: ids of those it was measured with, in the memory whose `digest` is `memory`."""

    kind = "scales of graph"

    amax: dict[str, float]
    top: dict[str, float]
    clips: tuple[int, ...]
    memory: str
    percentile: float

    def rebuild_command(self) -> str:
        """See `Sidecar`."""
        return f"motionrt build {self.bundle} ... --precision {self.dtype} --calibrate MEMORY --graphs {self.graph}"

    @property
    def sha256(self) -> str:
        """Digest of the numbers."""
        return hashlib.sha256(json.dumps([self.amax, self.top], sort_keys=True).encode()).hexdigest()

    def of(self, kind: str) -> dict[str, float]:
        """What `quantised.static` takes for `kind`."""
        return self.top if kind == "int8" else self.amax


def form_graph(bundle: Bundle, name: str, dtype: str) -> ir.Model:
    """The engine graph of graph `name`, its sizes left open."""
    spec, source = bundle.graph(name), bundle.graph_path(name)
    external = package_weights(spec, source, bundle.path) if spec.weights is not None else None
    every = {
        port.name: Span(*(tuple(getattr(dim, side) for dim in port.dims) for side in ("min", "opt", "max")))
        for port in spec.inputs
    }
    return engine_graph(ir.load(source), (every,), dtype, external, wide=spec.wide)


def find_scales(
    bundle: Bundle, names: Sequence[str], memory: Path | None, requests: int, listen: Listener = lambda event: None
) -> dict[str, Scales]:
    """The scales of graphs: those that are there and fit, or measured now with `requests` clips of `memory` and kept.

    A graph that these requests never ran, or that has nothing to quantise, has none. Raises `InputError` without a memory where
    something would have to be measured.
    """
    recipe = _recipe()
    found: dict[str, Scales] = {}
    for name in names:
        file = bundle.path / "engines" / FOLDER / f"{name}.scales"
        try:
            scales = Scales.read(file)
            scales.check_origin(bundle.graph(name))
        except EngineError:
            continue
        if scales.recipe_sha256 == recipe:
            found[name] = scales
    if memory is None:
        if lacking := [name for name in names if name not in found]:
            raise InputError(
                f"there are no scales of {', '.join(lacking)} in {bundle.path / 'engines' / FOLDER}, or they are of another "
                "graph or version. Measure them: --calibrate MEMORY, a motion memory whose clips' files are there."
            )
        return found
    with MotionMemory.open(memory, readonly=True) as opened:
        digest, clips = opened.digest(), tuple(some_clips(opened, requests))
        if set(found) == set(names) and all((one.memory, one.clips) == (digest, clips) for one in found.values()):
            return found
        asked = requests_of(bundle, opened, clips)
        return measure_scales(bundle, names, asked, opened, clips, listen)


def measure_scales(
    bundle: Bundle, names: Sequence[str], requests: Sequence[Request], memory: MotionMemory | None = None,
    clips: tuple[int, ...] = (), listen: Listener = lambda event: None,
) -> dict[str, Scales]:  # fmt: skip
    """The scales of graphs, measured with `requests` and kept; `clips`: those of `memory` that these were made of."""
    watch = _Watching(names)
    pipeline = MotionPipeline(bundle, watch, memory)
    for place, request in enumerate(requests):
        listen(Event(names[0], "calibrating", place, len(requests)))
        pipeline.result(pipeline.start(request))
    made = {}
    for name, (amax, top) in watch.seen.items():
        spec = bundle.graph(name)
        made[name] = Scales(
            folder=bundle.path / "engines" / FOLDER, graph=name, dtype="float32", motionrt=motionrt.__version__,
            onnx_sha256=spec.sha256, weights_sha256=spec.weights_sha256, recipe_sha256=_recipe(), amax=amax, top=top,
            clips=clips, memory="" if memory is None else memory.digest(), percentile=PERCENTILE,
        )  # fmt: skip
        made[name].folder.mkdir(parents=True, exist_ok=True)
        with replacing(made[name].folder / f"{name}.scales", EngineError) as temporary:
            temporary.write_text(made[name].to_json(), encoding="utf-8")
    return made


def measure(
    bundle: Bundle, memory: Path, forms: Mapping[str, OnnxForm], requests: int, listen: Listener = lambda event: None
) -> Quality:
    """What `forms` do to videos of clips that calibration with `requests` clips leaves out, as ONNX Runtime computes them."""
    heard = []
    with MotionMemory.open(memory, readonly=True) as opened:
        clips = some_clips(opened, requests, 1)[:QUALITY_REQUESTS]
        exact, ours = (MotionPipeline(bundle, backend, opened) for backend in (OnnxRuntimeBackend(), _Forms(forms)))
        for place, request in enumerate(requests_of(bundle, opened, clips)):
            listen(Event(next(iter(forms)), "measuring quality", place, len(clips)))
            want, got = (pipeline.result(pipeline.start(request)).frames for pipeline in (exact, ours))
            heard.append(decibels(got, want))
    return Quality(round(float(np.mean(heard)), 2), len(heard))


def _recipe() -> str:
    """Digest of the code that decides what is measured, and under which names."""
    digest, here_ = hashlib.sha256(), Path(__file__)
    for name in ("calibration", "quantised", "graph"):
        digest.update(here_.with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


class _Forms(OnnxRuntimeBackend):
    """ONNX Runtime with forms in the place of graphs, whomever they are for."""

    def __init__(self, forms: Mapping[str, OnnxForm]) -> None:
        super().__init__()
        self._forms = forms

    def form(self, bundle: Bundle, name: str) -> OnnxForm | None:
        return self._forms.get(name)


class _Watching(OnnxRuntimeBackend):
    """ONNX Runtime that sees what the products of some graphs multiply. seen: graph -> `Scales.amax` and `.top` so far."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = names
        self.seen: dict[str, tuple[dict[str, float], dict[str, float]]] = {}

    def load(self, bundle: Bundle, name: str) -> Checked:
        """See `OnnxRuntimeBackend`; a graph that is watched gives what its products read, too."""
        if name not in self._names:
            return super().load(bundle, name)
        import onnxruntime

        model, spec = form_graph(bundle, name, "float32"), bundle.graph(name)
        found = products(model)
        if not found:
            return super().load(bundle, name)
        read = {product.weight: product.node.inputs[0] for product in found}
        shown = [value for value in dict.fromkeys(read.values()) if value is not None]
        model.graph.outputs.extend(value for value in shown if not value.is_graph_input() and not value.is_graph_output())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        with tempfile.TemporaryDirectory(prefix="motionrt-calibrate-") as folder:
            save(model, Path(folder) / "graph.onnx")
            session = onnxruntime.InferenceSession(f"{folder}/graph.onnx", options, providers=["CPUExecutionProvider"])
        names = {weight: str(value.name) for weight, value in read.items() if value is not None}
        seen = self.seen.setdefault(name, ({}, {}))
        return Checked(spec, _Watched(session, [port.name for port in spec.outputs], names, seen))


class _Watched(OrtExecutor):
    """A session whose further outputs are looked at and not given. reads: weight -> the value it is multiplied with."""

    def __init__(
        self, session: Any, outputs: Sequence[str], reads: Mapping[str, str], seen: tuple[dict[str, float], dict[str, float]]
    ) -> None:
        super().__init__(session, outputs)
        self._reads, self._seen = reads, seen

    def execute(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """See `Executor`."""
        wanted = list(dict.fromkeys([*self.outputs, *(name for name in self._reads.values() if name not in inputs)]))
        values = dict(inputs) | dict(zip(wanted, self.session.run(wanted, inputs), strict=True))
        found = {name: tops_of(np.asarray(values[name])) for name in set(self._reads.values())}
        for weight, name in self._reads.items():
            for largest, number in zip(self._seen, found[name], strict=True):
                largest[weight] = max(largest.get(weight, 0.0), number)
        return {name: values[name] for name in self.outputs}


def tops_of(array: NDArray[Any], percentile: float = PERCENTILE) -> tuple[float, float]:
    """The largest absolute value, and the one below which `percentile` of the numbers lie: the largest, where there are few."""
    numbers = np.abs(array.ravel())
    place = min(int(np.ceil(len(numbers) * percentile / 100)), len(numbers) - 1)
    return float(numbers.max()), float(np.partition(numbers, place)[place])
