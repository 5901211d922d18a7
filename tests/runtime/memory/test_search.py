"""What a search may leave out and how it orders, against the slow way; the index that grows; sets of memories."""

from __future__ import annotations

import json
import runpy
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from motionrt.runtime.errors import InputError, MemoryStoreError
from motionrt.runtime.memory import index as memory_index
from motionrt.runtime.memory import memory as memory_module
from motionrt.runtime.memory import ranking as memory_ranking
from motionrt.runtime.memory import search as memory_search
from motionrt.runtime.memory.memory import MotionMemory, Reference, Search
from motionrt.runtime.memory.set import MemorySet

_fake = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parents[3] / "tests/helpers/fake_memory.py")))
D, E, KEPT, M = _fake.D, _fake.E, _fake.KEPT, _fake.M
clip, filled, names, query, ranked = _fake.clip, _fake.filled, _fake.names, _fake.query, _fake.ranked
DATASETS = ("", "openvid", "pets", "it's \"; DROP TABLE clips; --", "日本")


def labelled(number: int) -> Any:
    """Clip `number`: its dataset and metadata follow from the number."""
    metadata = {"licence": ("CC0", "BY")[number % 2], "who' OR 1=1": f"{number % 10}"}
    return clip(number, dataset=DATASETS[number % 5], metadata=metadata)


@pytest.fixture(params=[1000, 10, 0], ids=["exact", "index", "wide"])
def memory(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """120 labelled clips; searched exactly, by an index, and by an index where no filter leaves few."""
    if request.param == 0:
        monkeypatch.setattr(memory_search, "FEW", -1)
    with MotionMemory.create(tmp_path / "m", **KEPT, index_threshold=request.param) as opened:
        opened.add(labelled(i) for i in range(120))
        yield opened


@pytest.mark.parametrize("where, passes", [
    ({"dataset": "pets"}, lambda n: n % 5 == 2), ({"dataset": DATASETS[3]}, lambda n: n % 5 == 3),
    ({"dataset": ["pets", "日本"]}, lambda n: n % 5 in (2, 4)), ({"dataset": ""}, lambda n: n % 5 == 0),
    ({"licence": "BY"}, lambda n: n % 2 == 1), ({"who' OR 1=1": "3", "licence": "BY"}, lambda n: n % 10 == 3),
    ({"dataset": "pets", "licence": ["CC0", "none"]}, lambda n: n % 10 == 2), ({}, lambda n: True),
], ids=["value", "quotes", "list", "empty", "metadata", "both", "mixed", "nothing"])  # fmt: skip
@pytest.mark.parametrize("source", [None, "video3.mp4"])
def test_filters_leave_the_nearest_that_pass(memory: MotionMemory, where: Any, passes: Any, source: str | None) -> None:
    want = [pair for pair in ranked(120, query(), source) if passes(pair[0] - 1)]
    found = memory.search(query(), 7, Search(where=where, exclude_source=source))
    assert [r.id for r in found] == [number for number, _ in want[:7]]
    assert [r.dataset for r in found] == [DATASETS[(r.id - 1) % 5] for r in found]
    assert found[0].metadata == labelled(found[0].id - 1).metadata
    assert memory.ids(where).tolist() == [n + 1 for n in range(120) if passes(n)]


def test_filters_that_leave_too_few_say_so(memory: MotionMemory) -> None:
    with pytest.raises(MemoryStoreError, match="holds 120 clips, 0 of them with .*gone.*motionrt memory add"):
        memory.search(query(), 1, Search(where={"dataset": "gone"}))
    with pytest.raises(MemoryStoreError, match="12 of them with"):
        memory.search(query(), 13, Search(where={"who' OR 1=1": "3"}))
    assert memory.search(query(), 13, Search(where={"dataset": "gone"}, minimum_score=-1)) == []
    assert memory.ids({"unknown": "x"}).tolist() == []


@pytest.mark.parametrize("where", ["x", {"a": 1}, {"a": []}, {1: "a"}, {"a": ["b", 2]}, ["a"], 5], ids=str)
def test_impossible_filters_are_refused(memory: MotionMemory, where: Any) -> None:
    for call in (lambda: memory.search(query(), 1, Search(where=where)), lambda: memory.ids(where)):
        with pytest.raises(InputError, match="where is"):
            call()


def test_minimum_score_is_a_cosine_and_may_leave_none(memory: MotionMemory) -> None:
    want = ranked(120, query())
    least = want[4][1]
    assert [r.id for r in memory.search(query(), 9, Search(minimum_score=least))] == [number for number, _ in want[:5]]
    assert len(memory.search(query(), 3, Search(minimum_score=least))) == 3
    assert memory.search(query(), 3, Search(minimum_score=1)) == []
    assert len(memory.search(query(), 200, Search(minimum_score=-1))) == 120


@pytest.mark.parametrize("change", [
    {"minimum_score": 1.5}, {"minimum_score": float("nan")}, {"minimum_score": "0.5"}, {"distinct": True},
    {"distinct": -2}, {"diversity": -0.1}, {"diversity": 2},
], ids=str)  # fmt: skip
def test_impossible_switches_are_refused(memory: MotionMemory, change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(change))} is .*allowed"):
        memory.search(query(), 1, Search(**change))


@pytest.mark.parametrize("threshold", [1000, 10], ids=["exact", "index"])
def test_distinct_keeps_the_best_of_each_motion(tmp_path: Path, threshold: int) -> None:
    """Ten motions, each in 12 clips that differ by a little noise and in length; copies of the best crowd the top."""
    random = np.random.default_rng(0)
    motions = random.standard_normal((10, M, D)).astype(np.float32)
    noise = 0.01 * random.standard_normal((120, M, D)).astype(np.float32)
    with MotionMemory.create(tmp_path / "m", **KEPT, index_threshold=threshold) as memory:
        memory.add(clip(i, motion=(1 + i % 3) * (motions[i % 10] + noise[i])) for i in range(120))
        best: dict[int, int] = {}
        for number, _ in ranked(120, query()):
            best.setdefault((number - 1) % 10, number)
        for k in (3, 10, 40):  # more than there are: fewer come back
            assert [r.id for r in memory.search(query(), k, Search(distinct=0.95))] == list(best.values())[:k]
        assert [r.id for r in memory.search(query(), 5, Search(distinct=1.0))] == [n for n, _ in ranked(120, query())[:5]]


def test_distinct_looks_at_no_more_than_it_says(memory: MotionMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_ranking, "LOOK", 64)
    assert len(memory.search(query(), 100, Search(distinct=1.0))) == 100  # what is asked for is looked at in any case
    assert len(memory.search(query(), 60, Search(distinct=-1.0))) == 1


def test_diversity_is_maximal_marginal_relevance(memory: MotionMemory) -> None:
    k, d = 6, 0.7
    vectors = {n + 1: clip(n).embedding / np.linalg.norm(clip(n).embedding) for n in range(120)}
    pool, chosen = ranked(120, query())[: 4 * k + 16], list[int]()
    while len(chosen) < k:
        gain = {
            number: (1 - d) * score - (d * max(float(vectors[number] @ vectors[other]) for other in chosen) if chosen else 0)
            for number, score in pool if number not in chosen
        }  # fmt: skip
        chosen.append(max(gain, key=lambda number: gain[number]))
    found = memory.search(query(), k, Search(diversity=d))
    assert [r.id for r in found] == chosen != [n for n, _ in ranked(120, query())[:k]]
    assert [r.score for r in found] == pytest.approx([dict(pool)[number] for number in chosen], abs=1e-6)
    for off in (0, None):
        assert [r.id for r in memory.search(query(), k, Search(diversity=off))] == [n for n, _ in ranked(120, query())[:k]]


@pytest.mark.parametrize("part", ["motion", "appearance"])
def test_search_by_tokens(memory: MotionMemory, part: str) -> None:
    tokens = np.random.default_rng(5).standard_normal((M, D)).astype(np.float32)

    def cosine(n: int) -> float:
        other = clip(n).record[part].ravel().astype(np.float64)
        return float(other @ tokens.ravel() / np.linalg.norm(other) / np.linalg.norm(tokens))

    want = sorted((n for n in range(120) if n % 5 == 2 and n % 7 != 3), key=lambda n: -cosine(n))
    found = memory.search_record(part, tokens, 5, Search(where={"dataset": "pets"}, exclude_source="video3.mp4"))
    assert [r.id - 1 for r in found] == want[:5]
    np.testing.assert_allclose([r.score for r in found], [cosine(n) for n in want[:5]], atol=1e-3)  # float16 tokens
    assert memory.search_record(part, clip(17).record[part], 1)[0].id == 18
    assert len(memory.search_record(part, tokens, 99, Search(minimum_score=0.1, distinct=0.5, diversity=0.3))) < 99
    with pytest.raises(InputError, match="allowed is 'motion' or 'appearance'"):
        memory.search_record("embedding", tokens, 1)
    with pytest.raises(InputError, match=rf"{part} of the query is float32 \[2\]"):
        memory.search_record(part, tokens[0, :2], 1)
    with pytest.raises(InputError, match="all zeros"):
        memory.search_record(part, 0 * tokens, 1)


def test_a_far_away_filter_keeps_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clips that pass are the farthest from the query: over-fetching would never reach them."""
    monkeypatch.setattr(memory_search, "FEW", 20)
    monkeypatch.setattr(memory_ranking, "FETCH", 200)
    order = [number for number, _ in ranked(600, query())]
    far = set(order[-60:])
    with MotionMemory.create(tmp_path / "m", **KEPT, index_threshold=10) as memory:
        memory.add(clip(i, dataset="far" if i + 1 in far else "near") for i in range(600))
        found = memory.search(query(), 9, Search(where={"dataset": "far"}))
        assert [r.id for r in found] == [number for number in order if number in far][:9]


@pytest.mark.parametrize("indexed", [0, 150, 300], ids=["exact", "half", "index"])
def test_leaving_out_nearly_all_keeps_the_order_of_the_rest(tmp_path: Path, indexed: int) -> None:
    """The best 260 of 300 clips are of one source: far more than a first look fetches."""
    near = {number for number, _ in ranked(300, query())[:260]}
    with MotionMemory.create(tmp_path / "m", **KEPT, index_threshold=20 if indexed else 1000) as memory:
        clips = [clip(i, source="same" if i + 1 in near else "other") for i in range(300)]
        memory.add(clips[:indexed])
        memory.refresh()
        memory.add(clips[indexed:])
        assert memory.stats().index_state == {0: "not needed", 150: "behind by 150 clips", 300: "current"}[indexed]
        found = memory.search(query(), 9, Search(exclude_source="same"))
        assert [r.id for r in found] == [number for number, _ in ranked(300, query())[260:269]]


# The index that grows


def count_of(path: Path) -> int:
    return int(json.loads((path / "index.json").read_text())["count"])


def test_an_index_and_newer_and_removed_clips_answer_together(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 200)
    with MotionMemory.open(path, index_threshold=10) as memory, MotionMemory.open(path, True, index_threshold=10) as reader:
        memory.refresh()
        memory.add(clip(i) for i in range(200, 260))
        gone = [number for number, _ in ranked(260, query())[:30:2]]
        assert memory.remove(gone) == 15
        want = [number for number, _ in ranked(260, query()) if number not in gone]
        for opened in (memory, reader):
            assert [r.id for r in opened.search(query(), 20)] == want[:20]
            assert len(opened) == 245 and opened.stats().index_state == "behind by 60 clips"
        assert count_of(path) == 200  # not made again


def test_refresh_extends_an_index_that_lacks_many_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "DELTA", 20)
    path = filled(tmp_path / "m", 100)
    with MotionMemory.open(path, index_threshold=10) as memory, MotionMemory.open(path, True, index_threshold=10) as reader:
        memory.refresh()
        reader.search(query(), 1)
        first = sorted(path.glob("*.usearch"))
        memory.add(clip(i) for i in range(100, 120))
        memory.refresh()
        assert count_of(path) == 100
        memory.add([clip(120)])
        memory.refresh()
        assert count_of(path) == 121 and sorted(path.glob("*.usearch")) != first and len(names(path)) >= 3
        for opened in (memory, reader):  # the reader takes the new one without being opened again
            assert [r.id for r in opened.search(query(), 9)] == [n for n, _ in ranked(121, query())[:9]]
            assert opened.stats().index_state == "current"
        assert reader._base is not None and reader._base.count == 121 and len(reader._recent.ids) == 0


def test_an_index_of_which_most_is_removed_is_made_again(tmp_path: Path) -> None:
    path = filled(tmp_path / "m", 100)
    with MotionMemory.open(path, index_threshold=10) as memory:
        memory.refresh()
        memory.remove(range(1, 45))
        assert memory.search(query(), 3) and count_of(path) == 100
        memory.remove(range(45, 55))
        want = [number for number, _ in ranked(100, query()) if number >= 55]
        assert [r.id for r in memory.search(query(), 9)] == want[:9] and count_of(path) == 46


def test_a_reader_without_an_index_answers_exactly_and_writes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = filled(tmp_path / "m", 50)
    with MotionMemory.open(path, True, index_threshold=10) as reader:
        reader.refresh()
        assert [r.id for r in reader.search(query(), 9)] == [n for n, _ in ranked(50, query())[:9]]
        reader.search(query(), 1)
        assert names(path) == ["memory.sqlite"] and reader.stats().index_state == "missing"
        assert caplog.text.count("searched row by row until a writer makes one") == 1


def test_a_memory_can_be_used_while_its_index_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go, real = threading.Event(), threading.Event(), memory_index.make_base

    def slow(*arguments: Any) -> Any:
        started.set()
        assert go.wait(30)
        return real(*arguments)

    with MotionMemory.open(filled(tmp_path / "m", 60), index_threshold=10) as memory:
        memory.refresh()
        memory.remove(range(1, 35))
        monkeypatch.setattr(memory_index, "make_base", slow)
        thread = threading.Thread(target=memory.refresh)
        thread.start()
        assert started.wait(30)
        assert memory.add([clip(60)]) == [61] and memory.get([61])[0].caption == "caption 60"
        go.set()
        thread.join()
        want = [number for number, _ in ranked(61, query()) if number >= 35]
        assert [r.id for r in memory.search(query(), 9)] == want[:9]
        assert memory.stats().index_state in ("current", "behind by 1 clips")  # the clip came before or after its state


def test_random_changes_never_make_a_wrong_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds, removals, refreshes and compactions in a random order, watched by a reader; seeds are printed on failure."""
    monkeypatch.setattr(memory_module, "DELTA", 15)
    for seed in range(4):
        random, here, number = np.random.default_rng(seed), dict[int, int](), 0
        path = filled(tmp_path / str(seed), 0)
        options = {"index_threshold": 25}
        with MotionMemory.open(path, **options) as memory, MotionMemory.open(path, True, **options) as reader:
            for _ in range(40):
                action = random.choice(["add", "add", "remove", "refresh", "compact"], p=[0.3, 0.2, 0.3, 0.15, 0.05])
                if action == "add":
                    count = int(random.integers(1, 20))
                    here |= dict(
                        zip(memory.add(clip(number + i) for i in range(count)), range(number, number + count), strict=True)
                    )
                    number += count
                elif action == "remove" and here:
                    gone = random.choice(list(here), min(len(here), int(random.integers(1, 16))), replace=False).tolist()
                    assert memory.remove(gone) == len(gone)
                    here = {key: value for key, value in here.items() if key not in gone}
                elif action in ("refresh", "compact"):
                    getattr(memory, str(action))()
                clips = {key: clip(value).embedding for key, value in here.items()}
                scores = {key: float(v @ query() / np.linalg.norm(v)) for key, v in clips.items()}
                want = sorted(scores, key=lambda key: (-scores[key], key))[:6]
                for opened in (memory, reader):
                    assert [r.id for r in opened.search(query(), 6, Search(minimum_score=-1))] == want if here else True, (
                        seed,
                        action,
                    )
            assert memory.verify() in ([], ["the index is missing; it will be made when a writer needs it"]), seed


# Sets


def test_a_set_orders_by_score_times_weight(tmp_path: Path) -> None:
    with (
        MotionMemory.open(filled(tmp_path / "a", 40)) as a,
        MotionMemory.create(tmp_path / "b", **KEPT) as b,
    ):
        b.add(clip(i + 500) for i in range(3))
        scores = {("a", r.id): r.score for r in a.search(query(), 40)}
        scores |= {("b", r.id): r.score * 2.5 for r in b.search(query(), 3)}
        with MemorySet({"a": a, "b": b}, {"b": 2.5}) as both:
            found = both.search(query(), 12)
            assert [(r.memory, r.id) for r in found] == sorted(scores, key=lambda key: -scores[key])[:12]
            assert [r.score for r in found] == pytest.approx([scores[r.memory, r.id] for r in found])
            assert len(both) == 43 and {r.memory for r in both.search(query(), 43)} == {"a", "b"}
            same = both.get([(r.memory, r.id) for r in found])
            assert [r.caption for r in same] == [r.caption for r in found] and same[0].memory == found[0].memory
            only = MemorySet({"b": b})  # switching is making another set
            assert [r.memory for r in only.search(query(), 3)] == ["b"] * 3
            assert both.search_record("motion", clip(501).record["motion"], 1)[0].caption == "caption 501"
            both.check("a" * 64)
            with pytest.raises(MemoryStoreError, match="its fingerprint is a{12}, this bundle's is d{12}"):
                both.check("d" * 64)
            with pytest.raises(MemoryStoreError, match="44 references .* hold 43 clips"):
                both.search(query(), 44)
            for wrong in ([3], [("c", 1)]):
                with pytest.raises(InputError, match="memory name, id"):
                    both.get(wrong)  # type: ignore[arg-type]


def test_a_set_leaves_out_copies_across_memories(tmp_path: Path) -> None:
    with MotionMemory.open(filled(tmp_path / "a", 20)) as a, MotionMemory.open(filled(tmp_path / "b", 20)) as b:
        both = MemorySet({"a": a, "b": b}, {"b": 0.5})
        found = both.search(query(), 40, Search(distinct=0.999, minimum_score=-1))
        assert len(found) == 20 == len({r.id for r in found})
        assert both.search(query(), 5, Search(diversity=0.5))[0].memory == "a"


@pytest.mark.parametrize("weights", [{"a": 0}, {"a": -1}, {"a": float("inf")}, {"b": 1}], ids=str)
def test_impossible_weights_are_refused(tmp_path: Path, weights: dict[str, float]) -> None:
    with MotionMemory.open(filled(tmp_path / "a", 1)) as a:
        for members, given in (({"a": a}, weights), ({}, {})):
            with pytest.raises(InputError, match="weights of a set"):
                MemorySet(members, given)


def test_a_reference_can_be_made_by_hand() -> None:
    tokens = np.zeros((M, D), np.float32)
    assert Reference(1, 0.5, "c", "s", 0.0, 1.0, {"motion": tokens}).memory == ""


def test_an_index_knows_where_a_clip_is_whatever_was_removed() -> None:
    rng = np.random.default_rng(5)
    for count in (1, 2, 40, 60):
        ids = np.sort(rng.choice(np.arange(3, 63), count, replace=False))
        base = memory_index.Base(None, None, (), ids, None, 1, "", 70, count)
        keys = {number: base.key(number) for number in range(75)}
        assert {number: key for number, key in keys.items() if key is not None} == {int(n): at for at, n in enumerate(ids)}
