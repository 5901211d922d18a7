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


def test_counts_are_those_of_the_weightless_step() -> None:
    """What `--count` says at full size is what the rows say at this one; and the release projects more."""
    found = {}
    for name, form in forms.FORMS.items():
        module, values = form.step(forms.TOY), form.feed(forms.TOY)
        cut = partition(module, tuple(values.values()), form.changes(forms.TOY), outputs=forms.OUTPUTS)
        found[name] = bench_warp.counts(cut)
        assert bench_warp.counted(forms.TOY, name) == found[name], name
    assert found["ours"].flops < min(found["released"].flops, found["gathered"].flops)
    for one in found.values():
        assert 0 < one.live_bytes < one.written_bytes
    assert bench_warp.over(found)["ours"] == {"flops": 1, "written_bytes": 1, "live_bytes": 1}


def test_fields_without_effect_are_no_comparison() -> None:
    moved, still = {"x": np.ones(3, np.float32)}, {"x": np.ones(3, np.float32) + 1e-4}
    with pytest.raises(harness.ParityError, match="fields change the outputs by 0.0001 only; 0.001 is the least"):
        bench_warp.gate(moved, still, 1e-4)
    bench_warp.gate(moved, {"x": np.zeros(3, np.float32)}, 1e-4)


@pytest.mark.slow
def test_every_form_has_a_checked_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "motion-i2v-toy", "--rounds", "10", "--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    bench_warp.main(arguments)
    out = capsys.readouterr().out
    rows: dict[str, Any] = {}
    for line in (tmp_path / "bench_warp.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["backend"]] = row
    assert list(rows) == list(forms.FORMS)
    for name, row in rows.items():
        assert row["error"]["to"] == "released" and row["error"]["max_abs_difference"] <= row["error"]["allowed"]
        assert row["n"] == 10 and row["written_bytes"] > row["live_bytes"] > 0
        assert name == "ours" or (len(row["over_ours"]) == 3 and row["counts_of_ours"]["flops"] > 1)
    assert "of ours" in out and "exporting ours" in out
    bench_warp.main(arguments)
    assert "exporting" not in capsys.readouterr().out  # kept from the first run
