"""What does it cost a search of the motion memory to check the clips that it returns?

    .venv-dev/bin/python benchmarks/questions/bench_checks.py --clips 1000000 --threads 2 --folder /tmp/memories

The memories and queries of bench_memory.py, and its folders. The two sides take turns in one process, one thread, warm; the
unchecked one has no check of a returned clip's checksums, which nothing but this script can switch off. Each side asks every
query once, half of all queries apart: what one has just read would else be in the processor's caches for the other.
"""

from __future__ import annotations

import argparse
import gc
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from motionrt.benchmarks import harness
from motionrt.benchmarks.models.memory_data import Floats, draw, leaves
from motionrt.benchmarks.questions.bench_memory import WARMUPS, K, add_sizes, build, into_cache, on_one_thread
from motionrt.runtime.memory import store
from motionrt.runtime.memory.memory import MotionMemory

TOKENS, KIND = (8, 64), "float16"
SIDES = {"checked": store._check, "unchecked": lambda *_: None}


def switch(check: object) -> None:
    """Have `check` called for each clip that a search reads."""
    vars(store)["_check"] = check


def prove(memory: MotionMemory, query: Floats) -> None:
    """ParityError unless every clip that leaves a search went through what is switched."""
    seen: list[int] = []
    switch(lambda number, *_: seen.append(number))
    found = memory.search(query, K)
    switch(SIDES["checked"])
    if not {reference.id for reference in found} <= {*seen}:
        raise harness.ParityError("a search returns clips that did not go through `store._check`; switch what checks them now")


def timed(memory: MotionMemory, queries: Floats, warm: Floats) -> dict[str, NDArray[np.float64]]:
    """Seconds of each side [n], in turns; ParityError where their answers differ."""
    for query in warm:
        memory.search(query, K)
    count, order = len(queries), np.random.default_rng(0)
    names = list(SIDES)
    seconds = {name: np.empty(count, np.float64) for name in names}
    ids: dict[str, dict[int, list[int]]] = {name: {} for name in names}
    gc.disable()
    for row in range(count):
        for side in order.permutation(len(names)):
            name, at = names[side], (row + side * (count // 2)) % count
            switch(SIDES[name])
            start = perf_counter()
            answer = memory.search(queries[at], K)
            seconds[name][row] = perf_counter() - start
            ids[name][at] = [reference.id for reference in answer]
    gc.enable()
    switch(SIDES["checked"])
    if ids["checked"] != ids["unchecked"]:
        raise harness.ParityError("the two sides do not find the same clips")
    return seconds


def measure(options: argparse.Namespace, count: int) -> None:
    """Build and time one size; append its rows."""
    path, size = options.folder / f"{count}x{options.embedding}-8x64-{KIND}", options.embedding
    built = build(path, count, size, TOKENS, KIND, options.threads)
    queries, warm = draw(leaves(size), options.queries, 10**9), draw(leaves(size), WARMUPS, 10**9 + 2)
    into_cache(path)
    with MotionMemory.open(path, readonly=True) as memory:
        index = memory.stats().index_state
        prove(memory, queries[0])
        seconds = timed(memory, queries, warm)
    comparison = harness.Comparison("unchecked", 0.0, WARMUPS, dict.fromkeys(SIDES, 0.0), seconds)
    ratio = comparison.ratio("checked", "unchecked")
    common = {"what": "search", "data": "tree", "clips": count, "embedding": size, "k": K, "tokens": list(TOKENS),
              "dtype": KIND, "threads": 1, "index": index, **built, "note": options.note}  # fmt: skip
    for name in SIDES:
        over = {"over_unchecked": ratio.as_row()} if name == "checked" else {}
        row = {**common, "backend": name, **harness.summary(seconds[name]), "warmups": WARMUPS, **over,
               "error": {"different_answers": 0.0, "to": "unchecked", "allowed": 0.0}}  # fmt: skip
        harness.append_row("bench_checks", row, folder=options.results)
        print(f"{count} x {size}, {name}: {harness.times(row)}")
    print(f"checked over unchecked: {ratio}")


def main() -> None:
    """Measure every size that is asked for."""
    parser = argparse.ArgumentParser(description="Cost of the checks of a search of the motion memory.")
    add_sizes(parser, 50_000)
    parser.add_argument("--embedding", type=int, default=384)
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for count in options.clips:
        measure(options, count)


if __name__ == "__main__":
    on_one_thread(main)
