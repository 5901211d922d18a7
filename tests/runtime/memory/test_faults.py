"""Faults done to a motion memory for real, in processes of their own: kills, damaged files, full disks, other writers.

The long run, 200 kills of each kind: `python tests/runtime/memory/test_faults.py 200`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from motionrt.runtime.errors import InputError, MemoryStoreError
from motionrt.runtime.memory import memory as memory_module
from motionrt.runtime.memory.memory import MotionMemory, Search

_fake = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parents[3] / "tests/helpers/fake_memory.py")))
clip, filled, index_of, names, query, ranked = (
    _fake.clip, _fake.filled, _fake.index_of, _fake.names, _fake.query, _fake.ranked,
)  # fmt: skip
ROUNDS = 4  # of each kind, in CI
THRESHOLD, DELTA = 40, 12


def work(kind: str, path: str) -> None:
    """What a child does until it is killed. `add` says which numbers are committed; clip `n` is made of the number n."""
    memory_module.DELTA = DELTA
    with MotionMemory.open(path, index_threshold=THRESHOLD) as memory:
        said = [int(text) for text in Path(path, "said").read_text().split()] if Path(path, "said").exists() else []
        number = max(said, default=-1) + 1
        print("ready", flush=True)
        while True:
            if kind == "add":
                numbers = list(range(number, number + random.randint(1, 9)))
                memory.add(clip(n) for n in numbers)
                print(*numbers, flush=True)  # only now are they promised
                number = numbers[-1] + 1
            elif kind == "remove":
                here = memory.ids().tolist()
                gone = random.sample(here, min(3, max(len(here) - THRESHOLD - 5, 0)))
                memory.remove(gone)
                print(*(-n for n in gone), flush=True)
            elif kind == "fold":
                ids = memory.add(clip(10**6 + random.randrange(10**6)) for _ in range(DELTA + 1))
                memory.refresh()
                memory.remove(ids)
            elif kind == "compact":
                memory.compact()
            elif kind == "rebuild":
                Path(path, "index.json").unlink(missing_ok=True)
                memory.search(query(), 1)
                with MotionMemory.open(path, index_threshold=THRESHOLD) as other:
                    other.refresh()


def killed(kind: str, path: Path) -> list[int]:
    """Run `work` until a random moment, kill it, and return what it printed as committed."""
    command = [sys.executable, __file__, kind, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_fake.environment()) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0, 0.15))
        child.send_signal(signal.SIGKILL)
        text = child.stdout.read()
    whole = text[: text.rfind("\n") + 1]  # a line that was cut was not said
    return [int(number) for number in whole.split()]


def kill_rounds(directory: Path, kind: str, rounds: int) -> None:
    """Kill `rounds` times on one memory; after each, every promised clip is there and every answer right."""
    path = filled(directory / "m", 60)
    promised = dict.fromkeys(range(60))
    for number in range(rounds):
        said = killed(kind, path)
        promised |= dict.fromkeys(n for n in said if n >= 0 and kind == "add")
        gone = {-n for n in said} if kind == "remove" else set()
        for readonly in (True, False):
            with MotionMemory.open(path, readonly, index_threshold=THRESHOLD) as memory:
                here = {r.id: r for r in memory.get(memory.ids().tolist())}
                assert len(here) == len(memory) and not gone & here.keys(), (kind, number)
                captions = {r.caption for r in here.values()}
                if kind != "remove":
                    assert {f"caption {n}" for n in promised} <= captions, (kind, number)
                vectors = {key: clip(int(r.caption.split()[1])).embedding for key, r in here.items()}
                scores = {key: float(v @ query() / np.linalg.norm(v)) for key, v in vectors.items()}
                want = sorted(scores, key=lambda key: (-scores[key], key))[:9]
                assert [r.id for r in memory.search(query(), 9)] == want, (kind, number)
                if not readonly:
                    assert memory.verify() == [], (kind, number)
        if kind == "add":
            written = sorted({int(caption.split()[1]) for caption in captions})
            (path / "said").write_text(" ".join(map(str, written)))
        if kind == "remove" and len(here) < THRESHOLD + 10:
            with MotionMemory.open(path, index_threshold=THRESHOLD) as memory:
                memory.add(clip(2000 + n) for n in range(60))
    # Half-written files of a killed writer are removed an hour later; SQLite may leave an empty journal until it writes.
    left = {name for name in names(path) if not name.endswith((".partial", "-journal"))}
    assert left <= {"memory.sqlite", "index.json", "index.usearch", "said"}, left


SLOW = pytest.mark.slow
KINDS = ("add", "remove", "fold", "compact", "rebuild")


@pytest.mark.parametrize("kind", ["add", *(pytest.param(kind, marks=SLOW) for kind in KINDS[1:])])
def test_kills_lose_nothing_and_make_no_wrong_answer(tmp_path: Path, kind: str) -> None:
    kill_rounds(tmp_path, kind, ROUNDS)


def test_a_reader_undoes_what_a_killed_writer_left_half_done(tmp_path: Path) -> None:
    """A writer in the mode without a log, killed after it wrote pages and before it committed."""
    path = filled(tmp_path / "m", 60)
    code = (
        "import sqlite3, sys, os; d = sqlite3.connect(sys.argv[1], isolation_level=None); d.execute('PRAGMA cache_size=1');"
        "d.execute('BEGIN'); d.execute('DELETE FROM clips'); d.execute('UPDATE vectors SET embedding = zeroblob(64)');"
        "os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path / "memory.sqlite")], check=False).returncode == 9
    assert (path / "memory.sqlite-journal").stat().st_size > 0
    with MotionMemory.open(path, readonly=True) as memory:
        assert [r.id for r in memory.search(query(), 9)] == [n for n, _ in ranked(60, query())[:9]]
        assert memory.readonly and memory.verify() == []


SEARCH = """
import json, sys, runpy
t = runpy.run_path(sys.argv[1])
with t['MotionMemory'].open(sys.argv[2], sys.argv[3] == 'True', index_threshold=40) as m:
    print(json.dumps([r.id for r in m.search(t['query'](), 9)]))
"""


def searched(path: Path, readonly: bool) -> Any:
    """What a fresh process finds; it fails if that process crashes."""
    command = [sys.executable, "-W", "error", "-c", SEARCH, _fake.__file__, str(path), str(readonly)]
    done = subprocess.run(command, capture_output=True, text=True, env=_fake.environment(), check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return json.loads(done.stdout)


def damages(path: Path, other: Path) -> Iterator[str]:
    """Do one damage after the other to the index or its sidecar of a sound memory; the name of each."""
    index, sidecar = index_of(path), path / "index.json"
    good, record = index.read_bytes(), sidecar.read_bytes()
    noise = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.5, 0.9, 0.999):
        index.write_bytes(good[: int(len(good) * share)])
        yield f"truncated to {share}"
    for bits in (1, 8, 400):
        content = np.frombuffer(good, np.uint8).copy()
        content[noise.integers(64, len(good), bits)] ^= np.uint8(1 << noise.integers(8))
        with index.open("r+b") as file:  # in place: the same inode and size
            file.write(content.tobytes())
        yield f"{bits} bits flipped"
    index.write_bytes(good + b"x")
    yield "longer"
    shutil.copy(index_of(other), index)
    yield "index of another memory"
    shutil.copy(index_of(other), path / index_of(other).name)
    shutil.copy(other / "index.json", sidecar)
    yield "index and sidecar of another memory"
    index.unlink(missing_ok=True)
    yield "no index"
    index.unlink(missing_ok=True)
    index.mkdir()
    yield "a directory for an index"
    index.rmdir()
    for text in (b"", record[: len(record) // 2], b"\x00" * 300, b"[]", b'{"format": 2}'):
        sidecar.write_bytes(text)
        yield f"sidecar {text[:9]!r}"
    sidecar.unlink()
    yield "no sidecar"


def test_a_damaged_index_is_never_used_and_is_made_again(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 150)
    with MotionMemory.create(tmp_path / "o", **_fake.KEPT, index_threshold=THRESHOLD) as other:
        other.add(clip(i + 5000) for i in range(150))
        other.refresh()
    want = [number for number, _ in ranked(150, query())[:9]]
    assert searched(path, False) == want
    for what in damages(path, tmp_path / "o"):
        in_processes = "flipped" in what or what in ("truncated to 0.9", "index of another memory")  # USearch would crash
        for readonly in (True, False):
            if in_processes:
                assert searched(path, readonly) == want, what
            else:
                with MotionMemory.open(path, readonly, index_threshold=THRESHOLD) as memory:
                    assert [r.id for r in memory.search(query(), 9)] == want, what
        with MotionMemory.open(path, index_threshold=THRESHOLD) as memory:
            memory.refresh()
            assert what == "a directory for an index" or memory.verify() == [], what


def test_an_open_reader_lets_go_of_an_index_that_is_overwritten(tmp_path: Path) -> None:
    """Reading a mapped file that was cut ends a process with SIGBUS: so it is looked at before each search."""
    path = filled(tmp_path / "m", 150)
    with MotionMemory.open(path, index_threshold=THRESHOLD) as memory:
        memory.refresh()
    code = (
        "import sys, os, runpy; t = runpy.run_path(sys.argv[1]);"
        "m = t['MotionMemory'].open(sys.argv[2], True, index_threshold=40); q = t['query']();"
        "a = [r.id for r in m.search(q, 9)]; assert m._base is not None; os.truncate(sys.argv[3], 100);"
        "b = [r.id for r in m.search(q, 9)]; assert m._base is None and a == b; print('fine')"
    )
    command = [sys.executable, "-c", code, _fake.__file__, str(path), str(index_of(path))]
    done = subprocess.run(command, capture_output=True, text=True, env=_fake.environment(), check=False)
    assert done.stdout == "fine\n", (done.returncode, done.stderr)


FULL = """
import resource, sys, runpy
t = runpy.run_path(sys.argv[1])
m = t['MotionMemory'].open(sys.argv[2], index_threshold=40)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
try:
    {'add': lambda: m.add(t['clip'](n) for n in range(500, 900)), 'compact': m.compact, 'refresh': m.refresh,
     'export': lambda: m.export_file(sys.argv[2] + '/out')}[sys.argv[3]]()
    print('done')
except Exception as error:
    print(type(error).__name__, error)
try:
    print([r.id for r in m.search(t['query'](), 9)])
except Exception as error:
    print('[]' if int(sys.argv[4]) < 40_000 and 'Free space' in str(error) else error)  # no room for SQLite's shared memory
"""


@pytest.mark.parametrize("what", ["add", *(pytest.param(what, marks=SLOW) for what in ("refresh", "compact", "export"))])
def test_a_full_disk_loses_nothing(tmp_path: Path, what: str) -> None:
    """The kernel refuses to let any file grow beyond a size, as a full disk does."""
    path = filled(tmp_path / "m", 150)
    want = [number for number, _ in ranked(150, query())[:9]]
    for size in (3000, 20_000, 40_000, 60_000):
        command = [sys.executable, "-c", FULL, _fake.__file__, str(path), what, str(size)]
        done = subprocess.run(command, capture_output=True, text=True, env=_fake.environment(), check=False)
        assert done.returncode == 0, done.stderr
        said, found = done.stdout.strip().split("\n")
        assert json.loads(found) in (want, [])
        assert said == "done" or said.startswith("MemoryStoreError") and ("space" in said or "damaged" not in said), said
        with MotionMemory.open(path, True, index_threshold=THRESHOLD) as memory:
            assert len(memory) == 150 and not [text for text in memory.verify() if "index" not in text]
            assert [r.id for r in memory.search(query(), 9)] == want
    assert not (path / "out").exists() and not list(path.glob(".*.partial"))


WRITER = """
import sys, runpy
t = runpy.run_path(sys.argv[1])
with t['MotionMemory'].open(sys.argv[2], index_threshold=40) as m:
    for n in range(int(sys.argv[3]), int(sys.argv[3]) + 40):
        m.add([t['clip'](n)])
        if n % 20 == 0:
            m.refresh()
"""


def test_two_writers_and_a_reader_during_rebuilds(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 100)
    seen, searches = 100, 0
    with (
        contextlib.ExitStack() as stack,
        MotionMemory.open(path, True, index_threshold=THRESHOLD) as reader,
        MotionMemory.open(path, index_threshold=THRESHOLD) as writer,
    ):
        children = []
        for first in (1000, 2000):
            command = [sys.executable, "-c", WRITER, _fake.__file__, str(path), str(first)]
            child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_fake.environment())
            children.append(stack.enter_context(child))
        while any(child.poll() is None for child in children) or not searches:
            if searches % 20 == 0:
                (path / "index.json").unlink(missing_ok=True)
                writer.refresh()
            here = reader.get(reader.ids().tolist())
            found = reader.search_record("motion", clip(5).record["motion"], 1)
            assert len(here) >= seen and found[0].id == 6
            seen, searches = len(here), searches + 1
            assert reader.search(clip(7).embedding, 1)[0].id == 8
            assert writer.search(clip(9).embedding, 1)[0].id == 10
        for child in children:
            assert child.wait() == 0, child.communicate()[1]
        assert len(reader) == 180
    with MotionMemory.open(path, index_threshold=THRESHOLD) as memory:
        memory.refresh()
        assert memory.verify() == []
        captions = {r.caption for r in memory.get(memory.ids().tolist())}
    assert captions == {f"caption {n}" for n in [*range(100), *range(1000, 1040), *range(2000, 2040)]}


def test_writers_that_begin_together_all_write(tmp_path: Path) -> None:
    """The first write of each turns the file over to a log beside it, and SQLite refuses one of two that do it at once."""
    for turn in range(8):
        path = filled(tmp_path / f"m{turn}", 1)
        ready = threading.Barrier(4)
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(4) as pool:
            writers = [stack.enter_context(MotionMemory.open(path)) for _ in range(4)]

            def write(writer: MotionMemory, ready: threading.Barrier = ready) -> list[int]:
                ready.wait()
                return writer.add([clip(5)])

            assert sorted(pool.map(write, writers)) == [[2], [3], [4], [5]]


def test_a_writer_that_waits_too_long_says_so(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 3)
    with MotionMemory.open(path) as a, MotionMemory.open(path) as b:
        assert b._db is not None
        b._db.execute("PRAGMA busy_timeout=50")
        with a._writing(), pytest.raises(MemoryStoreError, match="being written by another process"):
            b.add([clip(4)])
        assert b.add([clip(4)]) == [4] == a.ids()[3:].tolist()


def test_odd_texts_and_numbers(tmp_path: Path) -> None:
    """SQL metacharacters, 100,000 characters, other scripts and NaN: kept as they are, or refused with nothing kept."""
    texts = ["'; DROP TABLE clips; --", '"%_\\', "\x00 in the middle", "映像 видео 🎬", "a" * 100_000, "{}[]:,"]
    path = tmp_path / "ünï 映像 '; --"
    with MotionMemory.create(path, **_fake.KEPT, index_threshold=10) as memory:
        memory.add(clip(i, caption=t, source=t, dataset=t, metadata={t: t}) for i, t in enumerate(texts * 3))
        for number, text in enumerate(texts, 1):
            found = memory.search(clip(number - 1).embedding, 3, Search(where={text: text, "dataset": [text]}))
            assert found[0].id == number and found[0].caption == found[0].source == found[0].dataset == text
            assert found[0].metadata == {text: text} and len(memory.ids({text: text})) == 3
            assert text not in [r.source for r in memory.search(query(), 15, Search(exclude_source=text))]
        for value in (np.nan, np.inf):
            with pytest.raises(InputError, match="NaN or infinite"):
                memory.add([clip(90), clip(91, embedding=np.full(16, value, np.float32))])
            with pytest.raises(InputError, match="NaN or infinite"):
                memory.search(np.full(16, value, np.float32), 1)
        memory.remove([2])
        memory.compact()
        assert len(memory) == 17 and memory.verify() == []


if __name__ == "__main__":
    if sys.argv[1] in KINDS:
        work(sys.argv[1], sys.argv[2])
    import tempfile

    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            kill_rounds(Path(folder), kind, int(sys.argv[1]))
        print(f"{kind}: {sys.argv[1]} kills, nothing lost, no wrong answer", flush=True)
    os._exit(0)
