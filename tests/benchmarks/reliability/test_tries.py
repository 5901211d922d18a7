"""Outcomes are counted, whatever becomes of the process that tries; and the short forms: a few tries of each kind are fine."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from motionrt.benchmarks.reliability import damage, soak, subjects, tries
from motionrt.runtime.errors import InputError

DAMAGE = "motionrt.benchmarks.reliability.damage:attempts"
QUICK = (
    "bundle.json", "graphs", "schedule tables", "memory.sqlite", "memory.sqlite with an index", "index.json", "exported memory",
    "still jpg", "animation png", "video mp4", "captions parquet",
)  # fmt: skip


def odd(kind: str, folder: Path) -> tries.Attempt:
    """Attempts that go wrong in every way; run in processes that import this file."""

    def attempt(number: int) -> Iterator[tries.Outcome]:
        if (kind, number) == ("crash", 1):
            os.kill(os.getpid(), signal.SIGSEGV)
        if (kind, number) == ("hang", 1):
            time.sleep(60)
        yield ("wrong", "another answer") if (kind, number) == ("wrong", 1) else ("same", "")

    return attempt


def fine(found: dict[str, tries.Found]) -> None:
    assert not {kind: one.bad for kind, one in found.items() if one.bad}
    assert all(one.tries for one in found.values())


def test_a_crash_a_hang_and_a_wrong_answer_are_counted_and_the_tries_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    found = tries.run("test_tries:odd", {"wrong": 3, "crash": 3, "hang": 3}, seconds=0.5)
    assert {kind: dict(one.outcomes) for kind, one in found.items()} == {
        kind: {"same": 2, kind: 1} for kind in ("wrong", "crash", "hang")
    }
    assert found["crash"].bad == {1: "crash: SIGSEGV"} and found["wrong"].bad == {1: "wrong: another answer"}


def test_a_subject_that_answers_otherwise_or_raw_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"

    def number() -> int:
        try:
            return int(file.read_text())
        except UnicodeDecodeError as error:
            raise InputError("not text") from error

    def subject(other: str = "") -> dict[str, int]:
        file.write_text("1234")
        monkeypatch.setattr(subjects, "KINDS", {"number": lambda folder: damage.Subject([file], {"it": number}, other)})
        attempt = damage.attempts("number", tmp_path)
        outcomes = [next(iter(attempt(one)))[0] for one in range(60)]
        assert file.read_text() == "1234", "it is put back after each try"
        return {outcome: outcomes.count(outcome) for outcome in outcomes}

    assert subject().keys() == {"wrong", "raw", "error"}
    assert subject("other text").keys() == {"other text", "raw", "error"}


def test_damage_is_other_bytes_and_the_same_for_the_same_number() -> None:
    for good in (b"", b"\0", b"[]", b'{"a": [1, "b"], "c": {"d": null}}', b"one,2\nthree,4\n", bytes(range(256)) * 40):
        made = [damage.damage(good, random.Random(number)) for number in range(200)]
        assert good not in made and made == [damage.damage(good, random.Random(number)) for number in range(200)]
        assert len(set(made)) > 2 or len(good) < 3


@pytest.mark.slow
def test_a_few_damages_of_the_kinds_that_are_quick() -> None:
    fine(tries.run(DAMAGE, dict.fromkeys(QUICK, 3), first=10**6))


@pytest.mark.parametrize("every, count", [(4, 1), pytest.param(1, 3, marks=pytest.mark.slow)])
def test_hostile_calls_of_public_functions(every: int, count: int) -> None:
    pytest.importorskip("hypothesis")
    from motionrt.benchmarks.reliability import hostile

    kinds = dict.fromkeys(hostile.names()[::every], count)
    fine(tries.run("motionrt.benchmarks.reliability.hostile:attempts", kinds, first=10**6))


@pytest.mark.slow
def test_some_requests_with_aborts() -> None:
    found = soak.run(2.0, seed=1, say=lambda text: None)
    assert not found.bad and found.outcomes["same"] and found.outcomes["aborted"]


def test_growth_of_memory_and_open_files_is_bad() -> None:
    for rss, files, bad in (([300] * 10, [7] * 10, 0), ([300] * 9 + [400], [7] * 10, 1), ([300] * 10, [7] * 9 + [20], 1)):
        found = soak.Soak(rss=rss, files=files)
        found.check()
        assert len(found.bad) == found.outcomes["wrong"] == bad


@pytest.mark.slow
def test_a_few_damages_of_every_kind() -> None:
    fine(tries.run(DAMAGE, dict.fromkeys(subjects.KINDS, 2), first=2 * 10**6))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["memory add", "memory compact", "memory import"])
def test_a_killed_command_loses_nothing(command: str) -> None:
    from motionrt.benchmarks.reliability import kills

    found = kills.run(command, 1, first=10**6)
    assert not found.bad and found.outcomes["killed"] == 1
