"""What does the server add to a job, what do people wait for under load, and how soon is a stopped job off the device?

    .venv-dev/bin/python benchmarks/serving/bench_serve.py                   # about 12 minutes
    .venv-dev/bin/python benchmarks/serving/bench_serve.py --rounds 3 --jobs 4 --blocks 1 --cancels 2 --loads 0.5

Three ways to the same frames: `direct`, the pipeline in this process, which writes the files that the server would; `queue`,
the server's store, queue and worker without HTTP; `http`, the server with a client that follows its stream of events.

- one at a time, in turns: each way's seconds for a job, and what of `queue` and `http` is in no stage that the job names
  (`outside`): from the order to the first stage, between stages, and from the last file to the answer that says so;
- Poisson arrivals at a part of what `direct` can do at most, the same ones for each way, in blocks that take turns: `wait`
  until a worker has the job, `total` until its video is there, both from the moment at which it was due to arrive;
- `cancel`: from the order to stop a job in the middle of its loop until nothing of it runs;
- resident memory of the server and of its worker while it answered all this.

Gate: the SHA-256 of the frames is the same on all ways, for every job.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from motionrt.benchmarks import harness
from motionrt.benchmarks.pipeline import DEMO
from motionrt.benchmarks.serving.job_ways import Direct, Fields, OverHttp, Queued, Way
from motionrt.benchmarks.serving.served import Served, rss
from motionrt.runtime.serve.client import Client

STILL = DEMO / "inputs" / "red_star.png"
REQUEST: Fields = {"prompt": "a red star moves in a circle", "seed": 7}
LONG: Fields = {**REQUEST, "steps": 50}
MODEL, POINTS = "demo", 200  # of a curve of memory, at most
MIB = 1 << 20


def one_at_a_time(ways: Mapping[str, Way], rounds: int, warmups: int) -> tuple[harness.Comparison, dict[str, list[float]]]:
    """The ways in turns, which must give the same frames; and by way the seconds of each job that no stage had."""
    outside: dict[str, list[float]] = {name: [] for name in ways}

    def candidate(name: str) -> harness.Candidate:
        def call() -> dict[str, Any]:
            start = time.monotonic()
            made = ways[name].make(STILL, REQUEST)
            outside[name].append(time.monotonic() - start - made.stages)
            return {"frames_sha256": np.frombuffer(bytes.fromhex(made.frames_sha256), np.uint8)}

        return call

    candidates = {name: candidate(name) for name in ways}
    compared = harness.compare(candidates, reference="direct", tolerance=0.0, rounds=rounds, warmups=warmups)
    return compared, {name: seconds[-rounds:] for name, seconds in outside.items()}


def open_loop(way: Way, due: harness.Seconds, digest: str) -> list[tuple[float, float]]:
    """Jobs that come at the seconds `due`, whether the ones before are done or not; of each (wait, total) in seconds since it
    was due. ParityError where a job gives other frames."""
    begin = time.monotonic() + 0.1

    def one(after: float) -> tuple[float, float]:
        time.sleep(max(0.0, begin + after - time.monotonic()))
        made = way.make(STILL, REQUEST)
        end = time.monotonic()
        if made.frames_sha256 != digest:
            raise harness.ParityError("a job under load gave other frames")
        return made.started - begin - after, end - begin - after

    with ThreadPoolExecutor(len(due)) as threads:
        return list(threads.map(one, due))


@contextlib.contextmanager
def watched(server: Served, seconds: float = 1.0) -> Iterator[list[tuple[float, float, float]]]:
    """While it is open, (seconds, MiB of the server, MiB of its workers) every so often."""
    found: list[tuple[float, float, float]] = []
    begin, over = time.monotonic(), threading.Event()

    def look() -> None:
        while not over.wait(seconds):
            workers = sum(map(rss, server.workers()))
            found.append((time.monotonic() - begin, rss(server.process.pid) / MIB, workers / MIB))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_options(parser, rounds=200, warmups=10)
    parser.add_argument("--jobs", type=int, default=100, help="jobs of a block")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of each load and way")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 0.95], help="parts of what `direct` can do")
    parser.add_argument("--cancels", type=int, default=100, help="jobs that are stopped, on each way")
    options = parser.parse_args(arguments)
    bundle, memory = DEMO / "bundle", DEMO / "memory"

    def row(what: str, backend: str, seconds: Any, **more: Any) -> None:
        numbers = harness.summary(np.array(seconds))
        one = {"model": MODEL, "what": what, "backend": backend, **numbers, "threads": 1, **more}
        harness.append_row("bench_serve", one, folder=options.results)
        where = f" at {more['value']:g} of capacity" if "value" in more else ""
        print(f"{what:>8} {backend:>7}{where}: {harness.times(one)}", flush=True)

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="motionrt-serve-")))
        server = stack.enter_context(Served(folder / "store", bundle, memory, ["--queue=10000"])).start()
        ways: dict[str, Way] = {"direct": Direct(bundle, memory), "queue": Queued(bundle, memory)}
        ways["http"] = OverHttp(Client(server.url))
        for way in ways.values():
            stack.enter_context(way)
        curve = stack.enter_context(watched(server))

        compared, outside = one_at_a_time(ways, options.rounds, options.warmups)
        for name in ways:
            over = {} if name == "direct" else {"over_direct": compared.ratio(name, "direct").as_row()}
            row("job", name, compared.seconds[name], warmups=options.warmups, error=compared.row(name)["error"], **over)
        for name in ("queue", "http"):
            row("outside", name, outside[name])

        capacity = 1.0 / float(np.mean(compared.seconds["direct"]))
        digest = ways["direct"].make(STILL, REQUEST).frames_sha256
        order = np.random.default_rng(0)
        for load in options.loads:
            seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for _ in range(options.blocks):
                due = np.cumsum(order.exponential(1.0 / (load * capacity), options.jobs))
                for name in order.permutation(list(ways)):
                    seen[name] += open_loop(ways[name], due, digest)
            for name, times in seen.items():
                about = {"axis": "load", "value": load, "jobs_per_second": load * capacity, "block": options.jobs}
                for place, what in enumerate(("wait", "total")):
                    row(what, name, [one[place] for one in times], **about)

        stopped: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.cancels):
            for name in order.permutation(list(ways)):
                stopped[name].append(ways[name].stop(STILL, LONG))
        for name, seconds in stopped.items():
            row("cancel", name, seconds)

        thinned = curve[:: max(1, len(curve) // POINTS + 1)]
        for place, backend in ((1, "server"), (2, "worker")):
            points = [[round(point[0], 1), round(point[place], 1)] for point in thinned]
            one = {"model": MODEL, "what": "rss", "backend": backend, "seconds_and_mib": points}
            harness.append_row("bench_serve", one, folder=options.results)
            print(f"     rss {backend:>7}: {points[0][1]} MiB at first, {points[-1][1]} MiB in the end")


if __name__ == "__main__":
    main()
