"""A JSON file beside something that was made from a graph of a bundle: what it is, from what, and the digests of its files.

    engines/<folder>/<graph>.json     an engine of TensorRT (tensorrt/engine_file.py)
    engines/<folder>/<graph>.form     a form of the graph for ONNX Runtime (onnx_form.py)

It is written last, and its rename is the moment at which what it describes counts: a build that is killed at any point leaves
its predecessor whole. It is checked before anything that it describes is loaded. No NumPy here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import msgspec

from motionrt.runtime.bundle.manifest import GraphSpec
from motionrt.runtime.errors import EngineError
from motionrt.runtime.files import digest_of, is_sealed, sealed

FORMAT = 1
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Sidecar(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One sidecar. `folder` is where it lies; everything else is in the JSON, beside `format`.

    `weights_sha256` is `GraphSpec.weights_sha256`, "" for a graph that holds its own weights; `recipe_sha256` the digest of the
    code that made it. `kind`: what it describes, for sentences.
    """

    kind: ClassVar[str]

    folder: Path
    graph: str
    dtype: str
    motionrt: str
    onnx_sha256: Sha256
    weights_sha256: str
    recipe_sha256: Sha256

    @property
    def bundle(self) -> Path:
        """The folder of the bundle that it belongs to."""
        return self.folder.parent.parent

    @property
    def title(self) -> str:
        """What it describes, for sentences."""
        return f"{self.kind} '{self.graph}' in {self.folder}"

    def rebuild_command(self) -> str:
        """The command that makes it anew."""
        raise NotImplementedError

    def refuse(self, what: str, command: str | None = None) -> EngineError:
        """The error that says what does not fit, and the command that makes it anew."""
        return EngineError(f"{self.title} {what}. Rebuild: `{command or self.rebuild_command()}`.")

    def check_origin(self, spec: GraphSpec) -> None:
        """Raise `EngineError` unless it was made from the bundle's graph `spec` with its weights, by this version."""
        from motionrt import __version__

        for what, built, here in (
            ("graph", self.graph, spec.name),
            ("ONNX digest", self.onnx_sha256[:12], spec.sha256[:12]),
            ("weights digest", self.weights_sha256[:12] or "none", spec.weights_sha256[:12] or "none"),
            ("MotionRT version", self.motionrt, __version__),
        ):
            if built != here:
                raise self.refuse(f"was built from {what} {built}; this bundle and installation have {here}")

    def check_file(self, name: str, sha256: str, *, read: bool = False) -> None:
        """Raise `EngineError` unless the file `name` beside it is whole. read: read it whatever its stamp says."""
        try:
            got = digest_of(self.folder / name, sha256, self.bundle, read=read)
        except OSError as error:
            raise self.refuse(f"cannot be used: {name} cannot be read ({error.strerror})") from None
        if got != sha256:
            said = f"its sidecar says {sha256[:12]}…: nothing was loaded"
            raise self.refuse(f"is damaged: SHA-256 of {name} is {got[:12]}…, {said}")

    def to_json(self) -> str:
        """The sidecar's text; the same for the same contents."""
        record = msgspec.to_builtins(self, enc_hook=str)
        del record["folder"]
        return json.dumps(sealed({"format": FORMAT, **record}), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the sidecar `path`; `EngineError` in plain words if it is missing, damaged or of another format."""
        command = f"`motionrt build {path.parent.parent.parent}`"
        again = f"Build it again with this version of motionrt: {command}"
        try:
            raw: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise EngineError(f"there is no {cls.kind} {path}. Build it: {command}.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise EngineError(f"{path} cannot be read ({error}). {again}.") from None
        if not isinstance(raw, dict):
            raise EngineError(f"{path}: it must hold one object. {again}.")
        intact = "seal" not in raw or is_sealed(raw)
        raw.pop("seal", None)
        if (number := raw.pop("format", None)) != FORMAT:
            raise EngineError(f"{path}: format is {number!r}; this version reads format {FORMAT}. {again}.")
        try:
            found = msgspec.convert({**raw, "folder": path.parent}, cls)
        except msgspec.ValidationError as error:
            raise EngineError(f"{path}: {error}. {again}.") from None
        if not intact:
            raise EngineError(f"{path} is damaged: it is not what its `seal` was made of. {again}.")
        return found
