"""benchmarks/report/report.py: docs/performance.md is what the rows say, of each the newest run; what was not run says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from motionrt.benchmarks.report import plots, report, searches

ROOT = Path(__file__).resolve().parents[3]
MACHINE = {"run": "1", "date": "2026-11-21T23:00:00+00:00", "commit": "abc", "processor": "CPU X", "gpu": None}


def timing(backend: str, p50: float, **more: Any) -> dict[str, Any]:
    percentiles = {"p50_ms": p50, "p95_ms": p50 + 1, "n": 30}
    return {**MACHINE, "command": "make it", "model": "demo", "backend": backend, **percentiles, **more}


def write(folder: Path, question: str, *rows: dict[str, Any]) -> None:
    with (folder / f"{question}.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def section(page: str, title: str) -> str:
    return page.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_page_and_its_figures_are_made_of_the_committed_rows() -> None:
    page, figures = report.page()
    assert page == report.PAGE.read_text(encoding="utf-8"), "rows or report changed; run `make report`"
    assert {path.name for path in report.RESULTS.glob("*.svg")} == set(figures), "remove what the page no longer shows"
    for name, svg in figures.items():
        assert (report.RESULTS / name).read_text(encoding="utf-8") == svg, f"{name}: run `make report`"


def test_the_readme_says_of_the_step_what_the_newest_rows_say() -> None:
    rows = report.Report(report.RESULTS).rows
    newest = {(row.get("model"), row.get("backend")): row.get("over_rewritten") for row in rows("bench_step")}
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = {
        ("demo", "plain"): "takes {:.2f} times as long as the rewritten one, both in ONNX Runtime",
        ("demo", "compiled"): "compiled PyTorch takes {:.2f} times as long",
        ("cogvideox-mid", "plain"): "takes {:.2f} times as long as written, with an interval of {:.2f} to {:.2f}",
        ("cogvideox-mid", "compiled"): "{:.2f} times as long in compiled PyTorch",
    }
    for which, words in said.items():
        assert words.format(*newest[which]) in text, f"{which}: the newest row says {newest[which]}"
    assert ("SVD: not run at a clean commit" in text) == (("svd-mid", "compiled") not in newest)
    profile = {(row.get("model"), row.get("what")): row for row in rows("profile_graph")}
    products = ("matrix products, convolutions", "attention")
    share = sum(profile["cogvideox-mid", kind].get("of_the_step")[0] for kind in products)
    assert f"{100 * share:.0f} % of that step are matrix products and attention" in text, f"the newest rows say {share:.0%}"
    for model, words in {"cogvideox-layer": "on top of all else in a layer", "cogvideox-mid": "in a step at reduced"}.items():
        value = profile[model, "motion"].get("over_the_rest")
        value = value[0] if isinstance(value, list) else value  # of seven rounds there is no interval
        assert f"{100 * value:.1f} % {words}" in text, f"{model}: the newest row says {value:.2%}"


def test_without_any_row_every_part_says_not_run_and_how(tmp_path: Path) -> None:
    page, figures = report.page(tmp_path)
    assert page.count("Not run: `") == len(report.SECTIONS) and not figures
    for each in report.SECTIONS:
        assert f"Not run: `.venv-dev/bin/python {each.command}`" in section(page, each.title)


def test_adapter_rows_become_a_table_counts_and_a_waterfall(tmp_path: Path) -> None:
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


def test_the_newest_run_of_a_model_counts_and_none_is_mixed_with_it(tmp_path: Path) -> None:
    old = [timing("plain", 50.0, over_rewritten=[5, 4, 6]), timing("rewritten", 10.0), timing("compiled", 77.0)]
    new = [timing("plain", 30.0, run="2", commit="def"), timing("rewritten", 20.0, run="2", commit="def")]
    write(tmp_path, "bench_step", *old, timing("plain", 8.0, model="svd-mid"), *new)
    body = section(report.page(tmp_path)[0], "The step")
    demo = body.split("### demo")[1].split("###")[0]
    assert "| plain | 30.0 |" in demo and "| rewritten | 20.0 |" in demo
    assert "77" not in demo, "a backend of an older run must not stand beside newer times"
    assert "lines 5-6, def" in demo
    assert "| plain | 8.00 |" in body.split("### svd-mid")[1]


def test_every_question_of_the_contract_is_rendered(tmp_path: Path) -> None:
    for k in (1, 4):
        write(
            tmp_path,
            "bench_conditioning",
            timing("memory", 2.0, k=k),
            timing("release", 60.0 * k, k=k, over_memory=[30 * k] * 3),
        )
    fit = {"what": "fit", "k": [1, 4], "fixed_ms": 1.0, "each_ms": 60.0}
    write(tmp_path, "bench_conditioning", {**MACHINE, "model": "demo", "backend": "release", **fit})
    write(tmp_path, "bench_end_to_end", timing("step", 80.0), timing("decode", 20.0), timing("request", 100.0))
    write(tmp_path, "bench_cold_start", timing("import", 300.0), timing("total", 400.0, loading="parallel"))
    write(tmp_path, "bench_cold_start", timing("total", 500.0, loading="sequential", over_parallel=[5, 4, 6]))
    for value in (1, 2, 4):
        write(tmp_path, "bench_scaling", timing("ours", 3.0 * value**2, axis="frames", value=value))
    fit = {"what": "fit", "axis": "frames", "over": "L", "power": {"exponent": 2.0, "coefficient_ms": 3.0}}
    write(tmp_path, "bench_scaling", {**MACHINE, "model": "demo", "backend": "ours", **fit})
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


def test_a_run_counts_only_if_all_of_its_rows_name_a_clean_commit(tmp_path: Path) -> None:
    newer = {"run": "2", "command": "make more"}
    write(tmp_path, "bench_step", timing("plain", 30.0), timing("rewritten", 20.0))
    write(tmp_path, "bench_step", timing("plain", 77.0, **newer), timing("rewritten", 66.0, commit="abc+changes", **newer))
    write(tmp_path, "bench_step", timing("rewritten", 55.0, model="svd-mid", commit=None, **newer))
    write(tmp_path, "bench_step", timing("rewritten", 44.0, model="older", run=None, command="make it so"))
    body = section(report.page(tmp_path)[0], "The step")
    assert "| plain | 30.0 |" in body and not any(f"| {p50} |" in body for p50 in ("77.0", "66.0", "55.0", "44.0"))
    assert "- Not run at a clean commit: model svd-mid. `make more`.\n" in body
    assert "- Not run at a clean commit: model older. `make it so`.\n" in body and body.count("Not run") == 2


def test_no_p99_of_a_few_and_no_interval_of_fewer(tmp_path: Path) -> None:
    for model, n in (("nine", 9), ("ten", 10), ("hundred", 100)):
        write(tmp_path, "bench_step", timing("plain", 30.0, n=n, p99_ms=88.0, over_rewritten=[1.5, 1.4, 1.6], model=model))
    body = section(report.page(tmp_path)[0], "The step")
    assert "| plain | 30.0 | 31.0 | - | 9 | 1.500 | - |" in body
    assert "| plain | 30.0 | 31.0 | - | 10 | 1.500 [1.400, 1.600] | - |" in body
    assert "| plain | 30.0 | 31.0 | 88.0 | 100 | 1.500 [1.400, 1.600] | - |" in body


def test_engines_and_exports_of_several_runs_stand_in_several_tables(tmp_path: Path) -> None:
    engine = {**MACHINE, "what": "build", "dtype": "float16", "flavor": "rtx", "convert_seconds": 1.0, "build_seconds": 2.0}
    for run, model, graph in (("1", "demo", "step"), ("2", "demo", "step"), ("2", "demo", "text"), ("3", "svd", "step")):
        write(tmp_path, "bench_build", {**engine, "run": run, "model": model, "graph": graph})
    write(tmp_path, "export_full", {**MACHINE, "model": "svd", "frames": 16}, {**MACHINE, "model": "x", "run": "2"})
    body = section(report.page(tmp_path)[0], "Export and build")
    assert body.count("| model | engine |") == 2 and body.count("| model | frames |") == 2
    assert "| demo (None) | float16, rtx | 2 | 2.00 | 4.00 |" in body, "the newest run of a model, whole"


def searched(clips: int, backend: str = "memory", **more: Any) -> dict[str, Any]:
    took = {"recall": 1.0, "open_ms": 3.0, "adding": {"add_s": 0.1}, "index_s": 1.0, "p99_ms": 2.0, "n": 1000}
    sizes = {"process_more": {"pss_anon_mib": 4.0, "pss_file_mib": 7.0}, "db_bytes_per_clip": 5.0, "index_bytes_per_clip": 6.0}
    own = {"what": "search", "embedding": 384, "tokens": [8, 64], "dtype": "float16", "clips": clips}
    return {**timing(backend, 1.0), **own, **took, **sizes, **more}


def test_searches_of_each_run_are_a_table_with_the_rivals_of_that_run(tmp_path: Path) -> None:
    turns = {"what": "search in turns", "over_memory": [275.0, 253.0, 298.0]}
    write(tmp_path, "bench_memory", searched(10), searched(20), searched(20, "lance_flat", **turns), searched(20, what="turns"))
    write(tmp_path, "bench_memory", searched(20, tokens=[25, 1024], p50_ms=9.0), searched(10, run="2", p50_ms=0.25))
    page, figures = report.page(tmp_path)
    first, second = section(page, "The memory at scale").split("| clips |")[1:]
    assert "| 20 x 384 |" in first and "| 275x [253, 298] | not run |" in first and "| 10 x 384 |" not in first
    assert "| 10 x 384 | 1.0000 | 0.25 ms | 2.00 ms |" in second and second.count("| not run |") == 1
    assert "| 4 + 7 MiB |" in second and "bench_memory.svg" not in figures, "no run has two sizes that count"
    write(tmp_path, "bench_memory", searched(10, run="3"), searched(1000, run="3"))
    ElementTree.fromstring(report.page(tmp_path)[1]["bench_memory.svg"])


def test_what_the_checks_of_a_search_cost_is_a_table_of_one_run(tmp_path: Path) -> None:
    size = {"what": "search", "clips": 1_000_000, "embedding": 384, "p99_ms": 2.0, "n": 1000}
    write(tmp_path, "bench_checks", {**timing("checked", 9.0), **size}, {**timing("unchecked", 8.0), **size})
    newest = [{**timing("checked", 0.75, over_unchecked=[1.05, 1.01, 1.09]), **size}, {**timing("unchecked", 0.71), **size}]
    write(tmp_path, "bench_checks", *({**row, "run": "2"} for row in newest))
    body = "\n".join(searches.cost(report.Report(tmp_path)))
    assert "Of 1,000,000 x 384, with the checks" in body and "9.00" not in body
    assert "| checked | 0.75 |" in body and "| 1.050 [1.010, 1.090] |" in body and "| unchecked | 0.71 |" in body


def test_the_page_of_the_memory_shows_what_its_rows_say() -> None:
    shown = "\n".join(searches.cost(report.Report(report.RESULTS)))
    assert shown in (ROOT / "docs" / "memory.md").read_text(encoding="utf-8"), "run `bench_memory.py --plot`"


def test_only_work_of_a_gpu_stands_in_a_gpus_section(tmp_path: Path) -> None:
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
def test_lines_refuses_what_it_cannot_draw(values: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.lines("title", {"a": values}, across="x", up="y")


def test_serving_rows_become_tables_two_figures_and_a_list(tmp_path: Path) -> None:
    loaded = [
        timing(way, 10.0 * load + place, what=what, axis="load", value=load)
        for load in (0.5, 0.8)
        for place, way in enumerate(("http", "direct"))
        for what in ("wait", "total")
    ]
    curve = [[0.0, 60.0], [5.0, 61.5]]
    write(
        tmp_path, "bench_serve", timing("direct", 100.0, what="job"), timing("http", 110.0, what="job", over_direct=1.1),
        timing("http", 9.0, what="outside"), *loaded, {**MACHINE, "model": "demo", "what": "rss", "backend": "server",
        "seconds_and_mib": curve},
    )  # fmt: skip
    page, figures = report.page(tmp_path)
    body = section(page, "Serving")
    assert "| http | 110 | 111 | - | 30 | 1.100 | - |" in body and "| http | 9.00 |" in body
    table = [line.split(" | ")[:3] for line in body.splitlines() if line.startswith("| 0.")]
    assert table[:2] == [["| 0.5", "total", "direct"], ["| 0.5", "total", "http"]] and len(table) == 8
    assert set(figures) == {"bench_serve_demo.svg", "bench_serve_rss_demo.svg"}
    outcome = {
        "seconds": 1800.0, "clients": {"flood": 8}, "lost": 0, "failed_by": {"storage_full": 3}, "two_jobs_ms": 250.0,
        "quiet_wait": {"n": 70, "p50_ms": 9.0, "p95_ms": 20.0}, "aborts": 100, "rss_mib_before": [60.0, 200.0],
        "rss_mib_after": [61.0, 210.0], "cpu_seconds_after_delete": [0.02, 50.0],
    }  # fmt: skip
    write(tmp_path, "bench_serve_soak", {**MACHINE, "model": "demo", "what": "mixed load and kills", **outcome})
    body = section(report.page(tmp_path)[0], "Serving: half an hour of kills")
    assert "| jobs lost | 0 | 0 |" in body and "| jobs that failed, and why | storage_full 3 |" in body
    assert "| wait of the quiet key | p50 9.00 ms, p95 20.0 ms, n 70 | p95 below two jobs: 250 ms |" in body
    assert "| disk filled to the last byte | not run: no tmpfs here |" in body
    about = {"jobs": 8, "steps": 50}
    write(
        tmp_path, "bench_replicas", timing("replicas-1", 4000.0, what="jobs", jobs_per_second=2.0, **about),
        timing("replicas-2", 2000.0, what="jobs", jobs_per_second=4.0, over_one=[2.0, 1.9, 2.1], **about),
        timing("replicas-2", 5000.0, what="kill", lost=0, begun_again=5, **about),
    )  # fmt: skip
    body = section(report.page(tmp_path)[0], "Serving: replicas")
    assert "8 jobs of 50 steps" in body and "| kill | replicas-2 | 5,000 | 5,001 | 30 | - | - | 0 | 5 |" in body
    assert "| jobs | replicas-2 | 2,000 | 2,001 | 30 | 4.00 | 2.00 [1.90, 2.10] | - | - |" in body
