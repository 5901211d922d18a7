"""Does a server lose or spoil a job when it is flooded, its workers and itself are killed, and its disk is full?

    .venv-dev/bin/python benchmarks/serving/bench_serve_soak.py                               # 30 minutes, then 1,000 aborts
    .venv-dev/bin/python benchmarks/serving/bench_serve_soak.py --seconds 20 --every 4 --aborts 20

Eight clients of the key `flood` and one of the key `quiet` make videos of the demo, watch them by events or polls, fetch,
cancel and delete them. Meanwhile, in turns: kill -9 of the worker, kill -9 of the server (started again on its store), and a
full disk with a kill of the worker in it. The store is a tmpfs of its own, and a file fills it to the last byte; that needs the
right to mount, so as another user than root say `unshare -rm` before the command. Without it the disk is never full, and the
row says so.

Wrong is: a job that was taken and is not there, or there and nobody asked for it; frames that are not the pipeline's for
their seed; a job that failed although nothing was done to the server that may fail one; a file that is no video of as many
frames; progress that goes back; an order that is refused for another reason than a full disk; a fault in the server's log.
The p95 of the quiet key's waits, from the order until a worker has it, must be below the time of two jobs; waits that touch an
outage are counted apart.

Then, on a server that is started anew, jobs are stopped in several ways, and memory is measured before and after. Behind every
DELETE of a running job the worker's processor time is read: it must not go on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from motionrt.benchmarks import harness
from motionrt.benchmarks.pipeline import DEMO
from motionrt.benchmarks.serving.served import Served, rss
from motionrt.benchmarks.serving.soak_load import TRIES, Ledger, Load, check_frames, check_kept, outage
from motionrt.runtime.serve.client import Client
from motionrt.runtime.serve.web.keys import Keys

BUNDLE, MEMORY, STILLS = DEMO / "bundle", DEMO / "memory", sorted((DEMO / "inputs").glob("*.png"))
FLOOD = 8  # clients of the flooding key
MIB = 1 << 20
DISK = 256 * MIB
FULL = 6.0  # seconds that the disk stays full
FLAT = 0.05  # of memory, that aborts may add
FAULTS = ("a fault while", "Exception in callback", "a job failed", "Task exception")


@contextlib.contextmanager
def own_disk(folder: Path) -> Iterator[bool]:
    """A tmpfs of DISK bytes at `folder`; False where nothing can be mounted, and then `folder` is as it was."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> Path:
    """Write a file until there is not a byte left."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return path


def disturb(server: Served, ledger: Ledger, disk: Path | None, every: float, over: threading.Event) -> None:
    """What is done to the server, one after the other, until it is `over`."""

    def lose_worker() -> None:
        for worker in server.workers():
            os.kill(worker, 9)
        ledger.count("worker_kills")

    turn = 0
    try:
        while not over.wait(every):
            kind = ("worker", "server", "disk")[turn % (3 if disk else 2)]
            turn += 1
            with outage(ledger, kind):
                if kind == "worker":
                    lose_worker()
                    time.sleep(0.1)
                elif kind == "server":
                    server.kill()
                    ledger.count("server_kills")
                    server.start(ready=False)
                elif disk is not None:
                    filler, early = fill(disk), 0.02 if turn % 2 else FULL / 2  # while a job runs, or when none can any more
                    time.sleep(early)
                    lose_worker()
                    time.sleep(FULL - early)
                    filler.unlink()
                    ledger.count("disk_fills")
                if not server.until_ready():
                    ledger.say(f"the server does not come back from {kind}")
                    return
    except Exception as error:
        ledger.say(f"nothing is done to the server any more: {type(error).__name__}: {error}")


def cpu(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def abort(server: Served, client: Client, count: int, seed: int) -> tuple[float, float]:
    """Stop so many jobs: deleted in a step, cancelled in a step, cancelled at once, the stream left and then deleted. Seconds
    of processor time that the worker used after a DELETE had been answered, and for how many seconds that was watched."""
    used, watched, (worker,), choose = 0.0, 0.0, server.workers(), random.Random(seed)
    for number in range(count):
        job = client.create("a red star", STILLS[0], seed=number, steps=50, n=2)["id"]
        if number % 4 != 2:
            for shown in client.events(job):
                if shown["motionrt"]["step"] > 0:
                    break
        time.sleep(choose.uniform(0, 0.02))
        if number % 4 in (1, 2):
            client.cancel(job)
            client.delete(job)
            continue
        client.delete(job)
        before, start = cpu(worker), time.monotonic()
        time.sleep(0.1)
        used, watched = used + cpu(worker) - before, watched + time.monotonic() - start
    return used, watched


def load(server: Served, keys: dict[str, str], disk: Path | None, options: argparse.Namespace, ledger: Ledger) -> None:
    """The mixed load, and what is done to the server meanwhile."""
    over, rest = threading.Event(), threading.Event()
    threads = [threading.Thread(target=disturb, args=(server, ledger, disk, options.every, over))]
    for number in range(FLOOD + 1):
        name = "quiet" if number == FLOOD else "flood"
        one = Load(name, Client(server.url, keys[name], tries=TRIES), ledger, STILLS, rest, number)
        threads.append(threading.Thread(target=one.run, args=(options.quiet if name == "quiet" else 0.0,)))
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    while (left := options.seconds - (time.monotonic() - begin)) > 0:
        time.sleep(min(60.0, left))
        print(f"{time.monotonic() - begin:6.0f} s: {dict(ledger.counts)}, {len(ledger.wrong)} wrong", flush=True)
    over.set()
    threads[0].join()
    rest.set()
    for thread in threads[1:]:
        thread.join(300)
        if thread.is_alive():
            ledger.say("a client still waits for its job, five minutes after the end")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0, help="of mixed load")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two things that are done to the server")
    parser.add_argument("--quiet", type=float, default=2.0, help="seconds between two jobs of the quiet key")
    parser.add_argument("--aborts", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for rows")
    options = parser.parse_args(arguments)
    ledger = Ledger()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="motionrt-soak-")))
        mounted = stack.enter_context(own_disk(folder / "disk"))
        made = Keys.open(folder / "keys.json", new=True)
        keys = {name: made.create(name, ["generate"]) for name in ("flood", "quiet")}
        server = Served(folder / "disk" / "store", BUNDLE, MEMORY, [f"--keys={folder / 'keys.json'}"])
        server.log = folder / "server.log"  # where there is room
        stack.enter_context(server.start())
        load(server, keys, folder / "disk" if mounted else None, options, ledger)
        if ledger.unaccounted():
            ledger.say(f"{ledger.unaccounted()} jobs were taken, and no client saw their end")
        lost = check_kept(ledger, {name: Client(server.url, key) for name, key in keys.items()})
        kinds = check_frames(ledger, BUNDLE, MEMORY)

        server.stop()
        server.start()
        client = Client(server.url, keys["flood"])
        abort(server, client, max(1, options.aborts // 10), seed=0)  # what the first ones take is not what each takes
        before = [rss(pid) / MIB for pid in (server.process.pid, *server.workers())]
        used, watched = abort(server, client, options.aborts, seed=1)
        after = [rss(pid) / MIB for pid in (server.process.pid, *server.workers())]
        log = server.log.read_text(errors="replace")

    faults = {text: log.count(text) for text in FAULTS if text in log}
    if faults:
        ledger.say(f"the log has faults: {faults}")
    two = 2 * float(np.mean(ledger.work))
    touched = [ledger.during(order, start) for order, start in ledger.waits]
    waits = {calm: [start - order for (order, start), bad in zip(ledger.waits, touched, strict=True) if bad != calm]
             for calm in (True, False)}  # fmt: skip
    p95 = float(np.percentile(waits[True], 95))
    if p95 >= two:
        ledger.say(f"the quiet key waits {p95:.3f} s at p95, and two jobs take {two:.3f} s")
    grown = [late / early - 1 for early, late in zip(before, after, strict=True)]
    if max(grown) > FLAT:
        ledger.say(f"{options.aborts} aborts added {max(grown):.1%} to the memory of a process; {FLAT:.0%} is allowed")
    if used > 0.1 * watched:
        ledger.say(f"behind a DELETE the worker went on: {used:.2f} s of {watched:.2f} s")
    row: dict[str, Any] = {
        "model": "demo", "what": "mixed load and kills", "seconds": options.seconds, "clients": {"flood": FLOOD, "quiet": 1},
        "lost": lost, "wrong": len(ledger.wrong), "said": ledger.wrong[:20], **ledger.counts, "failed_by": dict(ledger.failed),
        "refused": dict(ledger.refused), "kinds_of_request": kinds, "full_disk": mounted,
        "quiet_wait": harness.summary(np.array(waits[True])), "two_jobs_ms": two * 1e3,
        "quiet_wait_in_outages": harness.summary(np.array(waits[False])) if waits[False] else None,
        "aborts": options.aborts, "rss_mib_before": before, "rss_mib_after": after, "cpu_seconds_after_delete": [used, watched],
    }  # fmt: skip
    harness.append_row("bench_serve_soak", row, folder=options.results)
    print("\n".join(f"{name}: {value}" for name, value in row.items()))
    if ledger.wrong:
        raise SystemExit(f"{len(ledger.wrong)} things are wrong")


if __name__ == "__main__":
    main()
