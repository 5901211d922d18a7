"""What does a search of the motion memory cost as it grows, against exact search and LanceDB on the same data?

    .venv-dev/bin/python benchmarks/questions/bench_memory.py --clips 10000 50000 --folder /tmp/memories
    .venv-dev/bin/python benchmarks/questions/bench_memory.py --plot

Data: synthetic embeddings that lie as those of sentences do (memory_data.py); queries are drawn as clips are, but are none
of them. A search is from vector to references, the 9 clips' tokens read and decoded, one thread, warm. Times are taken in a
process that only reads; rivals take turns with it on the same queries and read the same columns. Folders are kept and used
again.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.benchmarks import harness
from motionrt.benchmarks.models.memory_data import CHUNK, Floats, chunks, draw, leaves
from motionrt.benchmarks.report import searches
from motionrt.benchmarks.report.rows import Report
from motionrt.runtime.bundle.manifest import Part
from motionrt.runtime.memory import index as memory_index
from motionrt.runtime.memory.memory import Clip, MotionMemory

K, WARMUPS, RIVAL_WARMUPS = 9, 1000, 20  # a reader that has served a while; warm-up queries are others than those timed
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LANCE_CPU_THREADS", "RAYON_NUM_THREADS", "TOKIO_WORKER_THREADS"), "1"
)  # read when the libraries load
Search = Callable[[Floats], list[int]]


def clips_of(vectors: Floats, start: int, tokens: tuple[int, int]) -> Iterator[Clip]:
    """Clips with these embeddings and random tokens, of a small pool: their values do not matter, their size does."""
    pool = np.random.default_rng(3).standard_normal((64, *tokens)).astype(np.float32)
    for row, vector in enumerate(vectors):
        n = start + row
        caption = f"clip {n}: a subject of the synthetic data moves from here to there, slowly, in the evening light"
        record = {"motion": pool[n % 64], "appearance": pool[(n + 1) % 64]}
        yield Clip(caption, f"videos/{n // 3}.mp4", n % 3, 2.0, 8.0, f"{n // 3:064x}", vector, record, {"licence": "CC0"}, "x")


def build(path: Path, count: int, size: int, tokens: tuple[int, int], kind: str, threads: int) -> dict[str, float]:
    """Make the memory in `path`, unless it is there; seconds for rows and for the index (kept in built.json)."""
    if not (path / "built.json").exists():
        record = [Part(name, "float16", tokens) for name in ("motion", "appearance")]
        times = {"rows_s": 0.0, "index_s": 0.0, "index_threads": float(threads)}
        with MotionMemory.create(path, embedding=size, record=record, fingerprint="", tokens=kind) as memory:
            for number, vectors in enumerate(chunks(leaves(size), count)):
                clips = list(clips_of(vectors, number * CHUNK, tokens))
                start = perf_counter()
                memory.add(clips)
                times["rows_s"] += perf_counter() - start
            start = perf_counter()
            memory.refresh(threads)
            times["index_s"] = perf_counter() - start
        (path / "built.json").write_text(json.dumps(times))
    return dict(json.loads((path / "built.json").read_text()))


def exact(queries: Floats, count: int, size: int) -> NDArray[np.int64]:
    """The ids of the K nearest clips of each query, by numpy."""
    best = np.full((len(queries), K), -2, np.float32)
    ids = np.zeros((len(queries), K), np.int64)
    for number, vectors in enumerate(chunks(leaves(size), count)):
        scores = np.concatenate([best, queries @ vectors.T], axis=1)
        rows = np.broadcast_to(number * CHUNK + 1 + np.arange(len(vectors)), (len(queries), len(vectors)))
        order = np.argsort(-scores, axis=1, kind="stable")[:, :K]
        best = np.take_along_axis(scores, order, 1)
        ids = np.take_along_axis(np.concatenate([ids, rows], axis=1), order, 1)
    return ids


def memory_of_process() -> dict[str, float]:
    """MiB of this process, pages that others share divided among them: all, its own, and those of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return {f"{name.lower()}_mib": int(lines[name].split()[0]) / 1024 for name in ("Pss", "Pss_Anon", "Pss_File")}


def into_cache(folder: Path) -> None:
    """Read all files of a memory once: they are in the system's page cache then, as far as it holds them."""
    for file in sorted(folder.glob("*")):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def reader(path: Path, queries: Path) -> None:
    """In a process of its own: open, search, and print as JSON what it took."""
    with np.load(queries) as stored:
        asked, warm = stored["queries"], stored["warm"]
    memory_index._usearch()  # its import is a program's, not a memory's
    into_cache(path)
    before = memory_of_process()
    start = perf_counter()
    memory = MotionMemory.open(path, readonly=True)
    opened = perf_counter()
    memory.search(asked[0], K)
    first = perf_counter()
    with memory:
        seconds, ids = timed({"memory": lambda q: [r.id for r in memory.search(q, K)]}, asked, warm)
        used = memory_of_process()
    print(json.dumps({
        "open_ms": (opened - start) * 1e3, "open_and_first_search_ms": (first - start) * 1e3,
        **harness.summary(seconds["memory"]), "warmups": len(warm), "ids": ids["memory"],
        "process": used, "process_more": {name: used[name] - before[name] for name in used},
    }))  # fmt: skip


def timed(
    searches: dict[str, Search], queries: Floats, warm: Floats
) -> tuple[dict[str, NDArray[np.float64]], dict[str, list[list[int]]]]:
    """Seconds [n] and answers of every search on every query, taking turns in a random order; collection is off."""
    names, order = list(searches), np.random.default_rng(0)
    seconds = {name: np.empty(len(queries), np.float64) for name in names}
    ids: dict[str, list[list[int]]] = {name: [] for name in names}
    for query in warm:
        for search in searches.values():
            search(query)
    gc.disable()
    for row, query in enumerate(queries):
        for position in order.permutation(len(names)):
            start = perf_counter()
            answer = searches[names[position]](query)
            seconds[names[position]][row] = perf_counter() - start
            ids[names[position]].append(answer)
    gc.enable()
    return seconds, ids


def recall(ids: list[list[int]], truth: NDArray[np.int64]) -> float:
    """Share of the true K nearest that were found."""
    return sum(len({*got} & {*want}) for got, want in zip(ids, truth.tolist(), strict=True)) / truth.size


def lance(folder: Path, memory: MotionMemory, count: int, size: int) -> dict[str, Search]:
    """LanceDB with the same vectors and tokens, flat and with HNSW and refinement; made unless it is there."""
    lancedb, pyarrow = (importlib.import_module(name) for name in ("lancedb", "pyarrow"))
    schema = pyarrow.schema([
        ("id", pyarrow.int64()), ("vector", pyarrow.list_(pyarrow.float32(), size)), ("caption", pyarrow.string()),
        ("motion", pyarrow.binary()), ("appearance", pyarrow.binary()),
    ])  # fmt: skip

    def batches() -> Iterator[Any]:
        some = memory.get([1])[0]
        blobs = [some.record[name].astype("<f2").tobytes() for name in ("motion", "appearance")]
        for number, vectors in enumerate(chunks(leaves(size), count)):
            ids = np.arange(number * CHUNK + 1, number * CHUNK + 1 + len(vectors))
            flat = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.ravel()), size)
            texts = [pyarrow.array([value] * len(ids)) for value in (some.caption, *blobs)]
            yield pyarrow.RecordBatch.from_arrays([pyarrow.array(ids), flat, *texts], schema=schema)

    db = lancedb.connect(folder)
    have = db.list_tables().tables if hasattr(db, "list_tables") else db.table_names()
    for name in ("flat", "hnsw"):
        if name in have:
            continue
        table = db.create_table(name, batches(), schema=schema)
        if name == "hnsw":  # one partition: no recall is lost to the choice of partitions
            config = importlib.import_module("lancedb.index").HnswSq
            table.create_index("vector", config=config(distance_type="cosine", num_partitions=1, m=16, ef_construction=128))

    def search(name: str, tune: Callable[[Any], Any]) -> Search:
        table, columns = db.open_table(name), ["id", "caption", "motion", "appearance", "_distance"]

        def run(query: Floats) -> list[int]:
            found = tune(table.search(query).distance_type("cosine")).limit(K).select(columns).to_arrow()
            for column in ("motion", "appearance"):
                np.stack([np.frombuffer(blob.as_py(), "<f2").astype(np.float32) for blob in found[column]])
            return list(found["id"].to_pylist())

        return run

    return {"lance_flat": search("flat", lambda s: s), "lance_hnsw": search("hnsw", lambda s: s.ef(64).refine_factor(4))}


def measure(options: argparse.Namespace, count: int, size: int) -> None:
    """Build, check and time one size; append its rows."""
    tokens = (options.tokens[0], options.tokens[1])
    name = f"{count}x{size}-{tokens[0]}x{tokens[1]}-{options.kind}"
    path = options.folder / name
    built = build(path, count, size, tokens, options.kind, options.threads)
    queries, warm = draw(leaves(size), options.queries, 10**9), draw(leaves(size), WARMUPS, 10**9 + 2)
    truth = exact(queries, count, size)
    np.savez(options.folder / "queries.npz", queries=queries, warm=warm)
    common = {"what": "search", "data": "tree", "clips": count, "embedding": size, "k": K, "tokens": list(tokens),
              "dtype": options.kind, "threads": 1, "n": len(queries), "note": options.note}  # fmt: skip

    command = [sys.executable, __file__, "--reader", str(path), str(options.folder / "queries.npz")]
    child = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    with MotionMemory.open(path) as memory:
        stats = memory.stats()
        found = recall(child.pop("ids"), truth)
        sizes = {"db_bytes_per_clip": stats.bytes_db / count, "index_bytes_per_clip": stats.bytes_index / count}
        row = {**common, "backend": "memory", "index": stats.index_state, "recall": found, **child, **built, **sizes}
        print("{clips} x {embedding}: recall@9 {recall:.4f}, ".format(**row) + harness.times(row))
        print("  open {open_ms:.1f} ms, with the first search {open_and_first_search_ms:.1f} ms".format(**row))
        row |= {"adding": adding(memory, path, queries, warm, tokens)}
        print("  process +{pss_anon_mib:.0f} MiB, +{pss_file_mib:.0f} mapped".format(**row["process_more"]))
        print("  adding 1,000:", row["adding"])
        harness.append_row("bench_memory", row, folder=options.results)

        searches: dict[str, Search] = {"memory": lambda q: [r.id for r in memory.search(q, K)]}
        if importlib.util.find_spec("lancedb") is None or options.rival_queries == 0:
            print("  LanceDB: not run:", "--rival-queries 0" if options.rival_queries == 0 else "it is not installed")
        else:
            searches |= lance(options.folder / f"{name}.lance", memory, count, size)
            seconds, ids = timed(searches, queries[: options.rival_queries], warm[:RIVAL_WARMUPS])
            for backend in searches:
                comparison = harness.Comparison("memory", 0.0, RIVAL_WARMUPS, {}, seconds)
                ratio = comparison.ratio(backend, "memory")
                found = recall(ids[backend], truth[: options.rival_queries])
                row = {**common, **harness.summary(seconds[backend]), "what": "search in turns", "backend": backend,
                       "recall": found, "warmups": RIVAL_WARMUPS,
                       "over_memory": ratio.as_row()}  # fmt: skip
                harness.append_row("bench_memory", row, folder=options.results)
                print(f"  {backend}: p50 {row['p50_ms']:.3f} ms, recall {found:.4f}, {ratio} of the memory's time")


def adding(memory: MotionMemory, path: Path, queries: Floats, warm: Floats, tokens: tuple[int, int]) -> dict[str, float]:
    """Add 1,000 clips, find them in a memory that was open before, search beside them, and remove them again."""
    extra = draw(leaves(queries.shape[1]), 1000, 10**9 + 1)
    clips = list(clips_of(extra, 0, tokens))
    with MotionMemory.open(path, readonly=True) as other:
        other.search(queries[0], K)
        start = perf_counter()
        ids = memory.add(clips)
        memory.refresh()
        added = perf_counter()
        found = other.search(extra[0], K)[0].id == ids[0]
        seen = perf_counter()
        seconds, _ = timed({"memory": lambda q: [r.id for r in other.search(q, K)]}, queries, warm)
    memory.remove(ids)
    if not found:
        raise harness.ParityError("a clip that was added is not found by a memory that was open")
    times = harness.summary(seconds["memory"])
    return {"add_s": added - start, "first_search_after_ms": (seen - added) * 1e3, **times}


def add_sizes(parser: argparse.ArgumentParser, clips: int) -> None:
    """The options of whatever measures memories of several sizes: how large, of `clips` by default, how often, and where."""
    parser.add_argument("--clips", type=int, nargs="+", default=[clips])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1, help="for making the index; searches take one")
    parser.add_argument("--folder", type=Path, default=Path("out/bench_memory"), help="where the memories are kept")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for rows")


def on_one_thread(main: Callable[[], None]) -> None:
    """Run a script's `main` in a process whose libraries were loaded with one thread."""
    if not ONE_THREAD.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ONE_THREAD})
    main()


def main(arguments: list[str] | None = None) -> None:
    """Measure every size that is asked for, or draw the rows there are."""
    parser = argparse.ArgumentParser(description="Cost of a search of the motion memory as it grows; LanceDB beside it.")
    add_sizes(parser, 10_000)
    parser.add_argument("--embedding", type=int, default=384)
    parser.add_argument("--tokens", type=int, nargs=2, default=[8, 64], metavar=("M", "D"))
    parser.add_argument("--kind", choices=["float16", "int8"], default="float16")
    parser.add_argument("--rival-queries", type=int, default=200, help="0: without the rivals")
    parser.add_argument("--note", default="")
    parser.add_argument("--plot", action="store_true", help="draw the rows that there are, and measure nothing")
    parser.add_argument("--reader", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.reader:
        reader(*options.reader)
    elif options.plot:
        report = Report(options.results)
        script = "benchmarks/questions/bench_memory.py --plot"
        searches.into_docs("cost", script, "\n".join(searches.cost(report)), harness.ROOT / "docs" / "memory.md")
        for name, svg in report.figures.items():
            (options.results / name).write_text(svg, encoding="utf-8")
    else:
        options.folder.mkdir(parents=True, exist_ok=True)
        for count in options.clips:
            measure(options, count, options.embedding)


if __name__ == "__main__":
    on_one_thread(main)
