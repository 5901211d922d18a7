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
        self, db: sqlite3.Connection, layout: Layout, by_vectors: Callable[[int], Ranked], query: NDArray[np.float32],
        search: Search, without: Set[int], text: str,
    ) -> Callable[[int], Ranked]:  # fmt: skip
        """What ranks the clips that pass the filters, but for those `without`, by the cosine and the words' share.

        Of the best `POOL` by vectors (`by_vectors` ranks them) and as many by words. Damaged; DamagedRow.
        """
        asked = Asked(text, self.vocabulary)
        proposed = self._propose(db, asked)

        def ranked(want: int) -> Ranked:
            best = by_vectors(max(want, POOL))
            more = proposed[~np.isin(proposed, best.ids)]
            if search.filters or without:
                passing = tags.passing(db, search, [number for number in more.tolist() if number not in without], without)
                more = np.array([number for number in more.tolist() if number in passing], np.int64)
            more = np.sort(more[: max(want, POOL)])
            scored = [(some, ranking.dots(vectors, query)) for some, vectors in ranking.scan(db, layout, ids=more.tolist())]
            ids, scores = (np.concatenate(parts) for parts in zip((best.ids, best.scores), *scored, strict=True))
            shares = asked.shares(tags.captions(db, ids.tolist()))
            order = np.lexsort((ids, -(scores + np.float32(search.words or 0) * shares)))
            ids, scores, shares = ids[order], scores[order], shares[order]
            return Ranked(ids, scores, best.complete, shares, layout.probability(scores, shares))

        return ranked

    def _propose(self, db: sqlite3.Connection, asked: Asked) -> NDArray[np.int64]:
        """Ids of clips whose captions have the rarest of the words, most of them first, equal ones by id."""
        counts, rows, found, weights = self.vocabulary.counts, 0, list[NDArray[np.int64]](), list[NDArray[np.float64]]()
        often = {term: sum(counts[word] for word in words) for term, words in asked.words.items()}
        for term in sorted(often, key=lambda term: (often[term], term)):
            rows += often[term]
            if rows > _PROPOSE:
                break
            if asked.weights.get(term, 0) > 0:
                found.append(self._having(db, term, asked.words[term]))
                weights.append(np.full(len(found[-1]), asked.weights[term]))
        if not found:
            return np.empty(0, np.int64)
        ids, values = np.concatenate(found), np.concatenate(weights)
        order = np.argsort(ids, kind="stable")
        ids, values = ids[order], values[order]
        starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
        ids, sums = ids[starts], np.add.reduceat(values, starts)
        return np.asarray(ids[np.lexsort((ids, -sums))])

    def _having(self, db: sqlite3.Connection, term: str, words: list[str]) -> NDArray[np.int64]:
        if term not in self._held:
            ids = np.array(sorted({number for word in words for number in tags.having(db, WORD, word)}), np.int64)
            if sum(map(len, self._held.values())) + len(ids) > _HELD:
                self._held.clear()
            self._held[term] = ids
        return self._held[term]
