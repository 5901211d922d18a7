"""A graph in float16 or bfloat16 for ONNX Runtime on a GPU, written beside the engines: what it is, and what is checked.

    engines/onnxruntime-<dtype>/<graph>.onnx            `motionrt build --flavor onnxruntime` converts it as for an engine
    engines/onnxruntime-<dtype>/<graph>.weights         its weights, where protobuf could not hold them
    engines/onnxruntime-<dtype>/<graph>.form            JSON: what it was made from, and the digests of both

The last one's rename is the moment at which a form counts. Inputs and outputs are those of the bundle's graph.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from motionrt.runtime.backends.tensorrt.engine_file import check_origin
from motionrt.runtime.bundle.manifest import GraphSpec
from motionrt.runtime.dtypes import PREFERRED
from motionrt.runtime.errors import EngineError
from motionrt.runtime.files import digest_of

FORMAT = 1
FLAVOR = "onnxruntime"
DTYPES = tuple(dtype for dtype in PREFERRED if dtype != "float32")


@dataclass(frozen=True)
class OnnxForm:
    """One form. `folder` is where it lies; everything else is in the JSON, beside `format`. `files`: name -> SHA-256."""

    folder: Path
    graph: str
    dtype: str
    motionrt: str
    onnx_sha256: str
    weights_sha256: str
    recipe_sha256: str
    files: dict[str, str]

    @property
    def path(self) -> Path:
        """The ONNX file."""
        return self.folder / f"{self.graph}.onnx"

    @property
    def bundle(self) -> Path:
        """The bundle's folder."""
        return self.folder.parent.parent

    def check(self, spec: GraphSpec, *, read: bool = False) -> None:
        """Raise `EngineError` unless this is the whole form of the bundle's graph `spec`. read: whatever the stamps say."""
        form = f"the {self.dtype} form of graph '{self.graph}' in {self.folder}"
        fix = f"Build it again: `motionrt build {self.bundle} --flavor {FLAVOR} --dtype {self.dtype} --graphs {self.graph}`."
        check_origin(self, spec, form, fix)
        for name, expected in self.files.items():
            try:
                got = digest_of(self.folder / name, expected, self.bundle, read=read)
            except OSError as error:
                raise EngineError(f"{form}: {name} cannot be read ({error.strerror}). {fix}") from None
            if got != expected:
                raise EngineError(f"{form} is damaged: {name} has SHA-256 {got[:12]}…, not {expected[:12]}…. {fix}")

    def to_json(self) -> str:
        """The sidecar's text."""
        record = {"format": FORMAT} | {key: value for key, value in asdict(self).items() if key != "folder"}
        return json.dumps(record, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> OnnxForm:
        """Read the sidecar `path`; `EngineError` in plain words if it is damaged or of another format."""

        def bad(what: str) -> EngineError:
            return EngineError(f"{path}: {what}. Build the bundle's forms again with this version of motionrt.")

        try:
            raw: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise bad(f"it cannot be read ({error})") from None
        if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
            raise bad(f"it is not of format {FORMAT}")
        fields = {name for name in cls.__dataclass_fields__ if name != "folder"}
        if raw.keys() != fields or not isinstance(raw["files"], dict):
            raise bad(f"it must hold {', '.join(sorted(fields))}")
        texts = [value for name, value in raw.items() if name != "files"] + [*raw["files"], *raw["files"].values()]
        if not all(isinstance(text, str) for text in texts) or raw["dtype"] not in DTYPES:
            raise bad("a value in it is of the wrong type")
        if f"{raw['graph']}.onnx" not in raw["files"] or not all(re.fullmatch(r"[\w.-]+", name) for name in raw["files"]):
            raise bad("it must name its own files, beside it")
        return cls(folder=path.parent, **raw)


def form_folder(bundle: Path, dtype: str) -> Path:
    """Where the forms of a bundle in `dtype` lie."""
    return bundle / "engines" / f"{FLAVOR}-{dtype}"


def find_form(bundle: Path, spec: GraphSpec, precision: str | None) -> OnnxForm | None:
    """The checked form of graph `spec` in `precision`; None: in the first dtype of which there is one, or None.

    `EngineError` where one was asked for and is not there, and for one that is damaged or of another bundle.
    """
    for dtype in DTYPES if precision is None else (precision,):
        sidecar = form_folder(bundle, dtype) / f"{spec.name}.form"
        if sidecar.is_file():
            form = OnnxForm.read(sidecar)
            form.check(spec)
            return form
    if precision is None:
        return None
    raise EngineError(
        f"bundle {bundle} has no {precision} form of graph '{spec.name}' for ONNX Runtime. Build it: `motionrt build {bundle} "
        f"--flavor {FLAVOR} --dtype {precision}`; or compute in float32 (--precision float32)."
    )
