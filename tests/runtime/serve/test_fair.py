"""Turns between keys: by the time they used, whatever the number of their jobs."""

from __future__ import annotations

from dataclasses import dataclass

from motionrt.runtime.serve.jobs.fair import Fair


@dataclass(frozen=True)
class Wants:
    share: str
    priority: int = 1
    name: str = ""


def test_nobody_waits_for_a_queue_of_somebody_else() -> None:
    """One key has a hundred jobs in the line; another one's two, each later, are next or the one after."""
    fair, line, order = Fair(), [Wants("flood", name=str(i)) for i in range(100)], []
    for turn in range(20):
        if turn in (5, 11):
            line.append(Wants("quiet"))
        one = fair.first(line)
        assert one is not None
        line.remove(one)
        order.append(one.share)
        fair.charge(one.share, 1.0)
    assert order.index("quiet") in (5, 6) and order.index("quiet", 7) in (11, 12)


def test_shares_are_of_time_and_not_of_jobs() -> None:
    """Jobs of one key take three times as long: it gets a third as many turns."""
    fair, turns = Fair(), {"short": 0, "long": 0}
    for _ in range(400):
        one = fair.first([Wants("long"), Wants("short")])
        assert one is not None
        turns[one.share] += 1
        fair.charge(one.share, 3.0 if one.share == "long" else 1.0)
    assert turns == {"short": 300, "long": 100}


def test_who_was_away_has_not_saved_up_turns() -> None:
    fair = Fair()
    for _ in range(100):
        assert fair.first([Wants("busy")]) is not None
        fair.charge("busy", 1.0)
    order = []
    for _ in range(10):
        one = fair.first([Wants("busy"), Wants("back")])
        assert one is not None
        order.append(one.share)
        fair.charge(one.share, 1.0)
    assert order.count("back") in (5, 6)


def test_priority_comes_first_and_then_who_came_first() -> None:
    fair = Fair()
    fair.charge("b", 100.0)
    assert fair.first([Wants("a"), Wants("b", 2)]) == Wants("b", 2)
    assert fair.first([Wants("a", name="1"), Wants("a", name="2")]) == Wants("a", name="1")
    assert fair.first([]) is None
