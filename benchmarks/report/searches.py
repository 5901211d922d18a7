"""What a search costs, from the rows of bench_memory and bench_checks, for docs/memory.md and docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from motionrt.benchmarks import harness
from motionrt.benchmarks.report import text
from motionrt.benchmarks.report.plots import lines
from motionrt.benchmarks.report.rows import Report, Row, by_run, groups, times

SIZE = ("clips", "embedding")
SERIES = {
    "memory p50": ("memory", "p50_ms"), "memory p99": ("memory", "p99_ms"),
    "LanceDB HNSW, refined, p50": ("lance_hnsw", "p50_ms"), "LanceDB flat p50": ("lance_flat", "p50_ms"),
}  # fmt: skip


def cost(report: Report) -> list[str]:
    """A table of each run that has the newest rows of a size, the figure of the one with most sizes, and what has no run at a
    clean commit; no line where there are no rows. Rows of other tokens than the default's are left out.
    """
    parts: list[str] = []
    newest = groups(filter(_plain, report.rows("bench_memory")), *SIZE)
    runs = sorted(by_run(row for rows in newest.values() for row in rows), key=lambda rows: str(rows[0].run))
    for rows in runs:
        parts += [*table(rows), "", text.source(rows), ""]
    figures = [(rows, line) for rows in runs if len((line := _lines(rows)).get("memory p50", ())) > 1]
    if figures:
        rows, series = max(figures, key=lambda figure: len(figure[1]["memory p50"]))
        title = "One search of 384-d embeddings, 9 clips with tokens, one thread"
        svg = lines(title, series, across="clips", up="ms", log=True, dashed=["memory p99"])
        parts += [report.figure("bench_memory", svg, title), "", text.source(rows), ""]
    return parts + report.unclean("bench_memory", *SIZE) + checks(report)


def checks(report: Report) -> list[str]:
    """A table of each size's newest run with checks and without; no line where there are no rows."""
    parts: list[str] = []
    for rows in groups(report.rows("bench_checks"), *SIZE).values():
        size = f"{rows[0].get('clips'):,} x {rows[0].get('embedding')}"
        parts += [f"Of {size}, with the checks of the clips that a search returns, and without:", ""]
        parts += [*times(rows, "unchecked", first="backend"), "", text.source(rows), ""]
    return parts + report.unclean("bench_checks", *SIZE)


def _plain(row: Row) -> bool:
    """Whether a row has the default tokens, and is the memory's by its own reader or a rival's beside it."""
    own = row.get("what") == "search"
    return bool(own == (row.get("backend") == "memory") and (row.get("tokens"), row.get("dtype")) == ([8, 64], "float16"))


def _lines(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """What a figure draws of one run: by series the points (clips, ms) of 384-d embeddings."""
    small = [row for row in rows if row.get("embedding") == 384]
    found = {
        label: [(row.get("clips"), row.get(key)) for row in small if row.get("backend") == backend and row.get(key)]
        for label, (backend, key) in SERIES.items()
    }
    return {label: points for label, points in found.items() if points}


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each size of one run."""
    head = ["clips", "recall@9", "p50", "p99", "open", "LanceDB flat", "LanceDB HNSW", "1,000 more", "process", "index",
            "bytes a clip"]  # fmt: skip

    def rival(backend: str, beside: Row) -> str:
        found = [row for row in rows if row.get("backend") == backend and all(row.get(k) == beside.get(k) for k in SIZE)]
        return harness.said(found[-1].get("over_memory"), "{:.0f}", "x") if found else "not run"

    own = [row for row in rows if row.get("backend") == "memory"]
    body = [
        [
            f"{row.get('clips'):,} x {row.get('embedding')}", f"{row.get('recall'):.4f}", f"{row.get('p50_ms'):.2f} ms",
            f"{row.get('p99_ms'):.2f} ms" if row.get("p99_ms") is not None else "-", f"{row.get('open_ms'):.1f} ms",
            rival("lance_flat", row), rival("lance_hnsw", row), f"{row.get('adding')['add_s']:.1f} s",
            "{pss_anon_mib:.0f} + {pss_file_mib:.0f} MiB".format(**row.get("process_more")), f"{row.get('index_s'):.0f} s",
            f"{row.get('db_bytes_per_clip'):.0f} + {row.get('index_bytes_per_clip'):.0f} index",
        ]
        for row in sorted(own, key=lambda row: (row.get("embedding"), row.get("clips")))
    ]  # fmt: skip
    return text.table(head, body)


def into_docs(name: str, script: str, written: str, page: Path) -> None:
    """Replace what stands between the page's marks of `name`, which `script` writes."""
    mark, end = f"<!-- {name}: written by {script} -->\n", f"<!-- end of {name} -->"
    before, rest = page.read_text(encoding="utf-8").split(mark, 1)
    page.write_text(f"{before}{mark}{written}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")
