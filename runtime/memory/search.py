"""Choosing clips: filters as SQL, exact scans, near-duplicates left out, and re-ranking for diversity."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.errors import InputError
from motionrt.runtime.memory.rows import Layout, Reference
from motionrt.runtime.memory.store import marks

CHUNK = 4096  # rows read and scored at once by a scan
FEW = 4096  # clips that a filter may leave for an exact scan of them to be the cheapest way
FETCH = 16_000  # clips that an index is asked for at most; beyond, an exact scan is. Twice that are values of one statement
LOOK = 4096  # best clips among which `distinct` looks for clips that are no copies

Where = Mapping[str, str | Sequence[str]]
Ranked = tuple[NDArray[np.int64], NDArray[np.float32], bool]  # ids, scores falling; whether these are all


@dataclass(frozen=True)
class Choice:
    """What a search leaves out and how it orders; see `MotionMemory.search`. InputError for what is not allowed."""

    where: Where | None = None
    exclude_source: str | None = None
    minimum_score: float | None = None
    distinct: float | None = None
    diversity: float | None = None

    def __post_init__(self) -> None:
        for name, low in (("minimum_score", -1), ("distinct", -1), ("diversity", 0)):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and low <= value <= 1):
                raise InputError(f"{name} is {value!r}; allowed is a number from {low} to 1, or None.")
        if self.where is not None:
            check_where(self.where)

    @property
    def may_be_short(self) -> bool:
        """Whether fewer clips than were asked for are an answer."""
        return self.minimum_score is not None or self.distinct is not None

    def pool(self, k: int) -> int:
        """How many of the best clips are needed for choosing `k`."""
        return 4 * k + 16 if self.diversity else k

    def of_row(self) -> tuple[str, list[str]]:
        """Conditions on one row `v`, for a candidate: looked up by its id."""
        return self._sql("EXISTS (SELECT 1 FROM tags t WHERE t.key = ? AND t.value IN ({}) AND t.id = v.id)")

    def of_scan(self) -> tuple[str, list[str]]:
        """Conditions on rows `v`, for a scan: the range of the tags leads."""
        return self._sql("v.id IN (SELECT id FROM tags WHERE key = ? AND value IN ({}))")

    def leaves_few(self, db: sqlite3.Connection) -> bool:
        """Whether `where` leaves so few clips that scanning them is cheapest; reads no more than that many tags."""
        for key, values in tags_of(self.where):
            question = f"SELECT COUNT(*) FROM (SELECT 1 FROM tags WHERE key = ? AND value IN ({marks(values)}) LIMIT ?)"
            if db.execute(question, (key, *values, FEW + 1)).fetchone()[0] <= FEW:
                return True
        return False

    def _sql(self, tag: str) -> tuple[str, list[str]]:
        sql, parameters = "", []
        for key, values in tags_of(self.where):
            sql += " AND " + tag.format(marks(values))
            parameters += [key, *values]
        if self.exclude_source is not None:
            sql += " AND NOT EXISTS (SELECT 1 FROM clips c WHERE c.id = v.id AND c.source = ?)"
            parameters += [self.exclude_source]
        return sql, parameters


class Found(NamedTuple):
    """A clip that may be chosen: the reference, and its unit vector in the space that was searched."""

    reference: Reference
    vector: NDArray[np.float32]


def check_where(where: Where) -> None:
    """InputError unless keys are text and values text or lists of text."""
    try:
        texts = [[key, *values] for key, values in tags_of(where)]
    except TypeError:
        texts = [[]]
    if not isinstance(where, Mapping) or not all(len(t) > 1 and all(isinstance(x, str) for x in t) for t in texts):
        raise InputError(f'where is {where!r}; allowed is {{"dataset": "name", "a metadata key": ["one", "or other"]}}.')


def tags_of(where: Where | None) -> list[tuple[str, list[str]]]:
    """Each key with the list of the values that it may have."""
    if not isinstance(where, Mapping):
        return []
    return [(key, [values] if isinstance(values, str) else list(values)) for key, values in where.items()]


def scan(
    db: sqlite3.Connection, layout: Layout, part: str, choice: Choice | None = None, after: int = 0
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Ids [n] rising and flattened unit vectors [n,·] of one part of the clips after an id, in chunks.

    Tokens that are all zeros have no direction and keep length 0.
    """
    table = "vectors" if part == "embedding" else "tokens"
    condition, parameters = choice.of_scan() if choice is not None else ("", [])
    lead = "+" if choice is not None and choice.where else ""  # keeps SQLite from walking all ids instead of the tags
    rows = db.execute(
        f"SELECT v.id, v.{part} FROM {table} v WHERE {lead}v.id > ?{condition} ORDER BY v.id", (after, *parameters)
    )
    while chunk := rows.fetchmany(CHUNK):
        ids = [row[0] for row in chunk]
        vectors = layout.unpack(part, ids, [row[1] for row in chunk]).reshape(len(ids), -1)
        yield np.array(ids, np.int64), vectors if part == "embedding" else directions(vectors)


def rank_all(
    db: sqlite3.Connection, layout: Layout, part: str, query: NDArray[np.float32], choice: Choice
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids and scores of every clip that the filters leave, best first, equal ones by id."""
    scored = [(ids, dots(vectors, query)) for ids, vectors in scan(db, layout, part, choice)]
    if not scored:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    return in_order(np.concatenate([ids for ids, _ in scored]), np.concatenate([scores for _, scores in scored]))


def in_order(ids: NDArray[np.int64], scores: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Best first, equal ones by id."""
    order = np.lexsort((ids, -scores))
    return ids[order], scores[order]


def pick(
    ranked: Callable[[int], Ranked],
    fetch: Callable[[NDArray[np.int64], NDArray[np.float32]], list[Found]],
    choice: Choice,
    need: int,
) -> list[Found]:
    """The best `need` clips above the minimum score, without near-copies of better ones.

    ranked(n): at least the best n ids and scores; fetch: the clips of some of them.
    """
    want = need
    while True:
        ids, scores, complete = ranked(want)
        if choice.minimum_score is not None:
            keep = scores >= choice.minimum_score - 1e-6  # rounding of float32
            complete |= not keep.all()
            ids, scores = ids[keep], scores[keep]
        if choice.distinct is None:
            return fetch(ids[:need], scores[:need])
        chosen: list[Found] = []
        motions: list[NDArray[np.float32]] = []
        for start in range(0, min(len(ids), max(LOOK, need)), 64):
            for found in fetch(ids[start : start + 64], scores[start : start + 64]):
                motion = directions(found.reference.motion.reshape(1, -1))[0]
                if all(float(motion @ other) <= choice.distinct for other in motions):
                    chosen, motions = [*chosen, found], [*motions, motion]
                if len(chosen) == need:
                    return chosen
        if complete or want >= LOOK:
            return chosen
        want = min(4 * want, LOOK)


def diverse(pool: Sequence[Found], k: int, diversity: float | None) -> list[Reference]:
    """`k` of a pool by maximal marginal relevance: (1 - d) score - d (largest cosine with those chosen before).

    Carbonell and Goldstein, "The use of MMR", SIGIR 1998, with lambda = 1 - d. Without `diversity` the first `k`.
    """
    if not diversity or not pool:
        return [found.reference for found in pool[:k]]
    vectors = np.stack([found.vector for found in pool])
    relevance = np.array([found.reference.score for found in pool])
    nearest, chosen = np.zeros(len(pool)), list[int]()
    while len(chosen) < min(k, len(pool)):
        gain = (1 - diversity) * relevance - diversity * nearest
        gain[chosen] = -math.inf
        chosen.append(int(np.argmax(gain)))
        cosines = vectors @ vectors[chosen[-1]]
        nearest = cosines if len(chosen) == 1 else np.maximum(nearest, cosines)
    return [pool[index].reference for index in chosen]


def too_few(db: sqlite3.Connection, path: Path, clips: int, k: int, choice: Choice) -> str:
    """Why there are no `k` clips to give."""
    text = f"{k} references were asked for; the motion memory {path} holds {clips or 'no'} clips"
    if choice.exclude_source is not None and clips:
        count = db.execute("SELECT COUNT(*) FROM clips WHERE source = ?", (choice.exclude_source,)).fetchone()[0]
        text += f", {count} of them from the excluded {choice.exclude_source}"
    if choice.where and clips:
        sql, parameters = Choice(where=choice.where).of_scan()
        count = db.execute(f"SELECT COUNT(*) FROM clips v WHERE 1{sql}", parameters).fetchone()[0]
        text += f", {count} of them with {dict(choice.where)}"
    return f"{text}. Ask for fewer, or add clips: `motionrt memory add {path} clip.mp4`."


def check_k(k: object) -> int:
    """`k` as an int; InputError if it is no whole number from 1 on."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise InputError(f"the number of references is {k!r}; allowed is a whole number from 1 on.")
    return int(k)


def check_tokens(part: str) -> None:
    """InputError unless `part` names the tokens of a clip."""
    if part not in ("motion", "appearance"):
        raise InputError(f"the tokens to search by are {part!r}; allowed is 'motion' or 'appearance'.")


def directions(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows [n,·] divided by their length; zero rows stay zero."""
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norm > 0, norm, 1), np.float32)


def dots(vectors: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """Dot products [n], row by row, so that equal rows score equal whatever stands beside them (a matrix product's may not)."""
    return np.asarray(np.vecdot(vectors, query), np.float32)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(float(value))
