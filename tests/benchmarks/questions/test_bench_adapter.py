"""The benchmarks of the step on models made for them, at toy size: gates first, a row for each variant, honest words."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from motionrt.benchmarks import harness  # noqa: E402
from motionrt.benchmarks.models import mid_models  # noqa: E402
from motionrt.benchmarks.questions import bench_adapter, bench_scaling, bench_step, profile_graph  # noqa: E402


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the toy's graphs are kept from one test to the next."""
    return tmp_path_factory.mktemp("work")


def rows(folder: Path, question: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{question}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_adapter_overhead_has_a_checked_row_for_each_variant(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", "layer-toy", "--runtime", "onnxruntime"]
    arguments = [*model, "--rounds", "2", "--work", str(work), "--results", str(tmp_path)]
    bench_adapter.main(arguments)
    out = capsys.readouterr().out
    found = {row["backend"]: row for row in rows(tmp_path, "bench_adapter")}
    assert set(found) == {"base", "base_ours", "released", "folded", "scale_0"} and "fused: not run" in out
    for row in found.values():
        assert row["n"] == 2 and row["model"] == "layer-toy"
        assert row["error"]["max_abs_difference"] <= row["error"]["allowed"]
    assert found["folded"]["error"]["to"] == "released" and found["scale_0"]["error"]["to"] == "base"
    assert found["folded"]["error"]["max_abs_difference"] > 0  # two forms, not one graph twice
    assert found["base_ours"]["flops"] <= found["base"]["flops"] < found["folded"]["flops"] < found["released"]["flops"]
    assert found["folded"]["over_base_ours"] > 0, "of two rounds there is no interval"
    capsys.readouterr()
    bench_adapter.main(arguments)
    assert "exporting" not in capsys.readouterr().out  # kept from the first run


@pytest.mark.slow
@pytest.mark.parametrize("model", ["layer-toy", "dynamicrafter-toy"])
def test_a_profile_tells_the_adapters_from_the_base_step(model: str, work: Path, tmp_path: Path) -> None:
    """DynamiCrafter has norms of groups, which ONNX Runtime takes apart into nodes without a name."""
    profile_graph.main(["--model", model, "--rounds", "3", "--work", str(work), "--results", str(tmp_path)])
    found = {row["what"]: row for row in rows(tmp_path, "profile_graph")}
    assert {"motion", "attention", "matrix products, convolutions", "norms"} < set(found)
    parts = [row for what, row in found.items() if what != "all nodes"]
    assert sum(row["of_the_step"] for row in parts) == pytest.approx(1, abs=0.2)  # medians need not add up
    motion = found["motion"]
    assert motion["n"] == 3 and 0 < motion["of_the_step"] < motion["over_the_rest"] < 0.5
    base = profile_graph.graphs_of(mid_models.MODELS[model], ("base_ours",), work)["base_ours"]
    assert "motion" not in profile_graph.profile(base, 1, 0, 1)


@pytest.mark.parametrize(
    ("name", "op", "kind"),
    [
        ("_inlfunc_motion_cross_attention_residual_12motionrt_part_3", "MatMul", "motion"),
        ("Mul_316", "Mul", "norms"),
        ("node_MatMul_87/MatMulAddFusion", "Gemm", "matrix products, convolutions"),
        ("node_transpose_1", "Transpose", "layout"),
        ("MatMul_316_token_1", "MatMul", "matrix products, convolutions"),
        ("cat_4.rotary", "RotaryEmbedding", "rotations"),
        ("Loop", "Loop", "the rest"),
    ],
)
def test_nodes_of_a_profile_by_name(name: str, op: str, kind: str) -> None:
    assert profile_graph.kind_of(name, op) == kind


@pytest.mark.slow
def test_step_is_timed_against_both_rivals(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Compiled without Inductor here: a C++ compiler would take a minute."""
    import torch._inductor.config as inductor

    monkeypatch.setattr(torch, "compile", lambda module, **options: functools.partial(_compiled, module, options))
    freezing, threads = inductor.freezing, torch.get_num_threads()  # monkeypatch would delete PyTorch's setting afterwards
    arguments = ["--model", "layer-toy", "--rounds", "2", "--warmups", "1", "--work", str(work), "--results", str(tmp_path)]
    try:
        bench_step.main(arguments)
    finally:
        torch.set_num_threads(threads)
        inductor.freezing = freezing
    found = {row["backend"]: row for row in rows(tmp_path, "bench_step")}
    assert set(found) == {"plain", "rewritten", "eager", "compiled"}
    assert "max-autotune" in found["compiled"]["compile"] and "the better rival is" in capsys.readouterr().out
    assert found["rewritten"]["flops"] < found["plain"]["flops"] == found["eager"]["flops"]
    for name, row in found.items():
        assert row["error"]["max_abs_difference"] <= row["error"]["allowed"]
        assert name == "rewritten" or row["over_rewritten"] > 0


def _compiled(module: Any, options: dict[str, Any], **tensors: Any) -> Any:
    assert options["mode"] == "max-autotune" and torch._inductor.config.freezing and not torch.is_grad_enabled()
    return module(**tensors)


def test_adapter_overhead_in_torch_exports_nothing(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    arguments = ["--model", "layer-toy", "--rounds", "2", "--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    try:
        bench_adapter.main(arguments)
    finally:
        torch.set_num_threads(threads)
    found = {row["backend"]: row for row in rows(tmp_path, "bench_adapter")}
    assert len(found) == 5 and {row["runtime"] for row in found.values()} == {"torch"}
    assert found["folded"]["flops"] < found["released"]["flops"] and not (tmp_path / "work").exists()


def test_gate_refuses_a_wrong_fold_and_motion_without_effect() -> None:
    base, moved = np.zeros(4, np.float32), np.ones(4, np.float32)
    right = {"base": base, "base_ours": base + 1e-6, "released": moved, "folded": moved - 1e-6, "scale_0": base}

    def calls(**other: Any) -> dict[str, Any]:
        return {name: lambda value=value: {"x": value} for name, value in {**right, **other}.items()}

    assert bench_adapter.gate(calls())["folded"]["to"] == "released"
    for name in ("base_ours", "folded", "scale_0"):
        with pytest.raises(harness.ParityError, match=f"{name} differs from"):
            bench_adapter.gate(calls(**{name: right[name] + 0.01}))
    with pytest.raises(harness.ParityError, match="would prove nothing"):
        bench_adapter.gate(calls(released=base, folded=base))


@pytest.mark.parametrize("name", ["cogvideox-toy", "layer-toy", "svd-toy", "dynamicrafter-toy"])
def test_the_base_model_is_the_adapted_one_at_scale_0(name: str) -> None:
    model = mid_models.MODELS[name]
    values = model.feed()
    adapted, base = model.step(adapter=True), model.step(adapter=False)
    with torch.no_grad():
        want = base(**values)
        silent = adapted(**{**values, "motion_scale": torch.zeros_like(values["motion_scale"])})
        moved = adapted(**values)
    for ours, theirs, other in zip(silent, want, moved, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert float((other - theirs).abs().max()) > 1e-3


def test_the_middle_models_have_the_published_depth() -> None:
    assert mid_models.MID.layers == 42 and mid_models.MID.head_width == 64 and mid_models.MID.motion_tokens == 25
    assert mid_models.MODELS["cogvideox-layer"].shape["L"] == 6976
    heads, widths = mid_models.SVD_MID["num_attention_heads"], mid_models.SVD_MID["block_out_channels"]
    assert [width // count for width, count in zip(widths, heads, strict=True)] == [64] * 4


def test_fits_find_the_law_they_are_given() -> None:
    sizes = [1.0, 2.0, 4.0, 7.0]
    power = bench_scaling.fit_power(sizes, [0.003 * size**1.5 for size in sizes])
    assert power["exponent"] == pytest.approx(1.5) and power["coefficient_ms"] == pytest.approx(3.0)
    line = bench_scaling.fit_polynomial(sizes, [0.5 + 0.1 * size for size in sizes], 1)
    assert line["coefficients_ms"] == pytest.approx([500, 100]) and line["worst_relative_residual"] < 1e-9
    bent = bench_scaling.fit_polynomial(sizes, [size**2 for size in sizes], 1)
    assert bent["worst_relative_residual"] > 0.1


def test_scaling_over_references_writes_points_and_a_fit(tmp_path: Path) -> None:
    bench_scaling.main(["--toy", "--axes", "k", "--rounds", "2", "--warmups", "0", "--results", str(tmp_path)])
    found = rows(tmp_path, "bench_scaling")
    assert [row.get("value") for row in found] == [1, 2, 4, None]
    assert found[-1]["what"] == "fit" and np.isfinite(found[-1]["power"]["exponent"])


@pytest.mark.parametrize("axis", ["frames", "resolution", "m", "batch"])
def test_every_axis_has_models_that_run(axis: str) -> None:
    for point in bench_scaling.points(axis, toy=True):
        step, values = point.model.step(adapter=True), point.model.feed()
        with torch.no_grad():
            results = step(**values)
        assert results[0].shape == values["latents"].shape
        if axis == "batch":
            assert len(values["latents"]) == point.value


@pytest.mark.parametrize(("runtime", "sessions"), [("onnxruntime", "0"), ("torch", "2")])
def test_sessions_that_cannot_be_are_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], runtime: str, sessions: str
) -> None:
    with pytest.raises(SystemExit):
        bench_adapter.main(["--model", "layer-toy", "--runtime", runtime, "--sessions", sessions])
    assert f"--sessions is {sessions}; allowed" in capsys.readouterr().err


def test_a_node_without_a_name_would_be_booked_as_a_norm(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    vector = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    weight = helper.make_tensor("w", TensorProto.FLOAT16, [1], [1.0])
    cast = helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT)
    for name in ("scaled", ""):
        nodes = [cast, helper.make_node("Mul", ["x", "wide"], ["y"], name=name)]
        graph = helper.make_graph(nodes, "g", [vector], [result], [weight])
        onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
        if name:
            profile_graph.check_names(tmp_path / "g.onnx")
        else:
            with pytest.raises(ValueError, match="nodes without a name .Mul."):
                profile_graph.check_names(tmp_path / "g.onnx")
