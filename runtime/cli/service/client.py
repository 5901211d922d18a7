"""The `motionrt client` commands: jobs of a server that is somewhere else. They open no bundle and run no graph."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motionrt.runtime.cli.places import check_output
from motionrt.runtime.cli.terminal import echo
from motionrt.runtime.errors import InputError, MotionRTError

if TYPE_CHECKING:
    from motionrt.runtime.serve.client import Client

client_app = typer.Typer(
    help="Jobs of a server elsewhere. Its key, if it asks for one, is read from MOTIONRT_API_KEY.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
ServerOption = Annotated[
    str | None, typer.Option(help="Address; else MOTIONRT_SERVER, else http://127.0.0.1:8420.", show_default=False)
]
Job = Annotated[str, typer.Argument(help="Id of a job, as `create` prints it.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="File of the video; of several seeds NAME-0.mp4 …")]
KINDS = ("mp4", "webp", "gif", "png")


@client_app.command("create")
def client_create(
    image: Annotated[Path | None, typer.Option("--image", "-i", help="The still: png, jpeg or webp.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What the video shows and how it moves.")] = None,
    out: Out = None,
    model: Annotated[str | None, typer.Option(help="Bundle, where the server has several.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory to search, where the server has several.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, bundle and memory: same video.")] = None,
    seeds: Annotated[int | None, typer.Option("-n", help="Videos of as many seeds.")] = None,
    priority: Annotated[str | None, typer.Option(help="low, normal or high.")] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other field: steps=8, references=[3,5]; a file: brush=@FILE."),
    ] = None,
    server: ServerOption = None,
) -> None:
    """Ask for a video. With --out this waits, shows how far it is, and writes the file; Ctrl-C leaves the job running.

    \b
    Examples:
      motionrt client create --image star.png -p "a red star moves in a circle" -o star.mp4
      motionrt client create --image star.png -p "a red star" -n 4 --set motion_scale=0.5 --server http://box:8420
    """
    given: dict[str, Any] = {"prompt": prompt, "image": image, "model": model, "memory": memory}
    given |= {"seed": seed, "n": seeds, "priority": priority}
    for text in fields or ():
        name, equals, value = text.partition("=")
        if not equals or given.get(name) is not None:
            raise InputError(f"--set is {text!r}; it takes NAME=VALUE, each name once.")
        given[name] = _value(value)
    if out is not None:
        given.setdefault("output", _kind(out))
    with _client(server) as client:
        job = client.create(**given)
        if out is None:
            echo(job["id"])
            return
        echo(job["id"], err=True)
        _follow(client, job["id"])
        _fetch(client, job["id"], out)


@client_app.command("watch")
def client_watch(job: Job, out: Out = None, server: ServerOption = None) -> None:
    """Wait until a job is over and show how far it is; with --out write its video."""
    if out is not None:
        _kind(out)
    with _client(server) as client:
        _follow(client, job)
        if out is not None:
            _fetch(client, job, out)


@client_app.command("get")
def client_get(job: Job, out: Out = None, server: ServerOption = None) -> None:
    """Print what the server says of a job, as JSON; with --out write its video instead, if it is done."""
    if out is not None:
        _kind(out)
    with _client(server) as client:
        if out is not None:
            _fetch(client, job, out)
        else:
            echo(json.dumps(client.retrieve(job)))


@client_app.command("record")
def client_record(job: Job, server: ServerOption = None) -> None:
    """Print what `motionrt replay` makes the same video from, as JSON.

    \b
    Example:
      motionrt client record JOB > star.json && motionrt replay star.json -b demo/bundle -m demo/memory
    """
    with _client(server) as client:
        print(json.dumps(client.record(job)))


@client_app.command("list")
def client_list(
    most: Annotated[int, typer.Option("--limit", min=1, help="How many.")] = 20, server: ServerOption = None
) -> None:
    """List your jobs, the newest first."""
    with _client(server) as client:
        for number, job in enumerate(client.jobs(page=min(most, 100))):
            if number == most:
                break
            echo(f"{job['id']}  {job['status']:<11}  {job['progress']:3d} %  {job['prompt'] or ''}")


@client_app.command("cancel")
def client_cancel(job: Job, server: ServerOption = None) -> None:
    """Stop a job; what is known of it stays."""
    with _client(server) as client:
        found = client.cancel(job)
    error = found["error"] or {}
    echo(f"{job}: {error.get('message') or 'it was over before: ' + found['status'] + '.'}")


@client_app.command("delete")
def client_delete(job: Job, server: ServerOption = None) -> None:
    """Stop a job if it runs, and remove it with its files."""
    with _client(server) as client:
        client.delete(job)
    echo(f"{job}: deleted.")


@contextmanager
def _client(server: str | None) -> Iterator[Client]:
    """A client; what the server refuses becomes the error of a command."""
    from motionrt.runtime.serve.client import Client, ServerError  # HTTP takes milliseconds to import: not at every start

    try:
        yield Client(server)
    except ServerError as error:
        raise MotionRTError(f"{error.code}: {error.message}") from error


def _value(text: str) -> Any:
    """The value of a field: a file behind @, a number, a list or an object where it reads as one, else text."""
    if text.startswith("@"):
        return Path(text[1:])
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, str) else value


def _kind(out: Path) -> str:
    """The form that a file's name asks for; said, with whether it can be written, before a job is made."""
    kind = out.suffix.lower().removeprefix(".")
    if kind not in KINDS:
        allowed = ", ".join(f".{one}" for one in KINDS)
        raise MotionRTError(f"cannot write {out}: extension {out.suffix!r} is not one of {allowed}.")
    check_output(out)
    return kind


def _follow(client: Client, job: str) -> None:
    """Show how far a job is until it is over; `ServerError` where it failed."""
    from motionrt.runtime.cli.show import progress

    with progress() as bars:
        task = bars.add_task("queued", total=None)
        for shown in client.events(job):
            where = shown["motionrt"]
            place = where.get("queue_position")
            words = where["stage"] if not place else f"{where['stage']}, {place} before it"
            begun = where["stage"] not in ("queued", "starting")
            bars.update(task, description=words, completed=where["step"], total=where["steps"] if begun else None)
    client.wait(job)  # raises what a failed job failed with


def _fetch(client: Client, job: str, out: Path) -> None:
    """Write the videos of a job, one for each seed."""
    seeds = client.retrieve(job)["motionrt"]["seeds"]
    for index, seed in enumerate(seeds):
        path = out if len(seeds) == 1 else out.with_name(f"{out.stem}-{index}{out.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        client.content(job, path, index=index)
        echo(f"{path}: seed {seed}")
