"""What the commands share: options that come again, filters, a pipeline with the memories that were named, plain errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from motionrt.runtime.errors import InputError, MotionRTError

if TYPE_CHECKING:
    from motionrt.runtime.memory import MotionMemory
    from motionrt.runtime.memory_set import MemorySet
    from motionrt.runtime.pipeline import MotionPipeline

BundlePath = Annotated[Path, typer.Option("--bundle", "-b", help="Bundle directory, as written by `motionrt export`.")]
BundleArgument = Annotated[Path, typer.Argument(help="Bundle directory.")]
MemoryPath = Annotated[Path, typer.Argument(help="Motion memory directory.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Solver = Annotated[str | None, typer.Option(help="Solver, such as ddim or dpm.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the backend; all cores if not given.")]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        help="onnxruntime, torch (needs programs in the bundle), tensorrt (needs engines), or auto: the fastest here.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; onnxruntime also tensorrt, its TensorRT provider.")]
AllowOnnxRuntime = Annotated[
    bool, typer.Option("--allow-onnxruntime", help="Run graphs that have no torch program, or no engine, in ONNX Runtime.")
]
AllowCpu = Annotated[
    bool, typer.Option("--allow-cpu", help="ONNX Runtime on a GPU: run on the CPU what the GPU has no kernel for.")
]
Engines = Annotated[str | None, typer.Option(help="Which engines, such as rtx-sm_89-float16; else the first that fits.")]
LowMemory = Annotated[
    bool, typer.Option("--low-memory", help="Hold one graph at a time: for models larger than the device; loads them anew.")
]
Conditions = Annotated[
    list[str] | None,
    typer.Option(
        "--where", metavar="KEY=VALUE", help="Only clips of this dataset or metadata; a key again: any of its values."
    ),
]
MinimumScore = Annotated[float | None, typer.Option("--min-score", help="Only clips with at least this cosine.")]
Distinct = Annotated[float | None, typer.Option(help="Leave out copies: cosine of motion tokens from which one is a copy.")]
Diversity = Annotated[float | None, typer.Option(help="Prefer clips that differ: 0 off, up to 1.")]


def parse_where(conditions: Sequence[str] | None) -> dict[str, list[str]] | None:
    """`key=value` options as a filter: a key that comes again may have any of its values."""
    where: dict[str, list[str]] = {}
    for condition in conditions or ():
        key, equals, value = condition.partition("=")
        if not key or not equals:
            raise InputError(f"--where is {condition!r}; allowed is key=value, such as dataset=mine.")
        where.setdefault(key, []).append(value)
    return where or None


def open_memory(memory: Path, readonly: bool = False) -> MotionMemory:
    from motionrt.runtime.memory import MotionMemory

    return MotionMemory.open(memory, readonly=readonly)


@contextmanager
def open_pipeline(
    bundle: Path,
    memories: Sequence[str],
    *,
    threads: int | None,
    backend: str = "onnxruntime",
    device: str | None = None,
    allow_onnxruntime: bool = False,
    allow_cpu: bool = False,
    engines: str | None = None,
    low_memory: bool = False,
) -> Iterator[MotionPipeline]:
    """A pipeline with no memory, with one, or with several that are searched together: `directory` or `directory=weight`."""
    from motionrt.runtime.backend import Backend, open_backend
    from motionrt.runtime.pipeline import MotionPipeline

    choice: dict[str, Any] = {"backend": "auto", "threads": threads, "device": device}
    if backend != "auto":
        runs: Backend = open_backend(
            backend, device=device, threads=threads, allow_onnxruntime=allow_onnxruntime, allow_cpu=allow_cpu, engines=engines
        )
        choice = {"backend": runs}
    elif engines is not None:
        raise InputError(f"--engines is {engines!r}, and the choice was left to auto; add --backend tensorrt.")
    with ExitStack() as stack:
        memory: MotionMemory | MemorySet | None = None
        weights = dict(_weighted(text) for text in memories)
        if len(weights) < len(memories):
            raise InputError("one motion memory is named twice; name each once.")
        opened = {path: stack.enter_context(open_memory(Path(path), readonly=True)) for path in weights}
        if list(weights.values()) == [1.0]:
            (memory,) = opened.values()
        elif weights:
            from motionrt.runtime.memory_set import MemorySet

            memory = MemorySet(opened, weights=weights)
        yield stack.enter_context(MotionPipeline.from_bundle(bundle, memory, low_memory=low_memory, **choice))


def _weighted(text: str) -> tuple[str, float]:
    path, _, weight = text.rpartition("=")
    if path and not Path(text).exists():
        try:
            return path, float(weight)
        except ValueError:
            raise InputError(f"--memory is {text!r}; allowed is a directory, or directory=weight with a number.") from None
    return text, 1.0


def run_app(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the commands of `app` under `name`, and end the process. Every bad input is one line on standard error.

    Exit status: 0 done, 1 interrupted, 2 bad input or a failure with a plain reason.
    """
    try:
        app(arguments, prog_name=name)
        sys.exit(0)
    except MotionRTError as error:
        message = str(error)
    except OSError as error:  # a full disk, a missing permission: whatever had no better words nearer to it
        message = f"{error.filename or 'input or output'}: {error.strerror or error}."
    except MemoryError:
        message = "out of memory. Use fewer references or a smaller bundle, or free some."
    typer.echo(f"{name}: {' '.join(message.split())}", err=True)
    sys.exit(2)
