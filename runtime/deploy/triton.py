"""A model repository of Triton Inference Server for a bundle: `config.pbtxt`, a model of one line, samples to warm up with.

    NAME/config.pbtxt    inputs and outputs as the bundle declares them, one instance a device, where bundle and memory lie
    NAME/1/model.py      names `motionrt.runtime.deploy.triton_model`, which must be installed where Triton is
    NAME/warmup/         the tensors of the request that Triton makes before it says that the model is ready
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.backends.open import RunOptions
from motionrt.runtime.bundle.manifest import ImageInput, Manifest, TextInput
from motionrt.runtime.deploy.tensors import Tensor, inputs_of, outputs_of, request_of
from motionrt.runtime.errors import InputError, shown
from motionrt.runtime.files import replacing_folder
from motionrt.runtime.pipeline import MotionPipeline

_USUAL = RunOptions()
_MODEL = '''"""Written by `motionrt deploy triton`: the package does the work."""

from motionrt.runtime.deploy.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_repository(
    out: Path, bundle: Path, memory: Path | None = None, options: RunOptions = _USUAL, *,
    devices: Sequence[str] = (), instances: int = 1, copied: bool = False,
) -> tuple[Path, str | None]:  # fmt: skip
    """Write the model of `bundle` into the repository `out`, in a folder of the bundle's name; that folder, and why it has no
    warm-up request, if it has none.

    devices: GPUs as `cuda:0`, with `instances` on each; on the CPU if empty. copied: whether bundle and memory are copied into
    the model's folder, which can then be taken elsewhere; else their absolute paths stand in it. The folder is written whole or
    not at all, and takes the place of an older model. Raises `BundleError`, `MemoryStoreError`, `InputError`.
    """
    gpus = [_gpu(device) for device in devices]
    with MotionPipeline.from_bundle(bundle, memory) as pipeline:
        manifest = pipeline.bundle.manifest
        sample, why = _sample(manifest, memory is not None), None
        try:
            pipeline.start(request_of(pipeline, sample)[0])
        except InputError as error:  # it needs what only people can give
            sample, why = {}, str(error)
    target = out / manifest.name
    if target.exists() and not (target / "config.pbtxt").is_file():
        raise InputError(f"{target} is there already and is no model of Triton. Remove it, or give another -o.")
    places = {"bundle": bundle} if memory is None else {"bundle": bundle, "memory": memory}
    parameters = {name: name if copied else str(path.absolute()) for name, path in places.items()}
    usual = asdict(_USUAL)
    parameters["options"] = json.dumps({name: value for name, value in asdict(options).items() if value != usual[name]})
    text = _config(manifest, parameters, gpus, instances, sample)
    with replacing_folder(target) as folder:
        (folder / "config.pbtxt").write_text(text, encoding="utf-8")
        for name in ("1", "warmup") if sample else ("1",):
            (folder / name).mkdir()
        (folder / "1/model.py").write_text(_MODEL, encoding="utf-8")
        for name, value in sample.items():
            (folder / "warmup" / name).write_bytes(_bytes_of(value))
        for name, path in places.items() if copied else ():
            shutil.copytree(path, folder / name)
    return target, why


def _gpu(device: str) -> int:
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise InputError(f"devices has {shown(device)}; allowed are GPUs, such as cuda:0,cuda:1; leave it out for the CPU.")
    return int(number or "0")


def _sample(manifest: Manifest, memory: bool) -> dict[str, NDArray[Any]]:
    """The smallest request that can be made up: black pictures, one word, the fewest steps; without a memory, none wanted."""
    sample = dict[str, NDArray[Any]]()
    for name, spec in manifest.inputs.items():
        if isinstance(spec, ImageInput):
            sample[name] = np.zeros((spec.height, spec.width, 3), np.uint8)
        elif isinstance(spec, TextInput) and spec.default is None:
            sample[name] = np.array([b"motion"], np.object_)
    if not memory:
        sample |= {name: np.array([value], np.float32) for name, value in manifest.off.items()}
    loops = [loop for loop in manifest.loops.values() if loop.feeds]
    if len(loops) == 1:
        sample["steps"] = np.array([min(loops[0].schedules[loops[0].default[0]])], np.int32)
    return sample


def _bytes_of(value: NDArray[Any]) -> bytes:
    """A tensor as Triton reads it from a file: texts with their lengths, numbers as they lie in memory."""
    if value.dtype != np.object_:
        return value.tobytes()
    return b"".join(struct.pack("<I", len(text)) + text for text in value)


def _config(
    manifest: Manifest, parameters: Mapping[str, str], gpus: Sequence[int], instances: int, sample: Mapping[str, NDArray[Any]]
) -> str:
    """The text of config.pbtxt: a message `ModelConfig` in protobuf's text format. The model's name is that of its folder."""
    inputs = inputs_of(manifest)
    group = f"kind: KIND_GPU gpus: {gpus}" if gpus else "kind: KIND_CPU"
    lines = [
        f"# Written by `motionrt deploy triton` for the bundle {manifest.name}.",
        'backend: "python"',
        "max_batch_size: 0  # a request is one video",
        "model_transaction_policy { decoupled: true }  # stage and progress come while it is made",
        *(_declared("input", tensor) for tensor in inputs),
        *(_declared("output", tensor) for tensor in outputs_of(manifest)),
        f"instance_group {{ {group} count: {instances} }}",
        *(f"parameters {{ key: {_text(key)} value {{ string_value: {_text(value)} }} }}" for key, value in parameters.items()),
    ]
    if sample:
        kinds = {tensor.name: tensor.kind for tensor in inputs}
        lines += ['model_warmup {', '  name: "sample"', "  batch_size: 1", "  count: 1"]
        for name, value in sample.items():
            shape = f"data_type: TYPE_{kinds[name]} dims: {list(value.shape)} input_data_file: {_text(name)}"
            lines.append(f"  inputs {{ key: {_text(name)} value {{ {shape} }} }}")
        lines.append("}")
    return "\n".join(lines) + "\n"


def _declared(what: str, tensor: Tensor) -> str:
    optional = " optional: true" if tensor.optional else ""
    return f"{what} {{ name: {_text(tensor.name)} data_type: TYPE_{tensor.kind} dims: {list(tensor.dims)}{optional} }}"


def _text(value: str) -> str:
    """A string in protobuf's text format, which escapes as JSON does."""
    return json.dumps(value, ensure_ascii=False)
