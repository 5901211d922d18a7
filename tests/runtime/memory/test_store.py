"""The file of a motion memory: older and newer schemas, int8 tokens, one-file export, looking for damage, compaction."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from motionrt.runtime.errors import InputError, MemoryStoreError
from motionrt.runtime.memory.memory import MotionMemory
from motionrt.runtime.memory.rows import Layout

_fake = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parents[3] / "tests/helpers/fake_memory.py")))
D, DIGESTS, DIMS, E, M = _fake.D, _fake.DIGESTS, _fake.DIMS, _fake.E, _fake.M
clip, digest, filled, index_of, names = _fake.clip, _fake.digest, _fake.filled, _fake.index_of, _fake.names
query, ranked = _fake.query, _fake.ranked
DEMO = Path(__file__).resolve().parents[3] / "demo" / "memory"


def old_memory(path: Path, count: int) -> Path:
    """A memory as the first version wrote it."""
    path.mkdir()
    with closing(sqlite3.connect(path / "memory.sqlite")) as db:
        db.executescript(
            f"PRAGMA application_id={0x4D52544D}; PRAGMA user_version=1;"
            "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);"
            "CREATE TABLE clips (id INTEGER PRIMARY KEY, caption TEXT NOT NULL, source TEXT NOT NULL, start REAL NOT NULL,"
            "duration REAL NOT NULL, fps REAL NOT NULL, source_sha256 TEXT NOT NULL, metadata TEXT NOT NULL,"
            "embedding BLOB NOT NULL, motion BLOB NOT NULL, appearance BLOB NOT NULL);"
            "CREATE INDEX clips_source ON clips (source); CREATE INDEX clips_sha256 ON clips (source_sha256);"
        )
        sizes = {name: [size] if isinstance(size, int) else size for name, size in DIMS.items()}
        meta = {"dims": json.dumps(sizes), "digests": json.dumps(DIGESTS), "generation": "3", "content": "ab" * 32}
        db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        for number in range(count):
            c = clip(number)
            metadata = json.dumps({"licence": "it's", **({"dataset": "pets"} if number % 2 else {})})
            blobs = (c.embedding.tobytes(), c.motion.astype("<f2").tobytes(), c.appearance.astype("<f2").tobytes())
            row = (c.caption, c.source, c.start, c.duration, c.fps, c.source_sha256, metadata, *blobs)
            db.execute(f"INSERT INTO clips VALUES (NULL{', ?' * 10})", row)
        db.commit()
    return path


def schema(path: Path) -> int:
    with closing(sqlite3.connect(path / "memory.sqlite")) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def check_contents(memory: MotionMemory, count: int) -> None:
    assert len(memory) == count and memory.digests == DIGESTS
    assert [r.id for r in memory.search(query(), 5)] == [n for n, _ in ranked(count, query())[:5]]
    odd = [n + 1 for n in range(count) if n % 2]
    assert memory.ids({"dataset": "pets"}).tolist() == odd and memory.ids({"licence": "it's"}).size == count
    assert [r.id for r in memory.search(query(), 3, where={"dataset": "pets"})] == [
        n for n, _ in ranked(count, query()) if n in odd
    ][:3]
    assert memory.search_tokens("motion", clip(7).motion, 1, exclude_source="none")[0].caption == "caption 7"
    found = memory.get([4])[0]
    assert (found.caption, found.source, found.dataset, found.metadata) == (
        "caption 3",
        "video3.mp4",
        "pets",
        {"licence": "it's"},
    )
    assert np.array_equal(found.motion, clip(3).motion.astype(np.float16).astype(np.float32))
    assert memory.contains(f"{2:064x}", 0.25, "caption 2") and memory.stats().tokens == "float16"
    assert memory.stats().datasets == {"": count - len(odd), "pets": len(odd)}


# Schemas


@pytest.mark.parametrize("threshold", [1000, 10], ids=["exact", "index"])
def test_an_old_memory_reads_as_it_is_and_the_first_change_migrates_it(tmp_path: Path, threshold: int) -> None:
    path = old_memory(tmp_path / "m", 40)
    before = digest(path / "memory.sqlite")
    for readonly in (True, False):
        with MotionMemory.open(path, readonly, index_threshold=threshold) as memory:
            check_contents(memory, 40)
            assert memory.verify() == ([] if threshold > 40 or not readonly else [MISSING])
            assert memory.add([]) == [] if not readonly else True
    assert digest(path / "memory.sqlite") == before and schema(path) == 1
    with MotionMemory.open(path, True, index_threshold=threshold) as reader:
        check_contents(reader, 40)
        with MotionMemory.open(path, index_threshold=threshold) as other, MotionMemory.open(path) as memory:
            with pytest.raises(InputError):
                memory.add([clip(40), clip(41, caption="")])
            assert memory.add([clip(40)]) == [41]
            for opened in (memory, reader, other):  # those opened before see the change and the new schema
                assert len(opened) == 41 and opened.get([41])[0].caption == "caption 40"
            assert other.remove([41]) == 1 and memory.remove([7, 41]) == 1
            assert memory.add([clip(6, metadata={"licence": "it's"})]) == [42]  # ids are never given again
    assert schema(path) == 2
    with MotionMemory.open(path) as memory:
        assert memory.verify() == [] and memory.stats().generation == 7
        assert len(memory) == 40 and memory.get([4])[0].metadata == {"licence": "it's"}


MISSING = "the index is missing; it will be made when a writer needs it"


def test_a_failed_change_leaves_an_old_memory_old(tmp_path: Path) -> None:
    path = old_memory(tmp_path / "m", 20)
    with MotionMemory.open(path) as memory:
        assert memory._db is not None
        pages = memory._db.execute("PRAGMA page_count").fetchone()[0]
        memory._db.execute(f"PRAGMA max_page_count={pages + 1}")
        with pytest.raises(MemoryStoreError, match="disk is full.*Nothing was changed"):
            memory.add([clip(20)])
        check_contents(memory, 20)
        memory._db.execute("PRAGMA max_page_count=1000000")
        assert memory.add([clip(20)]) == [21] and memory.verify() == []
    assert schema(path) == 2


def test_migrations_of_two_writers_meet(tmp_path: Path) -> None:
    path = old_memory(tmp_path / "m", 12)
    with MotionMemory.open(path) as a, MotionMemory.open(path) as b:
        assert (a.add([clip(12)]), b.add([clip(13)]), a.remove([1]), b.remove([1])) == ([13], [14], 1, 0)
        assert a.ids().tolist() == b.ids().tolist() == list(range(2, 15))


def test_the_memory_of_the_demo_opens_and_migrates(tmp_path: Path) -> None:
    before = {file.name: digest(file) for file in DEMO.iterdir()}
    with MotionMemory.open(DEMO, readonly=True) as memory:
        reference = memory.search_tokens("motion", memory.get([5])[0].motion, 3)
        assert reference[0].id == 5 and memory.verify() == []
        everything = memory.get(memory.ids().tolist())
    assert {file.name: digest(file) for file in DEMO.iterdir()} == before
    shutil.copytree(DEMO, tmp_path / "m")
    with MotionMemory.open(tmp_path / "m") as memory:
        memory.compact()
        for old, new in zip(everything, memory.get(memory.ids().tolist()), strict=True):
            assert (old.id, old.caption, old.source, old.start) == (new.id, new.caption, new.source, new.start)
            assert np.array_equal(old.motion, new.motion) and np.array_equal(old.appearance, new.appearance)
        assert memory.verify() == []
    assert schema(tmp_path / "m") == 2


# Tokens


@pytest.mark.parametrize("kind, step", [("float16", 2**-11), ("int8", 0.5 / 127)])
def test_tokens_come_back_to_the_precision_of_their_kind(tmp_path: Path, kind: str, step: float) -> None:
    tokens = np.random.default_rng(0).standard_normal((M, D)).astype(np.float32) * np.array([[1], [1000], [0]], np.float32)
    with MotionMemory.create(tmp_path / "m", digests=DIGESTS, dims=DIMS, tokens=kind) as memory:
        memory.add([clip(0, motion=tokens, appearance=-tokens)])
    with MotionMemory.open(tmp_path / "m") as memory:
        found = memory.get([1])[0]
        assert memory.stats().tokens == kind and memory.verify() == [] and found.motion.flags.writeable
    largest = np.abs(tokens).max(axis=1, keepdims=True)
    assert (np.abs(found.motion - tokens) <= step * largest * 1.001).all()
    assert np.array_equal(found.appearance, -found.motion) and not found.motion[2].any()
    np.testing.assert_allclose(np.abs(found.motion).max(axis=1), largest[:, 0], rtol=1e-3)


def test_int8_takes_half_the_space_of_large_tokens(tmp_path: Path) -> None:
    dims = {"embedding": [8], "motion": [25, 256], "appearance": [25, 256]}
    sizes = {kind: Layout.checked(dims, kind).bytes_of("motion") for kind in ("float16", "int8")}
    assert sizes == {"float16": 12800, "int8": 6500}
    with pytest.raises(InputError, match="tokens of a motion memory are 'int4'; allowed is float16 or int8"):
        MotionMemory.create(tmp_path / "m", digests=DIGESTS, dims=DIMS, tokens="int4")
    assert not (tmp_path / "m").exists()


def test_dataset_is_no_metadata(tmp_path: Path) -> None:
    with MotionMemory.open(filled(tmp_path / "m", 1)) as memory, pytest.raises(InputError, match=r"Clip\(dataset=...\)"):
        memory.add([clip(1, metadata={"dataset": "x"})])


# One file


@pytest.mark.parametrize("old", [False, True], ids=["new", "schema 1"])
def test_export_and_import(tmp_path: Path, old: bool) -> None:
    path = old_memory(tmp_path / "m", 30) if old else filled(tmp_path / "m", 30)
    file = tmp_path / "out" / "everything.mrm"
    with MotionMemory.open(path) as memory:
        if not old:
            memory.add([clip(30)])
            memory.remove([31])
        memory.export_file(file)
        with pytest.raises(MemoryStoreError, match="exists"):
            memory.export_file(file)
        with MotionMemory.import_file(file, tmp_path / "n") as other:
            assert other.ids().tolist() == memory.ids().tolist() and other.verify() == []
            assert other.search(query(), 3)[2].caption == memory.search(query(), 3)[2].caption
            assert other.add([clip(50)]) == [31 if old else 32]  # an id of the other is not given again
    assert [item.name for item in file.parent.iterdir()] == [file.name]
    with pytest.raises(MemoryStoreError, match="already holds"):
        MotionMemory.import_file(file, tmp_path / "n")


def test_import_refuses_what_is_damaged_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "good"
    with MotionMemory.open(filled(tmp_path / "m", 300)) as memory:
        memory.export_file(file)
    good = file.read_bytes()
    token = clip(137).motion.astype("<f2").tobytes()
    assert good.count(token) == 1
    flipped = bytearray(good)
    flipped[good.index(token)] ^= 1  # one bit of one token: SQLite would not notice
    newer = bytearray(good)
    newer[60:64] = (99).to_bytes(4, "big")
    for content, words in ((bytes(flipped), "clip 138 is not what was written"), (good[: len(good) // 2], "damaged"),
                           (good[:40960] + bytes(4096) + good[45056:], "damaged"), (b"", "not a motion memory"),
                           (b"hello" * 999, "damaged"), (bytes(newer), "schema 99; this MotionRT reads up to 2")):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(MemoryStoreError, match=words):
            MotionMemory.import_file(file, tmp_path / "n")
        assert list((tmp_path / "n").iterdir()) == []
    with pytest.raises(MemoryStoreError, match="there is no file"):
        MotionMemory.import_file(tmp_path / "none", tmp_path / "n")
    file.write_bytes(good)
    assert len(MotionMemory.import_file(file, tmp_path / "n")) == 300


# Damage


@pytest.mark.parametrize("change, words", [
    ("UPDATE tokens SET motion = zeroblob(length(motion)) WHERE id = 3", "clip 3 is not what was written"),
    ("UPDATE vectors SET embedding = x'00' WHERE id = 4", "clip 4 has 1 bytes of embedding"),
    ("DELETE FROM vectors WHERE id = 5", "vectors has 29 rows; the history says 30"),
    ("DELETE FROM clips WHERE id = 5", "clips has 29 rows"), ("DELETE FROM tokens WHERE id = 5", "tokens has 29 rows"),
    ("DELETE FROM tags WHERE id = 6 AND key = 'dataset'", "tags has 59 rows; the clips have 60"),
    ("DELETE FROM history", "its history ends in None"),
])  # fmt: skip
def test_verify_says_what_is_wrong(tmp_path: Path, change: str, words: str) -> None:
    path = filled(tmp_path / "m", 30)
    with MotionMemory.open(path) as memory:
        assert memory.verify() == []
        with closing(sqlite3.connect(path / "memory.sqlite", isolation_level=None)) as db:
            db.execute(change)
        assert any(words in text for text in memory.verify()), memory.verify()


def test_verify_reads_the_index_even_where_its_stamp_fits(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 300)
    with MotionMemory.open(path, index_threshold=10) as memory:
        memory.refresh()
        assert memory.verify() == []
    index = index_of(path)
    content = bytearray(index.read_bytes())
    content[-1] ^= 1
    index.write_bytes(content)
    record = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps(record | {"stamp": list(_fake.stamped(index))}))  # as a failing disk would
    with MotionMemory.open(path, index_threshold=10) as memory:
        assert memory.verify() == ["the index is not what was written; remove index.json to have it made again"]
        (path / "index.json").write_text(json.dumps(record))
    with MotionMemory.open(path, True, index_threshold=10) as memory:
        assert "the index is damaged" in memory.verify()[0]


def test_an_unchanged_index_is_not_read_again_to_open_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from motionrt.runtime.memory import index as memory_index

    read: list[Path] = []
    real = memory_index.sha256_of
    monkeypatch.setattr(memory_index, "sha256_of", lambda file: [read.append(file), real(file)][1])
    path = filled(tmp_path / "m", 100)

    def search(where: Path, readonly: bool) -> int:
        read.clear()
        with MotionMemory.open(where, readonly, index_threshold=10) as memory:
            memory.search(query(), 1)
            assert memory._base is not None
        return len(read)

    assert search(path, False) == 1  # made and hashed
    assert search(path, False) == search(path, True) == 0
    shutil.copytree(path, tmp_path / "n")  # a copy is another file: hashed until a writer has stamped it
    assert [search(tmp_path / "n", readonly) for readonly in (True, True, False, True, False)] == [1, 1, 1, 0, 0]


# Compaction


@pytest.mark.parametrize("threshold", [1000, 10], ids=["exact", "index"])
def test_compact_gives_back_space_and_forgets(tmp_path: Path, threshold: int) -> None:
    path = filled(tmp_path / "m", 400)
    with MotionMemory.open(path, index_threshold=threshold) as memory, MotionMemory.open(path, True) as reader:
        memory.refresh()
        for number in range(1, 300, 10):
            memory.remove(range(number, number + 10))
        (path / ".abc.partial").write_bytes(b"x")
        os.utime(path / ".abc.partial", (0, 0))
        (path / "index-0123456789abcdef.usearch").write_bytes(b"x")
        want = [n for n, _ in ranked(400, query()) if n > 300]
        before = memory.stats()
        memory.compact()
        after = memory.stats()
        for opened in (memory, reader):
            assert [r.id for r in opened.search(query(), 9)] == want[:9] and len(opened) == 100
        assert memory.add([clip(7)]) == [401] and after.generation == before.generation
        assert memory.verify() == []
    assert (path / "memory.sqlite").stat().st_size < before.bytes_db / 2
    with closing(sqlite3.connect(path / "memory.sqlite")) as db:
        assert db.execute("SELECT COUNT(*) FROM history").fetchone()[0] == 2
    wanted = ["memory.sqlite"] if threshold > 400 else ["index.json", "index.usearch", "memory.sqlite"]
    assert [name for name in names(path) if name != "index.usearch" or threshold == 10] == wanted


def test_stats(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 30)
    with MotionMemory.open(path, index_threshold=10) as memory:
        memory.add([clip(30, dataset="pets")])
        stats = memory.stats()
        assert (stats.clips, stats.datasets, stats.generation) == (31, {"": 30, "pets": 1}, 2)
        assert (stats.bytes_index, stats.index_state) == (0, "missing")
        memory.refresh()
        assert memory.stats().index_state == "current"
        assert memory.stats().bytes_index == sum(f.stat().st_size for f in path.glob("index*"))
        memory.close()
    with MotionMemory.open(path) as memory:
        assert memory.stats().index_state == "not needed"
        assert memory.stats().bytes_db == (path / "memory.sqlite").stat().st_size


def test_contents_have_one_digest(tmp_path: Path) -> None:
    """The history names a state by a digest of all that was done, so that an index of another memory is no match."""
    contents = set()
    for name, numbers in {"a": [1, 2], "b": [2, 1], "c": [1, 2, 3]}.items():
        with MotionMemory.create(tmp_path / name, digests=DIGESTS, dims=DIMS) as memory:
            memory.add(clip(i) for i in numbers)
            memory.remove([3])
        with closing(sqlite3.connect(tmp_path / name / "memory.sqlite")) as db:
            contents |= {row[0] for row in db.execute("SELECT content FROM history ORDER BY generation DESC LIMIT 1")}
    assert len(contents) == 3 and all(len(text) == len(hashlib.sha256().hexdigest()) for text in contents)


def test_ids_are_never_given_again(tmp_path: Path) -> None:
    with MotionMemory.create(tmp_path / "m", digests=DIGESTS, dims=DIMS) as memory:
        given: list[Any] = []
        for number in range(3):
            given += memory.add([clip(number), clip(number + 10)])
            memory.remove(given)
        assert given == [1, 2, 3, 4, 5, 6] and len(memory) == 0 and memory.ids().dtype == np.int64
