"""A graph in float16 or bfloat16 for ONNX Runtime on a GPU, written beside the engines: what it is, and what is checked.

    engines/onnxruntime-<dtype>/<graph>.onnx            `motionrt build --flavor onnxruntime` converts it as for an engine
    engines/onnxruntime-<dtype>/<graph>.weights         its weights, where protobuf could not hold them
    engines/onnxruntime-<dtype>/<graph>.form            the sidecar: what it was made from, and the digests of both

Inputs and outputs are those of the bundle's graph.
"""

from __future__ import annotations

import re
from pathlib import Path

from motionrt.runtime.backends.sidecar import Sha256, Sidecar
from motionrt.runtime.bundle.manifest import GraphSpec
from motionrt.runtime.dtypes import PREFERRED
from motionrt.runtime.errors import EngineError

FLAVOR = "onnxruntime"
DTYPES = tuple(dtype for dtype in PREFERRED if dtype != "float32")


class OnnxForm(Sidecar, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One form. `files`: name -> SHA-256 of each of its files."""

    kind = "form of graph"

    files: dict[str, Sha256]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        if self.path.name not in self.files or not all(re.fullmatch(r"[\w.-]+", name) for name in self.files):
            raise ValueError(f"files are {', '.join(self.files)}; it must name its own files, beside it")

    @property
    def path(self) -> Path:
        """The ONNX file."""
        return self.folder / f"{self.graph}.onnx"

    def rebuild_command(self) -> str:
        """See `Sidecar`."""
        return f"motionrt build {self.bundle} --flavor {FLAVOR} --dtype {self.dtype} --graphs {self.graph}"

    def check(self, spec: GraphSpec, *, read: bool = False) -> None:
        """Raise `EngineError` unless this is the whole form of the bundle's graph `spec`. read: whatever the stamps say."""
        self.check_origin(spec)
        for name, sha256 in self.files.items():
            self.check_file(name, sha256, read=read)


def form_folder(bundle: Path, dtype: str, flavor: str = FLAVOR) -> Path:
    """Where the forms of a bundle in `dtype` lie."""
    return bundle / "engines" / f"{flavor}-{dtype}"


def find_form(bundle: Path, spec: GraphSpec, precision: str | None, flavor: str = FLAVOR) -> OnnxForm | None:
    """The checked form of graph `spec` in `precision`; None: in the first dtype of which there is one, or None.

    `EngineError` where one was asked for and is not there, and for one that is damaged or of another bundle.
    """
    for dtype in DTYPES if precision is None else (precision,):
        sidecar = form_folder(bundle, dtype, flavor) / f"{spec.name}.form"
        if sidecar.is_file():
            form = OnnxForm.read(sidecar)
            form.check(spec)
            return form
    if precision is None:
        return None
    raise EngineError(
        f"bundle {bundle} has no {precision} form of graph '{spec.name}' for ONNX Runtime. Build it: `motionrt build {bundle} "
        f"--flavor {flavor} --dtype {precision}`; or compute in float32 (--precision float32)."
    )
