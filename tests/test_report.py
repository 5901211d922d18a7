"""benchmarks/report.py: docs/performance.md is what the rows say, the newest run counts, and what was not run says so."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ("report", "report_sections", "report_rows", "report_text", "plots", "memory_plot")
MACHINE = {"date": "2026-11-21T23:00:00+00:00", "commit": "abc", "processor": "CPU X", "gpu": None}


@pytest.fixture(scope="module")
def report() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("report")
        for name in BESIDE:
            sys.modules.pop(name, None)


def timing(backend: str, p50: float, **more: Any) -> dict[str, Any]:
    percentiles = {"p50_ms": p50, "p95_ms": p50 + 1, "p99_ms": p50 + 2, "n": 30}
    return {**MACHINE, "run": "1", "command": "make it", "model": "demo", "backend": backend, **percentiles, **more}


def write(folder: Path, question: str, *rows: dict[str, Any]) -> None:
    with (folder / f"{question}.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def section(page: str, title: str) -> str:
    return page.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_page_and_its_figures_are_made_of_the_committed_rows(report: ModuleType) -> None:
    page, figures = report.page()
    assert page == report.PAGE.read_text(encoding="utf-8"), "rows or report changed; run `make report`"
    for name, svg in figures.items():
        assert (report.RESULTS / name).read_text(encoding="utf-8") == svg, f"{name}: run `make report`"


def test_the_readme_says_of_the_step_what_the_newest_rows_say(report: ModuleType) -> None:
    rows = report.Report(report.RESULTS).rows
    newest = {(row.get("model"), row.get("backend")): row.get("over_rewritten") for row in rows("bench_step")}
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for model, words in {"demo": "as long for a step", "cogvideox-mid": "for CogVideoX", "svd-mid": "for SVD"}.items():
        value = newest[model, "compiled"][0]
        assert f"{value:.2f} times {words}" in text, f"{model}: the newest row says {value:.2f}"
    profile = {(row.get("model"), row.get("what")): row for row in rows("profile_graph")}
    products = ("matrix products, convolutions", "attention")
    share = sum(profile["cogvideox-mid", kind].get("of_the_step")[0] for kind in products)
    assert f"{100 * share:.0f} % of a CogVideoX step" in text, f"the newest rows say {share:.0%}"
    for model, words in {"cogvideox-layer": "on top of all else in a layer", "cogvideox-mid": "in a step at reduced"}.items():
        value = profile[model, "motion"].get("over_the_rest")[0]
        assert f"{100 * value:.1f} % {words}" in text, f"{model}: the newest row says {value:.2%}"


def test_without_any_row_every_part_says_not_run_and_how(report: ModuleType, tmp_path: Path) -> None:
    page, figures = report.page(tmp_path)
    assert page.count("Not run: `") == len(report.SECTIONS) and not figures
    for each in report.SECTIONS:
        assert f"Not run: `.venv-dev/bin/python {each.command}`" in section(page, each.title)


def test_adapter_rows_become_a_table_counts_and_a_waterfall(report: ModuleType, tmp_path: Path) -> None:
    write(
        tmp_path, "bench_adapter",
        timing("fused", 10.2, over_base=[1.02, 1.01, 1.03], flops=102, model="cogvideox-mid"),
        timing("base", 10.0, flops=100, model="cogvideox-mid"),
        timing("released", 10.6, over_base=[1.06, 1.05, 1.07], flops=106, model="cogvideox-mid"),
        timing("base_ours", 9.5, over_base=[0.95, 0.94, 0.96], model="cogvideox-mid"),
    )  # fmt: skip
    page, figures = report.page(tmp_path)
    body = section(page, "The adapter per step")
    table = [line for line in body.splitlines() if line.startswith("| ")]
    assert [line.split(" ")[1] for line in table[2:]] == ["base", "released", "fused", "base_ours"]
    assert "1.020 [1.010, 1.030]" in body
    assert "base +0.00%, released +6.00%, fused +2.00%" in body
    assert (
        "[bench_adapter.jsonl](../benchmarks/results/bench_adapter.jsonl) lines 1-4, abc, 2026-11-21, CPU X: `make it`" in body
    )
    svg = figures["adapter_cogvideox_mid.svg"]
    assert "+6.0 %" in svg and "-5.0 %" in svg and "benchmarks/results/adapter_cogvideox_mid.svg" in body
    ElementTree.fromstring(svg)


def test_the_newest_run_of_a_model_counts_and_none_is_mixed_with_it(report: ModuleType, tmp_path: Path) -> None:
    old = [timing("plain", 50.0, over_rewritten=[5, 4, 6]), timing("rewritten", 10.0), timing("compiled", 77.0)]
    new = [timing("plain", 30.0, run="2", commit="def"), timing("rewritten", 20.0, run="2", commit="def")]
    write(tmp_path, "bench_step", *old, timing("plain", 8.0, model="svd-mid"), *new)
    body = section(report.page(tmp_path)[0], "The step")
    demo = body.split("### demo")[1].split("###")[0]
    assert "| plain | 30.0 |" in demo and "| rewritten | 20.0 |" in demo
    assert "77" not in demo, "a backend of an older run must not stand beside newer times"
    assert "lines 5-6, def" in demo
    assert "| plain | 8.00 |" in body.split("### svd-mid")[1]


def test_every_question_of_the_contract_is_rendered(report: ModuleType, tmp_path: Path) -> None:
    for k in (1, 4):
        write(
            tmp_path,
            "bench_conditioning",
            timing("memory", 2.0, k=k),
            timing("release", 60.0 * k, k=k, over_memory=[30 * k] * 3),
        )
    fit = {"what": "fit", "k": [1, 4], "fixed_ms": 1.0, "each_ms": 60.0}
    write(tmp_path, "bench_conditioning", {**MACHINE, "run": "1", "model": "demo", "backend": "release", **fit})
    write(tmp_path, "bench_end_to_end", timing("step", 80.0), timing("decode", 20.0), timing("request", 100.0))
    write(tmp_path, "bench_cold_start", timing("import", 300.0), timing("total", 400.0, loading="parallel"))
    write(tmp_path, "bench_cold_start", timing("total", 500.0, loading="sequential", over_parallel=[5, 4, 6]))
    for value in (1, 2, 4):
        write(tmp_path, "bench_scaling", timing("ours", 3.0 * value**2, axis="frames", value=value))
    fit = {"what": "fit", "axis": "frames", "over": "L", "power": {"exponent": 2.0, "coefficient_ms": 3.0}}
    write(tmp_path, "bench_scaling", {**MACHINE, "run": "1", "model": "demo", "backend": "ours", **fit})
    write(tmp_path, "export_full", {**MACHINE, "model": "cogvideox-5b-i2v", "frames": 17, "seconds": 1234.0})
    page, figures = report.page(tmp_path)
    assert "| 4 | release | 240 |" in section(page, "Conditioning") and "[1, 4]" not in section(page, "Conditioning")
    assert "20.00 ms" in figures["bench_end_to_end_demo.svg"]
    cold = section(page, "Cold start")
    assert "5.00 [4.00, 6.00]" in cold and "| total parallel | 400 |" in cold and "| total sequential | 500 |" in cold
    assert "power exponent 2, coefficient_ms 3" in section(page, "Scaling")
    assert ">L; ms<" in figures["scaling_demo_frames.svg"]
    assert figures["scaling_demo_frames.svg"].count("<polyline") == 2, "the measured line and the fitted one"
    assert "| cogvideox-5b-i2v | 17 |" in section(page, "Export and build")
    for title in ("Conditioning", "End to end", "Cold start", "Scaling"):
        assert "Not run" not in section(page, title)
        assert section(page, title).count("Rows: [") == 2, "the table's rows and the figure's"
    for svg in figures.values():
        ElementTree.fromstring(svg)


def test_only_work_of_a_gpu_stands_in_a_gpus_section(report: ModuleType, tmp_path: Path) -> None:
    here = {"gpu": "NVIDIA H200, 580, 345 MHz", "what": "cogvideox-5b step"}
    write(tmp_path, "gpu_step", timing("ours_graph", 7.0, device="cpu", **here))
    assert "Not run" in section(report.page(tmp_path)[0], "On a GPU: the step at full size")
    write(tmp_path, "gpu_step", timing("ours_graph", 9.0, device="NVIDIA H200", over_base=[0.9, 0.8, 1.0], **here))
    body = section(report.page(tmp_path)[0], "On a GPU: the step at full size")
    assert "### NVIDIA H200, cogvideox-5b step" in body and "| ours_graph | 9.00 |" in body and "7.00" not in body
    for backend, p50 in (("base_eager", 20.0), ("base_compiled", 10.0)):
        write(tmp_path, "gpu_step", timing(backend, p50, device="NVIDIA H200", tflops=700.0, **here))
    body = section(report.page(tmp_path)[0], "On a GPU: the step at full size")
    assert "p50 over that of base_compiled, the fastest base" in body and "ours_graph 0.900" in body
    assert "| TFLOP/s |" in body and "| 700 |" in body


@pytest.mark.parametrize("values", [[(1.0, -1.0)], []], ids=["negative", "none"])
def test_lines_refuses_what_it_cannot_draw(report: ModuleType, values: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        sys.modules["plots"].lines("title", {"a": values}, across="x", up="y")
