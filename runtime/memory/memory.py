"""The motion memory: reference clips with captions, vectors and tokens, found by the meaning of a prompt.

A directory. `memory.sqlite` is the truth, one clean file once it is closed; `index-*.usearch` with sidecar `index.json`
is derived from it, for large memories only, and made again when it is missing, stale or damaged. Searching writes
nothing else, so a memory can be committed, mounted read-only or copied. E embedding size, M tokens of width D.
"""

from __future__ import annotations

import logging
import math
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.errors import MemoryStoreError
from motionrt.runtime.files import replacing
from motionrt.runtime.memory import index as derived
from motionrt.runtime.memory import search as choosing
from motionrt.runtime.memory import store
from motionrt.runtime.memory.file import INDEX_THRESHOLD, MemoryFile, new_file
from motionrt.runtime.memory.rows import Clip, MemoryStats, Reference, unit
from motionrt.runtime.memory.search import Choice, Found, Ranked, Where
from motionrt.runtime.memory.store import State, plain_errors

__all__ = ["INDEX_THRESHOLD", "Clip", "MemoryStats", "MotionMemory", "Reference"]
_log = logging.getLogger(__name__)
_UNUSED = np.empty(0, np.float32)
DELTA = 4096  # clips newer than the index that `refresh` leaves to exact search: about half a millisecond


class _View(NamedTuple):
    """One consistent state to search in. base: the index, if it may be used; useful: whether it knows most clips."""

    db: sqlite3.Connection
    state: State
    base: derived.Base | None
    useful: bool


class MotionMemory(MemoryFile):
    """An open motion memory; use `create` or `open`, then `close` or a `with` block. Safe to share between threads."""

    def __init__(self, path: Path, db: sqlite3.Connection, readonly: bool, index_threshold: int) -> None:
        super().__init__(path, db, readonly, index_threshold)
        self._base: derived.Base | None = None
        self._base_known = False  # that its state is one of this memory's
        self._signature: tuple[int, ...] | None = None  # of the sidecar that `_base` was last looked for in
        self._warned = False
        self._recent = derived.Recent(self.dims["embedding"][0])

    @classmethod
    def import_file(cls, file: str | os.PathLike[str], path: str | os.PathLike[str]) -> MotionMemory:
        """Make a memory in the directory `path` of a file that `export_file` wrote, and open it.

        Every page, row and checksum is verified first; MemoryStoreError, and no memory, if one is wrong.
        """
        source = Path(file)
        if not source.is_file():
            raise MemoryStoreError(f"there is no file {source} to import; make one with `motionrt memory export`.")
        with new_file(Path(path)) as temporary, plain_errors(source):
            store.copy(source, temporary)
        return cls.open(path)

    def export_file(self, path: str | os.PathLike[str]) -> None:
        """Write all clips as one file, verified and whole or not at all, for `import_file`; others may write meanwhile.

        MemoryStoreError if the file exists, there is no place for it, or this memory is damaged.
        """
        target = Path(path)
        if target.exists():
            raise MemoryStoreError(f"{target} exists; remove it, or choose another file.")
        with plain_errors(self.path), replacing(target, MemoryStoreError) as temporary:
            store.copy(self.path / store.FILE, temporary)

    def close(self) -> None:
        """Fold the write-ahead log into memory.sqlite and close; a second call does nothing."""
        with self._lock:
            self._base, self._signature = None, None
            self._recent = derived.Recent(self.dims["embedding"][0])
            super().close()

    def search(
        self, embedding: NDArray[Any], k: int, *, where: Where | None = None, exclude_source: str | None = None,
        minimum_score: float | None = None, distinct: float | None = None, diversity: float | None = None,
    ) -> list[Reference]:  # fmt: skip
        """The `k` clips whose captions are nearest to `embedding` [E] by cosine, nearest first, equal ones by id.

        where: {"dataset" or a metadata key: value, or list of allowed values}, all of which must hold; exclude_source:
        leave out clips of this source. minimum_score: a cosine; clips below it are left out. distinct: a cosine of motion
        tokens above which a clip counts as a copy of a better one and is left out (among the best 4096). With one of
        these two, fewer than `k` clips may come back. diversity: 0 (off) to 1; re-ranks the best 4 k + 16 by maximal
        marginal relevance. MemoryStoreError if fewer than `k` clips are there; InputError.
        """
        choice = Choice(where, exclude_source, minimum_score, distinct, diversity)
        return self._answer("embedding", embedding, k, choice)

    def search_tokens(
        self, part: str, tokens: NDArray[Any], k: int, *, where: Where | None = None, exclude_source: str | None = None,
        minimum_score: float | None = None, distinct: float | None = None, diversity: float | None = None,
    ) -> list[Reference]:  # fmt: skip
        """The `k` clips whose `part`, "motion" (of a video) or "appearance" (of an image), is nearest to `tokens` [M,D].

        By cosine of the flattened tokens; keywords as in `search`. Exact, and so linear in the clips that pass `where`:
        every token is read. An index of tokens would be as large as the tokens, for a question asked by people.
        """
        choosing.check_tokens(part)
        return self._answer(part, tokens, k, Choice(where, exclude_source, minimum_score, distinct, diversity))

    def found(self, part: str, query: NDArray[Any], k: int, choice: Choice) -> list[Found]:
        """Candidates for `k` references, best first, fewer if there are no more: what `search` chooses from."""
        what = "the query embedding" if part == "embedding" else f"the {part} tokens of the query"
        vector = unit(self._layout.array(part, query, what).reshape(-1))
        with self._view() as view:
            if part != "embedding":
                return self._pick_by_tokens(view, part, vector, k, choice)
            if not view.useful and self.readonly and not self._warned:
                _log.warning("%s has no index that fits; it is searched row by row until a writer makes one", self.path)
                self._warned = True
            if view.useful or self.readonly:
                return self._pick(view, vector, k, choice)
        self.refresh()
        with self._view() as view:
            return self._pick(view, vector, k, choice)

    def get(self, ids: Sequence[int]) -> list[Reference]:
        """The clips of these ids, in this order; their score is NaN. Raises MemoryStoreError for an unknown id."""
        with self._transaction() as db:
            return store.references(db, self.path, self._layout, [int(number) for number in ids], [math.nan] * len(ids))

    def refresh(self, threads: int = 1) -> None:
        """Bring the index up to date: made if it is missing or half of it is removed, extended if it lacks many clips.

        Up to 4096 newer clips are left to exact search. Others can search and write meanwhile. A read-only memory takes
        what others stored. threads: more are faster, but then the index depends on their timing.
        """
        with self._view() as view:
            state, base = view.state, view.base
            if self.readonly or state.clips <= self.index_threshold:
                return
            if view.useful and base is not None and state.last - base.last <= DELTA:
                return
        self._index(base if view.useful else None, threads)

    def compact(self, threads: int = 1) -> None:
        """Give back the space of removed clips, and make the index one of exactly the clips that are there."""
        with self._writing() as db:  # also migrates
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
                wrong = store.problems(view.db, self.path, self._layout)
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

    def stats(self) -> MemoryStats:
        """Counts and sizes; see `MemoryStats`."""
        with self._view() as view:
            state, base = view.state, view.base
            datasets = "SELECT value, COUNT(*) FROM tags WHERE key = 'dataset' GROUP BY value ORDER BY value"
            counts = dict(view.db.execute(datasets).fetchall())
        behind = 0 if base is None else state.last - base.last
        index = (
            "not needed" if state.clips <= self.index_threshold else "missing" if base is None
            else f"behind by {behind} clips" if behind else "current"
        )  # fmt: skip
        file = self.path / store.FILE
        size = sum(part.stat().st_size for part in (file, file.with_name(f"{file.name}-wal")) if part.exists())
        stored = derived.stored_bytes(self.path)
        return MemoryStats(state.clips, counts, size, stored, state.generation, self._layout.tokens, index)

    def _answer(self, part: str, query: NDArray[Any], k: int, choice: Choice) -> list[Reference]:
        k = choosing.check_k(k)
        answer = choosing.diverse(self.found(part, query, k, choice), k, choice.diversity)
        if len(answer) < k:
            with self._transaction() as db:
                clips = store.read_state(db, self.path).clips
                if clips == 0 or not choice.may_be_short:
                    raise MemoryStoreError(choosing.too_few(db, self.path, clips, k, choice))
        return answer

    def _pick(self, view: _View, query: NDArray[np.float32], k: int, choice: Choice) -> list[Found]:
        condition, parameters = choice.of_row()

        def left(ids: NDArray[np.int64], vectors: NDArray[np.float32] | None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
            """Those of the clips that are there and pass the filters, and their unit vectors."""
            if len(ids) and (condition or gone):
                question = f"SELECT v.id FROM vectors v WHERE v.id IN ({store.marks(ids)}){condition}"
                there = {row[0] for row in view.db.execute(question, (*ids.tolist(), *parameters))}
                keep = np.array([number in there for number in ids.tolist()])
                ids, vectors = ids[keep], None if vectors is None else vectors[keep]
            return ids, vectors_of(ids.tolist()) if vectors is None else vectors

        def vectors_of(ids: list[int]) -> NDArray[np.float32]:
            question = f"SELECT id, embedding FROM vectors WHERE id IN ({store.marks(ids)})"
            found = dict(view.db.execute(question, ids).fetchall())
            return self._layout.unpack("embedding", ids, [found[number] for number in ids])

        def ranked(want: int) -> Ranked:
            fetch = want + 8  # the index rounds vectors: its order is right to within a few places
            while not few and fetch <= choosing.FETCH and (base is None or fetch < base.count):
                ids, vectors = left(*self._recent.nearest(query, fetch))
                complete = fetch >= len(self._recent.ids)
                enough = complete or len(ids) >= want
                if base is not None:
                    more, others = left(*base.nearest(query, fetch))
                    enough, complete = enough and len(more) >= want, False
                    ids, vectors = np.concatenate([ids, more]), np.concatenate([vectors, others])
                if enough:
                    return *choosing.in_order(ids, choosing.dots(vectors, query)), complete
                fetch *= 4
            return *choosing.rank_all(view.db, self._layout, "embedding", query, choice), True

        def fetch(ids: NDArray[np.int64], scores: NDArray[np.float32]) -> list[Found]:
            references = store.references(view.db, self.path, self._layout, ids.tolist(), scores.tolist())
            vectors = vectors_of(ids.tolist()) if choice.diversity else repeat(_UNUSED)
            return list(map(Found, references, vectors))

        base, few = view.base, choice.leaves_few(view.db)
        after = 0 if base is None else base.last
        if not few:
            self._recent.update(after, view.state, lambda above: choosing.scan(view.db, self._layout, "embedding", after=above))
        gone = view.state.clips != len(self._recent.ids) + (0 if base is None else base.count)
        return choosing.pick(ranked, fetch, choice, choice.pool(k))

    def _pick_by_tokens(self, view: _View, part: str, query: NDArray[np.float32], k: int, choice: Choice) -> list[Found]:
        ranked = choosing.rank_all(view.db, self._layout, part, query, choice)

        def fetch(ids: NDArray[np.int64], scores: NDArray[np.float32]) -> list[Found]:
            references = store.references(view.db, self.path, self._layout, ids.tolist(), scores.tolist())
            return [Found(item, choosing.directions(getattr(item, part).reshape(1, -1))[0]) for item in references]

        return choosing.pick(lambda want: (*ranked, True), fetch, choice, choice.pool(k))

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
            store.look_like_new(db, self._old)
            state = store.read_state(db, self.path)
            if base is not None and base.file is None:  # it could not be stored, so it cannot be read again
                base = None
            chunks = choosing.scan(db, self._layout, "embedding", after=0 if base is None else base.last)
            made = derived.make_base(self.path, state, chunks, self.dims["embedding"][0], threads, base)
        with self._lock:
            self._base, self._base_known, self._signature = made, True, derived.signature(self.path)
