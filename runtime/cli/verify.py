"""`motionrt verify`: every file of a bundle, read whatever its stamp says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from motionrt.runtime.cli.common import BundleArgument
from motionrt.runtime.cli.terminal import echo
from motionrt.runtime.errors import EngineError, MotionRTError

if TYPE_CHECKING:
    from motionrt.runtime.bundle.manifest import GraphSpec


def verify(bundle: BundleArgument) -> None:
    """Read every file of a bundle and say what is wrong; exit status 2 if anything is.

    Graphs, weights (in packages too), tokenizers, tables of rows, torch programs and engines. Other commands do not read a
    file again that did not change since it was read; this one does, and so finds what a failing disk has done.

    \b
    Example:
      motionrt verify demo/bundle
    """
    from motionrt.runtime.bundle.bundle import Bundle

    problems: dict[str, None] = {}  # in order, each once: two graphs may take their weights from one package
    sound: dict[Path, str] = {}
    for kind, check in checks(bundle):
        try:
            sound[check()] = kind
        except MotionRTError as error:
            problems[" ".join(str(error).split())] = None
    for problem in problems:
        echo(f"motionrt: {problem}", err=True)
    if problems:
        raise typer.Exit(2)
    Bundle.open(bundle)  # also reads what the tables hold
    counts = ", ".join(f"{kind} {count}" for kind, count in Counter(sound.values()).items())
    echo(f"{bundle}: all sound: {counts}; {sum(path.stat().st_size for path in sound):,} bytes read.")


def checks(bundle: Path) -> Iterator[tuple[str, Callable[[], Path]]]:
    """For each file of the bundle its kind, and what reads it: gives its path, or raises `MotionRTError`.

    Raises `BundleError` at once if `bundle.json` cannot be read: nothing else says which files there are.
    """
    from motionrt.runtime.backends.onnx_weights import package_file
    from motionrt.runtime.bundle.bundle import verify_file
    from motionrt.runtime.bundle.manifest import read_manifest

    def inside(file: str, sha256: str, what: str) -> Callable[[], Path]:
        return partial(verify_file, bundle, file, sha256, what, read=True)

    manifest = read_manifest(bundle / "bundle.json")
    for name, graph in manifest.graphs.items():
        yield "graphs", inside(graph.file, graph.sha256, f"graph '{name}'")
    for name, graph in manifest.graphs.items():
        if graph.data is not None:
            yield "weights", inside(graph.data.file, graph.data.sha256, f"the weights of graph '{name}'")
        if graph.weights is not None:
            yield "weights", partial(package_file, graph, bundle, read=True)
    for name, tokenizer in manifest.tokenizers.items():
        yield "tokenizers", inside(tokenizer.file, tokenizer.sha256, f"tokenizer '{name}'")
    yield "tables of rows", inside(manifest.tables.file, manifest.tables.sha256, "the tables of rows")
    for name, graph in manifest.graphs.items():
        if graph.program is not None:
            yield "programs", inside(graph.program.file, graph.program.sha256, f"program '{name}'")
    for sidecar in sorted(bundle.glob("engines/*/*.json")):
        yield "engines", partial(_engine, sidecar, manifest.graphs)
    for sidecar in sorted(bundle.glob("engines/*/*.form")):
        yield "forms", partial(_form, sidecar, manifest.graphs)


def _engine(sidecar: Path, graphs: Mapping[str, GraphSpec]) -> Path:
    """The engine that `sidecar` names; `EngineError` if it is not whole, or not of this bundle and version."""
    from motionrt.runtime.backends.tensorrt.engine_file import EngineFile

    file = EngineFile.read(sidecar)
    if sidecar.stem not in graphs:
        raise EngineError(
            f"engine '{sidecar.stem}' in {sidecar.parent} is of no graph of this bundle, which has {', '.join(graphs)}. "
            f"Remove {sidecar.name} and {file.file}."
        )
    file.check(graphs[sidecar.stem], read=True)
    return file.engine_path


def _form(sidecar: Path, graphs: Mapping[str, GraphSpec]) -> Path:
    """The graph that `sidecar` describes; `EngineError` if it is not whole, or not of this bundle and version."""
    from motionrt.runtime.backends.onnx_form import OnnxForm

    form = OnnxForm.read(sidecar)
    if form.graph not in graphs:
        raise EngineError(f"{sidecar} is of no graph of this bundle, which has {', '.join(graphs)}. Remove it.")
    form.check(graphs[form.graph], read=True)
    return form.path
