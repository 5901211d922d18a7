"""The stages of the full-size step, at toy size on the CPU: parity first, a row for each, and the budget is kept."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from motionrt.benchmarks.gpu import gpu_step  # noqa: E402


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "gpu_step.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_stage_runs_and_keeps_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiled without Inductor here; there are no CUDA graphs on a CPU, and the row of that stage says what it ran as."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    stages = [stage for stage in gpu_step.STAGES if not stage.endswith("tuned")]  # these only compile in another mode: below
    arguments = ["--size", "toy", "--rounds", "2", "--warmups", "1", "--results", str(tmp_path), "--stages", *stages]
    gpu_step.main(arguments, device="cpu", dtype=torch.float32)
    found = {row["backend"]: row for row in rows(tmp_path)}
    out = capsys.readouterr().out
    assert set(found) == set(stages), out
    assert "CUDA graph capture failed" in out and found["ours_graph"]["ran_as"] == "compile"
    for name, row in found.items():
        assert row["n"] == 2 and row["flops"] > 0 and row["device"] == "cpu"
        if name.startswith("ours"):
            assert 0 < row["error"]["relative_l2"] <= 1e-4
    assert found["ours_eager"]["flops"] < found["released_eager"]["flops"]
    assert found["base_eager"]["flops"] < found["released_eager"]["flops"]


def test_plain_is_tuned_by_max_autotune_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda module, *, dynamic, mode: modes.append(mode) or module)
    for mode in ("eager", "compiled", "tuned"):
        (result,) = gpu_step.plain(lambda x: (x + 1,), {"x": torch.zeros(2)}, mode)()
        assert result.tolist() == [1, 1]
    assert modes == ["default", "max-autotune"]


def test_no_stage_starts_after_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_step.main(["--size", "toy", "--budget", "0", "--results", str(tmp_path)], device="cpu", dtype=torch.float32)
    assert "released_eager: not run: 0 s of 0 s are spent" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_failing_stage_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = gpu_step.ours

    def broken(partition: Any, inputs: Any, mode: str, device: str) -> Any:
        step, ran = real(partition, inputs, mode, device)
        return (lambda: [2 * value for value in step()]), ran

    monkeypatch.setattr(gpu_step, "ours", broken)
    arguments = ["--size", "toy", "--rounds", "1", "--results", str(tmp_path), "--stages", "released_eager", "ours_eager"]
    gpu_step.main([*arguments, "base_eager"], device="cpu", dtype=torch.float32)
    assert "ours_eager: failed: ParityError: it differs from released_eager by 1" in capsys.readouterr().out
    assert [row["backend"] for row in rows(tmp_path)] == ["released_eager", "base_eager"]


@pytest.mark.parametrize(
    "device, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 5090", 209.5),
    ],
)
def test_bound_is_that_of_the_device(device: str, tflops: float) -> None:
    assert gpu_step.bound(10**15, device) == pytest.approx(1e6 / tflops)
    assert gpu_step.bound(10**15, "some GPU") is None


def test_not_run_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu_step.main([])
    assert capsys.readouterr().out == "not run: no CUDA device\n"
