"""benchmarks/gpu/gpu_suite.py at toy size on the CPU, so that it cannot rot: every stage runs or says why not."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from motionrt.benchmarks.gpu import gpu_suite


def printed_rows(out: str) -> list[dict[str, Any]]:
    body = out.split(gpu_suite.BEGIN + "\n", 1)[1]
    lines = body.splitlines()
    assert lines[-1] == gpu_suite.END, "rows are the last that is printed"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.slow
@pytest.mark.timeout(600)  # under a minute of work for one processor; CI machines are shared
def test_every_stage_runs_on_the_cpu_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the steps whose own tests run them at this very size, CogVideoX's and those of gpu_mid: of them, how they are
    called."""
    for package in ("torch", "diffusers", "transformers", "triton"):
        pytest.importorskip(package)
    called: list[tuple[list[str], dict[str, Any]]] = []
    from motionrt.benchmarks.gpu import gpu_mid, gpu_step

    for script in (gpu_step, gpu_mid):
        monkeypatch.setattr(script, "main", lambda arguments, **more: called.append((arguments, more)))
    code = gpu_suite.main(["--toy", "--rounds", "2", "--warmups", "1", "--results", str(tmp_path)])
    out = capsys.readouterr().out
    assert code == 0, out
    for stage in gpu_suite.STAGES:
        assert f"== {stage.name}: done" in out, out
    assert "augmented kernel stages not run: no CUDA device" in out and "gathered: " in out
    assert "kernel stages not run: no CUDA device" in out and "from fp64" in out
    assert "engines: not run:" in out
    rows = printed_rows(out)
    assert len(rows) == sum(len(path.read_text().splitlines()) for path in tmp_path.glob("*.jsonl"))
    found = {(row["question"], row["backend"]) for row in rows if "backend" in row}
    sizes = [(arguments[arguments.index("--size") + 1], more["device"]) for arguments, more in called]
    assert sizes == [("toy", "cpu")] * 3
    stages = [[word for word in arguments if word in gpu_step.STAGES] for arguments, _ in called]
    assert stages == [["released_eager", "ours_eager"], ["released_eager", "ours_eager", "base_eager"], ["base_eager"]]
    steps = {"released_eager", "ours_eager", "base_eager"}
    assert {backend for question, backend in found if question == "gpu_step"} == steps
    assert {row["what"] for row in rows if row["question"] == "gpu_step"} == {"svd toy step"}
    wanted = {"memory", "release", "cogvideox", "svd, 4 frames at once", "ours eager", "as released, eager"}
    assert {backend for question, backend in found if question == "gpu_request"} == wanted
    guided = {row["what"].split()[1].rstrip(","): row["over_plain"] for row in rows if row["question"] == "gpu_guided"}
    assert guided.keys() == {"step_guided", "step_plain"} and guided["step_plain"] == 1 != guided["step_guided"]
    assert {"torch_cpu", "onnxruntime_cpu"} <= {backend for question, backend in found if question == "gpu_demo"}
    asked = {"gpu_ceilings", "gpu_step", "gpu_request", "gpu_demo", "gpu_guided", "bench_branches"}
    assert {row["question"] for row in rows} == asked
    for row in rows:
        assert row.get("device", "cpu") == "cpu" and row["p50_ms"] > 0
    svd = {row["backend"]: row["flops"] for row in rows if row.get("what") == "svd toy step"}
    assert svd["ours_eager"] < svd["base_eager"] < svd["released_eager"], "with motion cheaper than the base without"


def options(folder: Path, **changes: Any) -> argparse.Namespace:
    given = {"results": folder, "rounds": 1, "warmups": 0, "toy": False, "here": False, "seconds": 60.0}
    return argparse.Namespace(**{**given, "flavor": "rtx", "dtype": "float16", "precision": None, **changes})


def test_a_stage_is_ended_when_its_time_is_up(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    stage = next(stage for stage in gpu_suite.STAGES if stage.name == "ceilings")
    assert gpu_suite.start(stage, options(tmp_path), 0.05).startswith("ended after its 0 s")


def test_a_stage_without_what_it_needs_says_so(tmp_path: Path) -> None:
    stage = gpu_suite.Stage("x", 1, lambda given, toy: pytest.fail("must not run"), ("no_such_package",))
    assert gpu_suite.start(stage, options(tmp_path), 1.0) == "not run: no_such_package not installed"


def test_a_failing_stage_keeps_its_rows_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q.jsonl").write_text('{"old": 1}\n')

    def failing(given: argparse.Namespace, toy: bool) -> None:
        with (given.results / "q.jsonl").open("a") as file:
            file.write('{"new": 1}\n')
        raise RuntimeError("out of memory")

    def fine(given: argparse.Namespace, toy: bool) -> None:
        (given.results / "r.jsonl").write_text('{"new": 2}\n')

    runs = {"bad": failing, "good": fine, "never": failing}
    stages = tuple(gpu_suite.Stage(name, 5, run, ()) for name, run in runs.items())
    monkeypatch.setattr(gpu_suite, "STAGES", stages)
    assert gpu_suite.main(["--toy", "--results", str(tmp_path), "--skip", "never"]) == 1
    out = capsys.readouterr().out
    assert "bad: failed: RuntimeError: out of memory" in out and "good: done" in out and "never" not in out
    assert printed_rows(out) == [{"new": 1}, {"new": 2}]


def test_stages_are_in_order_of_value_and_the_needed_ones_fit_into_their_time() -> None:
    names = [stage.name for stage in gpu_suite.STAGES]
    optional = [stage.optional for stage in gpu_suite.STAGES]
    assert optional == sorted(optional), "optional stages come last"
    assert names.index("kernels") < names.index("cogvideox_step") < names.index("svd_step") < names.index("request")
    assert len(set(names)) == len(names)
