"""Choosing clips: exact scans, near-duplicates left out, and re-ranking for diversity."""

from __future__ import annotations

import math
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.arguments import LAST_ID, instance, text_of, whole
from motionrt.runtime.errors import InputError, MemoryStoreError
from motionrt.runtime.memory import tags
from motionrt.runtime.memory.rows import Damaged, DamagedRow, Layout, Reference, reference
from motionrt.runtime.memory.search import EVERYTHING, Search, marks

CHUNK = 4096  # rows read and scored at once by a scan
FETCH = 16_000  # clips that an index is asked for at most; beyond, an exact scan is. Twice that are values of one statement
LOOK = 4096  # best clips among which `distinct` looks for clips that are no copies

_UNLIKE = 0.0  # agreement below which a clip moves unlike the others
_SHARPNESS = 10.0  # a candidate that ranks 0.1 lower has 1/e of the say in what the others should move like


class Ranked(NamedTuple):
    """Clips, best first: ids, cosines, whether these are all; where words were looked at, their shares, and probabilities.

    told: what the clips say of themselves, where it was read (`tags.told`).
    """

    ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    complete: bool
    words: NDArray[np.float32] | None = None
    chances: NDArray[np.float64] | None = None
    told: Mapping[int, tuple[Any, ...]] | None = None

    def some(self, which: Any) -> Ranked:
        """Those of a slice or a mask."""
        words, chances = (None if values is None else values[which] for values in (self.words, self.chances))
        return Ranked(self.ids[which], self.scores[which], self.complete, words, chances, self.told)


class Found(NamedTuple):
    """A clip that may be chosen: the reference.

    vector: where diversity counts, its unit vector in the space that was searched. motion: where agreement counts, the unit
    vector of its motion about the memory's mean; agreement, unlike: as of `Reference`.
    """

    reference: Reference
    vector: NDArray[np.float32] | None
    motion: NDArray[np.float32] | None = None
    agreement: float = math.nan
    unlike: int = 0


def relevance(found: Found, search: Search) -> float:
    """What candidates are ordered by: the cosine, and words and agreement with their weights."""
    words, agreement, more = found.reference.words, found.agreement, 0.0
    if search.words and not math.isnan(words):
        more += search.words * words
    if search.agreement and not math.isnan(agreement):
        more += search.agreement * agreement
    return found.reference.score + more


class Searchable:
    """Something that has clips and can be asked for the nearest ones."""

    def __len__(self) -> int:
        raise NotImplementedError

    def found(self, part: str | None, query: NDArray[Any], k: int, search: Search, text: str | None = None) -> list[Found]:
        """Candidates for `k` references, best first, fewer if there are no more: what `search` (part None) chooses from."""
        raise NotImplementedError

    def search(
        self, embedding: NDArray[Any], k: int, search: Search = EVERYTHING, text: str | None = None,
        still: tuple[str, NDArray[Any]] | None = None,
    ) -> list[Reference]:  # fmt: skip
        """The `k` clips whose captions are nearest to `embedding` [E] by cosine, nearest first, equal ones by id.

        text: what `embedding` was made of. With it, the order is by the cosine, the words that captions share with the text
        (`words.Asked`) and the agreement of the clips' motion, weighted as `search` says; and a clip that has several captions
        comes once, with the best of them, as long as there are others. still: for `search.looks`, a float part of records and
        what it is of the still. MemoryStoreError if fewer than `k` clips are there (unless `search` may be short); InputError.
        """
        instance("search", search, Search, "a Search(...)")
        if search.looks and still is None:
            raise InputError("looks is on, and there is no still to compare clips with; give one, or leave it off.")
        return self._answer(None, embedding, k, search, text, still if search.looks else None)

    def search_record(self, part: str, array: NDArray[Any], k: int, search: Search = EVERYTHING) -> list[Reference]:
        """The `k` clips whose float part `part` of the record is nearest to `array`, of the part's dims.

        By cosine of the flattened arrays. Exact, and so linear in the clips that pass `search.where`: every record is read.
        An index of them would be as large as they are, for a question asked by people.
        """
        instance("search", search, Search, "a Search(...)")
        return self._answer(part, array, k, search)

    def _answer(
        self, part: str | None, query: NDArray[Any], k: int, search: Search, text: str | None = None,
        still: tuple[str, NDArray[Any]] | None = None,
    ) -> list[Reference]:  # fmt: skip
        k = whole("the number of references", k, 1, LAST_ID)
        if text is not None:
            text_of("the text of a search", text)
            search = search.with_text()
        pool, again, want = self.found(part, query, k, search, text), list[Found](), k
        while text is not None:
            every, (pool, again) = len(pool), _once(pool)
            if len(pool) >= k or every < search.pool(want):
                break
            want *= 4
            pool = self.found(part, query, want, search, text)
        pool = agreeing(pool, search)
        answer = diverse(pool, k, search) if still is None else looking_like(pool, k, *still)
        answer += map(_told, again[: k - len(answer)])
        if len(answer) < k and (not search.may_be_short or not len(self)):
            raise MemoryStoreError(f"{k} references were asked for; {self._too_few(len(answer), search)}.")
        return answer

    def _too_few(self, found: int, search: Search) -> str:
        """Why there are no more than `found` clips to give, and what to do."""
        raise NotImplementedError


def scan(
    db: sqlite3.Connection,
    layout: Layout,
    part: str | None = None,
    *,
    after: int = 0,
    ids: Sequence[int] | None = None,
    wrong: dict[int, str] | None = None,
    raw: bool = False,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Ids [n] rising and unit vectors [n,·] of clips, in chunks: embeddings, or a flattened float part of the record.

    Of the clips with ids above `after`, or of `ids` (rising). Each row is checked, and that none is missing: those that are
    damaged go to `wrong`, by id with why, or are a DamagedRow without it; Damaged if it is more than rows. Parts that are all
    zeros keep length 0. raw: parts as they are, of any length.
    """
    table, column = ("vectors", "embedding") if part is None else ("records", "record")
    bytes_, bad, have = 4 * layout.embedding if part is None else layout.dtype.itemsize, dict[int, str](), list[int]()
    last = after
    for chunk in _rows(db, table, column, after, ids):
        have += [row[0] for row in chunk]
        sound = []
        for number, blob, expected in chunk:
            if not isinstance(blob, bytes) or len(blob) != bytes_:
                bad[number] = f"has {len(blob) if isinstance(blob, bytes) else 0} bytes of {column}"
            elif zlib.crc32(blob, number & 0xFFFFFFFF) != expected:  # `rows.checksum`, without the call
                bad[number] = f"is not what was written: the checksum of its {column} differs"
            elif number <= last:  # a page in the place of another, whose rows are sound
                raise Damaged(f"the rows of {table} are not in their order")
            else:
                sound.append((number, blob))
                last = number
        if sound:
            numbers, blobs = zip(*sound, strict=True)
            values = layout.embeddings(numbers, blobs) if part is None else layout.unpack(numbers, blobs, part)[part]
            if part is not None:
                values = values.reshape(len(values), -1) if raw else directions(values)
            yield np.array(numbers, np.int64), values
    if ids is not None:
        there = len(ids)
    elif after:
        there = db.execute("SELECT COUNT(*) FROM clips WHERE id > ?", (after,)).fetchone()[0]
    else:
        there = db.execute("SELECT clips FROM history ORDER BY generation DESC LIMIT 1").fetchone()[0]
    if len(have) != there or bad:  # a page that is damaged may give rows of other ids
        known = set(ids if ids is not None else [row[0] for row in db.execute("SELECT id FROM clips WHERE id > ?", (after,))])
        if ids is None and not after and len(known) != there:
            raise Damaged(f"clips has {len(known)} rows; the history says {there}")
        bad |= dict.fromkeys(known.difference(have), f"has no {column}")
        bad |= dict.fromkeys({*have} - known if ids is None else (), "has no caption")
    if bad and wrong is None:
        raise DamagedRow(bad)
    if wrong is not None:
        wrong.update(bad)


def _rows(
    db: sqlite3.Connection, table: str, column: str, after: int, ids: Sequence[int] | None
) -> Iterator[list[tuple[int, Any, Any]]]:
    """Chunks of (id, blob, checksum) of a table, by rising id."""
    if ids is None:
        rows = db.execute(f"SELECT id, {column}, checksum FROM {table} WHERE id > ? ORDER BY id", (after,))
        while chunk := rows.fetchmany(CHUNK):
            yield chunk
        return
    for at in range(0, len(ids), CHUNK):
        some = ids[at : at + CHUNK]
        yield db.execute(f"SELECT id, {column}, checksum FROM {table} WHERE id IN ({marks(some)}) ORDER BY id", some).fetchall()


def rank_all(
    db: sqlite3.Connection,
    layout: Layout,
    part: str | None,
    query: NDArray[np.float32],
    search: Search,
    without: Set[int] = frozenset(),
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids and scores of every clip that the filters leave, best first, equal ones by id; DamagedRow.

    without: ids that are left out, whatever their rows are.
    """
    gone = without | tags.excluded(db, search, without)
    ids = [number for number in tags.tagged(db, search) if number not in gone] if search.where else None
    wrong: dict[int, str] = {}
    scored = [(some, dots(vectors, query)) for some, vectors in scan(db, layout, part, ids=ids, wrong=wrong)]
    if wrong := {number: why for number, why in wrong.items() if number not in gone}:
        raise DamagedRow(wrong)
    if not scored:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    found, scores = (np.concatenate(some) for some in zip(*scored, strict=True))
    keep = ~np.isin(found, np.fromiter(gone, np.int64, len(gone)))
    return in_order(found[keep], scores[keep])


def in_order(ids: NDArray[np.int64], scores: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Best first, equal ones by id."""
    order = np.lexsort((ids, -scores))
    return ids[order], scores[order]


def pick(
    ranked: Callable[[int], Ranked],
    fetch: Callable[[Ranked], list[Found]],
    search: Search,
    need: int,
    compared: str,
) -> list[Found]:
    """The best `need` clips above the minimum score, without near-copies of better ones.

    ranked(n): at least the best n; fetch: the clips of some of them; compared: the part of the record in
    which copies are alike.
    """
    want = need
    while True:
        best = ranked(want)
        complete = best.complete
        if search.minimum_score is not None:
            keep = best.scores >= search.minimum_score - 1e-6  # rounding of float32
            complete |= not keep.all()
            best = best.some(keep)
        if search.minimum_probability and best.chances is not None:
            keep = best.chances >= search.minimum_probability
            complete |= not keep.all()
            best = best.some(keep)
        if search.distinct is None:
            return fetch(best.some(np.s_[:need]))
        chosen: list[Found] = []
        kept: list[NDArray[np.float32]] = []
        for start in range(0, min(len(best.ids), max(LOOK, need)), 64):
            for found in fetch(best.some(np.s_[start : start + 64])):
                direction = directions(found.reference.record[compared][None])[0]
                if all(float(direction @ other) <= search.distinct for other in kept):
                    chosen, kept = [*chosen, found], [*kept, direction]
                if len(chosen) == need:
                    return chosen
        if complete or want >= LOOK:
            return chosen
        want = min(4 * want, LOOK)


def agreeing(pool: Sequence[Found], search: Search) -> list[Found]:
    """A pool with each clip's agreement, in the order that it makes: who moves unlike the others comes later.

    The mean cosine with the other clips' motion, weighted by how they rank themselves.
    """
    motions = [found.motion for found in pool if found.motion is not None]
    if not search.agreement or len(motions) < len(pool) or len(pool) < 2:
        return list(pool)
    ranks = np.array([relevance(found, search) for found in pool])
    say = np.exp(_SHARPNESS * (ranks - ranks.max()))
    vectors = np.array(motions, np.float64)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, 0)
    others = say.sum() - say
    agreement = cosines @ say / np.where(others > 0, others, 1)
    order = np.argsort(-(ranks + search.agreement * agreement), kind="stable")
    ranks, agreement = ranks[order], agreement[order]
    behind, unlike = np.zeros(len(pool), np.int64), agreement < _UNLIKE
    if unlike.any():
        later = ~np.tri(len(pool), dtype=bool)
        behind = (later & (ranks >= ranks[:, None] - 1e-6) & unlike).sum(axis=1)
    return [
        pool[at]._replace(agreement=own, unlike=after)
        for at, own, after in zip(order.tolist(), agreement.tolist(), behind.tolist(), strict=True)
    ]


def diverse(pool: Sequence[Found], k: int, search: Search) -> list[Reference]:
    """`k` of a pool by maximal marginal relevance: (1 - d) relevance - d (largest cosine with those chosen before).

    Carbonell and Goldstein, "The use of MMR", SIGIR 1998, with lambda = 1 - d. Without `search.diversity` the first `k`.
    """
    diversity = search.diversity
    if not diversity or not pool:
        return list(map(_told, pool[:k]))
    vectors = np.array([found.vector for found in pool])
    ranks = np.array([relevance(found, search) for found in pool])
    nearest, chosen = np.zeros(len(pool)), list[int]()
    while len(chosen) < min(k, len(pool)):
        gain = (1 - diversity) * ranks - diversity * nearest
        gain[chosen] = -math.inf
        chosen.append(int(np.argmax(gain)))
        cosines = vectors @ vectors[chosen[-1]]
        nearest = cosines if len(chosen) == 1 else np.maximum(nearest, cosines)
    return [_told(pool[index]) for index in chosen]


def _once(pool: Sequence[Found]) -> tuple[list[Found], list[Found]]:
    """A pool's clips by their best caption, and what it has of them under others."""
    seen, first, again = set[object](), list[Found](), list[Found]()
    for found in pool:
        one = found.reference
        clip = (one.memory, one.source_sha256, one.start) if one.source_sha256 else (one.memory, one.id)
        (again if clip in seen else first).append(found)
        seen.add(clip)
    return first, again


def looking_like(pool: Sequence[Found], k: int, part: str, still: NDArray[Any]) -> list[Reference]:
    """The `k` of a pool whose `part` of the record is nearest to the still's by cosine, nearest first, equal ones in order."""
    if not pool:
        return []
    wanted = directions(np.asarray(still, np.float32)[None])[0]
    cosines = dots(directions(np.stack([found.reference.record[part] for found in pool])), wanted)
    best = np.argsort(-cosines, kind="stable")[:k]
    return [replace(_told(pool[index]), looks=float(cosines[index])) for index in best]


def _told(found: Found) -> Reference:
    if math.isnan(found.agreement):
        return found.reference
    return reference(vars(found.reference), agreement=found.agreement, unlike=found.unlike)


def directions(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows [n,...] flattened and divided by their length; zero rows stay zero."""
    vectors = values.reshape(len(values), -1)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norm > 0, norm, 1), np.float32)


def dots(vectors: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """Dot products [n], row by row, so that equal rows score equal whatever stands beside them (a matrix product's may not)."""
    return np.asarray(np.vecdot(vectors, query), np.float32)
