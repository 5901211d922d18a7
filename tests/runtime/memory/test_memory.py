"""The motion memory: what goes in comes out, nothing half-written, damage and misuse said in one sentence."""

from __future__ import annotations

import errno
import json
import os
import runpy
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from motionrt.runtime.errors import InputError, MemoryStoreError
from motionrt.runtime.files import sealed
from motionrt.runtime.memory import index as memory_index
from motionrt.runtime.memory import memory as memory_module
from motionrt.runtime.memory.memory import MotionMemory, Reference, Search

_fake = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parents[3] / "tests/helpers/fake_memory.py")))
D, E, KEPT, M = _fake.D, _fake.E, _fake.KEPT, _fake.M
clip, digest, environment, filled = _fake.clip, _fake.digest, _fake.environment, _fake.filled
index_of, names, query, ranked, stamped = _fake.index_of, _fake.names, _fake.query, _fake.ranked, _fake.stamped


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that other users can reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    for folder in [path, *(item for item in path.rglob("*") if item.is_dir())]:
        folder.chmod(0o755)
    shutil.rmtree(path)


# Finding


@pytest.mark.parametrize("threshold", [1000, 10], ids=["exact", "index"])
@pytest.mark.parametrize("without", [None, "video3.mp4", "nothing.mp4"])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_search_gives_the_nearest_first(tmp_path: Path, threshold: int, without: str | None, k: int) -> None:
    filled(tmp_path / "m", 60)
    q = 3 * query()  # cosine: the length of the query does not matter
    with MotionMemory.open(tmp_path / "m", index_threshold=threshold) as memory:
        found = memory.search(q, k, Search(exclude_source=without))
    want = ranked(60, q, without)[:k]
    assert [r.id for r in found] == [number for number, _ in want]
    np.testing.assert_allclose([r.score for r in found], [score for _, score in want], atol=1e-6)
    assert ("index.usearch" in names(tmp_path / "m")) == (threshold == 10)


def test_a_reference_is_the_clip_that_was_added(tmp_path: Path) -> None:
    with MotionMemory.create(tmp_path / "m", **KEPT) as memory:
        assert len(memory) == 0 and memory.add([clip(i) for i in range(3)]) == [1, 2, 3] and len(memory) == 3
    with MotionMemory.open(tmp_path / "m") as memory:
        found, want = memory.search(clip(1).embedding, 1)[0], clip(1)
        again = memory.get([3, 2, 2])
    assert isinstance(found, Reference) and found.score == pytest.approx(1)
    assert (found.id, found.caption, found.source, found.start, found.duration) == (
        2, want.caption, want.source, want.start, want.duration,
    )  # fmt: skip
    for name in ("motion", "appearance"):
        value = found.record[name]
        assert value.dtype == np.float32 and value.shape == (M, D) and value.flags.writeable
        assert np.array_equal(value, want.record[name].astype(np.float16).astype(np.float32))
    assert [r.id for r in again] == [3, 2, 2] and np.isnan(again[0].score)


def test_equal_captions_come_in_the_order_of_their_ids(tmp_path: Path) -> None:
    same = query(1)
    for threshold in (100, 2):
        path = tmp_path / str(threshold)
        with MotionMemory.create(path, **KEPT, index_threshold=threshold) as memory:
            memory.add(clip(i, embedding=same) for i in range(9))
            assert [r.id for r in memory.search(same, 4)] == [1, 2, 3, 4]


def test_an_index_that_finds_too_little_is_not_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MotionMemory.open(filled(tmp_path / "m", 30), index_threshold=10) as memory:
        memory.refresh()
        monkeypatch.setattr(memory_index.Base, "nearest", lambda self, query, count: (np.array([4]), None))
        assert [r.id for r in memory.search(query(), 3)] == [n for n, _ in ranked(30, query())[:3]]


@pytest.mark.parametrize("threshold", [100, 2])
def test_too_few_clips_is_a_plain_error(tmp_path: Path, threshold: int) -> None:
    with MotionMemory.create(tmp_path / "m", **KEPT, index_threshold=threshold) as memory:
        with pytest.raises(MemoryStoreError, match="1 references .* holds no clips.*motionrt memory add"):
            memory.search(query(), 1)
        memory.add(clip(i, source="a" if i < 3 else "b") for i in range(5))
        with pytest.raises(MemoryStoreError, match="6 references .* holds 5 clips"):
            memory.search(query(), 6)
        with pytest.raises(MemoryStoreError, match="3 of them from the excluded a"):
            memory.search(query(), 3, Search(exclude_source="a"))
        assert len(memory.search(query(), 2, Search(exclude_source="a"))) == 2


@pytest.mark.parametrize("vector", [
    np.full(E, np.nan, np.float32), np.full(E, np.inf, np.float32), np.zeros(E, np.float32),
    np.ones(E + 1, np.float32),
    np.ones((1, E), np.float32), np.ones(E, np.int64), np.array(["x"] * E), None,
], ids=["nan", "inf", "zero", "long", "rank", "int", "text", "none"])  # fmt: skip
def test_impossible_embeddings_are_refused(tmp_path: Path, vector: np.ndarray) -> None:
    with MotionMemory.open(filled(tmp_path / "m", 3)) as memory:
        with pytest.raises(InputError):
            memory.search(vector, 1)
        with pytest.raises(InputError):
            memory.add([clip(7), clip(8, embedding=vector)])
        assert len(memory) == 3


@pytest.mark.parametrize("k", [0, -1, 1.5, True, None])
def test_impossible_k_is_refused(tmp_path: Path, k: int) -> None:
    with MotionMemory.open(filled(tmp_path / "m", 3)) as memory, pytest.raises(InputError, match="of references"):
        memory.search(query(), k)


@pytest.mark.parametrize("changes", [
    {"motion": np.full((M, D), np.nan, np.float32)}, {"appearance": np.zeros((D, M), np.float32)},
    {"motion": np.full((M, D), 1e5, np.float32)}, {"motion": np.zeros((1, M, D), np.float32)}, {"caption": "  "},
    {"caption": None}, {"source": "bad\udcff.mp4"}, {"duration": float("nan")}, {"start": -1.0}, {"metadata": {"a": 1}},
], ids=["nan", "swapped", "float16", "rank", "blank", "none", "unicode", "duration", "start", "metadata"])  # fmt: skip
def test_impossible_clips_are_refused_and_nothing_is_added(tmp_path: Path, changes: dict[str, object]) -> None:
    with MotionMemory.open(filled(tmp_path / "m", 3)) as memory:
        with pytest.raises(InputError, match="clip 1"):
            memory.add([clip(7), clip(8, **changes)])
        assert len(memory) == 3 and memory.add([clip(9)]) == [4]


def test_an_error_in_the_middle_of_adding_adds_nothing(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 3)
    with sqlite3.connect(path / "memory.sqlite") as db:
        when = "BEFORE INSERT ON clips WHEN NEW.caption = 'caption 8'"
        db.execute(f"CREATE TRIGGER t {when} BEGIN SELECT RAISE(FAIL, 'x'); END")
    db.close()
    with MotionMemory.open(path) as memory:
        with pytest.raises(MemoryStoreError):
            memory.add([clip(7), clip(8), clip(9)])
        assert len(memory) == 3 and not memory.contains(clip(7).source_sha256, 7 / 8, "caption 7")


def test_contains_and_unknown_ids(tmp_path: Path) -> None:
    with MotionMemory.open(filled(tmp_path / "m", 3)) as memory:
        assert memory.contains(f"{2:064x}", 0.25, "caption 2")
        assert not memory.contains(f"{2:064x}", 0.5, "caption 2") and not memory.contains(f"{2:064x}", 0.25, "other")
        with pytest.raises(MemoryStoreError, match="has no clip 4"):
            memory.get([1, 4])


def test_check_compares_fingerprints(tmp_path: Path) -> None:
    with MotionMemory.open(filled(tmp_path / "m", 1)) as memory:
        memory.check("a" * 64)
        with pytest.raises(MemoryStoreError, match="its fingerprint is a{12}, this bundle's is d{12}.*Use the bundle"):
            memory.check("d" * 64)
        with pytest.raises(MemoryStoreError, match="this bundle's is none"):
            memory.check("")


# Files


def test_a_closed_memory_is_one_clean_file_that_reading_leaves_alone(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 20)
    assert names(path) == ["memory.sqlite"]
    before = digest(path / "memory.sqlite")
    for readonly in (False, True):
        with MotionMemory.open(path, readonly) as memory:
            memory.search(query(), 3)
            memory.refresh()
        assert names(path) == ["memory.sqlite"] and digest(path / "memory.sqlite") == before
    assert (path / "memory.sqlite").read_bytes()[18:20] == b"\1\1"  # not in WAL mode, so it opens anywhere


def test_equal_contents_give_equal_state(tmp_path: Path) -> None:
    states, history = [], "SELECT generation, content, last, clips FROM history"
    for name in ("a", "b"):
        with sqlite3.connect(filled(tmp_path / name, 5) / "memory.sqlite") as db:
            states.append((db.execute("SELECT * FROM meta").fetchall(), db.execute(history).fetchall()))
        db.close()
    assert states[0] == states[1] and states[0][1][-1][0] == 1


def test_create_refuses_to_overwrite_and_impossible_dims(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 2)
    with pytest.raises(MemoryStoreError, match="already holds a motion memory"):
        MotionMemory.create(path, **KEPT)
    assert len(MotionMemory.open(path)) == 2
    for change in ({"embedding": 0}, {"embedding": 2.5}, {"record": ()}, {"fingerprint": None}):
        with pytest.raises(InputError, match="of a motion memory|a motion memory of"):
            MotionMemory.create(tmp_path / "n", **KEPT | change)
    (tmp_path / "file").write_text("x")
    with pytest.raises(MemoryStoreError, match="cannot"):
        MotionMemory.create(tmp_path / "file", **KEPT)
    assert not (tmp_path / "n").exists()


def test_a_read_only_directory_works(shared: Path) -> None:
    path = filled(shared / "m", 30)
    wal = filled(shared / "wal", 30)
    db = sqlite3.connect(wal / "memory.sqlite")  # as a crash right after a checkpoint leaves it
    db.execute("PRAGMA journal_mode=WAL")
    db.close()
    assert (wal / "memory.sqlite").read_bytes()[18:20] == b"\2\2"
    for folder in (path, wal):
        (folder / "memory.sqlite").chmod(0o444)
        folder.chmod(0o555)
    root = os.geteuid() == 0
    memory_index._usearch()  # imported while every file of the environment can be read
    if root:
        os.seteuid(65534)  # root could write anywhere
    try:
        for folder in (path, wal):
            for readonly in (False, True):
                for threshold in (100, 10):
                    with MotionMemory.open(folder, readonly, index_threshold=threshold) as memory:
                        assert memory.readonly
                        assert [r.id for r in memory.search(query(), 5)] == [n for n, _ in ranked(30, query())[:5]]
                        with pytest.raises(MemoryStoreError, match="read-only"):
                            memory.add([clip(1)])
        with pytest.raises(MemoryStoreError, match="(?i)permission"):
            MotionMemory.create(path / "new", **KEPT)
    finally:
        if root:
            os.seteuid(0)
    assert names(path) == names(wal) == ["memory.sqlite"]


def test_clips_survive_a_kill_after_add(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 3)
    code = (
        "import os, sys, runpy; t = runpy.run_path(sys.argv[1]); m = t['MotionMemory'].open(sys.argv[2]);"
        "m.add([t['clip'](5)]); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, _fake.__file__, str(path)], check=False, env=environment())
    assert done.returncode == 9
    assert "memory.sqlite-wal" in names(path)
    with MotionMemory.open(path, readonly=True) as memory:
        assert len(memory) == 4
    with MotionMemory.open(path) as memory:
        assert len(memory) == 4 and memory.search(clip(5).embedding, 1)[0].caption == "caption 5"
    assert names(path) == ["memory.sqlite"]


def test_readers_see_what_a_writer_adds_and_the_last_one_tidies_up(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 30)
    for threshold in (1000, 10):
        with MotionMemory.open(path, True, index_threshold=threshold) as reader, MotionMemory.open(path) as writer:
            reader.search(query(), 1)
            number = writer.add([clip(900, embedding=-query())])[0]
            assert reader.search(-query(), 1)[0].id == number and len(reader) == 31
            assert writer.remove([number, number, 999]) == 1
            assert reader.search(-query(), 1)[0].id != number and len(reader) == 30
    with MotionMemory.open(path) as memory:
        assert memory.add([clip(1)])
    assert not {"memory.sqlite-wal", "memory.sqlite-shm"} & set(names(path))


def test_threads_may_share_a_memory(tmp_path: Path) -> None:
    wrong: list[object] = []
    with MotionMemory.open(filled(tmp_path / "m", 40), index_threshold=10) as memory:

        def work(seed: int) -> None:
            try:
                got = [r.id for r in memory.search(query(seed), 5)]
                wrong.extend([] if got == [n for n, _ in ranked(40, query(seed))[:5]] else [got])
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_closed_memory_says_so(tmp_path: Path) -> None:
    memory = MotionMemory.open(filled(tmp_path / "m", 1))
    memory.close()
    memory.close()
    for call in (lambda: memory.search(query(), 1), lambda: memory.add([clip(1)]), lambda: len(memory), memory.refresh):
        with pytest.raises(MemoryStoreError, match="is closed"):
            call()


# Damage


def test_missing_and_damaged_truth(tmp_path: Path) -> None:
    with pytest.raises(MemoryStoreError, match="there is no motion memory at .*motionrt memory create"):
        MotionMemory.open(tmp_path / "none")
    good = filled(tmp_path / "m", 200) / "memory.sqlite"
    data = good.read_bytes()
    random = np.random.default_rng(0).bytes
    for content, words in {
        b"": "damaged", b"hello": "damaged", random(9000): "damaged", data[:16] + random(len(data) - 16): "damaged",
        data[:4096] + random(len(data) - 4096): "damaged", data[: len(data) // 2]: "damaged",
    }.items():  # fmt: skip
        good.write_bytes(content)
        with pytest.raises(MemoryStoreError, match=words), MotionMemory.open(good.parent) as memory:
            memory.search(query(), 1)
            memory.get(range(1, 201))
    good.unlink()
    other = sqlite3.connect(good)
    other.execute("CREATE TABLE meta (key, value)")
    other.close()
    with pytest.raises(MemoryStoreError, match="is not a motion memory"):
        MotionMemory.open(good.parent)


@pytest.mark.parametrize("change, words", [
    ("PRAGMA user_version=9", "schema 9; this MotionRT reads schema 5 .a newer MotionRT wrote it: upgrade"),
    ("DELETE FROM meta", "damaged"), ("UPDATE meta SET layout='['", "damaged"), ("UPDATE meta SET checksum=x'00'", "damaged"),
    ("UPDATE history SET clips='x'", "history ends in"), ("DELETE FROM history", "damaged"), ("DROP TABLE clips", "damaged"),
    ("UPDATE records SET record=x'00'", "damaged: clip 2 is not what was written"),
    ("UPDATE records SET record=NULL", "damaged: clip 2 has no record"),
    ("UPDATE records SET record='text'", "damaged: clip 2 is not what was written"),
    ("UPDATE vectors SET embedding=x'0000'", "2 bytes of embedding"),
    (f"UPDATE records SET record=x'{'0000' * M * D + '007e' * M * D}'", "clip 2 is not what was written"),
    (f"UPDATE vectors SET embedding=x'{'0000c07f' * E}'", "the checksum of its embedding differs; clip 2 is"),
])  # fmt: skip
def test_damage_inside_the_truth(tmp_path: Path, change: str, words: str) -> None:
    path = filled(tmp_path / "m", 3)
    with sqlite3.connect(path / "memory.sqlite") as db:
        db.execute(change)
    db.close()
    with pytest.raises(MemoryStoreError, match=words), MotionMemory.open(path) as memory:
        memory.search(clip(1).embedding, 1)


def test_an_index_that_cannot_be_trusted_is_made_again(tmp_path: Path) -> None:
    path, q = filled(tmp_path / "m", 300), query()
    sidecar = path / "index.json"
    want = [number for number, _ in ranked(300, q)[:5]]

    def search() -> list[int]:
        with MotionMemory.open(path, index_threshold=10) as memory:
            return [r.id for r in memory.search(q, 5)]

    assert search() == want
    index = index_of(path)
    good, record = index.read_bytes(), json.loads(sidecar.read_text())
    assert record["sha256"] == digest(index) and record["count"] == 300 and record["generation"] == 1
    stamp = index.stat().st_mtime_ns
    assert search() == want and index.stat().st_mtime_ns == stamp  # a good one is kept
    flipped = np.frombuffer(good, np.uint8).copy()
    flipped[np.random.default_rng(0).integers(len(good) // 2, len(good), 400)] ^= 255  # loading this crashes USearch
    for content in (flipped.tobytes(), good[:1000], b"", None):
        index.unlink()
        if content is not None:
            index.write_bytes(content)
        assert search() == want and index.read_bytes() == good
    good_sidecar = sidecar.read_text()
    record = json.loads(good_sidecar)
    for change in ("", "{}", "[1]", {"sha256": "0" * 64, "stamp": []}, {"count": 299}, {"content": "0"}, {"format": 1},
                   {"generation": 7}, {"file": "../m/" + index.name}, {"file": "gone"}):  # fmt: skip
        sidecar.write_text(change if isinstance(change, str) else json.dumps(sealed(record | change)))
        assert search() == want
        assert json.loads(sidecar.read_text()) == sealed(record | {"stamp": list(stamped(index))})
    filled(tmp_path / "other", 0)  # another memory with as many clips and changes
    with MotionMemory.open(tmp_path / "other", index_threshold=10) as other:
        other.add(clip(i + 1000) for i in range(300))
    shutil.copy(tmp_path / "other" / "memory.sqlite", path / "memory.sqlite")
    with MotionMemory.open(path, index_threshold=10) as memory:
        assert memory.search(clip(1007).embedding, 1)[0].caption == "caption 1007"


def test_onnxruntime_can_be_imported_after_an_index_was_used(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    code = (
        "import sys; from motionrt.runtime.memory.memory import MotionMemory as M; m = M.open(sys.argv[1], index_threshold=2);"
        "m.refresh(); import onnxruntime"
    )
    done = subprocess.run([sys.executable, "-c", code, str(filled(tmp_path / "m", 5))], check=False, env=environment())
    assert done.returncode == 0 and "index.usearch" in names(tmp_path / "m")


def test_refresh_makes_the_index_that_a_large_memory_wants(tmp_path: Path) -> None:
    for threshold, files in ((3, ["memory.sqlite"]), (2, ["index.json", "index.usearch", "memory.sqlite"])):
        with MotionMemory.open(filled(tmp_path / str(threshold), 3), index_threshold=threshold) as memory:
            memory.refresh()
        assert names(tmp_path / str(threshold)) == files
    assert memory_module.INDEX_THRESHOLD == 5_000


# A full disk


def test_a_full_disk_adds_nothing(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 3)
    with MotionMemory.open(path) as memory:
        assert memory._db is not None
        pages = memory._db.execute("PRAGMA page_count").fetchone()[0]
        memory._db.execute(f"PRAGMA max_page_count={pages + 2}")  # SQLite's own SQLITE_FULL, in the middle of the clips
        with pytest.raises(MemoryStoreError, match="disk is full.*Nothing of this change was kept. Free space"):
            memory.add(clip(i) for i in range(500))
        assert len(memory) == 3
        memory._db.execute("PRAGMA max_page_count=1000000")
        assert memory.add([clip(4)]) == [4]
    assert names(path) == ["memory.sqlite"]


def test_a_full_disk_keeps_create_and_the_index_from_half_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = filled(tmp_path / "m", 30)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MemoryStoreError, match="No space left on device.*Free space"):
        MotionMemory.create(tmp_path / "new", **KEPT)
    assert names(tmp_path / "new") == []
    with MotionMemory.open(path, index_threshold=10) as memory:  # the index is derived: the search still answers
        assert [r.id for r in memory.search(query(), 5)] == [n for n, _ in ranked(30, query())[:5]]
    assert names(path) == ["memory.sqlite"] and "could not be kept" in caplog.text


# Places


def test_a_memory_stays_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened by a relative path, whatever the working directory becomes."""
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with MotionMemory.create("m", **KEPT, index_threshold=50) as memory:
        memory.add(clip(i) for i in range(100))
        memory.refresh()
        monkeypatch.chdir("other")
        assert memory.search(query(), 1)[0].id == ranked(100, query())[0][0]
        assert memory.verify() == [] and memory.stats().bytes_index > 0
        memory.add(clip(i) for i in range(100, 5000))
        memory.compact()
        memory.export_file("one")
    with MotionMemory.import_file("one", "n") as other:
        monkeypatch.chdir(tmp_path)
        assert len(other) == 5000 and other.verify() == []
    assert names(tmp_path / "other") == ["n", "one"] and names(tmp_path) == ["m", "other"]


KILLED = """
import os, sys, runpy
t = runpy.run_path(sys.argv[1])
m = t['MotionMemory'].create(sys.argv[2], **t['KEPT'])
m.add(t['clip'](n) for n in range(8))
os._exit(9)
"""


@pytest.mark.parametrize("suffix", ["-wal", "-journal"])
def test_nothing_is_made_beside_the_log_of_another_memory(tmp_path: Path, suffix: str) -> None:
    """SQLite would play it into the new file: old clips came back, and `verify` found them sound."""
    with MotionMemory.open(filled(tmp_path / "good", 9)) as memory:
        memory.export_file(tmp_path / "one")
        command = [sys.executable, "-c", KILLED, _fake.__file__, str(tmp_path / "m")]
        assert subprocess.run(command, env=environment(), check=False).returncode == 9
        (tmp_path / "m" / "memory.sqlite").unlink()
        (tmp_path / "m" / "memory.sqlite-shm").unlink()
        log = (tmp_path / "m" / "memory.sqlite-wal").rename(tmp_path / "m" / f"memory.sqlite{suffix}")
        shutil.copy(log, tmp_path / f"two{suffix}")
        words = f"{suffix} is left of another memory, whose memory.sqlite is gone. Put that file back"
        for call in (
            lambda: MotionMemory.create(tmp_path / "m", **KEPT),
            lambda: MotionMemory.import_file(tmp_path / "one", tmp_path / "m"),
        ):
            with pytest.raises(MemoryStoreError, match=words):
                call()
        with pytest.raises(MemoryStoreError, match="is left of another memory"):
            memory.export_file(tmp_path / "two")
        assert names(tmp_path / "m") == [log.name]
        log.unlink()
        assert len(MotionMemory.import_file(tmp_path / "one", tmp_path / "m")) == 9


FILLED_UP = """
import os, resource, sys, runpy
t = runpy.run_path(sys.argv[1])
m = t['MotionMemory'].open(sys.argv[2])
m.add(t['clip'](n) for n in range(100, 400))
resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(sys.argv[2] + '/memory.sqlite'), resource.RLIM_INFINITY))
m.close()
"""


def test_closing_on_a_full_disk_keeps_the_log_and_all_that_was_added(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 3)
    command = [sys.executable, "-c", FILLED_UP, _fake.__file__, str(path)]
    done = subprocess.run(command, env=environment(), check=False, capture_output=True, text=True)
    assert done.returncode == 0 and "stays beside it" in done.stderr, done.stderr
    assert (path / "memory.sqlite-wal").stat().st_size
    with MotionMemory.open(path) as memory:
        assert len(memory) == 303 and memory.verify() == []
        memory.remove([1])
    assert names(path) == ["memory.sqlite"]


@pytest.mark.parametrize("tidy", [True, False], ids=["log", "log and shared memory"])
@pytest.mark.parametrize("compacted", [True, False])
@pytest.mark.parametrize("count", [0, 9])
def test_a_log_that_is_of_another_memory_is_noticed(tmp_path: Path, count: int, compacted: bool, tidy: bool) -> None:
    """A backup that was put back over the file, while the log that a killed writer left is of another memory."""
    path = filled(tmp_path / "m", 9)
    code = f"""
import os, sys, runpy
t = runpy.run_path(sys.argv[1])
m = t['MotionMemory'].open(sys.argv[2])
m.add(t['clip'](n) for n in range(8))
{"m.compact()" if compacted else ""}
os._exit(9)
"""
    command = [sys.executable, "-c", code, _fake.__file__, str(path)]
    assert subprocess.run(command, env=environment(), check=False).returncode == 9
    own = (path / "memory.sqlite").read_bytes()
    shutil.copy(filled(tmp_path / "other", count) / "memory.sqlite", path / "memory.sqlite")
    if tidy:
        (path / "memory.sqlite-shm").unlink()
    for readonly in (True, False):
        with pytest.raises(MemoryStoreError, match="memory.sqlite-wal is of another memory than memory.sqlite beside it"):
            MotionMemory.open(path, readonly)
    with pytest.raises(MemoryStoreError, match="is of another memory"):
        MotionMemory.import_file(path / "memory.sqlite", tmp_path / "n")
    (path / "memory.sqlite").write_bytes(own)
    with MotionMemory.open(path) as memory:  # looking did not harm it
        assert len(memory) == 17 and memory.verify() == []


def test_a_log_that_is_older_than_its_file_is_noticed(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 9)
    shutil.copytree(path, tmp_path / "newer")
    with MotionMemory.open(tmp_path / "newer") as memory:
        for number in range(5):
            memory.add([clip(number)])
    code = "t = runpy.run_path(sys.argv[1]); m = t['MotionMemory'].open(sys.argv[2]); m.add([t['clip'](7)]); os._exit(9)"
    command = [sys.executable, "-c", f"import os, sys, runpy; {code}", _fake.__file__, str(path)]
    assert subprocess.run(command, env=environment(), check=False).returncode == 9
    shutil.copy(tmp_path / "newer" / "memory.sqlite", path / "memory.sqlite")
    for readonly in (True, False):
        with pytest.raises(MemoryStoreError, match="memory.sqlite-wal is of an older state than memory.sqlite beside it"):
            MotionMemory.open(path, readonly)
    (path / "memory.sqlite-wal").unlink()
    (path / "memory.sqlite-shm").unlink()
    assert len(MotionMemory.open(path)) == 14
