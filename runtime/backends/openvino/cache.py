"""What OpenVINO compiled from a graph, kept in the bundle for the next process.

    engines/openvino-cache/<graph>-<key>/<number>.blob      written by OpenVINO
    engines/openvino-cache/<graph>-<key>/<number>.sha256    the digest of that file, written by us
    engines/openvino-cache/<graph>-<key>/none               in their place: this graph is compiled every time

`key` is a digest of all that the compiled graph depends on: graph, weights, precision, device, OpenVINO, MotionRT. So a bundle
that changed finds nothing, whatever OpenVINO compares itself. It compares little: a file with a byte that changed is taken as
it is, and so is one that was compiled for another precision. Hence the digest, which is checked before OpenVINO sees a file;
one that does not fit is removed and the graph compiled again.

A cache is never needed. Where the bundle cannot be written there is none. It appears whole: a process compiles into a folder of
its own and renames that.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from motionrt.runtime.files import digest_of, sha256_of

log = logging.getLogger("motionrt")
LOSES = frozenset({"RoPE"})  # operations of OpenVINO's own that do not come back as they were, as of 2026.4.1


def cache_folder(bundle: Path, graph: str, parts: Sequence[str]) -> Path:
    """Where what was compiled from `graph` lies; `parts`: all that it depends on."""
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return bundle / "engines" / "openvino-cache" / f"{graph}-{key[:16]}"


def compile_cached(compiles: Callable[[Path | None], Any], folder: Path, bundle: Path) -> Any:
    """What `compiles` gives, read from `folder` or, where there is nothing whole, kept there if the disk takes it.

    compiles: gives a compiled model of OpenVINO; it is told the folder that OpenVINO is to read from or write into, or None.
    """
    if (folder / "none").is_file():
        return compiles(None)
    if _whole(folder, bundle):
        return compiles(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(suffix=".partial", prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        log.info("no compile cache of OpenVINO in %s: %s", folder.parent, error.strerror)
        return compiles(None)
    try:
        compiled = compiles(made)
        with contextlib.suppress(OSError):  # a full disk, or another process that was first
            if comes_back(compiled):
                _seal(made)
            else:
                for file in made.iterdir():
                    file.unlink()
                (made / "none").write_text(f"{', '.join(LOSES)}: wrong after it was read again\n")
            if any(file.suffix != ".blob" for file in made.iterdir()):
                os.rename(made, folder)
        return compiled
    finally:
        shutil.rmtree(made, ignore_errors=True)


def comes_back(compiled: Any) -> bool:
    """Whether a compiled model, read again from a cache, computes what it did.

    OpenVINO writes its fused rotary embedding without some of its settings; read again, it computes something else, without a
    word: in the demo's step x0 is wrong by 6 %.
    """
    operations = compiled.get_runtime_model().get_ops()
    return not any(str(operation.get_rt_info()["layerType"].astype(str)) in LOSES for operation in operations)


def _seal(folder: Path) -> None:
    for blob in folder.glob("*.blob"):
        blob.with_suffix(".sha256").write_text(sha256_of(blob) + "\n")


def _whole(folder: Path, bundle: Path) -> bool:
    """Whether `folder` holds one compiled graph with its digest; what is damaged is removed."""
    if not folder.is_dir():
        return False
    try:
        (blob,) = folder.glob("*.blob")
        expected = blob.with_suffix(".sha256").read_text().strip()
        if digest_of(blob, expected, bundle) == expected:
            return True
    except (OSError, ValueError):
        pass
    log.info("%s is damaged: the graph is compiled again", folder)
    shutil.rmtree(folder, ignore_errors=True)
    return False
