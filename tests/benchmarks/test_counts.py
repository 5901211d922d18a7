"""The performance gate: the counts of this tree are those of benchmarks/baseline.json, and a worse one is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKED = dict(re.findall(r"^([\w-]+)==([^\s;]+)", (ROOT / "requirements" / "dev.txt").read_text(encoding="utf-8"), re.M))


def check(counts: ModuleType, part: str, now: Callable[[], dict[str, int]]) -> None:
    """Fail where `now` differs from the baseline; skip where a library that the counts depend on is not the locked one."""
    for library in counts.DEPENDS[part]:
        pytest.importorskip(library)
    for library, version in counts.versions(part).items():
        if version.split("+")[0] != LOCKED[library].split("+")[0]:
            pytest.skip(f"{library} is {version}; counts are held with the locked {LOCKED[library]}")
    lines = counts.compare(part, now(), json.loads(counts.BASELINE.read_text(encoding="utf-8")))
    assert not lines, "\n".join(["counts changed:", *lines, f"accept them, with the reason: {counts.ACCEPT}"])


def test_committed_bundle_costs_what_the_baseline_says(counts: ModuleType) -> None:
    pytest.importorskip("onnx")
    check(counts, "demo bundle", counts.bundle_counts)


@pytest.mark.slow
def test_pass_over_the_demo_gives_what_the_baseline_says(counts: ModuleType) -> None:
    check(counts, "demo step", counts.demo_counts)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["cogvideox tiny", "svd tiny", "dynamicrafter tiny"])
def test_pass_over_released_structures_gives_what_the_baseline_says(
    counts: ModuleType, part: str, request: pytest.FixtureRequest
) -> None:
    def now() -> dict[str, int]:
        return counts.partition_counts(request.getfixturevalue("tiny_partitions")(part)[0])  # type: ignore[no-any-return]

    check(counts, part, now)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_take_what_the_baseline_says(counts: ModuleType, request: pytest.FixtureRequest) -> None:
    def now() -> dict[str, int]:
        reports = [report for found, _ in request.getfixturevalue("compiled_kernels").values() for report in found]
        return counts.kernel_counts(reports)  # type: ignore[no-any-return]

    check(counts, "kernels", now)


def test_every_part_has_counts_and_a_reason(counts: ModuleType) -> None:
    baseline = json.loads(counts.BASELINE.read_text(encoding="utf-8"))
    assert list(baseline["parts"]) == list(counts.PARTS) == list(counts.DEPENDS)
    for part, entry in baseline["parts"].items():
        assert set(entry["versions"]) == set(counts.DEPENDS[part]) and len(entry["counts"]) > 10
    assert baseline["reasons"] and all(item["reason"].strip() and item["date"] for item in baseline["reasons"])
    for graph in ("step", "request", "schedule"):
        for part in ("demo step", "cogvideox tiny", "svd tiny", "dynamicrafter tiny"):
            assert {f"{graph}/nodes", f"{graph}/flops", f"{graph}/weight bytes"} <= baseline["parts"][part]["counts"].keys()


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    path = tmp_path / "baseline.json"
    part = {"versions": {}, "counts": {"step/nodes": 10, "step/flops": 1000, "step/nodes/MatMul": 4}}
    path.write_text(json.dumps({"parts": {"demo bundle": part}, "reasons": [{"date": "d", "reason": "first", "changed": {}}]}))
    return path


CHANGED = {"step/nodes": 11, "step/flops": 900, "step/nodes/Add": 1}


def test_changed_counts_fail_and_say_which_by_how_much_and_what_to_do(
    counts: ModuleType, baseline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(counts.PARTS, "demo bundle", lambda: CHANGED)
    before = baseline.read_bytes()
    assert counts.main(["--parts", "demo bundle", "--baseline", str(baseline)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "demo bundle: 3 counts, not as the baseline",
        "WORSE  demo bundle: step/nodes: 10 -> 11 (+10.00%)",
        "WORSE  demo bundle: step/nodes/Add: 0 -> 1",
        "better demo bundle: step/flops: 1,000 -> 900 (-10.00%)",
        "better demo bundle: step/nodes/MatMul: 4 -> 0 (-100.00%)",
        f"accept them, with the reason: {counts.ACCEPT}",
    ]
    assert baseline.read_bytes() == before


def test_accepting_keeps_every_reason_and_what_it_changed(
    counts: ModuleType, baseline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(counts.PARTS, "demo bundle", lambda: CHANGED)
    arguments = ["--parts", "demo bundle", "--baseline", str(baseline)]
    with pytest.raises(ValueError, match="reason is empty"):
        counts.main([*arguments, "--accept", " "])
    assert counts.main([*arguments, "--accept", "one more Add for X"]) == 0
    assert counts.main(arguments) == 0
    found: dict[str, Any] = json.loads(baseline.read_text())
    assert [item["reason"] for item in found["reasons"]] == ["first", "one more Add for X"]
    assert found["reasons"][1]["changed"]["demo bundle: step/nodes"] == [10, 11]
    assert found["parts"]["demo bundle"]["counts"] == CHANGED


def test_another_version_of_a_library_is_named_beside_what_changed(
    counts: ModuleType, baseline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = json.loads(baseline.read_text())
    monkeypatch.setitem(counts.DEPENDS, "demo bundle", ("numpy",))
    lines = counts.compare("demo bundle", CHANGED, data)
    assert "counted then with {}, now with {'numpy'" in lines[-1]
    assert counts.compare("demo bundle", data["parts"]["demo bundle"]["counts"], data) == []
    assert counts.compare("kernels", {}, data) == ["kernels: not in the baseline"]


def test_a_graph_with_one_more_node_and_weight_counts_more(counts: ModuleType, fake_bundle: Path, tmp_path: Path) -> None:
    """The fake bundle, its step with one identity and one weight of 12 bytes more."""
    import shutil

    import onnx

    from motionrt.runtime.files import sha256_of

    copy = tmp_path / "bundle"
    shutil.copytree(fake_bundle, copy)
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest.setdefault("partition", {"classes": {}})["classes"] = {}
    (copy / "bundle.json").write_text(json.dumps(manifest))
    before = counts.bundle_counts(copy)
    path = copy / manifest["graphs"]["step"]["file"]
    model = onnx.load(path)
    model.graph.initializer.append(onnx.helper.make_tensor("more", onnx.TensorProto.FLOAT, [3], [1.0, 2.0, 3.0]))
    model.graph.node.append(onnx.helper.make_node("Identity", ["more"], ["unused"]))
    onnx.save(model, path)
    manifest["graphs"]["step"]["sha256"] = sha256_of(path)
    (copy / "bundle.json").write_text(json.dumps(manifest))
    changed = {name: new - old for name, (old, new) in counts.changes(counts.bundle_counts(copy), before).items()}
    assert changed.pop("bytes of the bundle") > 12
    assert changed.pop("step/nodes/Identity") == 1
    assert changed == {"step/nodes": 1, "step/weight bytes": 12}
