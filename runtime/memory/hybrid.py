"""A search by vectors and by words: the best clips of either, in the order that both make together."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Set

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.memory import ranking, tags
from motionrt.runtime.memory.ranking import Ranked
from motionrt.runtime.memory.rows import WORD, Layout
from motionrt.runtime.memory.search import POOL, Search
from motionrt.runtime.memory.words import Asked, Vocabulary

_PROPOSE = 4_096  # rows of clips' words that a search reads: of a prompt's rarest words; the others only order what is found
_HELD = 1_000_000  # ids of clips kept with the words that they have, to be read once


class Words:
    """The words of one state of a memory."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._held: dict[str, NDArray[np.int64]] = {}

    def ranked(
        self, db: sqlite3.Connection, layout: Layout, by_vectors: Callable[[int], Ranked],
        vectors_of: Callable[[NDArray[np.int64]], NDArray[np.float32]], query: NDArray[np.float32],
        search: Search, without: Set[int], text: str,
    ) -> Callable[[int], Ranked]:  # fmt: skip
        """What ranks the clips that pass the filters, but for those `without`, by the cosine and the words' share.

        Of the best `POOL` by vectors (`by_vectors` ranks them) and as many by words. vectors_of: unit vectors [n,E] of clips
        that are there, by ids [n] rising. Damaged; DamagedRow.
        """
        asked = Asked(text, self.vocabulary)
        proposed, sums = self._propose(db, asked)

        def ranked(want: int) -> Ranked:
            best = by_vectors(want := max(want, POOL))
            known = {*best.ids.tolist()}
            if search.filters or without:
                left_out = known | without
                more = [number for number in _first(proposed, sums, len(proposed)) if number not in left_out]
                passing = tags.passing(db, search, more, without)
                more = [number for number in more if number in passing]
            else:
                more = [number for number in _first(proposed, sums, want + len(known)) if number not in known]
            some = np.array(sorted(more[:want]), np.int64)
            ids = np.concatenate([best.ids, some])
            scores = np.concatenate([best.scores, ranking.dots(vectors_of(some), query)])
            told = tags.told(db, ids.tolist())
            shares = asked.shares([told[number][0] for number in ids.tolist()])
            order = np.lexsort((ids, -(scores + np.float32(search.words or 0) * shares)))
            ids, scores, shares = ids[order], scores[order], shares[order]
            return Ranked(ids, scores, best.complete, shares, layout.probability(scores, shares), told)

        return ranked

    def _propose(self, db: sqlite3.Connection, asked: Asked) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ids, rising, of clips whose captions have the rarest of the words, and what these weigh together."""
        rows, found, weights = 0, list[NDArray[np.int64]](), list[NDArray[np.float64]]()
        for often, term in sorted((often, term) for term, often in asked.often.items()):
            rows += often
            if rows > _PROPOSE:
                break
            if asked.weights[term] > 0:
                found.append(self._having(db, term, asked.words[term]))
                weights.append(np.full(len(found[-1]), asked.weights[term]))
        if not found:
            return np.empty(0, np.int64), np.empty(0)
        ids, values = np.concatenate(found), np.concatenate(weights)
        order = np.argsort(ids, kind="stable")
        ids, values = ids[order], values[order]
        starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
        return ids[starts], np.add.reduceat(values, starts)

    def _having(self, db: sqlite3.Connection, term: str, words: list[str]) -> NDArray[np.int64]:
        if term not in self._held:
            ids = np.array(sorted({number for word in words for number in tags.having(db, WORD, word)}), np.int64)
            if sum(map(len, self._held.values())) + len(ids) > _HELD:
                self._held.clear()
            self._held[term] = ids
        return self._held[term]


def _first(ids: NDArray[np.int64], sums: NDArray[np.float64], count: int) -> list[int]:
    """The `count` of ids [n], rising, that have the largest sums [n], largest first, equal ones by id."""
    if count < len(ids):
        least = np.partition(sums, len(sums) - count)[len(sums) - count]
        some = np.flatnonzero(sums > least)
        some = np.concatenate([some, np.flatnonzero(sums == least)[: count - len(some)]])
        ids, sums = ids[some], sums[some]
    found: list[int] = ids[np.lexsort((ids, -sums))].tolist()
    return found
