"""The static bounds: formulas equal what is counted, and the table's arithmetic is right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from motionrt.benchmarks.models import full_step  # noqa: E402
from motionrt.benchmarks.questions import roofline  # noqa: E402


def counted(partition: Any) -> tuple[int, int]:
    from motionrt.export.compiler.classify import bytes_of, flops
    from motionrt.export.compiler.rewrites import FUSED

    nodes = [n for n in partition.step.module.graph.nodes if n.target == FUSED]
    moved = sum(bytes_of(n, {}) + sum(bytes_of(a, {}) for a in n.args[:3]) for n in nodes)
    return sum(flops(n, {}) for n in nodes), moved


@pytest.mark.parametrize(
    "change", [{}, {"layers": 3}, {"heads": 3, "head_width": 32, "motion_tokens": 5, "frames": 3}], ids=str
)
def test_kernel_formula_equals_what_is_counted(change: dict[str, int]) -> None:
    size = replace(full_step.TOY, **change)
    flops, moved = counted(full_step.cut(size, torch.bfloat16))
    assert roofline.kernel_of(size) == roofline.Work(flops, moved)


@pytest.mark.slow
def test_step_of_any_depth_equals_what_is_counted() -> None:
    size = replace(full_step.TOY, layers=4)
    assert roofline.step_of(size) == roofline.counted_step(size)


def test_full_size_kernel_is_what_the_issue_says() -> None:
    assert (full_step.FULL.tokens, full_step.FULL_49.tokens) == (6976, 17776)
    work = roofline.kernel_of(full_step.FULL)
    assert work.bytes / 1e9 == pytest.approx(7.8, abs=0.1)  # 7.8 GB per step in one fused kernel
    assert roofline.released_of(full_step.FULL).flops > 2.5 * work.flops


def test_bound_is_the_larger_of_both() -> None:
    gpu = roofline.Gpu("unit", "sm_0", 1, 1, "")
    assert roofline.Work(2 * 10**9, 10**6).bound(gpu) == (2, "compute")
    assert roofline.Work(10**9, 5 * 10**6).bound(gpu) == (5, "memory")


@pytest.mark.slow
def test_command_prints_a_table_and_keeps_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roofline.main(["--sizes", "toy", "--results", str(tmp_path)])
    out = capsys.readouterr().out
    assert "| H100 SXM (sm_90) |" in out and "on top of the base step's FLOPs: motion, fused" in out
    rows = [json.loads(line) for line in (tmp_path / "roofline.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    for row in rows:
        assert "not a measurement" in row["note"] and len(row["bounds"]) == len(roofline.GPUS)
        assert all(bound["bound_ms"] > 0 and bound["source"] for bound in row["bounds"])
    with pytest.raises(SystemExit):
        roofline.main(["--sizes", "huge"])
    assert "size huge is not one of full" in capsys.readouterr().err
