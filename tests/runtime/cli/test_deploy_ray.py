"""`motionrt deploy ray`: the config that it writes, and what it refuses."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from motionrt.runtime.cli.main import app

Run = Callable[..., tuple[int, str, str]]


def config(run: Run, out: Path, *options: object) -> Any:
    status, _, err = run("deploy", "ray", "-o", out, *options)
    assert status == 0, err
    return yaml.safe_load(out.read_text())


def test_each_bundle_has_its_replicas_and_the_memories_that_were_made_for_it(
    run: Run, fake_bundle: Path, fake_memory: Path, guided_bundle: Path, guided_memory: Path, tmp_path: Path
) -> None:
    bundles = ("-b", f"a={fake_bundle}", "-b", f"b={guided_bundle}", "-m", f"x={fake_memory}", "-m", f"y={guided_memory}")
    told = config(run, tmp_path / "ray.yaml", *bundles, "--replicas", 2, "--threads", 3, "--port", 8100)
    assert told["http_options"] == {"host": "127.0.0.1", "port": 8100}
    for name, bundle, memories, one in zip(
        "ab", (fake_bundle, guided_bundle), ({"x": str(fake_memory)}, {"y": str(guided_memory)}), told["applications"],
        strict=True,
    ):  # fmt: skip
        assert (one["name"], one["route_prefix"]) == (name, f"/{name}")
        opening = one["args"][name]
        assert opening["bundles"] == {name: str(bundle)} and opening["memories"] == memories
        assert opening["run_options"]["threads"] == 3
        (replicas,) = one["deployments"]
        assert replicas["num_replicas"] == 2 and replicas["max_ongoing_requests"] == 1
        assert replicas["ray_actor_options"] == {"num_cpus": 3}


def test_replicas_of_several_bundles_take_any_of_them(
    run: Run, fake_bundle: Path, guided_bundle: Path, tmp_path: Path
) -> None:
    bundles = ("-b", f"a={fake_bundle}", "-b", f"b={guided_bundle}")
    (app,) = config(run, tmp_path / "ray.yaml", *bundles, "--multiplex")["applications"]
    assert app["route_prefix"] == "/" and [*app["args"]] == ["a", "b"]


@pytest.mark.parametrize(
    "options", [("--device", "cuda"), ("--backend", "tensorrt"), ("--backend", "torch", "--device", "cuda:0")], ids=" ".join
)
def test_a_replica_on_a_gpu_asks_for_one(run: Run, fake_bundle: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    (app,) = config(run, tmp_path / "ray.yaml", "-b", fake_bundle, *options)["applications"]
    assert app["deployments"][0]["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1}


def test_a_range_of_replicas_is_what_ray_scales_in(run: Run, fake_bundle: Path, tmp_path: Path) -> None:
    scaling = ("--replicas", "0-8", "--autoscaling", "downscale_delay_s=60", "--autoscaling", "aggregation_function=max")
    (app,) = config(run, tmp_path / "ray.yaml", "-b", fake_bundle, *scaling)["applications"]
    assert app["deployments"][0]["autoscaling_config"] == {
        "min_replicas": 0, "max_replicas": 8, "target_ongoing_requests": 1,
        "downscale_delay_s": 60, "aggregation_function": "max",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--replicas", "many"), "it must be a number, such as 2"), (("--replicas", "3-2"), "no more than the second"),
        (("--replicas", "0"), "1 or more"), (("--autoscaling", "min_replicas=2"), "give a range"),
        (("--replicas", "1-2", "--autoscaling", "fast"), "write KEY=VALUE"), (("--backend", "cuda"), "it must be one of"),
        (("--run",), "motionrt[ray]"),
    ],
    ids=str,
)  # fmt: skip
def test_what_makes_no_sense_is_refused_and_nothing_written(
    run: Run, fake_bundle: Path, tmp_path: Path, options: tuple[str, ...], why: str
) -> None:
    status, _, err = run("deploy", "ray", "-b", fake_bundle, "-o", tmp_path / "ray.yaml", *options)
    assert status == 2 and why in " ".join(err.split()) and not (tmp_path / "ray.yaml").exists()


def test_a_memory_of_no_bundle_is_refused(run: Run, fake_bundle: Path, guided_memory: Path, tmp_path: Path) -> None:
    status, _, err = run("deploy", "ray", "-b", fake_bundle, "-m", guided_memory, "-o", tmp_path / "ray.yaml")
    assert status == 2 and "was made for none of the bundles" in " ".join(err.split())


def test_the_page_types_what_there_is() -> None:
    """Every `motionrt` line of docs/ray.md is parsed by its command; tests/runtime/serve/test_ray.py runs such lines."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "ray.md").read_text()
    lines = [shlex.split(line, comments=True) for line in page.splitlines() if line.startswith("    motionrt ")]
    assert [line[1] for line in lines] == ["deploy", "serve", "deploy"]
    for _, *words in lines:
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context(command.name, words)  # an option that there is not ends it
