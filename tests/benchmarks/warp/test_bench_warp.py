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
from motionrt.benchmarks.warp import bench_warp, forms  # noqa: E402
from motionrt.export.compiler.partition import partition  # noqa: E402
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
    return bench_warp.Saved(Path(name), feed, still, bench_warp.Counts(10 * more, 8 * more, 4))


def test_a_row_has_the_ratio_with_its_interval_and_what_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_warp, "saved", lambda size, name, work: made(name, 1.0))
    monkeypatch.setattr(bench_warp, "open_graph", lambda path, threads: lambda feed: {"next_latents": feed["x"] * 1})
    bench_warp.main(["--model", "motion-i2v-toy", "--rounds", "10", "--results", str(tmp_path)])
    found = rows(tmp_path)
    assert list(found) == list(forms.FORMS)
    for name in ("released", "gathered"):
        assert len(found[name]["over_ours"]) == 3
        assert found[name]["counts_of_ours"] == {"flops": 2, "written_bytes": 2, "live_bytes": 1}
    assert found["ours"]["shape"] == {"B": 2, "F": 4, "H": 8, "W": 8, "D": 32} and "over_ours" not in found["ours"]
    assert "of ours, 2.00x the bytes, 2.000x the FLOPs" in capsys.readouterr().out


def test_a_form_that_differs_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_warp, "saved", lambda size, name, work: made(name, 1.1 if name == "gathered" else 1.0))
    monkeypatch.setattr(bench_warp, "open_graph", lambda path, threads: lambda feed: {"next_latents": feed["x"] * 1})
    with pytest.raises(harness.ParityError, match="gathered differs from released by 0.1"):
        bench_warp.main(["--model", "motion-i2v-toy", "--rounds", "1", "--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())


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
