"""`motionrt serve`: the demo on one's own machine, or a service for many; and the keys that it asks for."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from motionrt.runtime.backends.open import RunOptions
from motionrt.runtime.cli.common import LowMemory, with_run_options
from motionrt.runtime.cli.terminal import echo
from motionrt.runtime.errors import InputError, MotionRTError, install

keys_app = typer.Typer(help="Make, list and revoke the API keys of a server.", no_args_is_help=True, rich_markup_mode=None)
_LOCAL = ("127.0.0.1", "localhost", "::1")
KeysFile = Annotated[Path, typer.Argument(help="File of keys; `motionrt serve --keys` reads it, and sees changes at once.")]


@with_run_options
def serve(
    bundle: Annotated[list[str], typer.Option("--bundle", "-b", help="Bundle directory, or NAME=DIRECTORY; again for more.")],
    store: Annotated[Path, typer.Option(help="Directory for jobs and videos; made if it is not there.")],
    memory: Annotated[
        list[str] | None, typer.Option("--memory", "-m", help="Motion memory directory, or NAME=DIRECTORY; again for more.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8420,
    keys: Annotated[Path | None, typer.Option(help="File of API keys, made by `motionrt keys create`.")] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let everybody who reaches another address than this machine's do all.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=0, help="Worker processes; 0: a thread of the server, for the smallest machines.")
    ] = 1,
    devices: Annotated[str | None, typer.Option(help="A worker for each: cuda:0,cuda:1.")] = None,
    replicas: Annotated[
        str, typer.Option(metavar="URL", help="Have replicas in Ray Serve make the videos; --workers: how many at once.")
    ] = "",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Host name that clients may use; again for more. With keys: any if not given.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin of a page elsewhere that may use the server; again for more.")
    ] = None,
    proxy: Annotated[
        list[str] | None, typer.Option(help="Address or network of a proxy, whose connections are not counted; again for more.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Most jobs in one call, where that gives the same bits and pays.")] = 1,
    batch_rounding: Annotated[
        bool, typer.Option("--batch-rounding", help="Batches also where they round differently; jobs say so.")
    ] = False,
    queue: Annotated[int, typer.Option(min=1, help="Jobs that may wait.")] = 100,
    lifetime: Annotated[float, typer.Option(help="Hours that a finished job is kept.")] = 24.0,
    storage: Annotated[float, typer.Option(help="GiB of finished videos; beyond that the oldest go.")] = 10.0,
    drain: Annotated[float, typer.Option(help="Seconds that running jobs have to end when the server is stopped.")] = 30.0,
    preview: Annotated[
        float, typer.Option(help="Seconds between two previews of a job that runs, of bundles that have them; 0: none.")
    ] = 0.5,
    low_memory: LowMemory = False,
    no_self_test: Annotated[bool, typer.Option("--no-self-test", help="Be ready without having made a video.")] = False,
    no_page: Annotated[bool, typer.Option("--no-page", help="Serve no page, only the API.")] = False,
    example: Annotated[
        list[str] | None, typer.Option(help="PROMPT=PICTURE that the page offers to begin with; again for more.")
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Prompts in the log; else only their length and hash.")
    ] = False,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Certificate, for https.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    *,
    run_options: RunOptions,
) -> None:
    """Serve video jobs over HTTP, with a page to see them. Needs the extra `serve`.

    \b
    Examples:
      motionrt serve -b demo/bundle -m demo/memory --store out/server
      motionrt serve -b video=bundles/svd -m birds=memories/birds --store /data --keys keys.json --host 0.0.0.0
    """
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise InputError(f"the server is not installed; {install('serve')}.")
    if host not in _LOCAL and keys is None and not no_auth:
        raise InputError(
            f"host is {host}, where others can reach the server, and there are no keys. Make one (`motionrt keys create"
            " keys.json NAME`) and give --keys keys.json; or type --no-auth, and everybody may do everything."
        )
    from motionrt.runtime.serve.run import run
    from motionrt.runtime.serve.settings import Settings

    settings = Settings(
        bundles=named(bundle, "bundle"), memories=named(memory or [], "memory"), store=store.absolute(),
        run_options=asdict(run_options), devices=tuple(devices.split(",")) if devices else (), workers=workers,
        replicas=replicas, low_memory=low_memory, batch=batch, batch_rounding=batch_rounding, self_test=not no_self_test,
        preview=preview, keys=None if keys is None else keys.absolute(), lifetime=lifetime * 3600, queue=queue,
        storage=int(storage * 2**30), drain=drain, page=not no_page, hosts=tuple(allow_host or ()),
        origins=tuple(cors_origin or ()), proxies=tuple(proxy or ()), log_prompts=log_prompts,
        examples=_examples(example or []),
    )  # fmt: skip
    run(settings, host, port, ssl_certfile, ssl_keyfile, echo)


@keys_app.command("create")
def keys_create(
    file: KeysFile,
    name: Annotated[str, typer.Argument(help="What the key is for: it stands in logs and lists.")],
    role: Annotated[
        list[str] | None, typer.Option(help="read, generate (which may read) or admin (which may all); again for more.")
    ] = None,
    waiting: Annotated[int | None, typer.Option(min=1, help="Jobs of it that may be not over at once.")] = None,
    seconds_a_day: Annotated[float | None, typer.Option(help="Seconds of work that it may use a day.")] = None,
    priority: Annotated[str, typer.Option(help="The highest priority that it may ask for: low, normal or high.")] = "normal",
) -> None:
    """Make a key and print it, this once: only its hash is kept.

    \b
    Examples:
      motionrt keys create keys.json alice
      motionrt keys create keys.json curator --role admin
    """
    from motionrt.runtime.serve.web.keys import Keys, Quota

    token = Keys.open(file, new=True).create(
        name, role or ["generate"], Quota(waiting=waiting, seconds_a_day=seconds_a_day, priority=priority)
    )
    print(token)
    echo(f"{file}: this is the key {name}. It is not shown again; clients send it as: Authorization: Bearer KEY", err=True)


@keys_app.command("list")
def keys_list(file: KeysFile) -> None:
    """List the keys of a file: names and roles."""
    from motionrt.runtime.serve.web.keys import Keys

    for key in Keys.open(file).every():
        echo(f"{key.name}: {', '.join(sorted(key.roles))}")


@keys_app.command("revoke")
def keys_revoke(file: KeysFile, name: Annotated[str, typer.Argument(help="The key's name.")]) -> None:
    """Revoke a key: a server that runs refuses it from now on."""
    from motionrt.runtime.serve.web.keys import Keys

    Keys.open(file).revoke(name)
    echo(f"{file}: the key {name} is revoked.")


def _examples(given: list[str]) -> dict[str, Path]:
    """`PROMPT=PICTURE` as a mapping."""
    split = [text.rpartition("=") for text in given]
    if wrong := next((path for prompt, _, path in split if not prompt.strip()), None):
        raise InputError(f"--example {wrong} has no prompt; write PROMPT=PICTURE.")
    return {prompt.strip(): Path(path) for prompt, _, path in split}


def named(given: list[str], what: str) -> dict[str, Path]:
    """`NAME=DIRECTORY` or `DIRECTORY`, named by its folder, as a mapping."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        where = Path(path if equals and not Path(text).exists() else text).absolute()
        name = name if equals and not Path(text).exists() else _own_name(where)
        if not where.is_dir():
            raise MotionRTError(f"--{what} {text}: there is no directory {where}.")
        if name in found:
            raise InputError(f"--{what}: two are named {name!r}; name them: --{what} NAME=DIRECTORY.")
        found[name] = where
    return found


def _own_name(directory: Path) -> str:
    """What a bundle calls itself; else, and of a memory, the name of its directory."""
    try:
        return str(json.loads((directory / "bundle.json").read_bytes())["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return directory.name
