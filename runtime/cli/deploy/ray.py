"""`motionrt deploy ray`: replicas of bundles in Ray Serve, as the config that `serve deploy` takes."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from motionrt.runtime.backends.kinds import BACKENDS
from motionrt.runtime.backends.open import RunOptions
from motionrt.runtime.cli.common import LowMemory, with_run_options
from motionrt.runtime.cli.service.serve import named
from motionrt.runtime.cli.terminal import echo
from motionrt.runtime.errors import InputError, MotionRTError, install
from motionrt.runtime.files import replacing

_HEAD = """\
# Replicas of {names} in Ray Serve, as `motionrt deploy ray` wrote them; every key is Ray's. Into a cluster that runs:
#   serve deploy {file}
# The bundles and memories must be at the same paths on each of its machines.
proxy_location: EveryNode
http_options: {http}
applications:
"""
_APPLICATION = """\
- name: {name}
  route_prefix: {route}
  import_path: motionrt.runtime.serve.replicas.ray:build
  args: {openings}
  deployments:
  - name: replicas
    {count}
    max_ongoing_requests: 1
    ray_actor_options: {actor}
"""


@with_run_options
def ray(
    bundle: Annotated[list[str], typer.Option("--bundle", "-b", help="Bundle directory, or NAME=DIRECTORY; again for more.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Config to write, .yaml.")],
    memory: Annotated[
        list[str] | None, typer.Option("--memory", "-m", help="Motion memory directory, or NAME=DIRECTORY; again for more.")
    ] = None,
    replicas: Annotated[str, typer.Option(help="How many of each bundle; 1-8: as many as there are jobs.")] = "1",
    autoscaling: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Of Ray's AutoscalingConfig; again for more.")
    ] = None,
    multiplex: Annotated[
        bool, typer.Option("--multiplex", help="Replicas for all bundles, each with one of them open at a time.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to reach them at; whoever does may use them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Its port.")] = 8000,
    low_memory: LowMemory = False,
    run: Annotated[bool, typer.Option("--run", help="Then start Ray with it on this machine, until a signal.")] = False,
    *,
    run_options: RunOptions,
) -> None:
    """Write a config for Ray Serve: replicas of bundles, each with a GPU, or with --threads cores (1 if not given).

    \b
    Examples:
      motionrt deploy ray -b demo/bundle -m demo/memory --replicas 2 -o ray.yaml --run
      motionrt serve -b demo/bundle -m demo/memory --store out/server --replicas http://127.0.0.1:8000 --workers 2
      motionrt deploy ray -b svd=/models/svd --replicas 1-8 --device cuda -o ray.yaml
    """
    if run_options.backend not in (*BACKENDS, "auto"):
        raise InputError(f"backend is {run_options.backend!r}; it must be one of {', '.join(BACKENDS)}, or auto.")
    if run and importlib.util.find_spec("ray") is None:
        raise InputError(f"Ray is not installed; {install('ray')}, or leave --run out and give {out} to a cluster that has it.")
    bundles, memories = named(bundle, "bundle"), named(memory or [], "memory")
    device = run_options.device or (BACKENDS[run_options.backend].devices[0] if run_options.backend in BACKENDS else "cpu")
    cores = {"num_cpus": run_options.threads or 1}
    options = asdict(run_options) | {"threads": cores["num_cpus"]}
    openings = {
        name: {"bundles": {name: str(path)}, "memories": found, "run_options": options, "low_memory": low_memory}
        for name, (path, found) in _with_memories(bundles, memories).items()
    }
    count = _count(replicas, autoscaling or [])
    actor = json.dumps(cores if device == "cpu" else {**cores, "num_gpus": 1})
    apps = [("bundles", "/", openings)] if multiplex else [(name, f"/{name}", {name: one}) for name, one in openings.items()]
    text = _HEAD.format(names=", ".join(bundles), file=out.name, http=json.dumps({"host": host, "port": port}))
    for name, route, opened in apps:
        about = {"name": json.dumps(name), "route": json.dumps(route), "openings": json.dumps(opened)}
        text += _APPLICATION.format(**about, count=count, actor=actor)
    with replacing(out, MotionRTError) as temporary:
        temporary.write_text(text)
    echo(f"{out}: {replicas} of {', '.join(bundles)}; for `motionrt serve`: --replicas http://{host}:{port}")
    if run:
        from motionrt.runtime.serve.replicas.ray import run as start

        start(out)


def _count(replicas: str, autoscaling: list[str]) -> str:
    """The line of a config that says how many replicas there are."""
    if (found := re.fullmatch(r"(\d+)(?:-(\d+))?", replicas)) is None:
        raise InputError(f"--replicas is {replicas!r}; it must be a number, such as 2, or two, such as 1-8.")
    low, high = int(found[1]), int(found[2] or found[1])
    if not 0 <= low <= high or not high:
        raise InputError(f"--replicas is {replicas!r}; the first number must be no more than the second, and that 1 or more.")
    if found[2] is None:
        if autoscaling:
            raise InputError(f"--autoscaling is given, and there are always {low} replicas; give a range: --replicas 1-{low}.")
        return f"num_replicas: {low}"
    scaling: dict[str, Any] = {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": 1}
    for text in autoscaling:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--autoscaling {text} has no value; write KEY=VALUE, such as downscale_delay_s=60.")
        try:
            scaling[key] = json.loads(value)
        except ValueError:
            scaling[key] = value
    return f"autoscaling_config: {json.dumps(scaling)}"


def _with_memories(bundles: dict[str, Path], memories: dict[str, Path]) -> dict[str, tuple[Path, dict[str, str]]]:
    """The directory of each bundle, and of the memories that were made for it. InputError for one that was made for none."""
    from motionrt.runtime.bundle.bundle import Bundle
    from motionrt.runtime.memory.memory import MotionMemory
    from motionrt.runtime.serve.work.engine import fits

    found: dict[str, tuple[Path, dict[str, str]]] = {name: (path, {}) for name, path in bundles.items()}
    specs = {name: Bundle.open(path).manifest.memory for name, path in bundles.items()}
    for memory, path in memories.items():
        with MotionMemory.open(path, readonly=True) as opened:
            owners = [name for name, spec in specs.items() if spec is not None and fits(opened, spec.fingerprint)]
        if not owners:
            raise InputError(f"the memory '{memory}' was made for none of the bundles {', '.join(bundles)}.")
        for name in owners:
            found[name][1][memory] = str(path)
    return found
