"""The parts of docs/performance.md: one function for each question, Markdown lines of its rows; none where it has no rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from motionrt.benchmarks.report import searches, text
from motionrt.benchmarks.report.plots import Bar, bars, lines
from motionrt.benchmarks.report.rows import Report, Row, by_run, groups, named, ordered, times

PERCENTILES = ("p50_ms", "p95_ms", "p99_ms", "n")
PYTHON = ".venv-dev/bin/python "
ADAPTER = ("base", "released", "folded", "fused", "scale_0", "base_ours")


def adapter(report: Report) -> list[str]:
    """Per model the variants of a step, and how much each takes on top of the base step."""
    parts: list[str] = []
    for name, rows in groups(report.rows("bench_adapter"), "model", "runtime").items():
        rows = ordered(rows, ADAPTER)
        parts += [f"### {name}", "", *times(rows, "base", "base_ours"), "", text.source(rows), ""]
        base = next((row for row in rows if row.get("backend") == "base" and row.get("flops")), None)
        if base is not None:
            counted = [f"{r.get('backend')} {r.get('flops') / base.get('flops') - 1:+.2%}" for r in rows if r.get("flops")]
            parts += [f"FLOPs on top of the base step's: {', '.join(counted)}.", ""]
        counted_at = next((row.get("flops_over_base") for row in rows if row.get("flops_over_base")), None)
        if counted_at is not None:
            parts += [f"Counted, here and in the model that it stands for: {text.facts({'FLOPs over base': counted_at})}.", ""]
        shares = [bar for row in rows if (bar := _share(row)) is not None]
        if shares:
            title = f"{name}: time of a step on top of the base step"
            parts += [report.figure(f"adapter_{text.slug(name)}", bars(title, shares), title), "", text.source(rows), ""]
    return parts + report.unclean("bench_adapter", "model", "runtime")


def _share(row: Row) -> Bar | None:
    over = row.get("over_base")
    if over is None or row.get("backend") == "base":
        return None
    value, *interval = (100 * (one - 1) for one in (over if isinstance(over, list) else [over]))
    low, high = interval if len(interval) == 2 else (None, None)
    return Bar(str(row.get("backend")), value, low, high, f"{value:+.1f} %")


def step(report: Report) -> list[str]:
    parts: list[str] = []
    for name, rows in groups(named(report.rows("bench_step")), "model").items():
        rows = ordered(rows, ("rewritten", "openvino", "openvino_bfloat16", "plain", "eager", "compiled"))
        parts += [f"### {name}", "", *times(rows, "rewritten"), "", text.source(rows), ""]
    return parts + report.unclean("bench_step", "model")


def kinds(report: Report) -> list[str]:
    """Per model the kinds of work in a step, and the part of it that each takes."""
    parts: list[str] = []
    head = ["kind of work", "p50 ms", "p95", "p99", "n", "of the step", "on top of all other"]
    for name, rows in groups(report.rows("profile_graph"), "model").items():
        body = [
            [
                str(row.get("what")), *(text.number(row.get(key)) for key in PERCENTILES),
                text.ratio(row.get("of_the_step")), text.ratio(row.get("over_the_rest")),
            ]
            for row in rows
        ]  # fmt: skip
        parts += [f"### {name}", "", *text.table(head, body), "", text.source(rows), ""]
    return parts + report.unclean("profile_graph", "model")


def against(rows: Sequence[Row], by: str, heading: str, over: str) -> list[str]:
    """A table of times by the column `by`, with how many times those of `over` they are."""
    head = [heading, "backend", "p50 ms", "p95", "p99", "n", f"x {over}"]
    body = [
        [
            str(row.get(by)), str(row.get("backend")), *(text.number(row.get(key)) for key in PERCENTILES),
            text.ratio(row.get(f"over_{over}")),
        ]
        for row in rows
    ]  # fmt: skip
    return text.table(head, body)


def conditioning(report: Report) -> list[str]:
    parts: list[str] = []
    for name, rows in groups(report.rows("bench_conditioning"), "model").items():
        rows = [row for row in rows if row.get("what") != "fit"]
        rows = sorted(rows, key=lambda row: (row.get("k", 0), str(row.get("backend"))))
        parts += [f"### {name}", "", *against(rows, "k", "K", "memory"), "", text.source(rows), ""]
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row.get("k") and row.get("p50_ms"):
                series.setdefault(str(row.get("backend")), []).append((row.get("k"), row.get("p50_ms")))
        if series:
            title = f"{name}: motion tokens of K references, p50 ms"
            svg = lines(title, series, across="K references", up="ms", log=True)
            parts += [report.figure(f"conditioning_{text.slug(name)}", svg, title), "", text.source(rows), ""]
    return parts + report.unclean("bench_conditioning", "model")


def memory(report: Report) -> list[str]:
    parts = searches.cost(report)
    return [*parts, "What stands behind it: [memory.md](memory.md).", ""] if parts else []


def stages(question: str) -> Callable[[Report], list[str]]:
    """A table and bars of the parts of something, in the order in which they were measured."""

    def render(report: Report) -> list[str]:
        parts: list[str] = []
        for name, rows in groups(named(report.rows(question)), "model").items():
            parts += [
                f"### {name}",
                "",
                *times(rows, "request", "total", "second_request", "parallel"),
                "",
                text.source(rows),
                "",
            ]
            items = [
                Bar(row.label(), row.get("p50_ms"), note=f"{row.get('p50_ms'):,.2f} ms")
                for row in rows if row.get("p50_ms") is not None
            ]  # fmt: skip
            if items:
                title = f"{name}: {question.removeprefix('bench_').replace('_', ' ')}, p50"
                parts += [report.figure(f"{question}_{text.slug(name)}", bars(title, items), title), "", text.source(rows), ""]
        return parts + report.unclean(question, "model")

    return render


def scaling(report: Report) -> list[str]:
    parts: list[str] = []
    for name, rows in groups(report.rows("bench_scaling"), "model", "axis").items():
        fits = [row for row in rows if row.get("what") == "fit"]
        measured = [row for row in rows if row.get("what") != "fit" and row.get("p50_ms") and row.get("value") is not None]
        parts += [f"### {name}", "", *(against(measured, "value", "value", "base_ours") if measured else []), ""]
        for row in fits:
            whose = f" of {row.get('backend')}" if row.get("backend") else ""
            parts += [f"Fit{whose}: {text.facts(row.data, skip=text.COMMON)}.", ""]
        parts += [text.source(rows), ""]
        series: dict[str, list[tuple[float, float]]] = {}
        for row in measured:
            x = row.get("size", row.get("value"))
            if isinstance(x, (int, float)):
                series.setdefault(str(row.get("backend")), []).append((float(x), float(row.get("p50_ms"))))
        curves = {f"fit of {row.get('backend')}": curve for row in fits if (curve := _curve(row, series))}
        if series:
            title = f"{name}: p50 ms of a step"
            across = next((str(row.get("over")) for row in fits if row.get("over")), name.split(", ")[-1])
            svg = lines(title, series | curves, across=across, up="ms", dashed=list(curves))
            parts += [report.figure(f"scaling_{text.slug(name)}", svg, title), "", text.source(rows), ""]
    return parts + report.unclean("bench_scaling", "model", "axis")


def _curve(row: Row, series: Mapping[str, Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """A fitted curve between the measured ends, in ms: `polynomial` in c_0, c_1 ..., else `power`; none where neither is."""
    points = series.get(str(row.get("backend")))
    if not points or len(points) < 2:
        return []
    begin, end = min(x for x, _ in points), max(x for x, _ in points)
    places = [begin + (end - begin) * index / 24 for index in range(25)]
    polynomial, power = row.get("polynomial") or {}, row.get("power") or row.data
    if polynomial.get("coefficients_ms"):
        curve = [(x, sum(c * x**n for n, c in enumerate(polynomial["coefficients_ms"]))) for x in places]
    elif power.get("exponent") is not None and power.get("coefficient_ms") is not None:
        curve = [(x, power["coefficient_ms"] * x ** power["exponent"]) for x in places]
    else:
        return []
    return [(x, y) for x, y in curve if y >= 0]


def build(report: Report) -> list[str]:
    parts: list[str] = []
    keys = ("model", "dtype", "flavor", "reduced")
    engines = groups([row for row in report.rows("bench_build") if row.get("what") == "build"], *keys).values()
    head = ["model", "engine", "graphs", "convert s", "build s", "ONNX MiB", "engine MiB", "peak RSS MiB"]
    for run in by_run(row for rows in engines for row in rows):
        body = []
        for rows in groups(run, *keys).values():
            model, dtype, flavor, reduced = (str(rows[0].get(key)) for key in keys)
            sums = [sum(r.get(key, 0) for r in rows) for key in ("convert_seconds", "build_seconds", "onnx_mib", "engine_mib")]
            cells = map(text.number, (*sums, max(row.get("peak_rss_mib", 0) for row in rows)))
            body.append([f"{model} ({reduced})", f"{dtype}, {flavor}", str(len(rows)), *cells])
        parts += [*text.table(head, body), "", text.source(run), ""]
    parts += report.unclean("bench_build", *keys)
    parts = ["### Engines", "", *parts] if parts else []
    full: list[str] = []
    head = [
        "model", "frames", "weights kept in", "weights read GB", "bundle GB", "processor s", "wall s", "peak MB, no page cache",
        "torch programs MB", "of the wall s, for these",
    ]  # fmt: skip
    for run in by_run(rows[-1] for rows in groups(report.rows("export_full"), "model", "frames").values()):
        body = [
            [
                str(row.get("model")), str(row.get("frames")), str(row.get("dtype")),
                *(text.number(row.get(key) / 1e9 if row.get(key) else None) for key in ("weights_read_bytes", "bundle_bytes")),
                *(text.number(row.get(key)) for key in ("cpu_seconds", "seconds", "peak_anonymous_mb")),
                text.number(sum(sizes.values()) / 1e6 if (sizes := row.get("program_bytes")) else None),
                text.number(row.get("program_seconds")),
            ]
            for row in run
        ]  # fmt: skip
        full += [*text.table(head, body), "", text.source(run), ""]
    full += report.unclean("export_full", "model", "frames")
    if parts and not full:
        full = [text.not_run(f"{PYTHON}benchmarks/models/export_full.py cogvideox-5b-i2v FOLDER"), ""]
    return parts + (["### Exports at full size", "", *full] if full else [])


def classes(report: Report) -> list[str]:
    parts: list[str] = []
    for run in by_run(rows[-1] for rows in groups(report.rows("partition_report"), "model", "frames").values()):
        body = []
        for row in run:
            name, whole = f"{row.get('model')}, {row.get('frames')} frames", row.get("classes", {}).get("model", {})
            for kind, size in row.get("classes", {}).items():
                if size.get("parameters") and kind != "model":
                    share = f"{size['parameters'] / whole['parameters']:.2%}"
                    body.append([name, kind, share, f"{size['flops'] / 1e12:,.3f}"])
            body.append([name, "step as written", "", f"{whole['flops'] / 1e12:,.3f}"])
            if (decoder := row.get("decode_flops")) is not None:
                body.append([name, "decoder, all frames", "", f"{decoder / 1e12:,.3f}"])
        parts += [*text.table(["model", "class", "of the weights", "TFLOP"], body), "", text.source(run), ""]
    return parts + report.unclean("partition_report", "model", "frames")


def quality(report: Report) -> list[str]:
    path = report.folder / "demo_quality.json"
    if not path.exists():
        return []
    data = json.loads(path.read_text(encoding="utf-8"))
    steps = {"16 steps": 16, "": 8, "4 steps": 4, "2 steps": 2}
    body, series = [], dict[str, list[tuple[float, float]]]()
    for row in data["rows"]:
        if row["row"] != "CAMA K=4" or "paraphrased" in row["split"]:
            continue
        cells = ("{:.2f} [{:.2f}, {:.2f}]".format(*row[key]) for key in ("epe_px", "psnr_db"))
        body.append([row["split"], row["change"] or "as shipped: 8 steps", *cells])
        if row["change"] in steps:
            series.setdefault(row["split"], []).append((steps[row["change"]], row["epe_px"][0]))
    note = f"Rows: `benchmarks/results/{path.name}`, written by `{data['command']}`."
    title = "Demo: path error in pixels against 2, 4, 8 and 16 steps (DDIM)"
    svg = lines(title, series, across="steps", up="pixels, mean")
    return [
        *text.table(["split", "change", "path error px", "PSNR dB"], body), "", note, "",
        "What a step takes: [the step](#the-step). Coarser weights were not timed.", "",
        report.figure("speed_quality", svg, title), "", note, "",
    ]  # fmt: skip


def bounds(report: Report) -> list[str]:
    """What no implementation can beat: counted, for GPUs that were never here."""
    runs = by_run(row for row in report.rows("roofline") if row.get("bounds"))
    if not runs:
        return report.unclean("roofline")
    rows = runs[-1]
    body = [
        [str(row.get("what")), f"{row.get('flops') / 1e12:,.2f}", f"{row.get('bytes') / 1e9:,.2f}"]
        + [text.number(bound["bound_ms"]) for bound in row.get("bounds")]
        for row in rows
    ]
    head = ["ms at the least", "TFLOP", "GB", *(bound["name"] for bound in rows[0].get("bounds"))]
    return [*text.table(head, body), "", text.source(rows), ""]


def plain(question: str, *keys: str, gpu: bool = False) -> Callable[[Report], list[str]]:
    """The newest rows of a question, of the processor or of a GPU, as a table by `keys`."""

    def render(report: Report) -> list[str]:
        parts: list[str] = []
        for name, rows in groups(report.rows(question, gpu=gpu), "device", *keys).items():
            over = sorted({key.removeprefix("over_") for row in rows for key in row.data if key.startswith("over_")})
            parts += [f"### {name}", "", *times(rows, *over), "", text.source(rows), ""]
            base = min((row for row in rows if str(row.get("backend")).startswith("base_")), key=_p50, default=None)
            if base is not None:
                compared = [f"{row.get('backend')} {_p50(row) / _p50(base):.3f}" for row in rows if row is not base]
                said = f"p50 over that of {base.get('backend')}, the fastest base, stages one after another"
                parts += [f"{said}: {', '.join(compared)}.", ""]
        return parts + report.unclean(question, "device", *keys, gpu=gpu)

    return render


def _p50(row: Row) -> float:
    return float(row.get("p50_ms", float("inf")))
