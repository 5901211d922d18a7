"""A graph in another dtype, written beside the engines for a backend that reads ONNX: what it is, and what is checked.

    engines/<flavor>-<dtype>/<graph>.onnx            `motionrt build --flavor <flavor>` converts it as for an engine
    engines/<flavor>-<dtype>/<graph>.weights         its weights, where protobuf could not hold them
    engines/<flavor>-<dtype>/<graph>.form            the sidecar: what it was made from, and the digests of both

Flavor onnxruntime: float16 and bfloat16 for GPUs, int8 for the CPU. Flavor openvino: int8. Where only some graphs have an int8
form, the others run as they are. Inputs and outputs are those of the bundle's graph.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from motionrt.runtime.backends.sidecar import Sha256, Sidecar
from motionrt.runtime.bundle.manifest import GraphSpec
from motionrt.runtime.dtypes import PREFERRED, QUANTISED
from motionrt.runtime.errors import EngineError

if TYPE_CHECKING:
    from motionrt.runtime.bundle.bundle import Bundle

FLAVOR = "onnxruntime"
DTYPES = tuple(dtype for dtype in PREFERRED if dtype != "float32")
FORMS = {FLAVOR: (*DTYPES, "int8"), "openvino": ("int8",)}  # flavor -> dtypes


class Quality(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an approximation does to videos. db: PSNR over all pixels of the frames against those of float32, the mean over `n`
    requests that it was not calibrated with; identical frames count as 61.1 dB."""

    db: float
    n: int

    def __str__(self) -> str:
        return f"{self.db:.1f} dB to float32 (n = {self.n})"


class OnnxForm(Sidecar, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One form. `files`: name -> SHA-256 of each of its files; `flavor`: whom it is for.

    Of one in 8 bits also: `products`: how many matrix products are; `scales_sha256`: digest of the measured scales, "" where
    none are needed; `quality`: None where it was not measured; `left`: weights whose products were left out for its sake.
    """

    kind = "form of graph"

    files: dict[str, Sha256]
    flavor: str = FLAVOR
    products: int = 0
    scales_sha256: str = ""
    quality: Quality | None = None
    left: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.flavor not in FORMS:
            raise ValueError(f"flavor is {self.flavor!r}; allowed: {', '.join(FORMS)}")
        if self.dtype not in FORMS[self.flavor]:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(FORMS[self.flavor])}")
        if self.path.name not in self.files or not all(re.fullmatch(r"[\w.-]+", name) for name in self.files):
            raise ValueError(f"files are {', '.join(self.files)}; it must name its own files, beside it")

    @property
    def path(self) -> Path:
        """The ONNX file."""
        return self.folder / f"{self.graph}.onnx"

    def rebuild_command(self) -> str:
        """See `Sidecar`."""
        return f"{build_command(self.bundle, self.dtype, self.flavor)} --graphs {self.graph}"

    def check(self, spec: GraphSpec, *, read: bool = False) -> None:
        """Raise `EngineError` unless this is the whole form of the bundle's graph `spec`. read: whatever the stamps say."""
        self.check_origin(spec)
        for name, sha256 in self.files.items():
            self.check_file(name, sha256, read=read)


def build_command(bundle: Path, dtype: str, flavor: str = FLAVOR) -> str:
    """The command that writes the forms of a bundle in `dtype`."""
    calibrate = " --calibrate MEMORY" if flavor != FLAVOR and dtype in QUANTISED else ""
    return f"motionrt build {bundle} --flavor {flavor} --{'precision' if dtype in QUANTISED else 'dtype'} {dtype}{calibrate}"


def form_folder(bundle: Path, dtype: str, flavor: str = FLAVOR) -> Path:
    """Where the forms of a bundle in `dtype` lie."""
    return bundle / "engines" / f"{flavor}-{dtype}"


def find_form(bundle: Path, spec: GraphSpec, precision: str | None, flavor: str = FLAVOR) -> OnnxForm | None:
    """The checked form of graph `spec` in `precision`; None: in the first float dtype of which there is one, or None.

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
        f"bundle {bundle} has no {precision} form of graph '{spec.name}' for {flavor}. Build it: `"
        f"{build_command(bundle, precision, flavor)}`; or compute in float32 (--precision float32)."
    )


def quantised_form(bundle: Bundle, name: str, precision: str, flavor: str = FLAVOR) -> OnnxForm | None:
    """The checked form of graph `name` in 8 bits, None for a graph that was left out: it runs as it is.

    `EngineError` where no step of a loop has one, as then nothing of what was asked for would happen; and as `find_form`.
    """
    folder = form_folder(bundle.path, precision, flavor)
    if not (folder / f"{name}.form").is_file() and any((folder / f"{step}.form").is_file() for step in bundle.steps):
        return None
    if name not in bundle.steps and not (folder / f"{name}.form").is_file():
        steps = " or ".join(f"'{step}'" for step in bundle.steps)
        raise EngineError(
            f"bundle {bundle.path} has no {precision} form of a step ({steps or 'it has no loop'}) for {flavor}. Build it: `"
            f"{build_command(bundle.path, precision, flavor)}`; or compute in float32 (--precision float32)."
        )
    return find_form(bundle.path, bundle.graph(name), precision, flavor)
