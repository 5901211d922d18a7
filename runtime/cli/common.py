"""What the commands share: options that come again, filters, a pipeline with the memories that were named, plain errors."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

import typer

from motionrt.runtime.backends.open import RunOptions
from motionrt.runtime.backends.seam import ROOM, out_of_memory
from motionrt.runtime.cli import terminal
from motionrt.runtime.cli.places import still
from motionrt.runtime.errors import InputError, MotionRTError
from motionrt.runtime.media.limits import LIMITS, Limits
from motionrt.runtime.memory.search import Search

if TYPE_CHECKING:
    from motionrt.runtime.bundle.manifest import Manifest
    from motionrt.runtime.memory.memory import MotionMemory
    from motionrt.runtime.memory.set import MemorySet
    from motionrt.runtime.pipeline import MotionPipeline

BundlePath = Annotated[Path, typer.Option("--bundle", "-b", help="Bundle directory, as written by `motionrt export`.")]
BundleArgument = Annotated[Path, typer.Argument(help="Bundle directory.")]
MemoryPath = Annotated[Path, typer.Argument(help="Motion memory directory.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Solver = Annotated[str | None, typer.Option(help="Solver, such as ddim or dpm.")]
LowMemory = Annotated[
    bool, typer.Option("--low-memory", help="Hold one graph at a time: for models larger than the device; loads them anew.")
]
Limited = Annotated[
    list[str] | None,
    typer.Option(
        "--limit", metavar="NAME=VALUE",
        help="The most that is decoded of a still or clip; again for another NAME: "
        + "; ".join(f"{one.name} {one.metadata['help']} ({one.default:,.0f} unless given)" for one in fields(Limits)) + ".",
    ),
]  # fmt: skip
Memories = Annotated[
    list[str] | None,
    typer.Option("--memory", "-m", help="Motion memory directory; again: searched together, `directory=0.5` for a weight."),
]
Conditions = Annotated[
    list[str] | None, typer.Option("--where", metavar="KEY=VALUE", help=Search.__dataclass_fields__["where"].metadata["help"])
]
Sources = Annotated[
    list[str] | None, typer.Option("--exclude-source", help=Search.__dataclass_fields__["exclude_source"].metadata["help"])
]


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
    from motionrt.runtime.memory.memory import MotionMemory

    return MotionMemory.open(memory, readonly=readonly)


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the options of `RunOptions` in place of its parameter `run_options`, which holds what was given."""
    return _with_options(command, "run_options", RunOptions, lambda given: RunOptions(**given))


def with_search_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the options of `Search` in place of its parameter `search`, which holds what was given."""
    make = lambda given: Search(**{**given, "where": parse_where(given.get("where"))})  # noqa: E731
    return _with_options(command, "search", Search, make, where=Conditions, exclude_source=Sources)


def _with_options(
    command: Callable[..., None], parameter: str, record: type, make: Callable[[dict[str, Any]], Any], **annotations: Any
) -> Callable[..., None]:
    """`command` with an option for each field of the dataclass `record` in place of `parameter`: that is what `make` makes.

    annotations: of fields whose option is not of the field's type.
    """
    types = get_type_hints(record)
    options = []
    for field in fields(record):
        name = field.metadata.get("option") or f"--{field.name.replace('_', '-')}"
        option = typer.Option(name, help=field.metadata["help"])
        kind, annotation = inspect.Parameter.KEYWORD_ONLY, annotations.get(field.name, Annotated[types[field.name], option])
        options.append(inspect.Parameter(field.name, kind, default=field.default, annotation=annotation))

    @functools.wraps(command)
    def filled(*arguments: Any, **given: Any) -> None:
        chosen = {option.name: given.pop(option.name) for option in options if option.name in given}
        command(*arguments, **given, **{parameter: make(chosen)})

    own = inspect.signature(command, eval_str=True)
    kept = [one for one in own.parameters.values() if one.name != parameter]
    filled.__signature__ = own.replace(parameters=[*kept, *options])  # type: ignore[attr-defined]  # what typer reads
    return filled


class BundleCommand(typer.core.TyperCommand):
    """A command whose options are also the inputs that the bundle among its arguments declares: nothing names them twice."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from motionrt.runtime.bundle.manifest import ImageInput, MaskInput, read_manifest

        paths = [Path(argument.removeprefix("--bundle=")) / "bundle.json" for argument in args]
        file = next((path for path in paths if os.path.isfile(path)), None)  # a prompt may be no name that a file can have
        if file is None:  # opening the bundle will say what is wrong with it
            ctx.ignore_unknown_options = ctx.allow_extra_args = True
            return list(super().parse_args(ctx, args))
        own = self.__dict__.setdefault("own_params", list(self.params))  # it may be used again, for another bundle
        taken = {flag for option in own for flag in option.opts}
        manifest = read_manifest(file)
        self.params = [*own, *input_options(manifest, taken)]
        self.__dict__["stills"] = {name for name, spec in manifest.inputs.items() if isinstance(spec, ImageInput | MaskInput)}
        try:
            return list(super().parse_args(ctx, args))
        except Exception as error:
            if type(error).__name__ != "NoSuchOption":  # of click, or of the copy of it that typer has
                raise
            takes = ", ".join(f"--{name.replace('_', '-')}" for name in manifest.inputs)
            raise InputError(f"{error}. The inputs of bundle '{manifest.name}' are {takes}; --help shows more.") from None

    def invoke(self, ctx: Any) -> Any:
        """Run the command; `ctx.obj` is what was given for the inputs, by name."""
        extra = [option.name for option in self.params if option not in self.__dict__.get("own_params", self.params)]
        given = {name: ctx.params.pop(name) for name in extra}
        stills = self.__dict__.get("stills", set())
        ctx.obj = {
            name: still(name, value) if name in stills else value for name, value in given.items() if value is not None
        }
        return super().invoke(ctx)


def input_options(manifest: Manifest, taken: set[str]) -> list[Any]:
    """An option for each declared input: `--motion-scale`; one letter too where it must be given and no `taken` flag is it."""
    from motionrt.runtime.bundle.manifest import (
        DRAWN,
        ChoiceInput,
        ColumnInput,
        FieldInput,
        MaskInput,
        NumberInput,
        TracksInput,
    )

    options = []
    for name, spec in manifest.inputs.items():
        flags = [f"--{name.replace('_', '-')}"]
        if spec.default is None and not isinstance(spec, ColumnInput | DRAWN) and (short := f"-{name[0]}") not in taken:
            flags.append(short)
            taken.add(short)
        kind: Any = float if isinstance(spec, NumberInput) else str
        more, said = dict[str, Any](), "" if spec.default in (None, "") else f" [default: {spec.default}]"
        if isinstance(spec, ColumnInput):
            more = {"parser": _numbers, "metavar": "NUMBER[,NUMBER ...]"}
        elif isinstance(spec, TracksInput):
            kind, more, said = list[str], {"metavar": '"X,Y X,Y ..."'}, f" Pixels of the {spec.image}; again for more."
        elif isinstance(spec, MaskInput | FieldInput):
            more = {"metavar": "FILE"}
        elif isinstance(spec, ChoiceInput):
            more = {"metavar": "|".join(spec.options)}
        annotation = Annotated[kind | None, typer.Option(*flags, help=f"{spec.help}{said}".strip(), **more)]
        options.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

    def command(**inputs: Any) -> None:
        """Only its options are used."""

    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # what typer reads
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return [option for option in typer.main.get_command(app).params if option.name in manifest.inputs]


def _numbers(text: str) -> float | list[float]:
    """A number, or one for each step with commas between them."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number, and no list of one for each step, such as 3,3,1.") from None
    return numbers if "," in text else numbers[0]


@contextmanager
def open_pipeline(
    bundle: Path,
    memories: Sequence[str],
    options: RunOptions,
    *,
    graphs: Sequence[str] | None = None,
    low_memory: bool = False,
    limits: Limits = LIMITS,
) -> Iterator[MotionPipeline]:
    """A pipeline with no memory, with one, or with several that are searched together: `directory` or `directory=weight`.

    graphs: what it is opened for, the denoising steps if not given; where the backend is left to auto, it is one that runs
    these.
    """
    from motionrt.runtime.backends.auto import backend_for
    from motionrt.runtime.bundle.bundle import Bundle
    from motionrt.runtime.pipeline import MotionPipeline

    with ExitStack() as stack:
        memory: MotionMemory | MemorySet | None = None
        weights = dict(_weighted(text) for text in memories)
        if len(weights) < len(memories):
            raise InputError("one motion memory is named twice; name each once.")
        opened = {path: stack.enter_context(open_memory(Path(path), readonly=True)) for path in weights}
        if list(weights.values()) == [1.0]:
            (memory,) = opened.values()
        elif weights:
            from motionrt.runtime.memory.set import MemorySet

            memory = MemorySet(opened, weights=weights)
        backend = backend_for(Bundle.open(bundle), options, graphs)
        yield stack.enter_context(
            MotionPipeline.from_bundle(bundle, memory, backend=backend, low_memory=low_memory, limits=limits)
        )


def _weighted(text: str) -> tuple[str, float]:
    path, _, weight = text.rpartition("=")
    if path and not os.path.exists(text):
        try:
            return path, float(weight)
        except ValueError:
            raise InputError(f"--memory is {text!r}; allowed is a directory, or directory=weight with a number.") from None
    return text, 1.0


def run_app(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the commands of `app` under `name`, and end the process. Whatever goes wrong is one line on standard error.

    Exit status: 0 done; 1 a fault of the program (with MOTIONRT_DEBUG=1 in the environment, its traceback), or output that
    nobody read to its end; 2 bad input or a failure with a plain reason; 130 interrupted.
    """
    with terminal.ready(name):
        try:
            try:
                app(arguments, prog_name=name)
                sys.exit(0)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # a full disk behind a pipe is said here, not when Python ends
        except (SystemExit, KeyboardInterrupt):
            raise
        except BrokenPipeError:  # `motionrt inspect bundle | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(1)
        except BaseException as error:  # what Rust raises when it fails is no Exception
            status, message = _explain(error)
            if status == 1 and os.environ.get("MOTIONRT_DEBUG"):
                raise
        terminal.echo(f"{name}: {' '.join(message.split())}", err=True)
        sys.exit(status)


def _explain(error: BaseException) -> tuple[int, str]:
    """The exit status and the sentence for what a command raised."""
    if isinstance(error, MotionRTError):
        return 2, str(error)
    if out_of_memory(error):
        return 2, f"too little memory. {ROOM}."
    if isinstance(error, OSError):  # a full disk, a missing permission: whatever had no better words nearer to it
        return 2, f"{error.filename or 'input or output'}: {error.strerror or error}."
    if isinstance(error, ImportError):
        return 2, f"a module cannot be imported: {error}. Install its package again."
    fault = "This is a fault of the program: MOTIONRT_DEBUG=1 in the environment shows where; please report it"
    return 1, f"{type(error).__name__}: {error}. {fault}."
