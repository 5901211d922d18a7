"""benchmarks/warp at toy size: the release's way to warp gives the same numbers, and what is counted and timed of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from motionrt.benchmarks import harness  # noqa: E402
from motionrt.benchmarks.warp import bench_warp, forms, layers  # noqa: E402
from motionrt.export.compiler.partition import partition  # noqa: E402
from motionrt.export.compiler.weightless import meta  # noqa: E402
from motionrt.export.systems.motion_i2v.stencil import stencil, warped  # noqa: E402


def test_a_splat_is_what_the_tables_gather() -> None:
    """Of a field that contracts, leaves holes and leaves the frame, and has a number that is none."""
    draw = torch.Generator().manual_seed(0)
    flow = 3 * torch.randn(2, 3, 2, 5, 7, generator=draw)
    flow[0, 0, 0, 2, 3] = float("nan")
    features = torch.randn(2, 35, 4, generator=draw)
    want = warped(stencil(flow), features)
    got = forms.splatted(forms.Splats(flow, flow[:, :, 0].flatten()), features)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert bool((want == 0).all(-1).any()), "holes"


def test_all_forms_of_a_step_agree_where_the_fields_matter() -> None:
    results = {}
    for name, form in forms.FORMS.items():
        values = form.feed(forms.TOY)
        assert list(values) == list(form.changes(forms.TOY))
        with torch.no_grad():
            results[name] = form.step(forms.TOY)(*values.values())
    for name, value in results.items():
        torch.testing.assert_close(value, results["released"], rtol=0, atol=1e-5, msg=name)
    still = forms.FORMS["ours"].feed(forms.TOY, torch.zeros_like(forms.turning(forms.TOY)))
    with torch.no_grad():
        unmoved = forms.FORMS["ours"].step(forms.TOY)(*still.values())
    assert float((unmoved - results["ours"]).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "name", ["motion-i2v-toy-attention-8x8", pytest.param("motion-i2v-attention-5x8", marks=pytest.mark.slow)]
)
def test_all_forms_of_a_layer_agree_where_the_fields_matter(name: str) -> None:
    layer, results = layers.LAYERS[name], {}
    for form_name, form in layers.COUNTED.items():
        values, still = form.feed(layer), form.still(layer)
        assert list(values) == list(form.changes(layer)) == list(still)
        with torch.no_grad():
            results[form_name] = form.step(layer)(*values.values())
            effect = float((form.step(layer)(*still.values()) - results[form_name]).abs().max())
        assert effect == 0 if form_name == "plain" else effect > 0.1
    plain = results.pop("plain")
    for form_name, value in results.items():
        torch.testing.assert_close(value, results["released"], rtol=0, atol=1e-5, msg=form_name)
    assert float((plain - results["released"]).abs().max()) > 0.1


def test_layers_are_the_42_attentions_of_the_release() -> None:
    full = [layer for layer in layers.LAYERS.values() if layer.size is forms.FULL]
    assert [(layer.grid, layer.width) for layer in full] == [((40, 64), 320), ((20, 32), 640), ((10, 16), 1280), ((5, 8), 1280)]
    with meta():
        names = [name for name, _ in forms.VideoUNet(forms.FULL.config).named_modules()]
    assert sum(layer.times for layer in full) == sum("motion_modules" in n and n.endswith((".attn1", ".attn2")) for n in names)


@pytest.mark.slow
def test_what_the_augmentation_adds_to_a_layer() -> None:
    """The release projects 15 rows a place more to keys and values; ours sums four rows for each that arrives, or more."""
    layer = layers.LAYERS["motion-i2v-attention-5x8"]
    found = {name: bench_warp.counted(layer, name) for name in ("released", "ours", "unfused", "plain")}
    row = 4 * layer.grid[0] * layer.grid[1] * layer.width  # bytes a frame of both branches, halved
    assert {name: counts.keys_values_bytes / (4 * row) for name, counts in found.items()} == {
        "released": 31, "ours": 16, "unfused": 16, "plain": 16
    }  # fmt: skip
    scores = 2 * 2 * layers.BRANCHES * layer.grid[0] * layer.grid[1] * 16 * 15 * layer.width
    products = 2 * 2 * 15 * layers.BRANCHES * layer.grid[0] * layer.grid[1] * layer.width**2
    assert found["released"].flops - found["plain"].flops == scores + products
    assert scores < found["ours"].flops - found["plain"].flops < scores + products / 20
    assert found["unfused"].written_bytes > found["ours"].written_bytes


def test_the_warp_of_the_release_is_gone_behind_its_block() -> None:
    from motionrt.export.systems.motion_i2v import augmented

    before = augmented.attended, augmented.warped
    with forms.as_released(splat=True):
        assert (augmented.attended, augmented.warped) == (forms.projected_after, forms.splatted)
    assert (augmented.attended, augmented.warped) == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_release_projects_more_and_counts_need_no_weights() -> None:
    found = {name: bench_warp.counted(forms.TOY, name) for name in ("ours", "released")}
    form = forms.FORMS["ours"]
    cut = partition(
        form.step(forms.TOY), tuple(form.feed(forms.TOY).values()), form.changes(forms.TOY), outputs=forms.OUTPUTS
    )
    assert found["ours"] == bench_warp.counts(cut)
    assert found["ours"].flops < found["released"].flops
    for one in found.values():
        assert 0 < one.live_bytes < one.written_bytes


def test_fields_without_effect_are_no_comparison() -> None:
    moved, still = {"x": np.ones(3, np.float32)}, {"x": np.ones(3, np.float32) + 1e-4}
    with pytest.raises(harness.ParityError, match="fields change the outputs by 0.0001 only; 0.001 is the least"):
        bench_warp.gate(moved, still, 1e-4)
    bench_warp.gate(moved, {"x": np.zeros(3, np.float32)}, 1e-4)


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "bench_warp.jsonl").read_text().splitlines()
    return {row["backend"]: row for row in map(json.loads, lines)}


def made(name: str, moved: float) -> bench_warp.Saved:
    """A step that gives what it reads, with counts of its own."""
    feed, still = ({"x": np.full(3, value, np.float32)} for value in (moved, 0.0))
    more = 1 if name == "ours" else 2
    return bench_warp.Saved(Path(name), feed, still, bench_warp.Counts(10 * more, 8 * more, 4, 2, 6 * more))


def profile_of(path: Path, feed: object, threads: int) -> bench_warp.Profile:
    return bench_warp.Profile(100 if path.name == "ours" else 150, {"MatMul": 1.5})


def test_a_row_has_the_ratio_with_its_interval_and_what_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_warp, "saved", lambda size, name, work: made(name, 1.0))
    monkeypatch.setattr(bench_warp, "open_graph", lambda path, threads, shared: lambda feed: {"next_latents": feed["x"] * 1})
    monkeypatch.setattr(bench_warp, "profiled", profile_of)
    bench_warp.main(["--model", "motion-i2v-toy", "--rounds", "10", "--results", str(tmp_path)])
    found = rows(tmp_path)
    assert list(found) == list(forms.FORMS)
    for name in ("released", "gathered"):
        assert len(found[name]["over_ours"]) == 3
        more = {"flops": 2, "written_bytes": 2, "live_bytes": 1, "weight_bytes": 1, "keys_values_bytes": 2}
        assert found[name]["counts_of_ours"] == more
        assert (found[name]["node_bytes"], found[name]["operators_ms"]) == (150, {"MatMul": 1.5})
    assert found["ours"]["shape"] == {"B": 2, "F": 4, "H": 8, "W": 8, "D": 32} and "over_ours" not in found["ours"]
    assert "of ours, 1.50x the bytes, 2.000x the FLOPs" in capsys.readouterr().out


def test_a_form_that_differs_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_warp, "saved", lambda size, name, work: made(name, 1.1 if name == "gathered" else 1.0))
    monkeypatch.setattr(bench_warp, "open_graph", lambda path, threads, shared: lambda feed: {"next_latents": feed["x"] * 1})
    with pytest.raises(harness.ParityError, match="gathered differs from released by 0.1"):
        bench_warp.main(["--model", "motion-i2v-toy", "--rounds", "1", "--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_more_threads_than_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_warp.main(["--threads", "2"])
    assert "--threads is 2; allowed: 1" in capsys.readouterr().err


def test_counts_are_rows_of_the_step_and_of_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flops = {"released": 6 * 10**12, "gathered": 7 * 10**12, "ours": 3 * 10**12, "unfused": 4 * 10**12, "plain": 2 * 10**12}
    monkeypatch.setattr(bench_warp, "counted", lambda model, name: bench_warp.Counts(flops[name], 8, 4, 2, 6))
    bench_warp.main(["--count", "--results", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "bench_warp.jsonl").read_text().splitlines()]
    assert len(lines) == 5 * len(flops) and {row["model"] for row in lines} >= {"motion-i2v", "motion-i2v-attention-40x64"}
    assert {row["backend"]: row["tflop_over_plain"] for row in lines} == {
        "released": 2, "gathered": 2.5, "ours": 0.5, "unfused": 1, "plain": 0
    }  # fmt: skip
    assert sum(row.get("times_in_a_step", 0) for row in lines) == 42 * len(flops)
    assert all(row["counts_of_ours"]["flops"] == row["flops"] / flops["ours"] for row in lines)


def test_what_nodes_write_is_what_the_profiler_says(tmp_path: Path) -> None:
    """A product of 4 x 6 numbers and its sum, and a view that is none of it."""
    onnx = pytest.importorskip("onnx")
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("MatMul", ["x", "y"], ["z"]),
        helper.make_node("Reshape", ["z", "shape"], ["flat"]),
        helper.make_node("CumSum", ["flat", "axis"], ["sums"]),
    ]
    given = [helper.make_tensor_value_info("x", number, [4, 5]), helper.make_tensor_value_info("y", number, [5, 6])]
    fixed = [onnx.numpy_helper.from_array(np.array([24]), "shape"), onnx.numpy_helper.from_array(np.array(0), "axis")]
    graph = helper.make_graph(nodes, "g", given, [helper.make_tensor_value_info("sums", number, [24])], fixed)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "g.onnx")
    feed = {"x": np.ones((4, 5), np.float32), "y": np.ones((5, 6), np.float32)}
    found = bench_warp.profiled(tmp_path / "g.onnx", feed, 1)
    assert found.node_bytes == 2 * 4 * 24
    assert set(found.operators_ms) == {"MatMul", "Reshape", "CumSum"} and all(v >= 0 for v in found.operators_ms.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_graphs_of_a_layer_agree_in_onnx_runtime(tmp_path: Path) -> None:
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    bench_warp.main(["--model", "motion-i2v-toy-attention-8x8", "--rounds", "1", *folders])
    found = rows(tmp_path)
    assert list(found) == list(layers.FORMS)
    for row in found.values():
        assert row["error"]["max_abs_difference"] <= row["error"]["allowed"] and row["node_bytes"] > row["keys_values_bytes"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_graphs_of_forms_agree_in_onnx_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two = {name: forms.FORMS[name] for name in ("released", "ours")}  # an export of the third takes a minute more
    monkeypatch.setattr(bench_warp, "FORMS", two)
    arguments = ["--model", "motion-i2v-toy", "--rounds", "1", "--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    bench_warp.main(arguments)
    for row in rows(tmp_path).values():
        assert row["error"]["to"] == "released" and row["error"]["max_abs_difference"] <= row["error"]["allowed"]
    assert "exporting ours" in capsys.readouterr().out
    bench_warp.main(arguments)
    assert "exporting" not in capsys.readouterr().out  # kept from the first run
