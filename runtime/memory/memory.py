"""The motion memory: reference clips with captions, vectors and records, found by the meaning of a prompt.

A directory. `memory.sqlite` is the truth, one clean file once it is closed; `index-*.usearch` with sidecar `index.json`
is derived from it, for large memories only, and made again when it is missing, stale or damaged. Searching writes
nothing else, so a memory can be committed, mounted read-only or copied. What is kept of a clip, its *record*, is declared
by the bundle: arrays with names, dtypes and sizes. E: numbers in a vector.
"""

from __future__ import annotations

import logging
import math
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.arguments import ids_of, whole
from motionrt.runtime.errors import MemoryStoreError
from motionrt.runtime.memory import index as derived
from motionrt.runtime.memory import ranking, store, tags
from motionrt.runtime.memory.file import INDEX_THRESHOLD, MemoryFile
from motionrt.runtime.memory.hybrid import Words
from motionrt.runtime.memory.ranking import Found, Ranked, Searchable
from motionrt.runtime.memory.rows import Clip, Damaged, DamagedRow, MemoryStats, Reference
from motionrt.runtime.memory.search import Search, marks
from motionrt.runtime.memory.state import State
from motionrt.runtime.memory.store import plain_errors

__all__ = ["INDEX_THRESHOLD", "Clip", "MemoryStats", "MotionMemory", "Reference", "Search"]
_log = logging.getLogger(__name__)
_THREADS = 1024
_MEAN = 256  # clips, the oldest, whose mean is taken for that of all motion
DELTA = 4096  # clips newer than the index that `refresh` leaves to exact search: about half a millisecond


class _View(NamedTuple):
    """One consistent state to search in. base: the index, if it may be used; useful: whether it knows most clips."""

    db: sqlite3.Connection
    state: State
    base: derived.Base | None
    useful: bool


class MotionMemory(MemoryFile, Searchable):
    """An open motion memory; use `create` or `open`, then `close` or a `with` block. Safe to share between threads."""

    def __init__(self, path: Path, db: sqlite3.Connection, readonly: bool, index_threshold: int) -> None:
        super().__init__(path, db, readonly, index_threshold)
        self._base: derived.Base | None = None
        self._base_known = False  # that its state is one of this memory's
        self._signature: tuple[int, ...] | None = None  # of the sidecar that `_base` was last looked for in
        self._warned = False
        self._recent = derived.Recent(self.layout.embedding)
        self._words: tuple[State, Words] | None = None
        self._mean: tuple[tuple[State, frozenset[int]], NDArray[np.float32]] | None = None
        self._told: set[int] = set()  # damaged clips that a search left out, and said so

    def close(self) -> None:
        """Fold the write-ahead log into memory.sqlite and close; a second call does nothing."""
        with self._lock:
            self._base, self._signature = None, None
            self._recent = derived.Recent(self.layout.embedding)
            super().close()

    def found(self, part: str | None, query: NDArray[Any], k: int, search: Search, text: str | None = None) -> list[Found]:
        text = text if search.words and self.layout.words else None
        vector = self.layout.query(part, query)
        compared = "" if search.distinct is None else self.layout.floating().name
        with self._view() as view:
            if part is None and not view.useful and self.readonly and not self._warned:
                _log.warning("%s has no index that fits; it is searched row by row until a writer makes one", self.path)
                self._warned = True
            if part is not None or view.useful or self.readonly:
                return self._sound(view, part, vector, k, search, compared, text)
        try:
            self.refresh()
        except MemoryStoreError:  # no index is made of damaged clips
            if not search.without_damaged:
                raise
        with self._view() as view:
            return self._sound(view, part, vector, k, search, compared, text)

    def get(self, ids: Sequence[int]) -> list[Reference]:
        """The clips of these ids, in this order; their score is NaN. Raises MemoryStoreError for an unknown id; InputError."""
        numbers = ids_of(ids)
        with self._transaction() as db:
            return store.read(db, self.path, self.layout, numbers, [math.nan] * len(numbers))[0]

    def refresh(self, threads: int = 1) -> None:
        """Bring the index up to date: made if it is missing or half of it is removed, extended if it lacks many clips.

        Up to 4096 newer clips are left to exact search. Others can search and write meanwhile. A read-only memory takes
        what others stored. threads: more are faster, but then the index depends on their timing.
        """
        whole("threads", threads, 1, _THREADS)
        with self._view() as view:
            state, base = view.state, view.base
            if self.readonly or state.clips <= self.index_threshold:
                return
            if view.useful and base is not None and state.last - base.last <= DELTA:
                return
        self._index(base if view.useful else None, threads)

    def compact(self, threads: int = 1) -> None:
        """Give back the space of removed clips, and make the index one of exactly the clips that are there."""
        whole("threads", threads, 1, _THREADS)
        with self._writing(False) as db:  # not where it is read-only
            state = store.read_state(db, self.path)
        with self._view() as view:
            current = view.base is not None and view.base.content == state.content and view.base.count == state.clips
        if state.clips > self.index_threshold and not current:
            self._index(None, threads)
        with self._writing() as db:
            known = self._base.generation if self._base is not None else store.read_state(db, self.path).generation
            db.execute("DELETE FROM history WHERE generation < ?", (known,))
        with self._lock, plain_errors(self.path):
            if self._db is not None:
                self._db.execute("VACUUM")
        derived.tidy(self.path)

    def verify(self) -> list[str]:
        """Read everything and say what is wrong, a sentence each; empty if the memory is sound. `compact` repairs an index."""
        try:
            with self._view() as view:
                wrong = store.problems(view.db, self.path)
                wanted, base = view.state.clips > self.index_threshold, view.base
        except MemoryStoreError as error:
            return [str(error)]
        if wanted and base is None and derived.signature(self.path) is None:
            wrong.append("the index is missing; it will be made when a writer needs it")
        elif wanted and base is None:
            wrong.append("the index is damaged, out of date or of another memory; it will be made again when a writer needs it")
        elif wanted and not derived.sound(self.path):
            wrong.append("the index is not what was written; remove index.json to have it made again")
        return wrong

    def digest(self) -> str:
        """A digest of all changes that led to what is in the memory: equal ones, equal clips; hex, empty for a new memory."""
        with self._view() as view:
            return view.state.content

    def stats(self) -> MemoryStats:
        """Counts and sizes; see `MemoryStats`."""
        with self._view() as view:
            state, base = view.state, view.base
            datasets = "SELECT value, COUNT(*) FROM tags WHERE key = 'dataset' GROUP BY value ORDER BY value"
            counts = dict(view.db.execute(datasets).fetchall())
            if sum(counts.values()) != state.clips:
                raise Damaged(f"its datasets have {sum(counts.values())} clips; the history says {state.clips}")
        behind = 0 if base is None else state.last - base.last
        index = (
            "not needed" if state.clips <= self.index_threshold else "missing" if base is None
            else f"behind by {behind} clips" if behind else "current"
        )  # fmt: skip
        file = self.path / store.FILE
        size = sum(part.stat().st_size for part in (file, file.with_name(f"{file.name}-wal")) if part.exists())
        stored = derived.stored_bytes(self.path)
        return MemoryStats(state.clips, counts, size, stored, state.generation, self.layout.kept, index)

    def _too_few(self, found: int, search: Search) -> str:
        with self._transaction() as db:
            clips, bad = store.read_state(db, self.path).clips, len(store.still_there(db, self._told))
            text = f"the motion memory {self.path} holds {clips or 'no'} clips"
            text += f", {bad} of them damaged" if search.without_damaged and bad else ""
            if search.sources and clips:
                question = f"SELECT COUNT(*) FROM clips WHERE source IN ({marks(search.sources)})"
                text += f", {db.execute(question, search.sources).fetchone()[0]} of them from the excluded "
                text += " and ".join(search.sources)
            for name, sign in (("least_seconds", "<"), ("most_seconds", ">")):
                if (limit := getattr(search, name)) is not None and clips:
                    count = db.execute(f"SELECT COUNT(*) FROM clips WHERE duration {sign} ?", (limit,)).fetchone()[0]
                    text += f", {count} of them {'shorter' if sign == '<' else 'longer'} than {limit:g} s"
        if search.where and clips:
            text += f", {len(self.ids(search.where))} of them with {dict(search.where)}"
        return f"{text}. Ask for fewer, or add clips: `motionrt memory add {self.path} clip.mp4`"

    def _sound(self, view: _View, *asked: Any) -> list[Found]:
        """What `_pick` gives, without clips that are damaged if the search says so; else DamagedRow."""
        search: Search = asked[3]
        without: set[int] = set()
        while True:
            try:
                return self._pick(view, without, *asked)
            except DamagedRow as error:
                if not search.without_damaged or without >= error.wrong.keys():
                    raise
                without |= error.wrong.keys()
                if not self._told >= error.wrong.keys():
                    self._told |= error.wrong.keys()
                    _log.warning("%s is searched without what is damaged: %s", self.path, error)

    def _pick(
        self, view: _View, without: set[int], part: str | None, query: NDArray[np.float32], k: int, search: Search,
        compared: str, text: str | None,
    ) -> list[Found]:  # fmt: skip
        moves = self._moves(view, search, without)

        def fetch(best: Ranked) -> list[Found]:
            more = {} if best.words is None else {"words": best.words.tolist()}
            more |= {} if best.chances is None else {"probability": best.chances.tolist()}
            ids, scores = best.ids.tolist(), best.scores.tolist()
            embedded = part is None and bool(search.diversity)
            references, embeddings = store.read(view.db, self.path, self.layout, ids, scores, more, best.told, embedded)
            vectors: Any = [None] * len(ids)
            motions: Any = vectors
            if embedded:
                vectors = self.layout.embeddings(ids, embeddings)
            elif part is not None and search.diversity and ids:
                vectors = ranking.directions(np.stack([reference.record[part] for reference in references]))
            if moves is not None and ids:
                name, mean = moves
                records = np.stack([reference.record[name] for reference in references])
                motions = ranking.directions(records.reshape(len(ids), -1) - mean)
            return list(map(Found, references, vectors, motions))

        if part is None:
            ranked = self._nearest(view, query, search, without)
            if text is not None:
                words = self._words_of(view)
                vectors_of = lambda ids: self._vectors_of(view, ids)  # noqa: E731
                ranked = words.ranked(view.db, self.layout, ranked, vectors_of, query, search, without, text)
        else:
            every = ranking.rank_all(view.db, self.layout, part, query, search, without)
            ranked = lambda want: Ranked(*every, True)  # noqa: E731
        return ranking.pick(ranked, fetch, search, search.pool(k), compared)

    def _nearest(
        self, view: _View, query: NDArray[np.float32], search: Search, without: set[int]
    ) -> Callable[[int], Ranked]:
        """What ranks the clips that pass the filters by their captions: by the index and what is newer, or all of them."""
        db, base, few = view.db, view.base, search.leaves_few(view.db)
        filtered = search.filters or bool(without)
        after = 0 if base is None else base.last
        if not few:
            load = lambda above, wrong: ranking.scan(db, self.layout, after=above, wrong=wrong)  # noqa: E731
            self._recent.update(after, view.state, load)
            if wrong := store.still_there(db, self._recent.wrong.keys() - without):
                raise DamagedRow({number: self._recent.wrong[number] for number in sorted(wrong)})
        gone = view.state.clips != len(self._recent.ids) + (0 if base is None else base.count)

        def left(ids: NDArray[np.int64], vectors: NDArray[np.float32] | None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
            """Those of the clips that are there and pass the filters, and their unit vectors."""
            if len(ids) and (filtered or gone):
                numbers = ids.tolist()
                there = {row[0] for row in db.execute(f"SELECT id FROM vectors WHERE id IN ({marks(ids)})", numbers)}
                if len(there) < len(numbers):
                    if lost := store.still_there(db, {*numbers} - there - without):
                        raise DamagedRow(dict.fromkeys(lost, "has no embedding"))
                there = tags.passing(db, search, sorted(there), without) if filtered else there
                keep = np.array([number in there for number in ids.tolist()])
                ids, vectors = ids[keep], None if vectors is None else vectors[keep]
            if vectors is None:  # of an index that could not be stored
                chunks = ranking.scan(db, self.layout, ids=ids.tolist())
                found = {number: vector for some, others in chunks for number, vector in zip(some, others, strict=True)}
                vectors = np.array([found[number] for number in ids], np.float32).reshape(len(ids), -1)
            return ids, vectors

        def ranked(want: int) -> Ranked:
            fetch = want + 8  # the index rounds vectors: its order is right to within a few places
            while not few and fetch <= ranking.FETCH and (base is None or fetch < base.count):
                ids, vectors = left(*self._recent.nearest(query, fetch))
                complete = fetch >= len(self._recent.ids)
                enough = complete or len(ids) >= want
                if base is not None:
                    more, others = left(*base.nearest(query, fetch))
                    enough, complete = enough and len(more) >= want, False
                    ids, vectors = np.concatenate([ids, more]), np.concatenate([vectors, others])
                if enough:
                    return Ranked(*ranking.in_order(ids, ranking.dots(vectors, query)), complete)
                fetch *= 4
            return Ranked(*ranking.rank_all(db, self.layout, None, query, search, without), True)

        return ranked

    def _vectors_of(self, view: _View, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Unit vectors [n,E] of clips that are there, by ids [n] rising: of the index, else of their rows. DamagedRow."""
        found, base, others = np.empty((len(ids), self.layout.embedding), np.float32), view.base, dict[int, int]()
        for at, number in enumerate(ids.tolist()):
            key = None if base is None or base.vectors is None else base.key(number)
            if base is None or base.vectors is None or key is None:
                others[number] = at
            else:
                found[at] = base.vectors[key]
        for some, vectors in ranking.scan(view.db, self.layout, ids=[*others]) if others else ():
            found[[others[number] for number in some.tolist()]] = vectors
        return found

    def _words_of(self, view: _View) -> Words:
        if self._words is None or self._words[0] != view.state:
            self._words = view.state, Words(tags.vocabulary(view.db, view.state))
        return self._words[1]

    def _moves(self, view: _View, search: Search, without: set[int]) -> tuple[str, NDArray[np.float32]] | None:
        """The part of records whose agreement counts, and its mean over the first clips; None where none counts. DamagedRow."""
        name = self.layout.moving if search.agreement else None
        if name is None:
            return None
        key = view.state, frozenset(without)
        if self._mean is None or self._mean[0] != key:
            ids = [row[0] for row in view.db.execute("SELECT id FROM clips ORDER BY id LIMIT ?", (_MEAN,))]
            ids, wrong = [number for number in ids if number not in without], dict[int, str]()
            parts = [some for _, some in ranking.scan(view.db, self.layout, name, ids=ids, wrong=wrong, raw=True)]
            if wrong:
                raise DamagedRow(wrong)
            self._mean = key, np.concatenate(parts).mean(axis=0) if parts else np.zeros(1, np.float32)
        return name, self._mean[1]

    @contextmanager
    def _view(self) -> Iterator[_View]:
        with self._lock:
            # The index first, then the state: so the state is never older than the index.
            signature = derived.signature(self.path)
            intact = self._base is None or self._base.intact()
            if signature != self._signature or not intact:
                opened = derived.open_base(self.path, self.readonly)
                self._base_known &= opened is None
                self._base, self._signature = opened or (self._base if intact else None), derived.signature(self.path)
            with self._transaction() as db:
                state = store.read_state(db, self.path)
                if self._base is not None and not self._base_known:
                    question = "SELECT content FROM history WHERE generation = ?"
                    self._base_known = db.execute(question, (self._base.generation,)).fetchone() == (self._base.content,)
                    self._base = self._base if self._base_known else None
                wanted = state.clips > self.index_threshold
                base = self._base if wanted else None
                held = 0 if base is None else state.clips - (state.last - base.last)
                useful = not wanted or base is not None and 2 * held >= max(base.count, state.clips)
                yield _View(db, state, base if useful else None, useful)

    def _index(self, base: derived.Base | None, threads: int) -> None:
        """Make an index, or extend `base`, from a state of its own, so that this memory can be used meanwhile."""
        with plain_errors(self.path), closing(store.connect(self.path, True)[0]) as db:
            db.execute("BEGIN")
            state = store.read_state(db, self.path)
            if base is not None and base.file is None:  # it could not be stored, so it cannot be read again
                base = None
            scan = lambda after: ranking.scan(db, self.layout, after=after)  # noqa: E731
            made = derived.make_base(self.path, state, scan, self.layout.embedding, threads, base)
        with self._lock:
            self._base, self._base_known, self._signature = made, True, derived.signature(self.path)
