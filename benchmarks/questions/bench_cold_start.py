"""How long from nothing to the first video, and what is the second worth? A fresh process for every measurement.

    .venv-dev/bin/python benchmarks/questions/bench_cold_start.py --processes 20

Phases: interpreter (Python itself), import, open (bundle and memory, verified), load (graphs), warm_up (tokenizers, the
memory's index), first_request, second_request; total: all to the first video. `load` and `total` are also taken with
graphs loaded one after the other (`sequential`), in turns with as many at once as there are cores. Files are in the system's
page cache. Gate: every process gives the same video, and gives it twice. `cpu_ms`: median of all threads, where wall time
waits for others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from motionrt.benchmarks import harness

CHILD = Path(__file__).with_name("cold_start_child.py")
DEMO = harness.ROOT / "demo"
PHASES = ("interpreter", "import", "open", "load", "warm_up", "first_request", "second_request")
WAYS = ("parallel", "sequential")


def fresh(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """One process; what it printed."""
    workers = 1 if way == "sequential" else None
    values = [options.bundle, options.memory, options.threads, workers, options.image, options.prompt]
    text = json.dumps([str(value) if isinstance(value, Path) else value for value in values])
    born = perf_counter()
    done = subprocess.run([sys.executable, str(CHILD), text, repr(born)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a process failed: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check(runs: list[dict[str, Any]]) -> None:
    """ParityError unless every process gave one and the same video, both times."""
    digests = {digest for run in runs for digest in run["digests"]}
    if len(digests) > 1:
        raise harness.ParityError(f"{len(digests)} different videos of one request from {len(runs)} processes")


def rows(runs: dict[str, list[dict[str, Any]]], shared: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each phase, and for the total, of both ways where they differ."""
    found = []
    seconds = {way: {name: np.array([run["seconds"][name] for run in taken]) for name in PHASES} for way, taken in runs.items()}
    for way in WAYS:
        seconds[way]["total"] = np.sum([seconds[way][name] for name in PHASES[:-1]], axis=0)
    for name in (*PHASES, "total"):
        for way in WAYS if name in ("load", "total") else WAYS[:1]:
            row = {**shared, "backend": name, "loading": way, **harness.summary(seconds[way][name])}
            if name != "total":
                row["cpu_ms"] = float(np.median([run["cpu"][name] for run in runs[way]])) * 1e3
            if name in runs[way][0]["peak_mib"]:
                row["peak_rss_mib"] = round(float(np.median([run["peak_mib"][name] for run in runs[way]])), 1)
            if way == "sequential":
                times = {each: seconds[each][name] for each in WAYS}
                ratio = harness.Comparison("parallel", 0.0, 0, {}, times).ratio("sequential", "parallel")
                row["over_parallel"] = ratio.as_row()
            found.append(row)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEMO / "bundle")
    parser.add_argument("--memory", type=Path, default=DEMO / "memory")
    parser.add_argument("--image", type=Path, default=DEMO / "inputs" / "red_star.png")
    parser.add_argument("--prompt", default="a red star slides straight to the left")
    parser.add_argument("--processes", type=int, default=20, help="of each way")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for rows")
    parser.add_argument("--note", default="")
    options = parser.parse_args(arguments)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for index in range(-1, options.processes):  # the first pair brings the files into the page cache
        for way in WAYS if index % 2 else WAYS[::-1]:
            run = fresh(way, options)
            if index >= 0:
                runs[way].append(run)
    check([run for taken in runs.values() for run in taken])
    shared = {
        "model": json.loads((options.bundle / "bundle.json").read_text())["name"], "what": "cold start", "dtype": "float32",
        "threads": options.threads, "warmups": 1, "page_cache": "warm",
        "error": {"max_abs_difference": 0.0, "to": "the first process's video", "allowed": 0.0}, "note": options.note,
    }  # fmt: skip
    for row in rows(runs, shared):
        harness.append_row("bench_cold_start", row, folder=options.results)
        cpu = f"cpu {row['cpu_ms']:6.0f}" if "cpu_ms" in row else ""
        peak = f"peak {row['peak_rss_mib']:6.0f} MiB" if "peak_rss_mib" in row else ""
        ratio = harness.said(row["over_parallel"], "{:.2f}", "x") + " of parallel" if "over_parallel" in row else ""
        print("{backend:>14} {loading:>10}: p50 {p50_ms:7.0f} ms  p95 {p95_ms:7.0f}  n {n} ".format(**row), cpu, peak, ratio)


if __name__ == "__main__":
    main()
