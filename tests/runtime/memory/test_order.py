"""`reorder`: the same graph under other numbers, in a file of the same size."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from motionrt.runtime.memory import index as memory_index
from motionrt.runtime.memory.order import order_of, reorder

CLIPS, SIZE = 3000, 24


def topics() -> NDArray[np.int8]:
    """Vectors of 50 topics in random order."""
    random = np.random.default_rng(1)
    vectors = random.standard_normal((50, SIZE))[random.integers(50, size=CLIPS)] + 0.2 * random.standard_normal((CLIPS, SIZE))
    return memory_index._in_bytes(vectors.astype(np.float32))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index with three levels, saved as USearch saves it."""
    file = tmp_path_factory.mktemp("index") / "plain.usearch"
    index = memory_index._usearch().Index(ndim=SIZE, metric="cos", dtype="i8", connectivity=8)
    index.add(np.arange(CLIPS) * 7 + 1, topics(), threads=1)
    assert index.max_level >= 2, "the upper levels must be in the test"
    index.save(str(file))
    return file


def restored(file: Path) -> memory_index.Any:
    return memory_index._usearch().Index.restore(str(file), view=True)


def test_every_answer_stays_the_same(saved: Path, tmp_path: Path) -> None:
    assert reorder(saved, tmp_path / "ordered")
    before, after = restored(saved), restored(tmp_path / "ordered")
    asked = np.random.default_rng(2).integers(-127, 128, (500, SIZE), np.int8)
    old, new = (index.search(asked, 20, threads=1) for index in (before, after))
    np.testing.assert_array_equal(old.keys, new.keys)
    np.testing.assert_array_equal(old.distances, new.distances)
    assert (old.computed_distances, old.visited_members) == (new.computed_distances, new.visited_members)
    assert saved.stat().st_size == (tmp_path / "ordered").stat().st_size
    assert saved.read_bytes() != (tmp_path / "ordered").read_bytes()


def test_more_can_be_added_afterwards(saved: Path, tmp_path: Path) -> None:
    assert reorder(saved, tmp_path / "ordered")
    index = memory_index._usearch().Index.restore(str(tmp_path / "ordered"))
    extra = np.full((1, SIZE), 127, np.int8)
    index.add(np.array([10**6]), extra, threads=1)
    assert index.search(extra[0], 1).keys.tolist() == [10**6]
    assert index.get(8).tolist() == topics()[1].tolist()


def test_near_vectors_follow_each_other() -> None:
    vectors = topics()
    order = order_of(vectors)
    assert sorted(order.tolist()) == list(range(CLIPS))

    def step(rows: NDArray[np.int8]) -> float:
        return float(np.linalg.norm(np.diff(rows.astype(np.float32), axis=0), axis=1).mean())

    assert step(vectors[order]) < 0.5 * step(vectors)


def test_equal_vectors_have_an_order_too() -> None:
    assert sorted(order_of(np.ones((100, 4), np.int8)).tolist()) == list(range(100))


@pytest.mark.parametrize("broken", ["empty", "short", "long", "other kind", "another program's"])
def test_a_file_of_another_layout_is_left_alone(saved: Path, tmp_path: Path, broken: str) -> None:
    data = bytearray(saved.read_bytes())
    head = 8 + CLIPS * SIZE
    if broken == "empty":
        data = bytearray()
    elif broken == "short":
        del data[-1:]
    elif broken == "long":
        data += b"\0"
    elif broken == "other kind":
        data[head + 16] += 1
    else:
        data[head] = ord("U")
    (tmp_path / "broken").write_bytes(data)
    assert not reorder(tmp_path / "broken", tmp_path / "ordered")
    assert not (tmp_path / "ordered").exists()


@pytest.mark.parametrize("how", ["unknown", "other answers", "full disk"])
def test_an_index_that_cannot_be_put_in_order_stays(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    file = tmp_path / "index"
    file.write_bytes(saved.read_bytes())

    def instead(source: Path, target: Path) -> bool:
        target.write_bytes(b"half")
        if how == "full disk":
            raise OSError(28, "No space left on device")
        if how == "other answers":
            other = restored(source).copy()
            other.remove(1)
            other.save(str(target))
        return how != "unknown"

    monkeypatch.setattr(memory_index, "reorder", instead)
    with caplog.at_level(logging.INFO):
        memory_index._put_in_order(file)
    assert file.read_bytes() == saved.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert {"unknown": "not known here", "other answers": "other answers", "full disk": "No space"}[how] in caplog.text


def test_a_stored_index_is_in_order(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "index"
    file.write_bytes(saved.read_bytes())
    memory_index._put_in_order(file)
    assert reorder(saved, tmp_path / "ordered")
    assert file.read_bytes() == (tmp_path / "ordered").read_bytes()
