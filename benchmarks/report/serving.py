"""What a server adds to a job, what it outlives and what replicas bring it: rows of bench_serve, _serve_soak and _replicas."""

from __future__ import annotations

from collections.abc import Iterator

from motionrt.benchmarks.report import text
from motionrt.benchmarks.report.plots import lines
from motionrt.benchmarks.report.rows import Report, Row, groups, times

ORDER = ("direct", "queue", "http")
SAYS = {
    "job": "One job at a time, from the order to its written video",
    "outside": "What of that is in none of the stages that the job names: all that the server adds",
    "cancel": "From the order to stop a job in the middle of its loop until nothing of it runs",
}


def serve(report: Report) -> list[str]:
    """Tables of jobs one at a time, under load and stopped; figures of the load and of memory."""
    parts: list[str] = []
    for name, rows in groups(report.rows("bench_serve"), "model").items():
        parts += [f"### {name}", ""]
        for what, says in SAYS.items():
            if found := [row for row in rows if row.get("what") == what]:
                parts += [f"{says}:", "", *times(found, "direct"), "", text.source(found), ""]
        loaded = [row for row in rows if row.get("axis") == "load"]
        if loaded:
            head = ["part of capacity", "", "way", "p50 ms", "p95", "p99", "n"]
            body = [
                [f"{row.get('value'):g}", str(row.get("what")), str(row.get("backend"))]
                + [text.number(row.get(key)) for key in ("p50_ms", "p95_ms", "p99_ms", "n")]
                for row in sorted(loaded, key=lambda row: (row.get("value"), row.get("what"), ORDER.index(row.get("backend"))))
            ]
            says = "Poisson arrivals at a part of what `direct` can do; times since a job was due to arrive"
            parts += [f"{says}:", "", *text.table(head, body), "", text.source(loaded), ""]
            series: dict[str, list[tuple[float, float]]] = {}
            for row in loaded:
                if row.get("what") == "total":
                    series.setdefault(f"{row.get('backend')} p95", []).append((row.get("value"), row.get("p95_ms")))
            title = f"{name}: from the arrival of a job to its video, p95 ms"
            svg = lines(title, series, across="part of capacity", up="ms")
            parts += [report.figure(f"bench_serve_{text.slug(name)}", svg, title), "", text.source(loaded), ""]
        if memory := [row for row in rows if row.get("what") == "rss"]:
            title = f"{name}: resident memory of a server, MiB"
            curves = {str(row.get("backend")): [(x, y) for x, y in row.get("seconds_and_mib")] for row in memory}
            svg = lines(title, curves, across="seconds", up="MiB", dashed=list(curves))
            parts += [report.figure(f"bench_serve_rss_{text.slug(name)}", svg, title), "", text.source(memory), ""]
    return parts + report.unclean("bench_serve", "model")


def soak(report: Report) -> list[str]:
    """What the soaks of each model did, found, and what is allowed."""
    parts: list[str] = []
    for name, rows in groups(report.rows("bench_serve_soak"), "model").items():
        for row in rows:
            minutes, clients = row.get("seconds") / 60, text.facts(row.get("clients"))
            parts += [f"### {name}", "", f"{minutes:.0f} minutes of clients of two keys ({clients}), then aborts alone:", ""]
            parts += [*text.table(["", "found", "allowed"], list(_found(row))), "", text.source([row]), ""]
    return parts + report.unclean("bench_serve_soak", "model")


def replicas(report: Report) -> list[str]:
    """How fast workers and replicas make so many jobs, and what became of those whose replica was killed."""
    parts: list[str] = []
    for name, rows in groups(report.rows("bench_replicas"), "model").items():
        head = ["", "", "p50 ms", "p95", "n", "videos a second", "times one", "jobs lost", "begun again"]
        body = [
            [str(row.get("what")), str(row.get("backend"))]
            + [text.number(row.get(key)) for key in ("p50_ms", "p95_ms", "n", "jobs_per_second")]
            + [text.ratio(row.get("over_one"))]
            + [text.number(row.get(key)) for key in ("lost", "begun_again")]
            for row in rows
        ]
        says = f"{rows[0].get('jobs')} jobs of {rows[0].get('steps')} steps, from the first order to the last video"
        parts += [f"### {name}", "", f"{says}:", "", *text.table(head, body), "", text.source(rows), ""]
    return parts + report.unclean("bench_replicas", "model")


def _found(row: Row) -> Iterator[list[str]]:
    def count(*names: str) -> str:
        return ", ".join(text.number(row.get(name) or 0) for name in names)

    yield ["jobs made; completed, deleted, cancelled", f"{count('created')}; {count('completed', 'deleted', 'cancelled')}", ""]
    yield ["kill -9 of the worker, of the server", count("worker_kills", "server_kills"), ""]
    yield ["disk filled to the last byte", count("disk_fills") if row.get("full_disk") else "not run: no tmpfs here", ""]
    failed = row.get("failed_by") or {}
    yield ["jobs that failed, and why", text.facts(failed) or "none", "`storage_full` while the disk is"]
    yield ["jobs lost", count("lost"), "0"]
    yield ["jobs with other frames, states or files than they should have", count("wrong"), "0"]
    for what, key, most in (
        ("wait of the quiet key", "quiet_wait", f"p95 below two jobs: {text.number(row.get('two_jobs_ms'))} ms"),
        ("the same, of jobs that met a kill or a full disk", "quiet_wait_in_outages", ""),
    ):
        if wait := row.get(key):
            yield [what, f"p50 {text.number(wait['p50_ms'])} ms, p95 {text.number(wait['p95_ms'])} ms, n {wait['n']}", most]
    before, after = row.get("rss_mib_before"), row.get("rss_mib_after")
    for place, process in enumerate(("server", "worker")):
        what = f"MiB of the {process} before and after {count('aborts')} aborts"
        yield [what, f"{before[place]:.1f}, {after[place]:.1f}", "5 % more"]
    used, watched = row.get("cpu_seconds_after_delete")
    yield ["seconds that the worker computed behind a DELETE", f"{used:.2f} of {watched:.0f} s watched", "a tenth"]
