"""Words beside vectors, and clips that agree: what a prompt's words are, what they count, and which clips follow."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing
from pathlib import Path

import fake_memory as fake
import numpy as np
import pytest

from motionrt.runtime.errors import InputError, MemoryStoreError
from motionrt.runtime.memory.memory import MotionMemory, Search
from motionrt.runtime.memory.set import MemorySet
from motionrt.runtime.memory.words import Asked, Vocabulary, sets_of, term_of, terms_of, words_of

CAPTIONS = (
    "slides straight to the left", "slides straight to the right", "circles around clockwise",
    "circles around counterclockwise", "bounces in place",
    "a long caption of somebody who walks the dog along the river and then stops for a while",
)  # fmt: skip
VECTORS = Search(words=0, agreement=0)
BOTH = Search(agreement=0)


def memory_of(path: Path, captions: tuple[str, ...] = CAPTIONS, **options: object) -> MotionMemory:
    """A memory whose clips all have the same vector: only words tell them apart."""
    memory = MotionMemory.create(path, **fake.KEPT, **options)
    memory.add(fake.clip(number, caption=caption, embedding=fake.query()) for number, caption in enumerate(captions))
    return memory


def first(memory: MotionMemory, prompt: str, search: Search = BOTH) -> str:
    return memory.search(fake.query(), 1, search, prompt)[0].caption


def test_words_are_folded_and_joined_and_cut() -> None:
    assert words_of("Ein Bär läuft; l'été, Straße 42!") == ["ein", "bar", "lauft", "l", "ete", "strasse", "42"]
    assert words_of("counter-clockwise, anti clockwise, a zig-zag") == ["counterclockwise", "anticlockwise", "a", "zigzag"]
    assert words_of("x" * 100) == ["x" * 64]
    assert words_of("clip 12345 of 1234 a" + "1" * 5) == ["clip", "of", "1234", "a11111"]
    assert words_of("…—") == []


@pytest.mark.parametrize("texts", [
    ["A red star; moves left!", "x" * 100], ["clip 12345", "12345a of 1234"], ["a zig", "zag, anti", "clockwise"],
    ["one\ntwo", "three"], ["", "\0a_b's"], ["Stra\u00dfe", "l'\u00e9t\u00e9"], [],
])  # fmt: skip
def test_words_of_some_texts_are_those_of_each(texts: list[str]) -> None:
    assert sets_of(texts) == [{*words_of(text)} for text in texts]


@pytest.mark.parametrize("one, other", [
    ("left", "leftward"), ("bouncing", "bounces"), ("izquierda", "links"), ("anticlockwise", "counterclockwise"),
    ("houses", "house"), ("Rises".casefold(), "ascending"),
])  # fmt: skip
def test_words_that_say_the_same_are_one_term(one: str, other: str) -> None:
    assert term_of(one) == term_of(other)


def test_what_a_prompt_rules_out_ends_with_its_clause() -> None:
    wanted, unwanted = terms_of("moves left, not right, but up")
    assert {"@left", "@up"} <= {*wanted} and unwanted == ("@right",)
    assert terms_of("goes left and not left")[1] == ()  # said both ways: asked for
    assert terms_of("without a dog")[1] == ()  # only motions are ruled out


@pytest.mark.parametrize("text, has, has_not", [
    ("a green circle glides left", "@left", "@circle"), ("the circle is moving up", "@up", "@circle"),
    ("a small red arc bounces", "@bounce", "@arc"),
    ("a dog runs circles around a tree", "@circle", "@none"), ("circles to the left", "@circle", "@none"),
    ("a circle to the left", "@circle", "@none"), ("a star makes a circle", "@circle", "@none"),
    ("a camera pans left", "@camera", "@none"), ("a bird flaps its wings", "@flutter", "@none"),
    ("a spiral towards us", "@spiral", "@none"), ("a wave rolls in", "@wave", "@none"),
    ("glides left in a line", "@straight", "@in"), ("spins in place", "@place", "@in"),
    ("zooms in on the face", "@in", "@none"),
])  # fmt: skip
def test_what_moves_and_where_is_no_motion(text: str, has: str, has_not: str) -> None:
    wanted, _ = terms_of(text)
    assert has in wanted and has_not not in wanted


@pytest.mark.parametrize("typed, term", [
    ("clokwise", "@clockwise"), ("zigzgas", "@zigzag"), ("bouunces", "@bounce"), ("lfet", "lfet"),
])  # fmt: skip
def test_a_slip_in_a_long_word_is_mended(typed: str, term: str) -> None:
    assert terms_of(typed)[0] == (term,)


def test_shares_are_of_what_the_memory_knows() -> None:
    counts = {"left": 2, "right": 2, "the": 4, "to": 4}
    asked = Asked("a red star moves left", Vocabulary(counts, 4))
    to_left, to_right, nothing = asked.shares(["to the left", "to the right", "red star"]).tolist()
    assert to_left > 0.9 and to_right == nothing == 0
    assert Asked("not left", Vocabulary(counts, 4)).shares(["to the left"]).tolist() == [0]
    against = Asked("right, not left", Vocabulary(counts, 4)).shares(["to the left", "to the right"]).tolist()
    assert against[0] < 0 < against[1]
    assert Asked("", Vocabulary({}, 0)).shares(["left"]).tolist() == [0]


def test_words_decide_where_vectors_cannot(tmp_path: Path) -> None:
    with memory_of(tmp_path / "m") as memory:
        assert first(memory, "glides rightwards in a line") == CAPTIONS[1]
        assert first(memory, "goes anti-clockwise") == CAPTIONS[3]
        assert first(memory, "hüpft auf der Stelle") == CAPTIONS[4]
        assert first(memory, "glides rightwards in a line", VECTORS) == CAPTIONS[0]  # all alike: by id
        found = memory.search(fake.query(), 2, BOTH, "glides rightwards in a line")
        assert found[0].words > found[1].words and found[0].score == pytest.approx(1)
        assert math.isnan(memory.search(fake.query(), 1)[0].words)  # without a text nothing is counted
        with pytest.raises(InputError, match="words is 11; allowed is a number from 0 to 10"):
            Search(words=11)


def test_words_follow_every_change(tmp_path: Path) -> None:
    with memory_of(tmp_path / "m") as memory:
        (number,) = memory.add([fake.clip(40, caption="jumps over the fence", embedding=fake.query())])
        assert first(memory, "leaps across a fence") == "jumps over the fence"
        memory.remove([number])
        assert "fence" not in first(memory, "leaps across a fence")
        memory.compact()
        assert memory.verify() == []
        memory.export_file(tmp_path / "one.mrtm")
    with MotionMemory.import_file(tmp_path / "one.mrtm", tmp_path / "again") as memory:
        assert first(memory, "goes anti-clockwise") == CAPTIONS[3]


def test_filters_hold_for_what_words_find(tmp_path: Path) -> None:
    """More clips than the best of the vectors: the ones that words propose are filtered too."""
    captions = (*["walks the dog"] * 200, "spins around", "spins around")
    with MotionMemory.create(tmp_path / "m", **fake.KEPT) as memory:
        far = -fake.query()
        memory.add(
            fake.clip(n, caption=text, embedding=vector, metadata={"shade": str(n % 2)}, source=f"{n}.mp4")
            for n, (text, vector) in enumerate(zip(captions, [fake.query()] * 200 + [far] * 2, strict=True))
        )
        strong = Search(words=10, agreement=0)
        ids = [found.id for found in memory.search(fake.query(), 2, strong, "rotating")]
        assert ids == [201, 202]
        assert memory.search(fake.query(), 1, Search({"shade": "1"}, words=10), "rotating")[0].id == 202
        assert memory.search(fake.query(), 1, Search(exclude_source="200.mp4", words=10), "rotating")[0].id == 202
        assert memory.search(fake.query(), 1, Search(words=10, minimum_score=0.0), "rotating")[0].caption == "walks the dog"


def test_an_index_finds_the_same(tmp_path: Path) -> None:
    captions = tuple(f"{a} {b} {c}" for a in ("walks", "spins", "falls") for b in ("left", "right") for c in "abcdefghijklmnop")
    with MotionMemory.create(tmp_path / "m", **fake.KEPT, index_threshold=20) as memory:
        memory.add(fake.clip(n, caption=text) for n, text in enumerate(captions))
        memory.refresh()
        assert memory.stats().index_state == "current"
        verbs = enumerate(("strolls", "rotates", "drops"))
        asked = [(fake.query(n), f"{verb} to the {side}") for n, verb in verbs for side in ("left", "right")]
        indexed = [[f.id for f in memory.search(q, 6, BOTH, text)] for q, text in asked]
    with MotionMemory.open(tmp_path / "m", readonly=True, index_threshold=1000) as memory:
        assert indexed == [[f.id for f in memory.search(q, 6, BOTH, text)] for q, text in asked]


def test_a_set_orders_by_words_too(tmp_path: Path) -> None:
    with memory_of(tmp_path / "a", CAPTIONS[:3]) as one, memory_of(tmp_path / "b", CAPTIONS[3:]) as other:
        found = MemorySet({"a": one, "b": other}).search(fake.query(), 2, BOTH, "goes anti-clockwise")
        assert (found[0].memory, found[0].caption) == ("b", CAPTIONS[3])


def test_a_memory_without_words_is_searched_by_vectors(tmp_path: Path) -> None:
    with memory_of(tmp_path / "m", words=False) as memory:
        assert first(memory, "goes anti-clockwise") == CAPTIONS[0]
        assert memory.verify() == []
        memory.remove([1])
        assert memory.verify() == []


@pytest.mark.parametrize("change, words", [
    ("UPDATE tallies SET count = count + 1 WHERE key = '' AND value = 'left'", "the words of its captions"),
    ("DELETE FROM tallies WHERE key = '' AND value = 'dog'", "the words of its captions"),
    ("UPDATE tags SET value = 'lefu' WHERE key = '' AND value = 'left'", "the word 'left'"),
    ("DELETE FROM tags WHERE key = '' AND value = 'left'", "the word 'left'"),
    ("UPDATE clips SET caption = 'slides straight to the lefu' WHERE id = 1", "clip 1 is not what was written"),
])  # fmt: skip
def test_damaged_words_are_refused(tmp_path: Path, change: str, words: str) -> None:
    memory_of(tmp_path / "m").close()
    with closing(sqlite3.connect(tmp_path / "m" / "memory.sqlite", isolation_level=None)) as db:
        db.execute(change)
    with MotionMemory.open(tmp_path / "m") as memory:
        with pytest.raises(MemoryStoreError, match=words):
            first(memory, "to the left")
        assert memory.verify()


def test_the_odd_one_out_comes_last(tmp_path: Path) -> None:
    """Five clips under one caption, one of which moves otherwise; others make the memory's mean."""
    random = np.random.default_rng(3)
    alike = random.standard_normal((fake.M, fake.D)).astype(np.float32)
    with MotionMemory.create(tmp_path / "m", **fake.KEPT) as memory:
        for number in range(5):
            motion = -alike if number == 0 else alike + random.standard_normal(alike.shape).astype(np.float32) / 10
            memory.add([fake.clip(number, caption="slides left", embedding=fake.query(), motion=motion)])
        memory.add(fake.clip(number, caption="something else", embedding=-fake.query()) for number in range(5, 40))
        by_words = memory.search(fake.query(), 4, BOTH, "slides left")
        assert 1 in [found.id for found in by_words] and all(math.isnan(found.agreement) for found in by_words)
        found = memory.search(fake.query(), 5, Search(), "slides left")
        assert found[-1].id == 1 and found[-1].agreement < 0.1 < 0.5 < found[0].agreement
        assert [clip.unlike for clip in found] == [1, 1, 1, 1, 0]  # and it is said that one stood behind
        assert [found.id for found in memory.search(fake.query(), 1)] == [1]  # without a text, by vectors alone


def test_metadata_has_names_and_so_have_filters(tmp_path: Path) -> None:
    with MotionMemory.create(tmp_path / "m", **fake.KEPT) as memory:
        with pytest.raises(InputError, match="metadata without a name"):
            memory.add([fake.clip(1, metadata={"": "left"})])
    with pytest.raises(InputError, match="where is"):
        Search({"": "left"})


def test_a_clip_with_several_captions_comes_once(tmp_path: Path) -> None:
    with MotionMemory.create(tmp_path / "m", **fake.KEPT) as memory:
        texts = ("slides left", "glides to the left", "a star moves leftwards", "goes right")
        same = {"embedding": fake.query(), "source_sha256": "e" * 64, "start": 1.0}
        memory.add([fake.clip(0, caption=text, **(same if "right" not in text else {})) for text in texts])
        found = memory.search(fake.query(), 2, BOTH, "glides to the left")
        assert [clip.caption for clip in found] == ["glides to the left", "goes right"]
        found = memory.search(fake.query(), 4, BOTH, "glides to the left")
        assert len(found) == 4 and found[1].caption == "goes right"  # where there are no others, they come again
        assert len(memory.search(fake.query(), 4)) == 4  # by the vector alone, captions are what is found


def test_probability_is_what_the_calibration_says(tmp_path: Path) -> None:
    with memory_of(tmp_path / "m", calibration=(-3.0, 2.0, 4.0)) as memory:
        best = memory.search(fake.query(), 1, BOTH, "slides to the left")[0]
        assert best.probability == pytest.approx(1 / (1 + math.exp(3 - 2 * best.score - 4 * best.words)))
        assert len(memory.search(fake.query(), 6, Search(minimum_probability=0.6), "slides to the left")) < 6
        assert memory.search(fake.query(), 6, Search(minimum_probability=0.99), "slides to the left") == []
        assert len(memory.search(fake.query(), 6, BOTH, "slides to the left")) == 6  # a number that is asked for
        assert memory.search(-fake.query(), 6, Search().likely(), "no such thing") == []
        assert len(memory.search(-fake.query(), 6, Search().lenient(), "no such thing")) == 6  # who searches may see them
        assert math.isnan(memory.search(fake.query(), 1)[0].probability)


def test_of_what_words_find_the_likest_to_the_still(tmp_path: Path) -> None:
    with MotionMemory.create(tmp_path / "m", **fake.KEPT) as memory:
        memory.add(fake.clip(number, caption="slides left", embedding=fake.query()) for number in range(12))
        looks = fake.clip(6).record["appearance"]
        found = memory.search(fake.query(), 2, Search(looks=True, agreement=0), "slides left", ("appearance", looks))
        assert found[0].id == 7 and found[0].looks == pytest.approx(1, abs=1e-3) and found[1].looks < found[0].looks
        # of the best 2 k + 3 alone: the twelfth is not among them
        far = ("appearance", fake.clip(11).record["appearance"])
        by_looks = Search(looks=True, agreement=0)
        assert 12 not in [clip.id for clip in memory.search(fake.query(), 2, by_looks, "slides left", far)]
        with pytest.raises(InputError, match="no still to compare clips with"):
            memory.search(fake.query(), 2, Search(looks=True), "slides left")


def test_clips_are_filtered_by_length_and_by_several_sources(tmp_path: Path) -> None:
    with MotionMemory.create(tmp_path / "m", **fake.KEPT) as memory:
        memory.add(fake.clip(n, duration=float(n), source=f"{n % 4}.mp4") for n in range(1, 13))

        def ids(search: Search, text: str | None) -> set[int]:
            return {clip.id for clip in memory.search(fake.query(), 12, Search(**vars(search) | {"minimum_score": -1}), text)}

        for text in (None, "caption"):
            assert ids(Search(least_seconds=4, most_seconds=6), text) == {4, 5, 6}
            assert ids(Search(exclude_source=["1.mp4", "2.mp4"]), text) == {3, 4, 7, 8, 11, 12}
            assert ids(Search(exclude_source="1.mp4", most_seconds=6, where={"licence": "CC0"}), text) == {2, 3, 4, 6}
        with pytest.raises(MemoryStoreError, match="holds 12 clips, 9 of them shorter than 10 s"):
            memory.search(fake.query(), 5, Search(least_seconds=10))
