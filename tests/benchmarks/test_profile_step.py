"""The profile books every node on one group, the candidates on the right one, and claims nothing for a GPU from a CPU."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_profile_step_books_candidates_and_keeps_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import full_step
    import profile_step as bench

    size = full_step.TOY
    partition = full_step.cut(size, torch.float32)
    module = partition.step.module
    groups = bench.classify(module, size)
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    assert set(groups) == set(calls)
    counts = Counter(groups.values())
    assert counts[bench.MOTION] == counts[bench.ATTENTION] == counts[bench.GELU] == size.layers
    assert counts[bench.GROUPNORM] == 0
    norms = {bench.ROPE: 0, bench.MODULATE: 0}
    for node in calls:
        if "layer_norm" in str(node.target):
            norms[groups[node]] += 1
    assert norms == {bench.ROPE: 2 * size.layers, bench.MODULATE: 4 * size.layers + 2}
    inputs = bench.step_inputs(partition, full_step.feed(size, torch.float32))
    bench.measure(size, module, inputs, device="cpu", dtype=torch.float32, rounds=2, results=tmp_path)
    (row,) = map(json.loads, (tmp_path / "profile_step.jsonl").read_text().splitlines())
    assert row["decides"] is False and row["note"] == "CPU: decides nothing for a GPU" and row["rule"] == bench.RULE
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert all(row["milliseconds"][name] > 0 for name in (bench.MODULATE, bench.ROPE, bench.SOLVER, bench.PRODUCTS))
    assert "GroupNorm + SiLU (candidate) - not in this network" in capsys.readouterr().out
    for name in ("profile_step", "full_step", "harness"):
        sys.modules.pop(name, None)
