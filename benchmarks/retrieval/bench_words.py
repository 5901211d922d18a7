"""What do words and agreement cost a search of a large memory, and what would SQLite's FTS5 take for the words alone?

    .venv-dev/bin/python benchmarks/retrieval/bench_words.py --clips 200000 1000000 --threads 2 --folder /tmp/memories

Vectors as in bench_memory.py; captions by the grammar of prompts.py, a fifth of them with a name that few others have (of
50,000, by Zipf's law). Prompts are of the split that is reported, a third of them with such a name; their vectors are drawn as
clips' are. One thread, warm, all ways in turns in one process: `vectors`; `words`, vectors and words; `all`, with agreement,
as a search is by default; and `fts5`, the 9 best captions by its BM25 for any of the prompt's words, without vectors, from a
table of its own. `known`: how often a prompt's name brings a clip with that name among the 9.
"""

from __future__ import annotations

import argparse
import gc
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from motionrt.benchmarks import harness
from motionrt.benchmarks.models.memory_data import CHUNK, Floats, chunks, draw, leaves
from motionrt.benchmarks.questions.bench_memory import K, add_sizes, clips_of, into_cache, on_one_thread
from motionrt.benchmarks.retrieval import prompts
from motionrt.runtime.bundle.manifest import Part
from motionrt.runtime.memory.memory import Clip, MotionMemory, Search
from motionrt.runtime.memory.words import words_of

SIZE, TOKENS, NAMES = 384, (8, 64), 50_000
WAYS = {"vectors": Search(words=0, agreement=0), "words": Search(agreement=0), "all": Search()}


def name(number: int) -> str:
    """A made-up name, the same for the same number."""
    syllables = ("ka", "lo", "mi", "ru", "ta", "ven", "zor", "shi", "pel", "quo")
    return "".join(syllables[int(digit)] for digit in f"{number:05d}")


def captions(count: int) -> Iterator[str]:
    """Captions of `count` clips, without end repeated with other names."""
    rng, every = np.random.default_rng(31), [prompt.text for prompt in prompts.everyday_captions()]
    for _ in range(count):
        text = every[rng.integers(len(every))]
        yield f"{text}, with {name(int(rng.zipf(1.3)) % NAMES)}" if rng.random() < 0.2 else text


def asked(count: int) -> list[tuple[str, str | None]]:
    """Prompts, and the name in each, if there is one."""
    rng, every = np.random.default_rng(32), [prompt.text for prompt in prompts.everyday_prompts("report")]
    found = []
    for _ in range(count):
        text, called = every[rng.integers(len(every))], name(int(rng.zipf(1.3)) % NAMES) if rng.random() < 1 / 3 else None
        found.append((f"{text}, with {called}" if called else text, called))
    return found


def build(path: Path, count: int, threads: int) -> None:
    """Make the memory in `path`, and the FTS5 table beside it, unless they are there."""
    if (path / "built").exists():
        return
    record, texts = [Part(part, "float16", TOKENS) for part in ("motion", "appearance")], captions(count)
    rows = index = 0.0
    with (
        MotionMemory.create(path, embedding=SIZE, record=record, fingerprint="") as memory,
        closing(sqlite3.connect(path / "fts5.sqlite")) as other,
    ):
        other.execute("CREATE VIRTUAL TABLE words USING fts5(caption, tokenize='porter')")
        for number, vectors in enumerate(chunks(leaves(SIZE), count)):
            clips = [_named(clip, next(texts)) for clip in clips_of(vectors, number * CHUNK, TOKENS)]
            start = perf_counter()
            memory.add(clips)
            rows += perf_counter() - start
            other.executemany("INSERT INTO words(caption) VALUES (?)", [(clip.caption,) for clip in clips])
            other.commit()
        start = perf_counter()
        memory.refresh(threads)
        index = perf_counter() - start
    (path / "built").write_text(f"{rows} {index}")


def _named(clip: Clip, caption: str) -> Clip:
    return Clip(**{**vars(clip), "caption": caption})


def measure(options: argparse.Namespace, count: int) -> None:
    """Build and time one size; append its rows."""
    path = options.folder / f"words-{count}"
    build(path, count, options.threads)
    queries = draw(leaves(SIZE), options.queries + 100, 10**9 + 5)
    texts = asked(len(queries))
    into_cache(path)
    with MotionMemory.open(path, readonly=True) as memory, closing(sqlite3.connect(path / "fts5.sqlite")) as other:
        start = perf_counter()
        memory.search(queries[0], K, Search(), texts[0][0])
        opened = perf_counter() - start

        def by(search: Search) -> Callable[[Floats, str], list[str]]:
            return lambda vector, text: [found.caption for found in memory.search(vector, K, search, text)]

        def fts5(vector: Floats, text: str) -> list[str]:
            question = "SELECT caption FROM words WHERE words MATCH ? ORDER BY rank LIMIT ?"
            match = " OR ".join(f'"{word}"' for word in words_of(text))
            return [row[0] for row in other.execute(question, (match, K))]

        ways = {way: by(search) for way, search in WAYS.items()} | {"fts5": fts5}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        known: dict[str, list[bool]] = {way: [] for way in ways}
        order = np.random.default_rng(0)
        gc.disable()
        for number, (vector, (text, called)) in enumerate(zip(queries, texts, strict=True)):
            for place in order.permutation(len(ways)):
                way = list(ways)[place]
                if way == "fts5" and number % options.every:
                    continue
                start = perf_counter()
                found = ways[way](vector, text)
                if number >= 100:
                    seconds[way].append(perf_counter() - start)
                    if called:
                        known[way].append(any(called in caption for caption in found))
        gc.enable()
        stats = memory.stats()
    rows_s, index_s = map(float, (path / "built").read_text().split())
    facts: dict[str, Any] = {
        "clips": count, "embedding": SIZE, "tokens": list(TOKENS), "rows_s": rows_s, "index_s": index_s,
        "first_ms": opened * 1e3, "bytes_db": stats.bytes_db, "bytes_fts5": (path / "fts5.sqlite").stat().st_size,
    }  # fmt: skip
    for way in ways:
        row = {"backend": way, **harness.summary(np.array(seconds[way])), "known": float(np.mean(known[way])), **facts}
        print(way, harness.times(row), f"known {row['known']:.2f}", flush=True)
        harness.append_row("bench_words", row, folder=options.results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, 200_000)
    parser.add_argument("--every", type=int, default=5, help="FTS5 is asked one prompt of so many: it takes long")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for count in options.clips:
        measure(options, count)


if __name__ == "__main__":
    on_one_thread(main)
