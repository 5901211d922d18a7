"""benchmarks/gpu/gpu_mid.py at toy size on the CPU: what is compared computes the same, a row for each stage, the budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from motionrt.benchmarks.gpu import gpu_mid, gpu_step  # noqa: E402

TOY = ["--size", "toy", "--rounds", "2", "--warmups", "1"]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "gpu_step.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", list(gpu_mid.STEPS))
def test_released_and_ours_are_one_step_in_each_dtype(name: str) -> None:
    subject = gpu_mid.STEPS[name](True)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for kind, way in (("released", subject.released), ("ours", subject.ours)):
            way = gpu_mid.placed(way, "cpu", dtype)
            assert all(value.dtype == torch.float32 for name, value in way.values.items() if name in gpu_mid.EXACT)
            with torch.no_grad():
                found[dtype, kind] = gpu_mid.Named(way.module)(**way.values)
    wanted = found[torch.float32, "released"]
    assert len(wanted) == len(subject.outputs) and list(subject.changes) == list(subject.ours.values)
    for (dtype, _), results in found.items():
        assert gpu_step.relative(results, wanted) <= gpu_step.ALLOWED[dtype] / 2


def test_not_run_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu_mid.main([])
    assert capsys.readouterr().out == "steps of middle size: not run: no CUDA device\n"


def test_no_step_begins_after_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_mid.main([*TOY, "--budget", "-1", "--results", str(tmp_path)], device="cpu", dtype=torch.float32)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(gpu_mid.STEPS)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute of work for one processor
def test_every_step_has_a_row_for_each_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["released_eager", "ours_eager", "base_eager"]
    gpu_mid.main([*TOY, "--results", str(tmp_path), "--stages", *stages], device="cpu", dtype=torch.float32)
    found: dict[str, dict[str, Any]] = {}
    for row in rows(tmp_path):
        found.setdefault(row["what"], {})[row["backend"]] = row
    crafter, *i2v = found
    assert crafter == "dynamicrafter-toy step" and set(found[crafter]) == set(stages), capsys.readouterr().out
    assert i2v == [f"motion-i2v-toy {name} step" for name in ("drawn", "plain", "video")]
    for name in i2v:
        released, ours = (found[name][stage] for stage in stages[:2])
        assert ours["error"]["relative_l2"] <= 1e-4 and 0 < ours["flops"] < released["flops"]
    assert found[crafter]["base_eager"]["flops"] < found[crafter]["released_eager"]["flops"]
