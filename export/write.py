"""Writing a bundle: graphs, solver tables, tokenizers and the manifest, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import nn

import motionrt
from motionrt.runtime.bundle.manifest import FORMAT, read_manifest
from motionrt.runtime.files import replacing_folder, sha256_of

Solvers = Mapping[str, Mapping[int, tuple[NDArray[Any], NDArray[np.float32]]]]
Tokenizers = Mapping[str, tuple[str, int, int]]


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A directory to write into; it takes the place of `out` when the block ends well, and vanishes otherwise."""
    with replacing_folder(out) as folder:
        for name in ("graphs", "tokenizers"):
            (folder / name).mkdir()
        yield folder


def digest_of(*modules: nn.Module) -> str:
    """SHA-256 of the modules' weights: names, dtypes, shapes and bytes. The same for every exporter version."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            array = value.detach().cpu().numpy()
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write_manifest(
    stage: Path,
    *,
    name: str,
    model: Mapping[str, Any],
    graphs: Mapping[str, Mapping[str, Any]],
    solvers: Solvers,
    default_solver: tuple[str, int],
    tokenizers: Tokenizers,
    guidance: float,
    digests: Mapping[str, str],
    partition: Mapping[str, Any],
    provenance: Mapping[str, Any],
    programs: Mapping[str, Mapping[str, Any]] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Write solver tables, tokenizers and `bundle.json` beside the graphs already in `stage/graphs`.

    `graphs`: what the exporters returned (and `weights` where they stay in a package); `solvers`: name -> step count ->
    `solver_rows`; `tokenizers`: name -> (tokenizer JSON, max length, padding id); `programs`: what `write_program`
    returned, for those that there are.
    """
    tables: dict[str, NDArray[Any]] = {}
    for solver, entries in solvers.items():
        for steps, (timesteps, coefficients) in entries.items():
            tables[f"{solver}/{steps}/timesteps"] = timesteps
            tables[f"{solver}/{steps}/coefficients"] = coefficients
    save_file(tables, stage / "solvers.safetensors")
    for key, (text, _, _) in tokenizers.items():
        (stage / "tokenizers" / f"{key}.json").write_text(text, encoding="utf-8")
    manifest = {
        "format": FORMAT,
        "name": name,
        "motionrt": motionrt.__version__,
        "model": dict(model),
        "graphs": {key: {**_file(stage, f"graphs/{key}.onnx"), **entry} for key, entry in graphs.items()},
        "solvers": {
            **_file(stage, "solvers.safetensors"),
            "default": default_solver[0],
            "default_steps": default_solver[1],
            "entries": {solver: {"steps": sorted(entries)} for solver, entries in solvers.items()},
        },
        "tokenizers": {
            key: {**_file(stage, f"tokenizers/{key}.json"), "max_length": length, "pad_id": pad}
            for key, (_, length, pad) in tokenizers.items()
        },
        "defaults": {"guidance": guidance, **(defaults or {})},
        "digests": dict(digests),
        "partition": dict(partition),
        "provenance": dict(provenance),
        **({"programs": {key: dict(entry) for key, entry in programs.items()}} if programs else {}),
    }
    (stage / "bundle.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    read_manifest(stage / "bundle.json")  # what the run side would not take is not published


def _file(stage: Path, relative: str) -> dict[str, str]:
    return {"file": relative, "sha256": sha256_of(stage / relative)}
