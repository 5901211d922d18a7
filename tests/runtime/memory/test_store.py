"""The file of a motion memory: other schemas, records of all kinds, one-file export, looking for damage, compaction."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from motionrt.runtime.bundle.manifest import ClipSize, Dim, GraphSpec, MemorySpec, Part, Port
from motionrt.runtime.errors import BundleError, InputError, MemoryStoreError
from motionrt.runtime.files import sealed
from motionrt.runtime.memory.memory import Clip, MotionMemory, Search
from motionrt.runtime.memory.rows import Layout

_fake = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parents[3] / "tests/helpers/fake_memory.py")))
D, E, KEPT, M = _fake.D, _fake.E, _fake.KEPT, _fake.M
clip, digest, filled, index_of, names = _fake.clip, _fake.digest, _fake.filled, _fake.index_of, _fake.names
query, ranked = _fake.query, _fake.ranked
DEMO = Path(__file__).resolve().parents[3] / "demo" / "memory"


# Schemas


@pytest.mark.parametrize("number, words", [
    (1, "schema 1; this MotionRT reads schema 5 .an older MotionRT wrote it: index its videos again"), (3, "schema 3;.*older"),
    (6, "schema 6; .*a newer MotionRT wrote it: upgrade"),
])  # fmt: skip
def test_other_schemas_are_refused_in_a_plain_sentence(tmp_path: Path, number: int, words: str) -> None:
    path = filled(tmp_path / "m", 3)
    with MotionMemory.open(path) as memory:
        memory.export_file(tmp_path / "one")
    for file in (path / "memory.sqlite", tmp_path / "one"):
        with closing(sqlite3.connect(file)) as db:
            db.execute(f"PRAGMA user_version={number}")
    with pytest.raises(MemoryStoreError, match=words):
        MotionMemory.open(path)
    with pytest.raises(MemoryStoreError, match=words):
        MotionMemory.import_file(tmp_path / "one", tmp_path / "n")


def test_the_memory_of_the_demo_is_sound_and_reading_leaves_it_alone() -> None:
    before = {file.name: digest(file) for file in DEMO.iterdir()}
    with MotionMemory.open(DEMO, readonly=True) as memory:
        reference = memory.search_record("motion", memory.get([5])[0].record["motion"], 3)
        assert reference[0].id == 5 and memory.verify() == []
        assert len(memory.get(memory.ids().tolist())) == len(memory) == 192
    assert {file.name: digest(file) for file in DEMO.iterdir()} == before


def test_filters_and_fields_of_what_was_added(tmp_path: Path) -> None:
    with MotionMemory.create(tmp_path / "m", **KEPT) as memory:
        memory.add(clip(n, metadata={"licence": "it's"}, dataset="pets" if n % 2 else "") for n in range(40))
    odd = [n + 1 for n in range(40) if n % 2]
    with MotionMemory.open(tmp_path / "m") as memory:
        assert memory.ids({"dataset": "pets"}).tolist() == odd and memory.ids({"licence": "it's"}).size == 40
        found = memory.get([4])[0]
        assert (found.caption, found.source, found.dataset, found.metadata, found.fps, found.source_sha256) == (
            "caption 3", "video3.mp4", "pets", {"licence": "it's"}, 8.0, f"{3:064x}",
        )  # fmt: skip
        assert memory.stats().datasets == {"": 20, "pets": 20} and memory.stats().tokens == "float16"


# Records


PARTS = (
    Part("flow", "float32", (2, 3)), Part("mask", "bool", (5,)), Part("latents", "float16", (3, 1, 2)),
    Part("pixels", "uint8", (2, 2, 3)), Part("frames", "int64", ()),
)  # fmt: skip


def arrays(seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "flow": random.standard_normal((2, 3)), "mask": random.integers(2, size=5).astype(bool),
        "latents": np.swapaxes(random.standard_normal((2, 1, 3)), 0, 2), "pixels": random.integers(0, 256, (2, 2, 3), np.uint8),
        "frames": np.array(-(2**62)),
    }  # fmt: skip


def general(path: Path, **options: Any) -> MotionMemory:
    return MotionMemory.create(path, embedding=E, record=PARTS, fingerprint="f", **options)


def bare(number: int, **changes: Any) -> Clip:
    return replace(clip(number), **{"record": arrays(number), **changes})


@pytest.mark.parametrize("tokens", [None, "float16", "int8"])
def test_a_record_of_any_parts_comes_back(tmp_path: Path, tokens: str | None) -> None:
    with general(tmp_path / "m", tokens=tokens) as memory:
        memory.add(bare(n) for n in range(3))
        assert memory.verify() == []
        assert memory.stats().tokens == (tokens or "float16, float32")
    with MotionMemory.open(tmp_path / "m") as memory:
        assert memory.layout.record == PARTS
        for number, found in enumerate(memory.get([1, 2, 3])):
            want = arrays(number)
            assert list(found.record) == [part.name for part in PARTS]
            for part in PARTS:
                got = found.record[part.name]
                assert got.shape == part.dims and got.flags.writeable
                if part.name in ("flow", "latents"):
                    assert got.dtype == np.float32
                    kind = "float32" if part.name == "flow" and tokens is None else "float16"
                    exact = want[part.name].astype(kind).astype(np.float32)
                    limit = 0 if tokens != "int8" else np.abs(want[part.name]).max() * 0.51 / 127
                    assert np.abs(got - exact).max() <= limit + (1e-3 if tokens == "int8" else 0)
                else:
                    assert got.dtype == part.dtype and np.array_equal(got, want[part.name])
        assert memory.search_record("latents", arrays(1)["latents"], 1)[0].id == 2
        assert memory.search_record("flow", arrays(2)["flow"], 1, Search(distinct=0.99))[0].id == 3
        with pytest.raises(InputError, match="the record is searched by 'pixels'; float parts.*'flow' or 'latents'"):
            memory.search_record("pixels", arrays()["pixels"], 1)


@pytest.mark.parametrize("change, words", [
    ({"pixels": np.zeros((2, 2, 3), np.int64)}, r"`pixels` of clip 0 .* is int64 \[2, 2, 3\]; this memory accepts uint8"),
    ({"pixels": np.zeros((2, 2, 3), np.float32)}, "is float32.*accepts uint8"),
    ({"mask": np.zeros(5, np.uint8)}, "is uint8.*accepts bool"), ({"frames": np.array(1.0)}, "float64.*accepts int64"),
    ({"flow": np.zeros((2, 3), np.int64)}, "is int64.*accepts float"), ({"flow": np.zeros((3, 2))}, r"\[3, 2\]"),
    ({"latents": np.full((3, 1, 2), 65505.0)}, "exceeds 65504, the largest float16"),
    ({"latents": np.full((3, 1, 2), np.nan)}, "NaN"), ({"flow": np.full((2, 3), 1e39)}, "largest float32"),
    ({"more": np.zeros(3)}, "has flow, mask, latents, pixels, frames, more; this memory keeps flow, mask"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")  # fmt: skip
def test_what_a_record_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with general(tmp_path / "m") as memory:
        with pytest.raises(InputError, match=words):
            memory.add([bare(0, record=arrays() | change)])
        with pytest.raises(InputError, match="this memory keeps flow"):
            memory.add([bare(0, record={})])
        assert len(memory) == 0 and memory.add([bare(0, record=arrays() | {"flow": np.full((2, 3), 1e30)})]) == [1]
    with general(tmp_path / "n", tokens="float16") as memory, pytest.raises(InputError, match="largest float16"):
        memory.add([bare(0, record=arrays() | {"flow": np.full((2, 3), 1e30)})])


@pytest.mark.parametrize("record", [
    (), PARTS[:1] * 2, (Part("", "uint8", (1,)),), (Part("a", "uint8", (0,)),), (Part("a", "uint8", (1.5,)),),
], ids=["none", "twice", "nameless", "empty", "fraction"])  # fmt: skip
def test_impossible_records_are_refused_before_anything_is_written(tmp_path: Path, record: Any) -> None:
    with pytest.raises(InputError, match="parts of different names, and whole sizes from 1 on"):
        MotionMemory.create(tmp_path / "m", embedding=E, record=record, fingerprint="f")
    assert not (tmp_path / "m").exists()


def test_a_record_without_float_parts(tmp_path: Path) -> None:
    parts = (Part("pixels", "uint8", (4, 3)),)
    with MotionMemory.create(tmp_path / "m", embedding=E, record=parts, fingerprint="f", tokens="int8") as memory:
        memory.add(replace(clip(n), record={"pixels": np.full((4, 3), n, np.uint8)}) for n in range(9))
        assert memory.search(query(), 3)[0].record["pixels"].dtype == np.uint8
        for call in (
            lambda: memory.search(query(), 3, Search(distinct=0.5)),
            lambda: memory.search_record("pixels", query(), 1),
        ):
            with pytest.raises(InputError, match="float parts of the record; allowed is none: .* have no float part"):
                call()


def test_records_on_demand_are_not_kept(tmp_path: Path) -> None:
    with general(tmp_path / "m", on_demand=True) as memory:
        with pytest.raises(InputError, match="has flow.*makes records on demand, and keeps none"):
            memory.add([bare(0)])
        memory.add(bare(n, record={}) for n in range(5))
        found = memory.search(bare(3).embedding, 2)
        assert found[0].id == 4 and found[0].record == {} and found[0].fps == 8.0 and found[0].source_sha256 == f"{3:064x}"
        assert memory.verify() == [] and memory.stats().tokens == "on demand"
        for call in (lambda: memory.search(query(), 3, Search(distinct=0.5)), lambda: memory.search_record("flow", 1, 1)):
            with pytest.raises(InputError, match="makes records on demand: it cannot be searched by them"):
                call()
        memory.export_file(tmp_path / "one")
        assert MotionMemory.import_file(tmp_path / "one", tmp_path / "n").layout.on_demand


def test_a_memory_for_a_bundle(tmp_path: Path) -> None:
    dims = (Dim("B", 1, 1, 4), Dim("E", 7, 7, 7))
    query_graph = GraphSpec("query", "q.onnx", "0" * 64, (), (Port("vector", "float32", dims),))
    spec = MemorySpec("prompt", "query", "text", 1, 2, ClipSize(3, 8, 8, 8.0), PARTS, "f" * 64)
    bundle: Any = SimpleNamespace(
        path="B", manifest=SimpleNamespace(memory=spec), graph=lambda name: {"query": query_graph}[name]
    )
    with MotionMemory.for_bundle(tmp_path / "m", bundle, tokens="int8", on_demand=True, index_threshold=7) as memory:
        assert memory.layout == Layout(7, PARTS, "f" * 64, "int8", True) and memory.index_threshold == 7
        memory.check("f" * 64)
    bundle.manifest.memory = None
    with pytest.raises(BundleError, match="takes no clips"):
        MotionMemory.for_bundle(tmp_path / "n", bundle)


# Tokens


@pytest.mark.parametrize("kind, step", [("float16", 2**-11), ("int8", 0.5 / 127)])
def test_tokens_come_back_to_the_precision_of_their_kind(tmp_path: Path, kind: str, step: float) -> None:
    tokens = np.random.default_rng(0).standard_normal((M, D)).astype(np.float32) * np.array([[1], [1000], [0]], np.float32)
    with MotionMemory.create(tmp_path / "m", **KEPT, tokens=kind) as memory:
        memory.add([clip(0, motion=tokens, appearance=-tokens)])
    with MotionMemory.open(tmp_path / "m") as memory:
        found = memory.get([1])[0]
        assert memory.stats().tokens == kind and memory.verify() == [] and found.record["motion"].flags.writeable
    largest = np.abs(tokens).max(axis=1, keepdims=True)
    assert (np.abs(found.record["motion"] - tokens) <= step * largest * 1.001).all()
    assert np.array_equal(found.record["appearance"], -found.record["motion"]) and not found.record["motion"][2].any()
    np.testing.assert_allclose(np.abs(found.record["motion"]).max(axis=1), largest[:, 0], rtol=1e-3)


def test_int8_takes_half_the_space_of_large_tokens(tmp_path: Path) -> None:
    parts = (Part("motion", "float16", (25, 256)),)
    sizes = {kind: Layout(8, parts, "f", kind).dtype.itemsize for kind in ("float16", "int8")}
    assert sizes == {"float16": 12800, "int8": 6500}
    with pytest.raises(InputError, match="tokens of a motion memory are 'int4'; allowed is float16 or int8"):
        MotionMemory.create(tmp_path / "m", **KEPT, tokens="int4")
    assert not (tmp_path / "m").exists()


def test_dataset_is_no_metadata(tmp_path: Path) -> None:
    with MotionMemory.open(filled(tmp_path / "m", 1)) as memory, pytest.raises(InputError, match=r"Clip\(dataset=...\)"):
        memory.add([clip(1, metadata={"dataset": "x"})])


# One file


def test_export_and_import(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 30)
    file = tmp_path / "out" / "everything.mrm"
    with MotionMemory.open(path) as memory:
        memory.add([clip(30)])
        memory.remove([31])
        memory.export_file(file)
        with pytest.raises(MemoryStoreError, match="exists"):
            memory.export_file(file)
        with MotionMemory.import_file(file, tmp_path / "n") as other:
            assert other.ids().tolist() == memory.ids().tolist() and other.verify() == []
            assert other.search(query(), 3)[2].caption == memory.search(query(), 3)[2].caption
            assert other.add([clip(50)]) == [32]  # an id of the other is not given again
    assert [item.name for item in file.parent.iterdir()] == [file.name]
    with pytest.raises(MemoryStoreError, match="already holds"):
        MotionMemory.import_file(file, tmp_path / "n")


def test_import_refuses_what_is_damaged_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "good"
    with MotionMemory.open(filled(tmp_path / "m", 300)) as memory:
        memory.export_file(file)
    good = file.read_bytes()
    token = clip(137).record["motion"].astype("<f2").tobytes()
    assert good.count(token) == 1
    flipped = bytearray(good)
    flipped[good.index(token)] ^= 1  # one bit of one token: SQLite would not notice
    newer = bytearray(good)
    newer[60:64] = (99).to_bytes(4, "big")
    for content, words in ((bytes(flipped), "clip 138 is not what was written"), (good[: len(good) // 2], "damaged"),
                           (good[:40960] + bytes(4096) + good[45056:], "damaged"), (b"", "not a motion memory"),
                           (b"hello" * 999, "damaged"), (bytes(newer), "schema 99; this MotionRT reads schema 5")):  # fmt: skip
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
    ("UPDATE records SET record = zeroblob(length(record)) WHERE id = 3", "clip 3 is not what was written"),
    ("UPDATE vectors SET embedding = x'00' WHERE id = 4", "clip 4 has 1 bytes of embedding"),
    ("DELETE FROM vectors WHERE id = 5", "vectors has 29 rows; the history says 30"),
    ("DELETE FROM clips WHERE id = 5", "clips has 29 rows"), ("DELETE FROM records WHERE id = 5", "records has 29 rows"),
    ("DELETE FROM tags WHERE id = 6 AND key = 'dataset'", "clip 6 is not found by 'dataset'"),
    ("INSERT INTO tags VALUES ('licence', 'none', 6)", "tags has 121 rows; the clips have 120"),
    ("UPDATE tags SET value = 'x' WHERE id = 7 AND key = 'dataset'", "clip 7 is not found by 'dataset'"),
    ("UPDATE tallies SET sum = sum + 1 WHERE key = 'licence'", "the filter licence=CC0 comes to (30, "),
    ("DELETE FROM tallies WHERE key = 'dataset'", "the filter dataset= comes to (30, "),
    ("UPDATE history SET last = 29", "its history ends in"), ("UPDATE meta SET layout = replace(layout, 'f', 'e')", "checksum"),
    ("DELETE FROM history", "its history ends in None"),
])  # fmt: skip
def test_verify_says_what_is_wrong(tmp_path: Path, change: str, words: str) -> None:
    path = filled(tmp_path / "m", 30)
    with MotionMemory.open(path) as memory:
        assert memory.verify() == []
        with closing(sqlite3.connect(path / "memory.sqlite", isolation_level=None)) as db:
            db.execute(change)
        assert any(words in text for text in memory.verify()), memory.verify()


COLUMNS = {
    "clips": ("caption", "source", "start", "duration", "fps", "source_sha256", "dataset", "metadata", "checksum"),
    "vectors": ("embedding", "checksum"), "records": ("record", "checksum"),
}  # fmt: skip


@pytest.mark.parametrize("table, column", [(table, column) for table, names in COLUMNS.items() for column in names])
def test_a_row_that_is_returned_was_checked(tmp_path: Path, table: str, column: str) -> None:
    """One bit of one value: the row is not given out, whichever way it was found, and `verify` names it."""
    path = filled(tmp_path / "m", 30)
    with closing(sqlite3.connect(path / "memory.sqlite", isolation_level=None)) as db:
        value = db.execute(f"SELECT {column} FROM {table} WHERE id = 4").fetchone()[0]
        if isinstance(value, float):
            value = np.nextafter(value, 9)
        elif isinstance(value, int):
            value ^= 1
        elif isinstance(value, str):
            value = value[:-2] + chr(ord(value[-2]) ^ 1) + value[-1] if value else "x"
        else:
            value = bytes([value[0] ^ 1]) + value[1:]
        db.execute(f"UPDATE {table} SET {column} = ? WHERE id = 4", (value,))
    with MotionMemory.open(path) as memory:
        assert memory.get([3, 5])
        calls: list[Callable[[], object]] = [lambda: memory.get([4]), lambda: memory.search(clip(3).embedding, 1)]
        calls += [lambda: memory.search_record("motion", clip(3).record["motion"], 1), lambda: memory.search(query(), 30)]
        for call in calls:
            with pytest.raises(MemoryStoreError, match="is damaged: clip 4 is not what was written"):
                call()
        assert any("clip 4" in text for text in memory.verify())


def test_a_flipped_bit_anywhere_is_found_or_means_nothing(tmp_path: Path) -> None:
    """Bits all over the file: `verify` says so, or opening does, or every value of every table is still what it was."""
    file = filled(tmp_path / "m", 40) / "memory.sqlite"

    def contents() -> list[Any]:
        with closing(sqlite3.connect(file)) as db:
            tables = ("meta", "history", "clips", "vectors", "records", "tags", "tallies")
            return [db.execute(f"SELECT * FROM {table}").fetchall() for table in tables]

    good, whole, found = file.read_bytes(), contents(), 0
    random = np.random.default_rng(0)
    for at in random.integers(len(good), size=400).tolist():
        data = bytearray(good)
        data[at] ^= 1 << int(random.integers(8))
        file.write_bytes(data)
        try:
            with MotionMemory.open(file.parent) as memory:
                wrong = memory.verify()
        except MemoryStoreError:
            wrong = ["it does not open"]
        found += bool(wrong)
        assert wrong or contents() == whole, at
    assert found > 50


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
    unseen = sealed(record | {"stamp": list(_fake.stamped(index))})  # as a failing disk would leave it
    (path / "index.json").write_text(json.dumps(unseen))
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


def test_a_reader_compacts_nothing(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 30)
    with MotionMemory.open(path, True, index_threshold=10) as reader, pytest.raises(MemoryStoreError, match="is read-only"):
        reader.compact()
    assert names(path) == ["memory.sqlite"]


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
        with MotionMemory.create(tmp_path / name, **KEPT) as memory:
            memory.add(clip(i) for i in numbers)
            memory.remove([3])
        with closing(sqlite3.connect(tmp_path / name / "memory.sqlite")) as db:
            contents |= {row[0] for row in db.execute("SELECT content FROM history ORDER BY generation DESC LIMIT 1")}
    assert len(contents) == 3 and all(len(text) == len(hashlib.sha256().hexdigest()) for text in contents)


def test_ids_are_never_given_again(tmp_path: Path) -> None:
    with MotionMemory.create(tmp_path / "m", **KEPT) as memory:
        given: list[Any] = []
        for number in range(3):
            given += memory.add([clip(number), clip(number + 10)])
            memory.remove(given)
        assert given == [1, 2, 3, 4, 5, 6] and len(memory) == 0 and memory.ids().dtype == np.int64
