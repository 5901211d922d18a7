"""How many more videos do two replicas make than one on two cores, and does the kill of one lose a job?

    .venv-dev/bin/python benchmarks/serving/bench_replicas.py                # about 6 minutes; needs make .venv-ray/.installed
    .venv-dev/bin/python benchmarks/serving/bench_replicas.py --rounds 3 --jobs 4 --kills 1

Four servers of the demo, each with one thread for each of its workers or replicas: `workers-1` and `workers-2` make the videos
in their own processes, `replicas-1` and `replicas-2` have Ray Serve make them, each in a Ray of its own on this machine.

- `jobs`: seconds from the first of a handful of orders to the last of their videos, the servers in turns;
- `kill`: the same with two replicas, of which one is killed (kill -9) while both are in the middle of a job.

Gate: the SHA-256 of every job's frames is the same on all of them, also of those that were begun again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.benchmarks import harness
from motionrt.benchmarks.pipeline import DEMO
from motionrt.benchmarks.serving.ray_here import RayHere
from motionrt.benchmarks.serving.served import Served
from motionrt.runtime.serve.client import Client

BUNDLE, MEMORY, STILL = DEMO / "bundle", DEMO / "memory", DEMO / "inputs" / "red_star.png"
PROMPT, STEPS = "a red star moves in a circle", 50
ONE, TWO = "replicas-1", "replicas-2"


def ordered(client: Client, jobs: int) -> list[str]:
    """So many jobs at once, the same ones each time; their ids."""
    return [client.create(PROMPT, STILL, seed=seed, steps=STEPS)["id"] for seed in range(jobs)]


def ended(client: Client, jobs: Sequence[str]) -> list[dict[str, Any]]:
    """Jobs once they are over."""
    return [client.wait(job) for job in jobs]


def digests(ended: Sequence[dict[str, Any]]) -> NDArray[np.uint8]:
    """SHA-256 of the frames [jobs, 32] of jobs that must have some."""
    if failed := [job["error"] for job in ended if job["status"] != "completed"]:
        raise harness.ParityError(f"a job failed: {failed[0]}")
    return np.array([[*bytes.fromhex(job["motionrt"]["frames_sha256"][0])] for job in ended], np.uint8)


def both_run(client: Client, jobs: Sequence[str]) -> bool:
    """Whether two of these jobs come to be in the middle of their loops at the same time, waiting for that."""
    while True:
        told = [client.retrieve(job) for job in jobs]
        if sum(job["status"] == "in_progress" and job["motionrt"]["step"] > 0 for job in told) > 1:
            return True
        if all(job["status"] in ("completed", "failed") for job in told):
            return False
        time.sleep(0.01)


def busy(client: Client, jobs: int, seconds: float = 120.0) -> tuple[float, list[str]]:
    """When so many jobs were ordered of which two are in the middle of their loops now, and their ids: orders are made again
    while there is only one replica. RuntimeError where there are no two."""
    end = time.monotonic() + seconds
    while (start := time.monotonic()) < end:
        if both_run(client, names := ordered(client, jobs)):
            return start, names
    raise RuntimeError("no two replicas were at work at the same time")


def killed(client: Client, ray: RayHere, jobs: int, want: NDArray[np.uint8]) -> tuple[float, int, int]:
    """One round with a kill in its middle: its seconds, jobs that were lost or came out otherwise, and jobs begun again."""
    start, names = busy(client, jobs)
    os.kill(ray.replicas()[0], 9)
    found = ended(client, names)
    seconds = time.monotonic() - start
    good = [job["status"] == "completed" and (digests([job])[0] == want[place]).all() for place, job in enumerate(found)]
    return seconds, good.count(False), sum(job["motionrt"]["attempt"] > 1 for job in found)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_options(parser, rounds=20, warmups=2)
    parser.add_argument("--jobs", type=int, default=8, help="jobs that are ordered at once")
    parser.add_argument("--kills", type=int, default=5, help="rounds with a kill in their middle")
    options = parser.parse_args(arguments)
    if options.jobs < 3:
        parser.error("--jobs: at least 3, so that some wait")

    def row(what: str, backend: str, **more: Any) -> None:
        one = {"model": "demo", "what": what, "backend": backend, "jobs": options.jobs, "steps": STEPS, "threads": 1, **more}
        harness.append_row("bench_replicas", one, folder=options.results)
        print(f"{what:>5} {backend:>10}: {harness.times(one)}", flush=True)

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="motionrt-replicas-")))
        rays, clients = dict[str, RayHere](), dict[str, Client]()
        for name in ("workers-1", "workers-2", ONE, TWO):
            count, words = name[-1], [f"--workers={name[-1]}"]
            (folder / name).mkdir()
            if name.startswith("replicas"):
                rays[name] = stack.enter_context(RayHere(folder / name, BUNDLE, MEMORY, [f"--replicas={count}"]))
                words.append(f"--replicas={rays[name].url}")
            server = stack.enter_context(Served(folder / name / "store", BUNDLE, MEMORY, words))
            clients[name] = Client(server.start().url)
        ended(clients[TWO], busy(clients[TWO], options.jobs)[1])  # both are up

        def candidate(name: str) -> harness.Candidate:
            return lambda: {"frames_sha256": digests(ended(clients[name], ordered(clients[name], options.jobs)))}

        ways = {name: candidate(name) for name in clients}
        want = ways["workers-1"]()["frames_sha256"]
        compared = harness.compare(ways, reference="workers-1", tolerance=0.0, rounds=options.rounds, warmups=options.warmups)
        for name in ways:
            rate = options.jobs / float(np.median(compared.seconds[name]))
            more: dict[str, Any] = {**compared.row(name), "jobs_per_second": rate}
            if (one := f"{name[:-1]}1") != name:
                more["over_one"] = compared.ratio(one, name).as_row()
            row("jobs", **more)
        rounds = [killed(clients[TWO], rays[TWO], options.jobs, want) for _ in range(options.kills)]
        seconds, lost, again = zip(*rounds, strict=True)
        counts = {"kills": options.kills, "lost": sum(lost), "begun_again": sum(again)}
        row("kill", TWO, **harness.summary(np.array(seconds)), **counts)
        print(f"{options.kills} kills: {sum(lost)} jobs lost, {sum(again)} begun again")
    if counts["lost"]:
        raise SystemExit("jobs were lost")


if __name__ == "__main__":
    main()
