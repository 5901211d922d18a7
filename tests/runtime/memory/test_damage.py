"""Damage to `memory.sqlite`: what is asked of it gives one MotionRTError, or exactly the undamaged answer.

The long run over every kind of file is benchmarks/reliability/bench_reliability.py, whose memory and questions these are.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motionrt.benchmarks.reliability.memories import LONG, QUESTIONS, WITHOUT, fake, made, told
from motionrt.runtime.errors import InputError, MemoryStoreError
from motionrt.runtime.memory.memory import MotionMemory, Search

clip, filled, query, ranked = fake.clip, fake.filled, fake.query, fake.ranked
ASKED = {name: ask for name, ask in QUESTIONS.items() if name not in ("without", "verify")}


def answers(path: Path, threshold: int) -> dict[str, Any]:
    """What a memory says to each question: an answer, or a MemoryStoreError. Any other error ends the test."""
    try:
        with MotionMemory.open(path, readonly=True, index_threshold=threshold) as memory:
            given = {name: _asked(ask, memory) for name, ask in ASKED.items()}
        with MotionMemory.open(path, readonly=True, index_threshold=threshold) as memory:
            sound = _asked(lambda m: m.search(LONG, 9, WITHOUT), memory)
            return given | {"without": sound, "left out": {*map(str, memory._told)}}
    except MemoryStoreError as error:
        return dict.fromkeys([*ASKED, "without"], error) | {"left out": set()}


def _asked(ask: Callable[[MotionMemory], Any], memory: MotionMemory) -> Any:
    try:
        return told(ask(memory))
    except MemoryStoreError as error:
        return error


def damage(good: bytes, random: np.random.Generator) -> bytearray:
    """One bit, a few bytes, a run of zeros or noise, a page that is another's, or an end that is missing."""
    data, at = bytearray(good), int(random.integers(len(good)))
    kind = random.choice(["bit", "bit", "bit", "byte", "zeros", "noise", "page", "cut"])
    if kind == "bit":
        data[at] ^= 1 << int(random.integers(8))
    elif kind == "byte":
        for place in random.integers(len(good), size=3).tolist():
            data[place] = int(random.integers(256))
    elif kind in ("zeros", "noise"):
        size = min(int(random.choice([2, 16, 512, 4096])), len(good) - at)
        data[at : at + size] = bytes(size) if kind == "zeros" else random.bytes(size)
    elif kind == "page":
        one, two = (int(page) * 8192 for page in random.integers(len(good) // 8192, size=2))
        data[one : one + 8192] = good[two : two + 8192]
    else:
        del data[at:]
    return data


def damaged(place: Path, tries: int, seed: int, threshold: int) -> Counter[str]:
    """Damage a memory `tries` times, and ask everything each time; how often which outcome came. AssertionError if wrong."""
    path = made(place / "m", index_threshold=threshold)
    file = path / "memory.sqlite"
    good, outcomes = file.read_bytes(), Counter[str]()
    want = answers(path, threshold)
    assert not want.pop("left out") and not any(isinstance(answer, MemoryStoreError) for answer in want.values())
    random = np.random.default_rng(seed)
    for number in range(tries):
        data = damage(good, random)
        file.write_bytes(data)
        given = answers(path, threshold)
        left_out = given.pop("left out")
        want["without"] = [one for one in want["every"] if one[0] not in left_out][:9]
        for name, got in given.items():
            assert isinstance(got, MemoryStoreError) or got == want[name], (seed, number, name, got, want[name])
            outcomes["error" if isinstance(got, MemoryStoreError) else "equal"] += 1
        outcomes["tries"] += 1
        for left in path.glob("memory.sqlite-*"):
            left.unlink()
    return outcomes


def change(path: Path, sql: str, *values: Any) -> None:
    with closing(sqlite3.connect(path / "memory.sqlite", isolation_level=None)) as db:
        db.execute(sql, values)


FLIPS = {
    "embedding": "UPDATE vectors SET embedding = CAST(substr(embedding, 1, 63) || x'41' AS BLOB) WHERE id = ?",
    "record": "UPDATE records SET record = zeroblob(length(record)) WHERE id = ?",
    "caption": "UPDATE clips SET caption = caption || '!' WHERE id = ?",
    "not UTF-8": "UPDATE clips SET source = CAST(x'ff' AS TEXT) WHERE id = ?",
    "metadata": "UPDATE clips SET metadata = '{' WHERE id = ?",
    "no record": "DELETE FROM records WHERE id = ?", "no caption": "DELETE FROM clips WHERE id = ?",
}  # fmt: skip


@pytest.mark.parametrize("threshold", [1000, 20], ids=["exact", "index"])
@pytest.mark.parametrize("what", FLIPS)
def test_a_damaged_clip_is_refused_by_its_id_and_the_others_can_be_used(
    tmp_path: Path, what: str, threshold: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = filled(tmp_path / "m", 60, index_threshold=threshold)
    with MotionMemory.open(path, index_threshold=threshold) as memory:
        memory.refresh()
    best, *others = [number for number, _ in ranked(60, query())]
    change(path, FLIPS[what], best)
    with MotionMemory.open(path, readonly=True, index_threshold=threshold) as memory:
        for call in (lambda: memory.search(query(), 3), lambda: memory.get([others[0], best])):
            with pytest.raises(MemoryStoreError, match=rf"damaged: clip {best} .*`motionrt memory remove .* {best}`.*restore"):
                call()
        for options in ({}, {"diversity": 0.0}, {"where": {"licence": "CC0"}}, {"exclude_source": "none"}, {"distinct": 1.0}):
            found = memory.search(query(), 9, Search(without_damaged=True, **options))  # type: ignore[arg-type]
            assert [r.id for r in found] == others[:9], options
        found = memory.search_record("motion", clip(others[0] - 1).record["motion"], 1, WITHOUT)
        assert found[0].id == others[0] and memory.get([others[0]])[0].id == others[0]
    assert caplog.text.count(f"is searched without what is damaged: clip {best} ") == 1
    with MotionMemory.open(path, index_threshold=threshold) as memory:
        if what != "no caption":
            assert memory.remove([best]) == 1 and memory.verify() == [] and len(memory) == 59
            assert memory.ids({"licence": "CC0"}).tolist() == sorted(others)
            assert [r.id for r in memory.search(query(), 9)] == others[:9]


def test_a_vector_that_was_damaged_cannot_leave_the_answer_without_a_word(tmp_path: Path) -> None:
    """Its clip would be far down the order, and nothing of it be looked at."""
    path = filled(tmp_path / "m", 60)
    best = ranked(60, query())[0][0]
    change(path, "UPDATE vectors SET embedding = ? WHERE id = ?", (-clip(best - 1).embedding).astype("<f4").tobytes(), best)
    for search in (Search(), Search(where={"licence": "CC0"}), Search(exclude_source="video9.mp4")):
        with MotionMemory.open(path) as memory, pytest.raises(MemoryStoreError, match=f"clip {best} is not what was written"):
            memory.search(query(), 1, search)


@pytest.mark.parametrize("sql", [
    "UPDATE tags SET value = 'CC1' WHERE key = 'licence' AND id = ?", "DELETE FROM tags WHERE key = 'licence' AND id = ?",
    "UPDATE tags SET id = 99 WHERE key = 'licence' AND id = ?",
])  # fmt: skip
def test_a_filter_that_was_damaged_is_an_error(tmp_path: Path, sql: str) -> None:
    path = filled(tmp_path / "m", 60)
    change(path, sql, ranked(60, query())[0][0])
    with MotionMemory.open(path) as memory:
        for call in (
            lambda: memory.search(query(), 1, Search(where={"licence": "CC0"})), lambda: memory.ids({"licence": ["CC0", "x"]}),
        ):  # fmt: skip
            with pytest.raises(MemoryStoreError, match="is damaged: what it has for the filter licence=CC0 is not what was"):
                call()
        assert memory.search(query(), 1)[0].id == ranked(60, query())[0][0]


def test_counts_of_datasets_that_cannot_be_right_are_an_error(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 60)
    change(path, "DELETE FROM tags WHERE key = 'dataset' AND id = ?", 4)
    with MotionMemory.open(path) as memory, pytest.raises(MemoryStoreError, match="datasets have 59 clips; .* says 60"):
        memory.stats()


def test_too_few_sound_clips_are_counted(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 3)
    change(path, FLIPS["record"], 2)
    with MotionMemory.open(path) as memory:
        assert len(memory.search(query(), 2, WITHOUT)) == 2
        with pytest.raises(MemoryStoreError, match="holds 3 clips, 1 of them damaged"):
            memory.search(query(), 3, WITHOUT)
    with pytest.raises(InputError, match="without_damaged is 1; allowed is True or False"):
        Search(without_damaged=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [1000, 20], ids=["exact", "index"])
def test_damage_anywhere_is_an_error_or_means_nothing(tmp_path: Path, threshold: int) -> None:
    outcomes = damaged(tmp_path, 150, 0, threshold)
    assert outcomes["error"] > 50 and outcomes["equal"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [1000, 20], ids=["exact", "index"])
def test_much_damage_anywhere_is_an_error_or_means_nothing(tmp_path: Path, threshold: int) -> None:
    damaged(tmp_path, 1500, 1, threshold)
